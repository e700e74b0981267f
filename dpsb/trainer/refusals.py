"""Which of a Trainer's arguments private training refuses or ignores, and why: a table, and one function that reads it.

Everything is looked at before the Trainer is built, so before any row of the data has been read.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("dpsb.trainer")


class TrainerArgumentError(ValueError):
    """An argument of the Trainer does not go with private training; the message names it and says why."""


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    Args:
      name: The argument, method or environment variable.
      place: ``"args"`` (TrainingArguments or SFTConfig), ``"trainer"`` (the constructor), ``"class"`` (a method that
        some class overrides; the value is that class) or ``"environment"``.
      harmless: Whether a value needs no word.
      reason: Why, and what to do instead.
      ignored: Ignored with a warning instead of refused.
    """

    name: str
    place: str
    harmless: Callable[[Any], bool]
    reason: str
    ignored: bool = False


def _off(value: Any) -> bool:
    return not value


def _one_of(*allowed: Any) -> Callable[[Any], bool]:
    return lambda value: value in allowed


def _alone(value: Any) -> bool:
    return value <= 1


_OUR_OWN = ("transformers.trainer", "trl.trainer.sft_trainer", "trl.trainer.base_trainer")


def _of_the_library(definer: type) -> bool:
    return definer.__module__ in _OUR_OWN or definer.__module__.startswith("dpsb.")


def _plain_data(value: Any) -> bool:
    kinds = {kind.__name__ for kind in type(value).__mro__}
    return value is None or ("IterableDataset" not in kinds and hasattr(value, "__getitem__"))


_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
_COLLATORS = (
    "DataCollatorWithPadding",
    "DataCollatorForLanguageModeling",
    "default_data_collator",
    "DefaultDataCollator",
)


def _known_collator(value: Any) -> bool:
    if value is None:
        return True
    kind = value if callable(value) and hasattr(value, "__name__") else type(value)
    known = kind.__name__ in _COLLATORS and kind.__module__.split(".")[0] in ("transformers", "trl")
    return known and not getattr(value, "mlm", False) and not getattr(value, "padding_free", False)


