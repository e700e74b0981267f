"""Methods, epsilons and learning rates of a sweep, as a user writes them. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpsb.baselines.methods import METHODS, MethodError, method_named
from dpsb.basis_spec import RELEASED, parse_basis


class CurveError(ValueError):
    """A setting of a sweep that does not exist, is out of range or contradicts another; the message names it."""


@dataclass(frozen=True)
class Entry:
    """A method with its basis.

    Args:
      method: Name, see :mod:`dpsb.baselines.methods`.
      basis: For ``sb``: see :mod:`dpsb.basis_spec`; None for a method without a basis to choose.
    """

    method: str
    basis: str | None = None

    @property
    def text(self) -> str:
        """As a user writes it: ``"lora"``, ``"sb:weight"``, ``"sb:public:a.csv+b.csv"``."""
        return self.method if self.basis is None else f"{self.method}:{self.basis.replace(',', '+')}"

    @property
    def label(self) -> str:
        """As a reader sees it: ``"sb (weight)"``, ``"sb (public a.csv)"``, ``"peft:eva (a.csv)"``."""
        if self.basis is None:
            return method_named(self.method).label
        spec = parse_basis(self.basis)
        return f"{self.method} ({' '.join([spec.kind, *(Path(source).name for source in spec.sources)])})"

    @property
    def sources(self) -> tuple[str, ...]:
        """The public files of its basis, or that its method starts from."""
        if self.basis is not None:
            return parse_basis(self.basis).sources
        source = method_named(self.method).source
        return () if source is None else (source,)

    @property
    def pays_for_basis(self) -> bool:
        """Whether its basis takes a share of epsilon, so that there is no cell at infinity."""
        return self.basis is not None and parse_basis(self.basis).kind in RELEASED

    def has_cell(self, epsilon: float) -> bool:
        """False for a basis that takes a share of epsilon where epsilon is infinite."""
        return not (self.pays_for_basis and math.isinf(epsilon))


def labels_of(entries: Sequence[Entry]) -> dict[str, str]:
    """Different labels for different entries, by text: two public files of one name are told apart by their paths."""
    labels = [entry.label for entry in entries]
    return {entry.text: entry.label if labels.count(entry.label) == 1 else entry.text for entry in entries}


def parse_entries(text: str, basis: str) -> tuple[Entry, ...]:
    """The methods in a comma-separated list.

    Args:
      text: Such as ``"sb,sb:private,sb:public:a.csv+b.csv,lora,peft:eva:a.csv"``; ``+`` stands between the files of one
        basis.
      basis: Of an ``sb`` that names none.

    Raises:
      CurveError: If a method or basis does not exist (the message lists those that do) or is there twice.

    Example:
      >>> [entry.text for entry in parse_entries("sb,sb:public:a.csv+b.csv,lora", "weight")]
      ['sb:weight', 'sb:public:a.csv+b.csv', 'lora']
    """
    entries = [_entry(part.strip(), basis) for part in text.split(",") if part.strip()]
    if not entries:
        raise CurveError(f"Expected methods={text!r} to name at least one of {', '.join(METHODS)}.")
    for entry in entries:
        if entries.count(entry) > 1:
            raise CurveError(f"methods={text!r} names {entry.text!r} twice.")
    return tuple(entries)


def _entry(text: str, basis: str) -> Entry:
    family, _, rest = text.partition(":")
    try:
        if family == "sb":
            chosen = (rest or basis).replace("+", ",")
            parse_basis(chosen)
            return Entry("sb", chosen)
        if rest and family != "peft" and family in METHODS:
            raise CurveError(f"methods: {family!r} has no basis to choose, got {text!r}.")
        return Entry(method_named(text).name)
    except MethodError as error:
        raise CurveError(f"methods: {error}") from None


def parse_epsilons(text: str) -> tuple[float, ...]:
    """The epsilons in a comma-separated list, ascending; ``inf`` is a non-private cell.

    Raises:
      CurveError: If one is not positive or is there twice.
    """
    values = _numbers("epsilons", text, ",")
    for value in values:
        if not value > 0:
            raise CurveError(f"Expected epsilons={text!r} to be positive, got {value:g}.")
    if len({f"{value:.12g}" for value in values}) < len(values):  # as a cell's folder is named
        raise CurveError(f"epsilons={text!r} holds two numbers that are equal in 12 digits.")
    return tuple(sorted(values))


def parse_rates(text: str | None, entries: Sequence[Entry], usual: Mapping[str, float]) -> dict[str, tuple[float, ...]]:
    """The learning rates to try, by the entry's text.

    Args:
      text: One grid for all (``"0.01,0.03"``), or one for each method (``"sb=0.02|0.05,lora=0.002"``), where ``sb``
        means every basis that is not named on its own; None for no tuning.
      entries: The methods of the sweep.
      usual: Of a method that is not mentioned.

    Raises:
      CurveError: If a rate is no positive number or a method is not part of the sweep.
    """
    if text is None:
        return {entry.text: (usual[entry.text],) for entry in entries}
    if "=" not in text:
        rates = _rates(text, ",")
        return {entry.text: rates for entry in entries}
    named: dict[str, tuple[float, ...]] = {}
    known = {entry.text for entry in entries} | {entry.method for entry in entries}
    for part in text.split(","):
        name, sign, values = part.strip().rpartition("=")
        if not sign or name not in known:
            raise CurveError(
                f"learning_rates: {part.strip()!r} does not give rates of a method in the sweep; write "
                f"METHOD=RATE|RATE with one of {', '.join(sorted(known))}."
            )
        if name in named:
            raise CurveError(f"learning_rates={text!r} names {name!r} twice.")
        named[name] = _rates(values, "|")
    return {entry.text: named.get(entry.text, named.get(entry.method, (usual[entry.text],))) for entry in entries}


def rates_text(rates: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """The learning rates as JSON holds them."""
    return {name: list(values) for name, values in rates.items()}


def _rates(text: str, separator: str) -> tuple[float, ...]:
    values = _numbers("learning_rates", text, separator)
    for value in values:
        if not 0 < value < math.inf:
            raise CurveError(f"Expected learning_rates={text!r} to be positive and finite, got {value:g}.")
    return values


def _numbers(name: str, text: str, separator: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(separator) if part.strip())
    except ValueError:
        raise CurveError(f"Expected {name}={text!r} to be numbers, {separator!r} between them.") from None
    if not values or any(math.isnan(value) for value in values):
        raise CurveError(f"Expected {name}={text!r} to hold at least one number.")
    if len(set(values)) != len(values):
        raise CurveError(f"{name}={text!r} holds a number twice.")
    return values
