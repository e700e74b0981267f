"""What happens to a Trainer's arguments before the Trainer is built. Reads no row of the data."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dpsb.adapter import Basis, lora_layers
from dpsb.basis.data_free import DATA_FREE
from dpsb.layers import CoreUp
from dpsb.models import add_lora, in_head
from dpsb.trainer.arguments import PrivacyArguments
from dpsb.trainer.refusals import TrainerArgumentError


def by_name(constructor: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the Trainer's constructor by name."""
    signature = inspect.signature(constructor)
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in signature.parameters.values()):
        if args:
            raise TrainerArgumentError("Give the Trainer's arguments by name: its constructor hides what is what.")
        return dict(kwargs)
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    return given


def check_evaluation(private: Sequence[Any], evaluation: Any) -> None:
    """Refuses to evaluate on the training data: its loss would be published without noise.

    Args:
      private: The training data, as given and as prepared.
      evaluation: A data set, several by name, or None.

    Raises:
      TrainerArgumentError: If one of them is the training data itself. (Some of its rows in another data set go
        unseen.)
    """
    sets = list(evaluation.values()) if isinstance(evaluation, dict) else [evaluation]
    for data in sets:
        mark = getattr(data, "_fingerprint", None)
        for mine in private:
            if mine is None or data is None:
                continue
            if data is mine or (mark is not None and mark == getattr(mine, "_fingerprint", None)):
                raise TrainerArgumentError(
                    "The data set to evaluate on is the training data: its loss would be told without noise. Give "
                    "held-out rows."
                )


def with_own_arithmetic(args: Any) -> Any:
    """A copy of the arguments without autocast, which evaluation would otherwise switch on in the middle of a run.

    Nor is the loss of an evaluation by several processes multiplied by their number, as the Trainer does for models
    that seem to know how many tokens all of them have. Nor does TRL tokenize in processes of its own: what they log of
    a row gets past the guard of this one's loggers.
    """
    args = copy.copy(args)
    args.bf16 = False
    args.average_tokens_across_devices = False
    if hasattr(args, "mixed_precision"):
        args.mixed_precision = "no"
    if hasattr(args, "dataset_num_proc"):
        args.dataset_num_proc = None
    return args


def give_adapter(given: dict[str, Any], privacy: PrivacyArguments, takes_config: bool) -> None:
    """Puts a new LoRA adapter of ``privacy.rank`` on a model that has none, or lets TRL do so."""
    model = given.get("model")
    adapted = hasattr(model, "peft_config") or given.get("peft_config") is not None
    if privacy.rank is None:
        return
    if adapted:
        raise TrainerArgumentError(
            f"rank={privacy.rank!r} is for a model without an adapter, and this one has one; leave rank out."
        )
    if takes_config:
        from peft import LoraConfig

        given["peft_config"] = LoraConfig(
            r=privacy.rank,
            lora_alpha=privacy.rank,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    elif isinstance(model, nn.Module):
        task = "classification" if getattr(model, "num_labels", 0) and _has_head(model) else "causal-lm"
        given["model"] = add_lora(model, task, privacy.rank)


def is_trained(model: nn.Module) -> bool:
    """Whether the model has cores that steps have moved: its head then holds what those steps released."""
    return any(isinstance(module, CoreUp) and bool(module.core.weight.any()) for module in model.modules())


def _has_head(model: nn.Module) -> bool:
    return any(in_head(name) for name, _ in model.named_modules())


def basis_of(model: nn.Module, privacy: PrivacyArguments, given: Basis | None) -> Basis:
    """The basis that the Trainer was given, or the data-free one that the arguments name.

    Raises:
      TrainerArgumentError: If the given one is neither data-free nor public: nothing here would pay for it.
    """
    if given is None:
        lora_layers(model)
        return DATA_FREE[privacy.basis](model)
    if not isinstance(given, Basis) or given.provenance.access not in ("data_free", "public"):
        access = given.provenance.access if isinstance(given, Basis) else type(given).__name__
        raise TrainerArgumentError(
            f"Expected basis to be a Basis with access 'data_free' or 'public', got {access!r}: `dpsb train` charges "
            "for one that reads private data."
        )
    return given
