"""Findings: what was found about a claim, how grave it is, and the numbers that show it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from dpsb_accounting.plan import number_to_json

SEVERITIES = ("error", "warning", "info")


@dataclass(frozen=True, slots=True)
class Range:
    """A pair of rigorous bounds on epsilon and how they were computed; `lower` is 0 where nothing better is known."""

    lower: float
    upper: float
    delta: float
    neighboring: str
    method: str

    def to_json(self) -> dict[str, object]:
        """Returns the range as a JSON object; infinity is the text "inf"."""
        return {
            "lower": number_to_json(self.lower),
            "upper": number_to_json(self.upper),
            "delta": self.delta,
            "neighboring": self.neighboring,
            "method": self.method,
        }

    def __str__(self) -> str:
        if math.isinf(self.upper) and self.lower < self.upper:
            return f"at least {self.lower:.4g}"
        if self.lower == self.upper or self.upper - self.lower < 5e-4 * self.upper:
            return f"{self.upper:.4g}"
        return f"{self.lower:.4g} to {self.upper:.4g}" if self.lower else f"at most {self.upper:.4g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was found about a claim.

    Args:
        id: Name of the kind of finding; `catalog.explain` says what it means.
        severity: "error" (the claim is wrong or proves nothing), "warning" (cannot be confirmed, or weak practice)
            or "info".
        message: What was found in this claim, in one or two sentences with the numbers.
        claimed: The value that the claim states, if it is about one.
        recomputed: The bounds on epsilon that hold with this one fault taken into account, if they can be computed.
        evidence: Further numbers by name.
    """

    id: str
    severity: str
    message: str
    claimed: float | None = None
    recomputed: Range | None = None
    evidence: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Returns the finding as a JSON object."""
        return {
            "id": self.id,
            "severity": self.severity,
            "message": self.message,
            "claimed": None if self.claimed is None else number_to_json(self.claimed),
            "recomputed": None if self.recomputed is None else self.recomputed.to_json(),
            "evidence": {name: number_to_json(value) for name, value in self.evidence.items()},
        }
