"""Reading an adapter that somebody else may have made: safetensors only, finite numbers, nothing that runs code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

WEIGHTS_NAME = "adapter_model.safetensors"


class AdapterFileError(ValueError):
    """An adapter's files cannot be used; the message says which and why, and quotes nothing of their content."""


def with_adapter(base: nn.Module, folder: Path) -> Any:
    """The model with the plain PEFT adapter of a folder.

    Guarantees:
      * Nothing is unpickled: an adapter that comes as a pickle only is refused before PEFT, which would read it, looks.
      * A file that is cut off, whose header lies about its size, whose tensors have other shapes than the model's or
        hold a NaN or an infinity is refused with one sentence.

    Args:
      base: The model that the adapter was made for.
      folder: With ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
      AdapterFileError: If a file cannot be used.
    """
    from peft import PeftModel

    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise AdapterFileError(
            f"{folder} holds no {WEIGHTS_NAME}. Weights in another format, such as a pickle (.bin, .pt), are not read: "
            "a pickle can run code."
        )
    _check_finite(path)
    try:
        return PeftModel.from_pretrained(base, str(folder))
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise AdapterFileError(
            f"The adapter in {folder} does not fit its base model ({type(error).__name__})."
        ) from None


def adapter_settings(folder: Path) -> dict[str, Any]:
    """The content of ``adapter_config.json``.

    Raises:
      AdapterFileError: If it is no JSON object, or names no base model.
    """
    path = folder / "adapter_config.json"
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} cannot be read ({type(error).__name__}).") from None
    if not isinstance(found, dict) or not isinstance(found.get("base_model_name_or_path"), str):
        raise AdapterFileError(f"{path} names no base model.")
    return found


def _check_finite(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            odd = [name for name in file.keys() if not bool(torch.isfinite(file.get_tensor(name)).all())]  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise AdapterFileError(f"{path} cannot be read as safetensors ({type(error).__name__}).") from None
    if odd:
        raise AdapterFileError(f"{path} holds numbers that are not finite in {len(odd)} of its tensors.")
