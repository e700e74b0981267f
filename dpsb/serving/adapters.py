"""A finished R-only run as files: its plain adapter, its cores, and what belongs to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dpsb.artifacts import CORE_NAME
from dpsb.models import HEAD_FILE
from dpsb.run import RunError
from dpsb_accounting import Ledger, LedgerError
from dpsb_accounting.ledger import LEDGER_NAME
from dpsb_accounting.positions import check_files

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
"""By name and not by pattern: what is packed, exported or pushed may be published, and a token may be a secret."""
_MEANING = ("labels", "pooling", "max_length", "task")
_NEEDED = (CONFIG, WEIGHTS, CORE_NAME, LEDGER_NAME, "report.json")


@dataclass(frozen=True)
class CoreAdapter:
    """An R-only adapter apart into what is shared and what is its own.

    Args:
      config: PEFT's adapter configuration.
      A: By layer, the name that PEFT's tensors begin with: shape ``(r, in)``.
      B: By layer, ``(out, r)``.
      R: By layer, ``(r, r)``, fp32.
      direct: What is trained besides, under PEFT's names.
      head: A mean-pooled classifier's head, from its own file; empty without.
      details: What the run's plan says of labels, pooling and length: what the numbers mean.
    """

    config: Mapping[str, Any]
    A: Mapping[str, torch.Tensor]
    B: Mapping[str, torch.Tensor]
    R: Mapping[str, torch.Tensor]
    direct: Mapping[str, torch.Tensor]
    head: Mapping[str, torch.Tensor]
    details: Mapping[str, Any]

    def same_basis(self, other: CoreAdapter) -> str | None:
        """What differs between the shared parts of two adapters, in words; None if they are the same, bit for bit."""
        for name in ("base_model_name_or_path", "task_type", "r", "lora_alpha"):
            if self.config.get(name) != other.config.get(name):
                return f"{name} ({self.config.get(name)!r} and {other.config.get(name)!r})"
        for name in _MEANING:
            if self.details.get(name) != other.details.get(name):
                return f"{name} ({self.details.get(name)!r} and {other.details.get(name)!r})"
        if self.A.keys() != other.A.keys():
            return "the layers that are adapted"
        for part, mine, theirs in (("A", self.A, other.A), ("B", self.B, other.B)):
            for layer, value in mine.items():
                if not torch.equal(value, theirs[layer]):
                    return f"{part} of {layer}"
        own = {**self.direct, **self.head}
        its = {**other.direct, **other.head}
        if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in its.items()}:
            return "the head's shape"
        return None


def read_core_adapter(folder: Path) -> CoreAdapter:
    """The adapter of a finished run of the method ``sb``.

    Raises:
      RunError: If the folder holds no such run, its files do not fit together, or they are not of the ledger beside
        them (each carries run, length and head of the ledger that it was written under).
    """
    for name in _NEEDED:
        if not (folder / name).exists():
            raise RunError(f"{folder} is no finished R-only run on one basis: {name} is missing.")
    try:
        ledger = Ledger.read(folder / LEDGER_NAME)
    except LedgerError as error:
        raise RunError(f"The ledger in {folder} cannot be read: {error}") from None
    for check in check_files(ledger):
        if not check.ok:
            raise RunError(f"{folder / check.name} is not of the ledger beside it: {check.detail}.")
    details = {name: ledger.plan.details[name] for name in _MEANING if name in ledger.plan.details}
    try:
        config = json.loads((folder / CONFIG).read_text())
        weights, cores = load_file(folder / WEIGHTS), load_file(folder / CORE_NAME)
        head = load_file(folder / HEAD_FILE) if (folder / HEAD_FILE).exists() else {}
    except (SafetensorError, ValueError) as error:
        raise RunError(f"The files in {folder} cannot be read: {type(error).__name__}.") from None
    A = {name.removesuffix(LORA_A): value for name, value in weights.items() if name.endswith(LORA_A)}
    R, B = {}, {}
    for name in (name.removesuffix(".R") for name in cores if name.endswith(".R")):
        layer = next((layer for layer in A if name == layer or name.endswith(f".{layer}")), None)
        if layer is None or f"{name}.B" not in cores:
            raise RunError(f"{CORE_NAME} in {folder} holds the core {name}, which {WEIGHTS} knows nothing of.")
        R[layer], B[layer] = cores[f"{name}.R"], cores[f"{name}.B"]
    if not R or R.keys() != A.keys():
        raise RunError(f"{folder} holds no R-only adapter: only runs of the method 'sb' have cores on a shared basis.")
    direct = {name: value for name, value in weights.items() if not name.endswith((LORA_A, LORA_B))}
    return CoreAdapter(config, A, B, R, direct, head, details)


def copy_plain_files(source: Path, pattern: str, target: Path) -> None:
    """Copies files, and no links: a folder from elsewhere may link to what its reader would not publish."""
    for path in sorted(source.glob(pattern)):
        if path.is_file() and not path.is_symlink():
            shutil.copyfile(path, target / path.name)


def write_plain_adapter(adapter: CoreAdapter, folder: Path) -> None:
    """Writes a plain LoRA adapter, A and B R, that PEFT loads without dpsb; and the head's file if there is one."""
    weights = dict(adapter.direct)
    for layer, A in adapter.A.items():
        B = adapter.B[layer]
        weights[layer + LORA_A] = A.contiguous()
        weights[layer + LORA_B] = (B.float() @ adapter.R[layer]).to(B.dtype).contiguous()
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(dict(adapter.config), indent=2) + "\n")
    if adapter.head:
        save_file(dict(adapter.head), folder / HEAD_FILE)
