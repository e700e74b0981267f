"""Names and shapes of what silos release for a basis that all pay for, and of that basis. All of it is public."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

A, B = ".A", ".B"
GRADIENT = "gradient/"
"""Before the names of what a silo releases for the basis."""

Shapes = Mapping[str, tuple[int, int, int]]
"""Out, in and rank of each target weight."""


def released_layout(shapes: Shapes) -> dict[str, torch.Tensor]:
    """Names, shapes and types of what a silo releases."""
    return {f"{GRADIENT}{name}": torch.zeros(rows, columns) for name, (rows, columns, _) in shapes.items()}


def shapes_of(start: Path) -> dict[str, tuple[int, int, int]]:
    """Out, in and rank of each target weight, from the public start of a federation."""
    saved = load_file(start)
    names = [name.removesuffix(A) for name in saved if name.endswith(A) and f"{name.removesuffix(A)}{B}" in saved]
    return {name: (saved[name + B].shape[0], saved[name + A].shape[1], saved[name + A].shape[0]) for name in names}
