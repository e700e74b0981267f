"""Train and evaluation mode of a model's modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, in which dropout is off; afterwards every module has the mode that it had."""
    was_training, modes = model.training, modes_of(model)
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)  # modules may do more in it than set a flag
        _set(modes)


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Train mode for the model, which activation checkpointing needs; undone afterwards."""
    modes = modes_of(model)
    model.train()
    try:
        yield
    finally:
        _set(modes)


def modes_of(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Every module of a model, and whether it is in train mode."""
    return [(module, module.training) for module in model.modules()]


def put_back(model: nn.Module, modes: Sequence[tuple[nn.Module, bool]]) -> None:
    """Train mode as it was, if anything has left it since; to look first is much faster than to set it again."""
    if all(module.training is training for module, training in modes):
        return
    model.train()  # modules may do more in it than set a flag
    _set(modes)


def _set(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training
