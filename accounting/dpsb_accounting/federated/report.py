"""FederatedReport: what a whole federation supports claiming, silo by silo and party by party."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dpsb_accounting import accountant
from dpsb_accounting.accountant import Schedule
from dpsb_accounting.bound import Bound
from dpsb_accounting.engines import ResourceLimit
from dpsb_accounting.federated.silo import Silo, Terms
from dpsb_accounting.plan import number_to_json

SCHEMA = "dpsb-federated-report/1"


@dataclass(frozen=True, kw_only=True, slots=True)
class SiloBound:
    """What one silo may claim.

    Args:
        name: The silo.
        epsilon: Bounds for one of its own units; None where nothing may be claimed.
        reason: Why there is no claim, or how the bound comes about; may be empty.
        charged: Training steps charged in its ledger; None without a ledger.
        planned: Training steps planned; the claim is for all of them.
    """

    name: str
    epsilon: Bound | None
    reason: str
    charged: int | None
    planned: int

    @property
    def claim(self) -> bool:
        """Whether the silo may claim its epsilon."""
        return self.epsilon is not None and self.epsilon.is_finite

    def to_json(self) -> dict[str, object]:
        """Returns the row as a JSON object."""
        return {
            "name": self.name,
            "claim": self.claim,
            "epsilon": ends(self.epsilon),
            "reason": self.reason,
            "charged": self.charged,
            "planned": self.planned,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Party:
    """What somebody sees, and what that is worth.

    Args:
        name: Who.
        sees: What reaches them.
        epsilon: The worst bound over all silos against them; None where nothing is guaranteed.
    """

    name: str
    sees: str
    epsilon: Bound | None

    def to_json(self) -> dict[str, object]:
        """Returns the row as a JSON object."""
        return {"name": self.name, "sees": self.sees, "epsilon": ends(self.epsilon)}


@dataclass(frozen=True, kw_only=True, slots=True)
class FederatedReport:
    """What a federation supports claiming; made by the functions of `dpsb_accounting.federated`.

    Args:
        model: The privacy model.
        epsilon: The claim for every unit of every silo; None where there is none.
        per_silo: Every silo's own bounds.
        parties: What each party sees.
        incomplete_rounds: How many training steps were charged in some ledger and not in all: rounds that somebody
            missed. They stay charged.
        statement: The claim in words.
        assumptions: What it rests on.
        terms: Delta, relation, unit.
    """

    model: str
    epsilon: Bound | None
    per_silo: tuple[SiloBound, ...]
    parties: tuple[Party, ...]
    incomplete_rounds: int
    statement: str
    assumptions: tuple[str, ...]
    terms: Terms

    @property
    def claim(self) -> bool:
        """Whether the federation as a whole may claim `epsilon`."""
        return self.epsilon is not None and self.epsilon.is_finite

    def to_json(self) -> dict[str, object]:
        """Returns the report as a JSON object; an infinite number is the text "inf"."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "claim": self.claim,
            "epsilon": ends(self.epsilon),
            "delta": self.terms.delta,
            "neighboring": self.terms.neighboring,
            "unit": self.terms.unit,
            "method": self.epsilon.method if self.epsilon else None,
            "statement": self.statement,
            "silos": [row.to_json() for row in self.per_silo],
            "parties": [row.to_json() for row in self.parties],
            "incomplete_rounds": self.incomplete_rounds,
            "assumptions": list(self.assumptions),
        }


def ends(bound: Bound | None) -> dict[str, object] | None:
    """Returns the ends of a bound as JSON, or None for no bound."""
    if bound is None:
        return None
    return {"lower": number_to_json(bound.lower), "upper": number_to_json(bound.upper)}


def bound(schedule: Schedule, terms: Terms) -> Bound:
    """Returns the bounds of a schedule on the federation's terms."""
    found = accountant.epsilon(schedule, terms.delta, terms.neighboring)
    return make_bound(found.lower, found.upper, terms, found.method)


def make_bound(lower: float, upper: float, terms: Terms, method: str) -> Bound:
    """Returns a bound on the federation's terms."""
    return Bound(
        lower=lower, upper=upper, delta=terms.delta, neighboring=terms.neighboring, unit=terms.unit, method=method
    )


def bound_if_computable(schedule: Schedule, terms: Terms) -> Bound | None:
    """Like `bound`, but None where the noise is too small for any engine; for information, never for a claim."""
    try:
        return bound(schedule, terms)
    except ResourceLimit:
        return None


def worst(bounds: Sequence[Bound | None]) -> Bound | None:
    """Returns the maximum of bounds that hold for disjoint data; None if one of them is missing or infinite."""
    found = [entry for entry in bounds if entry is not None and entry.is_finite]
    if not found or len(found) < len(bounds):
        return None
    top = max(found, key=lambda entry: entry.upper)
    lower = max(entry.lower for entry in found)
    return Bound(
        lower=min(lower, top.upper),
        upper=top.upper,
        delta=top.delta,
        neighboring=top.neighboring,
        unit=top.unit,
        method=top.method,
    )


def row(silo: Silo, schedule: Schedule, terms: Terms) -> SiloBound:
    """Returns the table row of a silo whose schedule is accounted for; no epsilon where there is no claim."""
    if silo.taints:
        return row_of(silo, None)
    try:
        return row_of(silo, bound(schedule, terms))
    except ResourceLimit as error:
        return row_of(silo, None, str(error))


def row_of(silo: Silo, epsilon: Bound | None, reason: str = "") -> SiloBound:
    """Returns the table row of a silo; a tainted or non-private one gets no epsilon, with the reason."""
    if silo.taints:
        epsilon, reason = None, f"tainted by {', '.join(map(repr, silo.taints))}"
    elif epsilon is not None and not epsilon.is_finite:
        epsilon, reason = None, "something was released with no guarantee (epsilon = inf)"
    return SiloBound(name=silo.name, epsilon=epsilon, reason=reason, charged=silo.charged, planned=silo.train.count)


def incomplete_rounds(silos: Sequence[Silo]) -> int:
    """Returns how many training steps some ledger charges and some other does not."""
    charged = [silo.charged for silo in silos if silo.charged is not None]
    return max(charged) - min(charged) if charged else 0


def no_claim(rows: Sequence[SiloBound]) -> str:
    """Returns the sentence that says which silos leave the federation without a claim."""
    bad = [f"{entry.name!r} ({entry.reason})" for entry in rows if not entry.claim]
    return f"No privacy claim can be made for the federation as a whole: there is none for {', '.join(bad)}."


def guarantee(total: Bound, person: str) -> str:
    """Returns the claim in words, with epsilon rounded up."""
    return (
        f"({rounded_up(total.upper)}, {total.delta:g})-differentially private for each single {person} "
        f"({total.neighboring})"
    )


def rounded_up(value: float) -> str:
    """Returns four digits or more, rounded up, so that a printed claim is never smaller than the bound."""
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    digits = max(3 - math.floor(math.log10(value)), 0)
    return f"{math.ceil(value * 10**digits) / 10**digits:.{digits}f}"
