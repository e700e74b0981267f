"""The cross-check: does a second, independent engine agree with the bounds that are claimed?

The claim rests on dp-accounting's distributions and on our binned lower bound (or on the closed form of one
Gaussian). Here an engine that shares no code with them answers the same question, and the two intervals must overlap.
Agreement is evidence against a bug in either; it is never what a bound rests on. Disagreement is recorded, not raised,
and then the larger of the two upper ends is what may be claimed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from dpsb_accounting import _checks, accountant, engines
from dpsb_accounting.accountant import Schedule, parts_of
from dpsb_accounting.composition import Composition, alternatives
from dpsb_accounting.engines.answer import Answer, Unavailable
from dpsb_accounting.ledger import LedgerRecord
from dpsb_accounting.plan import Plan, number_to_json
from dpsb_accounting.relations import needs_two_steps, resolved

SecondEngine: TypeAlias = Callable[[Composition, float, str], Answer]

ABSOLUTE_TOLERANCE = 1e-4
RELATIVE_TOLERANCE = 2e-3  # of epsilon; what was measured between engines is 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossCheck:
    """What a second engine said of an epsilon.

    Args:
        status: "agrees" if the intervals overlap within the tolerance, "disagrees" if not, "none" if no second
            engine answers.
        engine: The second engine's name; None if there was none.
        lower: Lower end of its interval; None if there was none.
        upper: Upper end of its interval; None if there was none.
        claimed: The upper bound that must be claimed: the accountant's, or the larger one on disagreement. Public.
        reason: In one sentence, what was compared, or why nothing was.
    """

    status: str
    engine: str | None
    lower: float | None
    upper: float | None
    claimed: float
    reason: str

    def to_json(self) -> dict[str, object]:
        """Returns the check as a JSON object; an infinite number is the text "inf"."""
        ends = None
        if self.lower is not None and self.upper is not None:
            ends = {"lower": number_to_json(self.lower), "upper": number_to_json(self.upper)}
        return {
            "status": self.status,
            "engine": self.engine,
            "epsilon": ends,
            "claimed": number_to_json(self.claimed),
            "reason": self.reason,
        }


def cross_check(
    schedule: Schedule | Composition, delta: float | None = None, neighboring: str | None = None
) -> CrossCheck:
    """Compares the accountant's bounds on epsilon with those of a second engine.

    Guarantees: raises nothing because of a disagreement; `claimed` is never below the accountant's upper bound.

    Args:
        schedule: As for `epsilon`; or a composition.
        delta: In (0, 1); may be left out where there is a plan. Public.
        neighboring: "add_or_remove_one", "zero_out" or "replace_one"; as for `epsilon`. Public.

    Returns:
        What the second engine said. Public.

    Raises:
        ValueError: If an argument is out of range.
        ResourceLimit: If the accountant itself cannot answer.

    Example:
        >>> from dpsb_accounting import PoissonGaussian
        >>> step = PoissonGaussian(noise_multiplier=1, sampling_prob=0.01)
        >>> found = cross_check([(step, 1000)], delta=1e-5)
        >>> found.status, found.engine, f"{found.upper:.6f}"
        ('agrees', 'quadrature', '1.828237')
    """
    if isinstance(schedule, Composition):
        relation = _checks.one_of(choices=_checks.RELATIONS, neighboring=neighboring or "add_or_remove_one")
        if delta is None:
            raise ValueError("delta must be given with a composition")
        delta = _checks.probability(open_interval=True, delta=delta)
        low, high, _ = engines.epsilon(schedule, delta, relation)
        return _compare((schedule,), delta, relation, (low, high))
    plan = schedule.plan if isinstance(schedule, LedgerRecord) else schedule
    parts = parts_of(plan.phases if isinstance(plan, Plan) else plan)
    claimed = accountant.epsilon(schedule if isinstance(plan, Plan) else parts, delta, neighboring)
    at = plan.delta if delta is None and isinstance(plan, Plan) else delta
    if at is None:
        raise ValueError("delta must be given where there is no plan to take it from")
    return _compare(alternatives(parts), at, claimed.neighboring, (claimed.lower, claimed.upper))


def second_opinion(composition: Composition, delta: float, neighboring: str) -> Answer:
    """Returns the answer of the first engine that has one, among those that share no code with the accountant's.

    Raises:
        Unavailable: If none has; the message gives every engine's reason.
    """
    if needs_two_steps(composition, neighboring):
        raise Unavailable("replace_one is bounded by two steps of zero_out here")
    parts = resolved(composition, neighboring)
    reasons = []
    for engine in SECOND_ENGINES:
        try:
            return engine(parts, delta, neighboring)
        except Unavailable as refusal:
            reasons.append(str(refusal))
    raise Unavailable("; ".join(dict.fromkeys(reasons)))


def _compare(
    choices: tuple[Composition, ...], delta: float, neighboring: str, claimed: tuple[float, float]
) -> CrossCheck:
    low, high = claimed
    if math.isinf(high):
        return _nothing(high, "epsilon is infinite, so there is nothing to check")
    if high == 0:
        return _nothing(high, "nothing was released, so there is nothing to check")
    try:
        answers = [second_opinion(choice, delta, neighboring) for choice in choices]
    except Unavailable as refusal:
        return _nothing(high, f"no second engine answers: {refusal}")
    # A unit meets only one of several parallel alternatives, so the largest counts.
    lower, upper = max(answer.lower for answer in answers), max(answer.upper for answer in answers)
    engine = "+".join(dict.fromkeys(answer.engine for answer in answers))
    tolerance = max(ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE * high)
    agrees = lower <= high + tolerance and low <= upper + tolerance
    looser = high if agrees else max(high, upper)
    found = f"{engine} finds [{lower:.6g}, {upper:.6g}] beside the accountant's [{low:.6g}, {high:.6g}]"
    return CrossCheck(
        status="agrees" if agrees else "disagrees",
        engine=engine,
        lower=lower,
        upper=upper,
        claimed=looser,
        reason=found if agrees else f"{found}: they do not overlap, so the looser bound, {looser:.6g}, is the claim",
    )


def _nothing(high: float, reason: str) -> CrossCheck:
    return CrossCheck(status="none", engine=None, lower=None, upper=None, claimed=high, reason=reason)


def _quadrature(composition: Composition, delta: float, neighboring: str) -> Answer:
    from dpsb_accounting.engines import quadrature

    return quadrature.epsilon(composition, delta, neighboring)


def _prv(composition: Composition, delta: float, neighboring: str) -> Answer:
    from dpsb_accounting.engines import prv

    return prv.epsilon(composition, delta, neighboring)


# In this order; the central limit estimate is not among them and never may be.
SECOND_ENGINES: tuple[SecondEngine, ...] = (_quadrature, _prv)
