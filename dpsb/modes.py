"""A model in evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, in which dropout is off; afterwards all modules have the mode that the model itself had."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
