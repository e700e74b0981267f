r"""Group privacy: what an accounting per example means for a person with several examples.

Two ways, of which the tighter that is valid is taken:

* Sums know the person: with at most k examples of clip norm C, a Gaussian sum moves by kC, and with Poisson sampling by
  jC where j is Binomial(k, q) (Choquette-Choo et al. 2023, arXiv:2310.15526), so the event is replaced by that of
  the person (`for_unit`).
* For anything else k changes of one example: :math:`(k\epsilon, \delta \sum_{i<k} e^{i\epsilon})` from
  :math:`(\epsilon, \delta)` (Vadhan 2017, Lemma 2.2).
"""

from __future__ import annotations

import math

from dpsb_accounting import _checks, accountant
from dpsb_accounting.accountant import Schedule
from dpsb_accounting.bound import Bound
from dpsb_accounting.engines import ResourceLimit, steps
from dpsb_accounting.events import (
    ApproximateDP,
    Composed,
    DiscreteLaplace,
    Event,
    Gaussian,
    Laplace,
    MatrixMechanism,
    NonPrivate,
    PoissonGaussian,
    PureEpsilon,
    RandomSelection,
    Repeated,
    Zcdp,
    user_mixture,
)
from dpsb_accounting.ledger import LedgerRecord
from dpsb_accounting.plan import Plan


def for_unit(event: Event, examples_per_unit: int) -> Event | None:
    """Returns the event that a unit of at most k examples sees where one example sees `event`; None if none is known.

    Not for parallel events, since the examples of one person may lie in different parts.

    Example:
        >>> for_unit(Gaussian(noise_multiplier=6), 3)
        Gaussian(noise_multiplier=2.0)
    """
    most = _checks.whole(at_least=1, examples_per_unit=examples_per_unit)
    if most == 1 or isinstance(event, NonPrivate):
        return event
    if isinstance(event, Repeated):
        inner = for_unit(event.event, most)
        return None if inner is None else Repeated(event=inner, count=event.count)
    if isinstance(event, Composed):
        found = [for_unit(child, most) for child in event.events]
        known = tuple(child for child in found if child is not None)
        return Composed(events=known) if len(known) == len(found) else None
    if isinstance(event, RandomSelection):
        inner = for_unit(event.event, most)
        return None if inner is None else RandomSelection(event=inner, mean_runs=event.mean_runs, shape=event.shape)
    return _release_for_unit(event, most)


def _release_for_unit(event: Event, most: int) -> Event | None:
    if isinstance(event, Gaussian):
        return Gaussian(noise_multiplier=event.noise_multiplier / most)
    if isinstance(event, PoissonGaussian):
        return user_mixture(
            noise_multiplier=event.noise_multiplier, sampling_prob=event.sampling_prob, examples_per_unit=most
        )
    if isinstance(event, MatrixMechanism):
        return MatrixMechanism(noise_multiplier=event.noise_multiplier, sensitivity=event.sensitivity * most)
    if isinstance(event, Laplace):
        return Laplace(noise_multiplier=event.noise_multiplier / most)
    if isinstance(event, DiscreteLaplace):
        return DiscreteLaplace(noise_parameter=event.noise_parameter, sensitivity=event.sensitivity * most)
    if isinstance(event, PureEpsilon):
        return PureEpsilon(epsilon=event.epsilon * most)
    if isinstance(event, ApproximateDP):
        grown = event.delta * math.exp(min(steps.log_growth(event.epsilon, most), 700.0))
        if grown >= 1:
            return NonPrivate(reason=f"({event.epsilon:g}, {event.delta:g})-DP says nothing about {most} examples")
        return ApproximateDP(epsilon=event.epsilon * most, delta=grown)
    if isinstance(event, Zcdp):
        harmonic = math.fsum(1 / i for i in range(1, most + 1))
        return Zcdp(rho=event.rho * most**2, xi=event.xi * most * harmonic)  # Bun and Steinke (2016), Prop. 1.9
    return None


def group_epsilon(
    schedule: Schedule,
    examples_per_unit: int,
    delta: float | None = None,
    neighboring: str | None = None,
    unit: str = "user",
) -> Bound:
    """Bounds epsilon for a person with at most k examples, where the schedule is accounted per example.

    Guarantees: upper ≥ true value, for every mechanism that the schedule states; the examples of a person are
        sampled independently of each other where sampling is.

    Args:
        schedule: As for `epsilon`.
        examples_per_unit: k, at least 1; must be enforced on the data. Public.
        delta: As for `epsilon`.
        neighboring: As for `epsilon`, of the person with all examples.
        unit: What the bound is for, such as "user".

    Raises:
        ResourceLimit: If no finite bound can be computed.
    """
    most = _checks.whole(at_least=1, examples_per_unit=examples_per_unit)
    plan = schedule.plan if isinstance(schedule, LedgerRecord) else schedule
    if isinstance(plan, Plan):
        delta, neighboring = plan.delta if delta is None else delta, neighboring or plan.neighboring
        parts = accountant.parts_of(plan.phases)
    else:
        parts = accountant.parts_of(plan)
    at = _checks.probability(open_interval=True, delta=delta)
    relation = _checks.one_of(choices=_checks.RELATIONS, neighboring=neighboring or "add_or_remove_one")
    together = Composed(events=tuple(Repeated(event=event, count=count) for event, count in parts if count))
    known = for_unit(together, most)
    if known is not None:
        found = accountant.epsilon([known], at, relation)
        lower, upper, method = found.lower, found.upper, found.method
    else:
        lower, upper, method = _by_steps(together, most, at, relation)
    return Bound(
        lower=lower, upper=upper, delta=at, neighboring=relation, unit=unit, method=f"{most} examples: {method}"
    )


def _by_steps(event: Event, most: int, delta: float, neighboring: str) -> tuple[float, float, str]:
    def upper(at: float) -> tuple[float, tuple[object, ...]]:
        bound = accountant.epsilon([event], at, neighboring)
        return bound.upper, (bound.method,)

    found = steps.least(upper, delta, most)
    if found is None:
        raise ResourceLimit(f"no finite bound for {most} examples per unit can be computed at delta={delta!r}")
    one = accountant.epsilon([event], delta, neighboring)  # one example is one of the things a person may change
    return min(one.lower, found[0]), found[0], f"group privacy, {most} steps; each {found[1][0]}"
