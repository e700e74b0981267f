"""Names and shapes of what silos release for a basis that all pay for, and of that basis. All of it is public."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from dpsb.federated.messages import theta_digest

A, B = ".A", ".B"
LEFT, VALUES, RIGHT = ".left", ".values", ".right"
GRADIENT = "gradient/"
"""Before the names of what a silo releases for the basis."""

FRAMES_NAME = "frames.safetensors"
"""In the folder of a federation whose basis is a hybrid, and of each of its silos: the wide public basis."""

Shapes = Mapping[str, tuple[int, int, int]]
"""Out, in and rank of each target weight."""


@dataclass(frozen=True)
class Wide:
    """A wide public basis, which the silos' releases turn and cut.

    Args:
      tensors: Of each target weight the leading singular triples of a public matrix, under its name with ``.left``,
        ``.values`` and ``.right``: (out, K), (K,) and (in, K).
      source: Of what matrix, for the silos' plans.
    """

    tensors: Mapping[str, torch.Tensor]
    source: str

    @property
    def width(self) -> int:
        """K."""
        return next(int(tensor.numel()) for name, tensor in self.tensors.items() if name.endswith(VALUES))

    @cached_property
    def sha256(self) -> str:
        """By which a round names it."""
        return theta_digest(self.tensors)

    def content(self) -> bytes:
        """The file that :func:`read_wide` reads."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.tensors.items()}
        return bytes(save(tensors, metadata={"source": self.source}))


def read_wide(folder: Path) -> Wide | None:
    """The wide public basis in a folder; None if there is none."""
    path = folder / FRAMES_NAME
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
        return Wide(load_file(path), (file.metadata() or {}).get("source", ""))


def released_layout(shapes: Shapes, width: int = 0) -> dict[str, torch.Tensor]:
    """Names, shapes and types of what a silo releases: whole gradients, or cores of a width."""
    return {
        f"{GRADIENT}{name}": torch.zeros(width or rows, width or columns) for name, (rows, columns, _) in shapes.items()
    }


def shapes_of(start: Path) -> dict[str, tuple[int, int, int]]:
    """Out, in and rank of each target weight, from the public start of a federation."""
    saved = load_file(start)
    names = [name.removesuffix(A) for name in saved if name.endswith(A) and f"{name.removesuffix(A)}{B}" in saved]
    return {name: (saved[name + B].shape[0], saved[name + A].shape[1], saved[name + A].shape[0]) for name in names}