REFUSED = (
    Rule("packing", "args", _off, "it puts several examples into one row, so clipping a row bounds no example"),
    Rule("padding_free", "args", _off, "it joins a batch into one sequence, so no row belongs to one example"),
    Rule("eval_packing", "args", _off, "packed evaluation rows are not what dpsb's losses and reports speak of"),
    Rule(
        "loss_type",
        "args",
        _one_of("nll", "chunked_nll", None, "ForCausalLMLoss"),
        "the loss is the mean over each example's own tokens; override per_example_loss for another",
    ),
    Rule(
        "label_smoothing_factor",
        "args",
        _off,
        "Trainer's smoothed loss is a mean over the tokens of the whole batch; override per_example_loss",
    ),
    Rule(
        "router_aux_loss_coef",
        "args",
        _off,
        "the balancing loss of a mixture of experts is a function of the whole batch",
    ),
    Rule("use_liger_kernel", "args", _off, "its fused losses return one number for the batch, none per example"),
    Rule(
        "group_by_length",
        "args",
        _off,
        "examples are drawn by Poisson sampling, which the accounting is about; microbatches are by length anyway",
    ),
    Rule(
        "train_sampling_strategy",
        "args",
        _one_of("random", None),
        "examples are drawn by Poisson sampling, which the accounting is about; microbatches are by length anyway",
    ),
    Rule(
        "auto_find_batch_size",
        "args",
        _off,
        "it starts training anew when memory runs out, over steps that are charged; token_budget bounds memory, and a "
        "microbatch that does not fit is halved",
    ),
    Rule(
        "neftune_noise_alpha",
        "args",
        lambda value: value is None,
        "its noise comes from the global seed and makes two passes over the same example differ, which the probe "
        "cannot tell from a loss that couples examples",
    ),
    Rule(
        "max_grad_norm",
        "args",
        _one_of(1.0, 0, None),
        "each example's gradient is clipped to PrivacyArguments.l2_clip_norm; clipping the noisy sum again is not done "
        "(1.0, Trainer's default, is ignored)",
    ),
    Rule("fp16", "args", _off, "a gradient scaler skips steps by what the data do; load the model in bfloat16"),
    Rule("fp16_full_eval", "args", _off, "it would cast the trained cores to half precision for good"),
    Rule("bf16_full_eval", "args", _off, "it would cast the trained cores to half precision for good"),
    Rule("deepspeed", "args", _off, "its engine takes the backward pass and the optimizer step into its own hands"),
    Rule(
        "fsdp",
        "args",
        _off,
        "it would shard what is trained; processes keep copies of the base here, and `dpsb train --shard-base` cuts it",
    ),
    Rule("parallelism_config", "args", _off, "several processes, each with a copy of the base, are what is tested"),
    Rule(
        "n_gpu",
        "args",
        _alone,
        "DataParallel replicates the model in every forward pass; make one GPU visible (CUDA_VISIBLE_DEVICES=0)",
    ),
    Rule("torch_compile", "args", _off, "a compiled model drops the hooks that per-example gradients need"),
    Rule(
        "optim",
        "args",
        _one_of(*_OPTIMIZERS),
        "only optimizers that act in step() alone are let through: layerwise ones and LOMO move weights inside the "
        "backward pass, by gradients without noise",
    ),
    Rule("optim_target_modules", "args", lambda value: value is None, "the cores are what is trained"),
    Rule(
        "lr_scheduler_type",
        "args",
        lambda value: value not in ("reduce_lr_on_plateau", "greedy"),
        "learning rates must be a public function of the step",
    ),
    Rule(
        "include_num_input_tokens_seen",
        "args",
        _one_of(False, None, "no"),
        "the number of tokens seen is a fact about the private data",
    ),
    Rule(
        "skip_memory_metrics",
        "args",
        bool,
        "memory peaks depend on the private data of a step and would be written into the logs",
    ),
    Rule("debug", "args", _off, "debug options print activations of private examples"),
    Rule("enable_jit_checkpoint", "args", _off, "it saves in the middle of a step; use save_steps"),
    Rule(
        "label_names",
        "args",
        _one_of(None, ["labels"], ["label"], ("labels",)),
        "the loss reads the column labels (or label)",
    ),
    Rule("max_length", "sft", lambda value: value is not None, "padded lengths must be public; set a number"),
    Rule(
        "train_dataset",
        "trainer",
        _plain_data,
        "Poisson sampling takes any row at any step, so the data set needs __getitem__ and a length",
    ),
    Rule(
        "data_collator",
        "trainer",
        _known_collator,
        "examples are padded by dpsb, each to its own public length; leave data_collator out, or override "
        "per_example_batch",
    ),
    Rule(
        "compute_loss_func",
        "trainer",
        lambda value: value is None,
        "it returns one number for the batch; override per_example_loss, which returns one per example",
    ),
    Rule("model_init", "trainer", lambda value: value is None, "it would build the model anew inside train()"),
    Rule(
        "optimizers",
        "trainer",
        lambda value: value is None or tuple(value) == (None, None),
        "an optimizer made before the cores holds tensors that are not trained; use optim, optimizer_cls_and_kwargs "
        "or override create_optimizer",
    ),
    *(
        Rule(
            method,
            "class",
            _of_the_library,
            "private training never calls it, so what it does would silently be missing; override per_example_loss or "
            "per_example_batch instead",
        )
        for method in ("compute_loss", "training_step", "optimizer_step", "get_batch_samples")
    ),
    *(
        Rule(
            method,
            "class",
            _of_the_library,
            "examples are drawn by Poisson sampling, which the accounting is about: no sampler or loader of one's own",
        )
        for method in ("get_train_dataloader", "_get_train_sampler", "get_train_sampler")
    ),
    *(
        Rule(
            variable,
            "environment",
            _one_of(None, "", "0", "no", "NO", "false", "False", "FALSE"),
            "accelerate launch would take over the backward pass, shard or compile the model; launch one plain process",
        )
        for variable in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_DYNAMO_BACKEND")
    ),
    Rule(
        "WANDB_WATCH",
        "environment",
        _one_of(None, "", "false", "False", "0", "parameters"),
        "it would log gradients of private examples",
    ),
)

