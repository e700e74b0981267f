"""The accountant: the only place where releases are composed. Everything else asks it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from dpsb_accounting import _checks, engines
from dpsb_accounting.bound import Bound
from dpsb_accounting.composition import Composition, alternatives
from dpsb_accounting.events import EVENT_CLASSES, Event
from dpsb_accounting.ledger import LedgerRecord
from dpsb_accounting.plan import Phase, Plan

Schedule: TypeAlias = LedgerRecord | Plan | Iterable[Phase | Event | tuple[Event, int]]


def epsilon(schedule: Schedule, delta: float | None = None, neighboring: str | None = None) -> Bound:
    r"""Bounds epsilon of a whole schedule.

    The smallest :math:`\epsilon` with :math:`P(M(x) \in S) \le e^\epsilon P(M(x') \in S) + \delta` for all S
    and all neighbouring x, x', where M is everything in the schedule, each release chosen knowing those
    before.

    Guarantees: lower ≤ true value ≤ upper, also in floating point; the order of the events and how they are
    grouped make no difference; anything non-private makes both ends infinite; nothing at all gives 0.

    Args:
        schedule: A ledger, its record or a plan: the plan's *whole* schedule is accounted for, whatever was
            charged so far, since a run whose stop depends on the data is not covered by less. Or phases,
            events, or pairs of an event and its count.
        delta: In (0, 1); may be left out where there is a plan. Public.
        neighboring: "add_or_remove_one", "zero_out" or "replace_one"; left out it is the plan's, or
            "add_or_remove_one" where there is none. Public.

    Returns:
        The bounds on epsilon, natural logarithm. Public.

    Raises:
        ValueError: If an argument is out of range.
        ResourceLimit: If no engine can answer; the message names the cause.

    References:
        Dominating pairs and their composition: Zhu, Dong and Wang (2022), arXiv:2106.08567, Theorem 10. The
        upper bound: Doroshenko et al. (2022), arXiv:2207.04380.

    Example:
        >>> from dpsb_accounting import PoissonGaussian
        >>> step = PoissonGaussian(noise_multiplier=1, sampling_prob=0.01)
        >>> print(f"{epsilon([(step, 1000)], delta=1e-5).upper:.3f}")
        1.828
    """
    choices, delta, neighboring, unit = _asked(schedule, delta, neighboring)
    low, high, method = _worst(engines.epsilon(choice, delta, neighboring) for choice in choices)
    return Bound(lower=low, upper=high, delta=delta, neighboring=neighboring, unit=unit, method=method)


def spent(ledger: LedgerRecord, delta: float | None = None) -> Bound:
    """Bounds epsilon of the steps charged so far: information, not a claim.

    Args:
        ledger: A ledger or its record; an unfinished last line of a record counts as charged.
        delta: In (0, 1); left out it is the plan's. Public.

    Returns:
        The bounds on epsilon. A run that stopped for a reason in the data must still claim `epsilon(ledger)`.
    """
    if not isinstance(ledger, LedgerRecord):
        raise ValueError(f"ledger must be a ledger or its record, not {ledger!r}")
    plan = ledger.plan
    parts = [(phase.event, ledger.charged(phase.name)) for phase in plan.phases]
    delta = plan.delta if delta is None else delta
    found = epsilon([part for part in parts if part[1]], delta, plan.neighboring)
    return Bound(
        lower=found.lower,
        upper=found.upper,
        delta=delta,
        neighboring=plan.neighboring,
        unit=plan.unit,
        method=found.method,
    )


def delta(schedule: Schedule, epsilon: float, neighboring: str | None = None) -> Bound:
    """Bounds delta of a whole schedule at `epsilon`; the inverse of the function `epsilon`, same rules.

    Args:
        schedule: As for `epsilon`.
        epsilon: At least 0, finite. Public.
        neighboring: As for `epsilon`.

    Returns:
        The bounds on delta; the bound's own `delta` is None and its `epsilon` is the one given. Public.
    """
    at = _checks.nonnegative(epsilon=epsilon)
    choices, _, neighboring, unit = _asked(schedule, 0.5, neighboring)
    low, high, method = _worst(engines.delta(choice, at, neighboring) for choice in choices)
    return Bound(lower=low, upper=high, delta=None, epsilon=at, neighboring=neighboring, unit=unit, method=method)


def _worst(found: Iterable[engines.Ends]) -> engines.Ends:
    """The worst of the alternatives that parallel events leave: both ends are maxima."""
    ends = list(found)
    if len(ends) == 1:
        return ends[0]
    worst = max(ends, key=lambda end: end[1])
    return max(end[0] for end in ends), worst[1], f"worst of {len(ends)} parallel alternatives: {worst[2]}"


def _asked(
    schedule: Schedule, delta: float | None, neighboring: str | None
) -> tuple[tuple[Composition, ...], float, str, str]:
    plan = schedule.plan if isinstance(schedule, LedgerRecord) else schedule
    unit = plan.unit if isinstance(plan, Plan) else "example"
    if isinstance(plan, Plan):
        delta = plan.delta if delta is None else delta
        neighboring = plan.neighboring if neighboring is None else neighboring
        if not plan.num_examples_declared and neighboring == "add_or_remove_one":
            raise ValueError(
                "neighboring='add_or_remove_one' does not hold for this plan: its number of examples was not declared"
            )
    elif delta is None:
        raise ValueError("delta must be given where there is no plan to take it from")
    choices = alternatives(parts_of(plan.phases if isinstance(plan, Plan) else plan))
    delta = _checks.probability(open_interval=True, delta=delta)
    neighboring = _checks.one_of(choices=_checks.RELATIONS, neighboring=neighboring or "add_or_remove_one")
    return choices, delta, neighboring, unit


def parts_of(entries: Iterable[Phase | Event | tuple[Event, int]]) -> list[tuple[Event, int]]:
    """Returns the events with their counts that phases, events or pairs stand for."""
    single: tuple[object, ...] = (entries,) if isinstance(entries, (*EVENT_CLASSES, Phase)) else tuple(entries)
    parts: list[tuple[Event, int]] = []
    for entry in single:
        if isinstance(entry, Phase):
            parts.append((entry.event, entry.count))
        elif isinstance(entry, EVENT_CLASSES):
            parts.append((entry, 1))
        elif isinstance(entry, tuple) and len(entry) == 2:
            parts.append((entry[0], _checks.whole(at_least=0, count=entry[1])))
        else:
            raise ValueError(f"schedule must hold phases, events or (event, count) pairs, not {entry!r}")
    return parts
