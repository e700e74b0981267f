"""The merged model: base weights with the adapter added in, for tools that know nothing of adapters."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dpsb.adapter_files import adapter_settings, with_adapter
from dpsb.folders import check_new, new_folder
from dpsb.models import HEAD_FILE
from dpsb.run import RunError
from dpsb_accounting.ledger import LEDGER_NAME

_ADAPTER = "adapter_config.json"


def export_merged(folder: Path, merged: Path) -> float:
    """Writes base model plus adapter to ``merged`` as an ordinary Hugging Face model with its tokenizer.

    A mean-pooled classifier becomes a plain encoder with its linear head beside it, in ``head.safetensors``. A base
    that is quantized stays so, and the sum is rounded to its grid again: the returned number shows how far that goes.

    Args:
      folder: A finished run, or any plain LoRA adapter folder with the tokenizer beside it.
      merged: New folder.

    Returns:
      How far merging moves the model's output on random tokens, relative to its norm: rounding in fp32 (about 1e-6),
      more in bf16, and the step of the grid on a quantized base.

    Raises:
      RunError: If ``folder`` holds no finished adapter.
      FileExistsError: If ``merged`` holds something.
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    if (folder / "config.json").exists() and (folder / "report.json").exists():
        raise RunError(f"{folder} holds a whole model already: its method trained the model's own tensors.")
    if not (folder / _ADAPTER).exists():
        raise RunError(f"{folder} holds no finished adapter ({_ADAPTER} is missing).")
    check_new(merged)
    settings = adapter_settings(folder)
    path = settings["base_model_name_or_path"]
    if settings.get("task_type") == "SEQ_CLS":
        labels = _labels(folder)
        base = AutoModelForSequenceClassification.from_pretrained(
            path,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            ignore_mismatched_sizes=True,
            use_safetensors=True,
        )
    elif settings.get("task_type") == "FEATURE_EXTRACTION":
        base = AutoModel.from_pretrained(path, use_safetensors=True)
    else:
        base = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True)
    adapted = with_adapter(base, folder).eval()
    before = _output(adapted)
    model = adapted.merge_and_unload()
    moved = float((_output(model) - before).norm() / before.norm().clamp(min=1e-30))
    with new_folder(merged) as new:
        model.save_pretrained(new)
        AutoTokenizer.from_pretrained(folder).save_pretrained(new)
        if (folder / HEAD_FILE).exists():
            shutil.copyfile(folder / HEAD_FILE, new / HEAD_FILE)
    return moved


def _output(model: Any) -> torch.Tensor:
    """Logits, or hidden states where there are none, of two random sequences."""
    size = min(model.config.vocab_size, 1000)
    ids = torch.randint(size, (2, 12), generator=torch.Generator().manual_seed(0)).to(model.device)
    with torch.no_grad():
        found = model(input_ids=ids)
    return (found.logits if hasattr(found, "logits") else found.last_hidden_state).float()


def _labels(folder: Path) -> list[str]:
    from dpsb_accounting import Ledger

    details: Mapping[str, Any] = Ledger.read(folder / LEDGER_NAME).plan.details
    return [str(label) for label in details["labels"]]