IGNORED = (
    Rule(
        "per_device_train_batch_size",
        "args",
        _one_of(8),
        "one release per step whatever it is; the batch is PrivacyArguments.expected_batch_size on average, and "
        "token_budget bounds memory",
        ignored=True,
    ),
    Rule(
        "gradient_accumulation_steps",
        "args",
        _one_of(1),
        "one release per step whatever it is; microbatches under token_budget do what it is for",
        ignored=True,
    ),
    Rule(
        "bf16",
        "args",
        _off,
        "private steps compute in the type of the model's weights; load the model in bfloat16 instead",
        ignored=True,
    ),
    Rule("dataloader_num_workers", "args", _off, "the drawn examples are read one by one", ignored=True),
    Rule("dataloader_drop_last", "args", _off, "a Poisson draw has no last batch", ignored=True),
    Rule(
        "data_seed",
        "args",
        lambda value: value is None,
        "draws and noise come from the operating system, never from a seed",
        ignored=True,
    ),
    Rule("activation_offloading", "args", _off, "token_budget and checkpointing bound memory", ignored=True),
    Rule("torch_empty_cache_steps", "args", _off, "token_budget bounds memory", ignored=True),
    Rule("save_only_model", "args", _off, "a checkpoint always holds what a resume needs; it is small", ignored=True),
    Rule("overwrite_output_dir", "args", _off, "a ledger is never overwritten", ignored=True),
    Rule(
        "push_to_hub",
        "args",
        _off,
        "nothing is uploaded while training; save_model() and push_to_hub() upload",
        ignored=True,
    ),
)

ALWAYS = (
    ("seed", "draws and noise come from the operating system; seed only decides how a new head starts"),
    ("max_grad_norm (1.0)", "each example's gradient is clipped instead"),
    ("remove_unused_columns", "only token columns and labels are used, whatever else there is"),
    ("average_tokens_across_devices", "the loss is per example"),
    ("logging_nan_inf_filter", "no training loss is logged"),
    ("dropout of the model", "set to 0 during private steps, as in fit"),
    ("shuffle_dataset (SFT)", "a Poisson draw does not depend on the order"),
)
"""Ignored without a word, because their values change nothing here: name and reason, for the documentation."""


def check(trainer_class: type, given: Mapping[str, Any]) -> None:
    """Refuses what private training cannot do, and warns of what it will not do.

    Args:
      trainer_class: The class that is about to be built.
      given: Arguments of its constructor by name; ``args`` are the TrainingArguments. Nothing of the data is read.

    Raises:
      TrainerArgumentError: For the first argument that is refused.
    """
    for rule in REFUSED:
        known, value = _value(rule, trainer_class, given)
        if known and not rule.harmless(value):
            raise TrainerArgumentError(f"{rule.name}={_shown(value)} is refused in private training: {rule.reason}.")
    for rule in IGNORED:
        known, value = _value(rule, trainer_class, given)
        if known and not rule.harmless(value):
            logger.warning("%s=%s is ignored in private training: %s.", rule.name, _shown(value), rule.reason)


def _value(rule: Rule, trainer_class: type, given: Mapping[str, Any]) -> tuple[bool, Any]:
    """Whether the argument exists here, and its value."""
    if rule.place == "environment":
        return True, os.environ.get(rule.name)
    if rule.place == "class":
        definer = next((kind for kind in trainer_class.__mro__ if rule.name in vars(kind)), None)
        return definer is not None, definer
    if rule.place == "trainer":
        return rule.name in given, given.get(rule.name)
    args = given["args"]
    if rule.place == "sft" and not hasattr(args, "packing"):
        return False, None
    value = getattr(args, rule.name, None)
    return hasattr(args, rule.name), getattr(value, "value", value)


def _shown(value: Any) -> str:
    """A value as it may be shown: plain ones as they are, of everything else only the kind."""
    if isinstance(value, type):
        return value.__qualname__
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    return type(value).__name__
