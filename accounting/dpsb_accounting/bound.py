"""Bound: an interval that certainly holds the number asked for; only the upper end may be claimed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dpsb_accounting import _checks


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    r"""A lower and an upper bound on epsilon at a given delta (or on delta at a given epsilon).

    lower ≤ true value ≤ upper. What is claimed is `upper`; `lower` tells how much the analysis can still be
    off.

    Args:
        lower: At least 0. Public.
        upper: At least `lower`; infinite where nothing is guaranteed. Public.
        delta: The delta at which epsilon is bounded, in (0, 1); None if delta itself is bounded.
        neighboring: "add_or_remove_one", "zero_out" or "replace_one".
        unit: Whose data is protected, such as "example".
        method: How the bounds were computed, in a few words.
        epsilon: The epsilon at which delta is bounded; None if epsilon itself is bounded.

    Raises:
        ValueError: If the ends are out of order or not numbers, or not exactly one of delta, epsilon is
            given.

    Example:
        >>> print(Bound(lower=1.8262, upper=1.8285, delta=1e-5, neighboring="add_or_remove_one",
        ...             unit="example", method="pld"))
        epsilon in [1.8262, 1.8285] at delta 1e-05 (add_or_remove_one, unit example; pld)
    """

    lower: float
    upper: float
    delta: float | None
    neighboring: str
    unit: str
    method: str
    epsilon: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "lower", _checks.nonnegative(infinite=True, lower=self.lower))
        object.__setattr__(self, "upper", _checks.nonnegative(infinite=True, upper=self.upper))
        if self.lower > self.upper:
            raise ValueError(f"lower must not exceed upper, but lower={self.lower!r}, upper={self.upper!r}")
        _checks.one_of(choices=_checks.RELATIONS, neighboring=self.neighboring)
        _checks.text(unit=self.unit)
        _checks.text(method=self.method)
        if (self.delta is None) == (self.epsilon is None):
            raise ValueError(f"give one of delta={self.delta!r} and epsilon={self.epsilon!r}, not both or none")
        if self.delta is not None:
            object.__setattr__(self, "delta", _checks.probability(open_interval=True, delta=self.delta))
        else:
            object.__setattr__(self, "epsilon", _checks.nonnegative(epsilon=self.epsilon))

    @property
    def is_finite(self) -> bool:
        """Whether the upper end is a finite number, so that there is something to claim."""
        return math.isfinite(self.upper)

    def __str__(self) -> str:
        if self.delta is not None:
            what, at = "epsilon", f"delta {self.delta:g}"
        else:
            what, at = "delta", f"epsilon {self.epsilon:g}"
        ends = f"[{self.lower:.5g}, {self.upper:.5g}]"
        return f"{what} in {ends} at {at} ({self.neighboring}, unit {self.unit}; {self.method})"
