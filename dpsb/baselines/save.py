"""What a finished run leaves of its weights: a plain PEFT adapter, or the whole model where its own parts moved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from dpsb.adapter import Adapter
from dpsb.baselines.methods import INITS_THAT_MOVE_THE_BASE
from dpsb.models import HEAD_FILE, MeanPooledClassifier, peft_part

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_weights(adapter: Adapter, folder: Path, start: Path) -> None:
    """Writes the trained weights to ``folder`` such that PEFT or transformers load them without dpsb.

    R-only and the methods of PEFT become an adapter, ``bitfit``, ``head-only`` and ``full`` a whole model. A start that
    moves the base weights (PiSSA, OLoRA, LoRA-GA: W0 - B0 A0 + B A) becomes a plain LoRA adapter of twice the rank on
    the *untouched* base: B' = [B, -B0], A' = [A; A0].

    Args:
      adapter: After training.
      folder: Where to write.
      start: The run's ``start.safetensors``, which holds A0 and B0; read only if they are needed.
    """
    model, part = adapter.model, peft_part(adapter.model)
    if isinstance(part, PeftModel):
        part.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
        if getattr(part.peft_config["default"], "init_lora_weights", None) in INITS_THAT_MOVE_THE_BASE:
            prefix = "encoder." if isinstance(model, MeanPooledClassifier) else ""
            _subtract_start(folder, load_file(start), f"theta/{prefix}")
    else:
        whole: Any = part
        whole.save_pretrained(folder)
    if isinstance(model, MeanPooledClassifier):
        save_file({k: v.cpu() for k, v in model.classifier.state_dict().items()}, folder / HEAD_FILE)


def _subtract_start(folder: Path, start: dict[str, torch.Tensor], prefix: str) -> None:
    saved = load_file(folder / _WEIGHTS)
    for name, value in saved.items():
        initial = start.get(f"{prefix}{name.removesuffix('.weight')}.default.weight")
        if ".lora_A." in name and initial is not None:
            saved[name] = torch.cat([value, initial])
        elif ".lora_B." in name and initial is not None:
            saved[name] = torch.cat([value, -initial], dim=1)
    save_file(saved, folder / _WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / _CONFIG).read_text())
    config |= {"r": 2 * config["r"], "lora_alpha": 2 * config["lora_alpha"], "init_lora_weights": True}
    (folder / _CONFIG).write_text(json.dumps(config, indent=2))
