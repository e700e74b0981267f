"""vLLM's rules for a LoRA adapter, as a check, and an adapter that keeps them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dpsb.folders import check_new, new_folder
from dpsb.run import RunError
from dpsb.serving.adapters import CONFIG, LORA_A, LORA_B, TOKENIZER_FILES, WEIGHTS, copy_plain_files
from dpsb_accounting.ledger import LEDGER_NAME

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` may be; an adapter's rank must not exceed it."""
_PREFIX = "base_model.model."
_REFUSED: Mapping[str, tuple[Any, str]] = {
    "modules_to_save": (None, "whole modules beside the adapter, such as a classification head, are not served"),
    "use_dora": (False, "DoRA is not served"),
    "bias": ("none", "trained biases are not served"),
    "rank_pattern": ({}, "ranks by layer are read as if all were r"),
    "alpha_pattern": ({}, "scales by layer are read as if all were lora_alpha / r"),
    "trainable_token_indices": (None, "trained tokens are not served"),
    "target_parameters": (None, "only whole linear modules are served"),
    "fan_in_fan_out": (False, "transposed base weights (GPT-2's Conv1D) are not served"),
}


def problems_for_vllm(folder: Path, max_lora_rank: int = RANKS[-1]) -> list[str]:
    """Why vLLM would refuse an adapter, or serve another one than was trained; empty if it would serve this one.

    Args:
      folder: A plain LoRA adapter in PEFT's format.
      max_lora_rank: What the server is started with.

    Raises:
      RunError: If the folder holds no adapter that can be read.
    """
    config, weights = _read(folder)
    found = [
        f"it has {name} {config[name]!r}: {why}"
        for name, (good, why) in _REFUSED.items()
        if config.get(name, good) not in (good, None)
    ]
    if config.get("peft_type") != "LORA":
        found.append(f"its peft_type is {config.get('peft_type')!r}, not 'LORA'")
    if config.get("task_type") != "CAUSAL_LM":
        found.append(f"its task_type is {config.get('task_type')!r}: only language models are served with adapters")
    rank = config.get("r")
    if max_lora_rank not in RANKS:
        found.append(f"max_lora_rank={max_lora_rank} is none of {', '.join(map(str, RANKS))}")
    if not isinstance(rank, int) or not 1 <= rank <= max_lora_rank:
        found.append(f"its rank {rank!r} is not between 1 and max_lora_rank={max_lora_rank}")
    return found + _problems_of_tensors(weights, rank)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        return json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError):
        raise RunError(f"{folder} holds no adapter that can be read ({CONFIG} and {WEIGHTS}).") from None


def _problems_of_tensors(weights: Mapping[str, torch.Tensor], rank: Any) -> list[str]:
    found = []
    for name, value in weights.items():
        if not name.startswith(_PREFIX) or not name.endswith((LORA_A, LORA_B)):
            found.append(f"it holds {name}, which is no LoRA factor")
        elif value.dim() != 2 or value.shape[0 if name.endswith(LORA_A) else 1] != rank:
            found.append(f"{name} has shape {tuple(value.shape)}, and r is {rank}")
        elif not bool(torch.isfinite(value).all()):
            found.append(f"{name} is not finite")
        elif name.endswith(LORA_A) and name.removesuffix(LORA_A) + LORA_B not in weights:
            found.append(f"{name} has no lora_B beside it")
        elif name.endswith(LORA_B) and name.removesuffix(LORA_B) + LORA_A not in weights:
            found.append(f"{name} has no lora_A beside it")
    return found if weights else ["it holds no tensors"]


def export_for_vllm(folder: Path, out: Path) -> int:
    """Writes an adapter that vLLM serves: one allowed rank for all layers (zeros added), targets by name.

    Args:
      folder: A finished run of a language model, or any plain LoRA adapter folder.
      out: New folder.

    Returns:
      The rank that the server's ``--max-lora-rank`` must reach.

    Raises:
      RunError: If the adapter cannot be made to fit; the message names every reason.
      FileExistsError: If ``out`` holds something.
    """
    check_new(out)
    config, weights = _read(folder)
    rank = max((value.shape[0] for name, value in weights.items() if name.endswith(LORA_A)), default=0)
    wide = next((allowed for allowed in RANKS if allowed >= rank), rank)
    scales = _scales(config, weights)
    padded = {name: _padded(name, value, wide, scales.get(name, 1.0)) for name, value in weights.items()}
    leaves = sorted({name.removesuffix(LORA_A).rpartition(".")[2] for name in weights if name.endswith(LORA_A)})
    fixed = {"r": wide, "lora_alpha": wide, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    with new_folder(out) as new:
        save_file(padded, new / WEIGHTS, metadata={"format": "pt"})
        (new / CONFIG).write_text(json.dumps({**config, **fixed, "target_modules": leaves}, indent=2) + "\n")
        if found := problems_for_vllm(new):
            raise RunError(f"{folder} cannot be served by vLLM: {'; '.join(found)}.")
        for pattern in (LEDGER_NAME, "report.json", "README.md", "claim.json", *TOKENIZER_FILES):
            copy_plain_files(folder, pattern, new)
        if (folder / "ledgers").is_dir():
            (new / "ledgers").mkdir()
            copy_plain_files(folder / "ledgers", "*.jsonl", new / "ledgers")
    return wide


def _scales(config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """lora_alpha / r of each layer, which goes into its B; by PEFT's rules for patterns."""
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    scales = {}
    for name in (name for name in weights if name.endswith(LORA_B)):
        layer = name.removesuffix(LORA_B).removeprefix(_PREFIX)
        rank = weights[name].shape[1]
        alpha = patterns.get(get_pattern_key(patterns.keys(), layer), config.get("lora_alpha", LoraConfig().lora_alpha))
        scales[name] = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return scales


def _padded(name: str, value: torch.Tensor, rank: int, scale: float) -> torch.Tensor:
    missing = rank - (value.shape[0] if name.endswith(LORA_A) else value.shape[1]) if value.dim() == 2 else 0
    if name.endswith(LORA_A):
        return torch.nn.functional.pad(value, (0, 0, 0, missing)).contiguous()
    if name.endswith(LORA_B):
        return (torch.nn.functional.pad(value, (0, missing)) * scale).contiguous()
    return value
