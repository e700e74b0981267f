"""The curves of a report: every point is a bound that the accountant gives, none is interpolated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dpsb_accounting import accountant, engines
from dpsb_accounting.composition import alternatives
from dpsb_accounting.plan import Plan
from dpsb_accounting.report.words import true_positive_rate

Points = tuple[tuple[float, float], ...]

_DELTAS = (0.3, 0.1, 0.03, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
_STEPS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Opinion:
    """What one engine says of epsilon: its ends, or 0 and infinity where it says nothing; `note` says how or why."""

    name: str
    lower: float
    upper: float
    rigorous: bool
    note: str

    @property
    def says_something(self) -> bool:
        """Whether at least one end is more than what always holds."""
        return self.lower > 0 or math.isfinite(self.upper)


@dataclass(frozen=True, kw_only=True, slots=True)
class Curves:
    """What is plotted of one plan.

    Args:
        steps: Number of training steps, upper bound on epsilon after them at the plan's delta.
        profile: Epsilon, upper bound on delta there, falling.
        errors: False-positive rate, least false-negative rate of any attacker.
        claim_errors: The same, from the one pair (epsilon, delta) of the claim only.
        engines: What each engine says of epsilon.
    """

    steps: Points
    profile: Points
    errors: Points
    claim_errors: Points
    engines: tuple[Opinion, ...]


def curves(plan: Plan, upper: float) -> Curves:
    """Computes the curves of a plan whose claim is finite; takes some seconds.

    Args:
        plan: The plan of a private run.
        upper: The claimed epsilon.
    """
    profile = _profile(plan, upper)
    rates = _rates()
    return Curves(
        steps=_over_steps(plan, upper),
        profile=profile,
        errors=tuple((rate, _least_miss(profile, rate)) for rate in rates),
        claim_errors=tuple((rate, _least_miss(((upper, plan.delta),), rate)) for rate in rates),
        engines=_by_engine(plan),
    )


def _over_steps(plan: Plan, upper: float) -> Points:
    """Epsilon as the run goes on; what other phases cost is there from the start."""
    counts = sorted({max(1, round(plan.steps * i / _STEPS)) for i in range(1, _STEPS)} - {plan.steps})
    others = [(phase.event, phase.count) for phase in plan.phases if phase.name != "train"]
    found: list[tuple[float, float]] = []
    for count in counts:
        try:
            bound = accountant.epsilon([*others, (plan.train.event, count)], plan.delta, plan.neighboring)
        except engines.ResourceLimit:
            continue
        found.append((float(count), bound.upper))
    return (*found, (float(plan.steps), upper))


def _profile(plan: Plan, upper: float) -> Points:
    found = [(upper, plan.delta)]
    for delta in _DELTAS:
        try:
            bound = accountant.epsilon(plan.phases, delta, plan.neighboring)
        except engines.ResourceLimit:
            continue
        if bound.is_finite:
            found.append((bound.upper, delta))
    at_zero = accountant.delta(plan.phases, 0.0, plan.neighboring)
    least = min(delta for epsilon, delta in [*found, (1.0, 1.0)] if epsilon == 0 or delta == 1)
    found = [(epsilon, delta) for epsilon, delta in found if epsilon > 0]
    return tuple(sorted({*found, (0.0, min(at_zero.upper, least))}))


def _least_miss(profile: Points, rate: float) -> float:
    return max(1 - true_positive_rate(epsilon, delta, rate) for epsilon, delta in profile)


def _rates() -> Sequence[float]:
    small = [10 ** (-4 + i / 10) for i in range(20)]
    return [0.0, *small, *(i / 50 for i in range(1, 51))]


def _by_engine(plan: Plan) -> tuple[Opinion, ...]:
    choices = alternatives([(phase.event, phase.count) for phase in plan.phases])
    if len(choices) > 1:  # of parallel parts: each alternative has answers of its own
        bound = accountant.epsilon(plan)
        return (Opinion(name="accountant", lower=bound.lower, upper=bound.upper, rigorous=True, note=bound.method),)
    found = []
    for answer in engines.answers(choices[0], plan.delta, plan.neighboring):
        if isinstance(answer, tuple):
            found.append(Opinion(name=answer[0], lower=0.0, upper=math.inf, rigorous=False, note=answer[1]))
        else:
            found.append(
                Opinion(
                    name=answer.engine,
                    lower=answer.lower,
                    upper=answer.upper,
                    rigorous=answer.rigorous,
                    note=answer.method,
                )
            )
    return tuple(found)
