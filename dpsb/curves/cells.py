"""The grid: one cell is one run, with a ledger and a report of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

from dpsb.curves.entries import Entry
from dpsb.curves.settings import CurveSettings

TUNING = "tuning"
"""Ends the name of a tuning run's folder, before its number."""

Chosen = Mapping[tuple[str, float], float]
"""The learning rate of the curve's cells, by the entry's text and epsilon."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Args:
      entry: Method and basis.
      epsilon: Target, may be infinite.
      learning_rate: Of the cores or of the method's tensors.
      repeat: Counted from 1.
      tuning: Whether it is there to choose a learning rate, and so judged on the validation data.
    """

    entry: Entry
    epsilon: float
    learning_rate: float
    repeat: int
    tuning: bool

    @property
    def name(self) -> str:
        """Its folder; different cells have different names."""
        text = self.entry.text
        slug = re.sub(r"[^\w.+-]+", "-", text).strip("-.")
        if slug != text.replace(":", "-"):  # a path: two of them may look alike
            slug = f"{slug[:40]}-{sha256(text.encode()).hexdigest()[:8]}"
        kind = TUNING if self.tuning else "run"
        return f"{slug}-eps{self.epsilon:.12g}-lr{self.learning_rate:.12g}-{kind}{self.repeat}"


def tuning_cells(settings: CurveSettings) -> list[Cell]:
    """Runs that choose learning rates, for each (method, epsilon) with more than one."""
    return [
        Cell(entry, epsilon, rate, repeat, True)
        for repeat in range(1, settings.tuning_repeats + 1)
        for epsilon in settings.epsilons
        for entry in settings.entries
        if entry.has_cell(epsilon) and len(settings.rates[entry.text]) > 1
        for rate in settings.rates[entry.text]
    ]


def curve_cells(settings: CurveSettings, chosen: Chosen) -> list[Cell]:
    """Runs that the curve is made of, repeat by repeat; those without a chosen learning rate are left out."""
    return [
        Cell(entry, epsilon, chosen[entry.text, epsilon], repeat, False)
        for repeat in range(1, settings.repeats + 1)
        for epsilon in settings.epsilons
        for entry in settings.entries
        if (entry.text, epsilon) in chosen
    ]


def pairs(settings: CurveSettings) -> list[tuple[Entry, float]]:
    """Every (method, epsilon) of the sweep."""
    return [(entry, epsilon) for epsilon in settings.epsilons for entry in settings.entries if entry.has_cell(epsilon)]
