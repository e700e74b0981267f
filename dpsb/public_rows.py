"""Whether what a user asks of public rows fits together. Needs no torch, so that settings can be checked at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpsb.baselines.methods import INITS_THAT_MOVE_THE_BASE, method_named
from dpsb.basis_spec import parse_basis, settings_for

if TYPE_CHECKING:
    from dpsb.config import RunConfig


def warm_start_fault(config: RunConfig) -> str | None:
    """What is wrong with the settings of training on public rows, as a sentence; None if nothing is."""
    if not config.warm_start_epochs:
        return _without_epochs(config)
    epochs = f"warm_start_epochs={config.warm_start_epochs!r}"
    if not config.warm_start:
        return f"{epochs} needs a file of public rows: warm_start=FILE."
    if method_named(config.method).peft in INITS_THAT_MOVE_THE_BASE:
        return f"{epochs} does not go with method={config.method!r}: it moves the frozen weights too. Use 'lora'."
    if "basis_share" in settings_for(parse_basis(config.basis), config.basis_choice):
        return (
            f"{epochs} trains on public rows before any private release, and basis={config.basis!r} is one (as basis_"
            f"choice={config.basis_choice!r} may be); use 'trained' or another basis that is not paid for."
        )
    return None


def _without_epochs(config: RunConfig) -> str | None:
    if config.warm_start and config.task != "classification":
        return (
            f"warm_start={config.warm_start!r} alone is for a classification head; task is {config.task!r}. With "
            "warm_start_epochs the adapter is trained on it too."
        )
    needs = "needs public rows to train on: warm_start=FILE, and warm_start_epochs (5 is usual)."
    if config.basis == "trained":
        return f"basis='trained' {needs}"
    if config.warm_start_learning_rate != type(config).warm_start_learning_rate:
        return f"warm_start_learning_rate={config.warm_start_learning_rate!r} {needs}"
    return None
