"""Composition: what is composed, in one canonical form that every engine reads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import TypeAlias

from dpsb_accounting import gaussian
from dpsb_accounting.events import (
    EVENT_CLASSES,
    MOST_COUNT,
    ApproximateDP,
    Composed,
    Event,
    Gaussian,
    Parallel,
    PoissonGaussian,
    PoissonLaplace,
    PureEpsilon,
    Repeated,
    Zcdp,
    contains_non_private,
)
from dpsb_accounting.releases import Laplace

MOST_CHOICES = 64  # compositions of which the worst one counts, where events are parallel
MOST_PARTS = 10_000  # different events in one composition

_Leaves: TypeAlias = Counter[Event]


@dataclass(frozen=True, kw_only=True, slots=True)
class Subsampled:
    """`count` equal Poisson-subsampled Gaussians, sampling_prob < 1."""

    noise_multiplier: float
    sampling_prob: float
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Composition:
    """Events in canonical form: all Gaussians as one, equal other ones merged and sorted.

    So neither the order of the events nor how they were grouped can change a result. An engine that knows only
    Gaussian sums must refuse a composition whose `others` are not empty.

    Args:
        noise_multiplier: Of the one Gaussian that all unsampled Gaussians compose to; infinite if there is
            none.
        subsampled: The subsampled Gaussians, sorted.
        non_private: Whether anything was released without a guarantee.
        others: All other events with their counts, sorted; each a single release or a RandomSelection.
    """

    noise_multiplier: float
    subsampled: tuple[Subsampled, ...]
    non_private: bool
    others: tuple[tuple[Event, int], ...] = ()

    @staticmethod
    def of(parts: Iterable[tuple[Event, int]]) -> Composition:
        """Returns the canonical form of events with their counts; ValueError if it depends on a parallel choice."""
        found = alternatives(parts)
        if len(found) > 1:
            raise ValueError(
                f"events contain a parallel composition with {len(found)} choices; use `alternatives` and take the "
                "worst of them"
            )
        return found[0]

    @property
    def count(self) -> int:
        """How many distributions are convolved, the one Gaussian counted once if there is one."""
        return (
            sum(part.count for part in self.subsampled)
            + sum(count for _, count in self.others)
            + int(self.noise_multiplier != float("inf"))
        )


def alternatives(parts: Iterable[tuple[Event, int]]) -> tuple[Composition, ...]:
    r"""Returns the compositions of which the worst bounds the events: one, unless some are parallel.

    A unit is in one part of each parallel composition, so A composed with a parallel B, C is no worse than the
    worse of A with B and A with C; with several of them, every combination of parts is one alternative.
    Alternatives that another one certainly dominates are left out.

    Raises:
        ValueError: If an entry is no event, or there are more than 64 alternatives.
    """
    totals: Counter[Event] = Counter()
    for event, count in parts:
        if not isinstance(event, EVENT_CLASSES):
            raise ValueError(f"event must be an event that an engine knows, not {event!r}")
        totals[event] += count
    leaves: list[_Leaves] = [Counter()]
    for event, count in totals.items():
        if count:
            leaves = _product(leaves, _expanded(event, count))
    found = {_canonical(entry) for entry in leaves}
    return tuple(sorted(found, key=repr))


def _expanded(event: Event, count: int) -> list[_Leaves]:
    """The alternatives for `count` releases of one event, each as its single releases with their counts."""
    if count > MOST_COUNT:
        raise ValueError(f"counts must multiply to at most {MOST_COUNT:.0e}, not {count!r}")
    if isinstance(event, Repeated):
        return _expanded(event.event, event.count * count)
    if isinstance(event, Composed):
        found: list[_Leaves] = [Counter()]
        for child in event.events:
            found = _product(found, _expanded(child, 1))
        return _times(found, count)
    if isinstance(event, Parallel):
        return _times(_pruned([entry for child in event.events for entry in _expanded(child, 1)]), count)
    return [Counter({event: count})]


def _times(choices: list[_Leaves], count: int) -> list[_Leaves]:
    """Every way to make `count` choices, the order aside."""
    if len(choices) == 1:
        if any(times * count > MOST_COUNT for times in choices[0].values()):
            raise ValueError(f"counts must multiply to at most {MOST_COUNT:.0e}, not {count!r} times the events")
        return [Counter({event: times * count for event, times in choices[0].items()})]
    if math.comb(min(count, MOST_CHOICES) + len(choices) - 1, len(choices) - 1) > MOST_CHOICES:
        raise ValueError(_too_many(f"{len(choices)} parts, {count} times"))
    return [sum(chosen, Counter()) for chosen in combinations_with_replacement(choices, count)]


def _product(left: list[_Leaves], right: list[_Leaves]) -> list[_Leaves]:
    """Every combination of one of each; `left` may be changed, so that long sums take no quadratic time."""
    if len(left) == len(right) == 1:
        left[0].update(right[0])
        _refuse_many(left[0])
        return left
    found = {frozenset(total.items()): total for one in left for other in right for total in [one + other]}
    if len(found) > MOST_CHOICES:
        raise ValueError(_too_many(f"{len(found)} combinations"))
    result = list(found.values())
    for entry in result:
        _refuse_many(entry)
    return result


def _refuse_many(leaves: _Leaves) -> None:
    if len(leaves) > MOST_PARTS:
        raise ValueError(f"a composition must have at most {MOST_PARTS} different events")


def _too_many(what: str) -> str:
    return f"the parallel compositions have {what}: more than {MOST_CHOICES} alternatives to compare"


def _pruned(choices: list[_Leaves]) -> list[_Leaves]:
    """Without those that another one dominates: equal ones, and one weaker sum of the same kind."""
    found = list({frozenset(entry.items()): entry for entry in choices}.values())
    if len(found) == 1:
        return found
    sums = [(_as_sum(entry), entry) for entry in found]
    kept: list[_Leaves] = [entry for sort, entry in sums if sort is None]
    front: list[tuple[tuple[float, float, int], _Leaves]] = []
    for sort, entry in sorted(((s, e) for s, e in sums if s is not None), key=lambda pair: pair[0], reverse=True):
        if not any(all(a <= b for a, b in zip(sort, other, strict=True)) for other, _ in front):
            front.append((sort, entry))
    return kept + [entry for _, entry in front]


def _as_sum(leaves: _Leaves) -> tuple[float, float, int] | None:
    """(-noise, q, count) of repeated equal Gaussian sums: larger in all three is certainly less private."""
    if len(leaves) != 1:
        return None
    ((event, count),) = leaves.items()
    if isinstance(event, Gaussian):
        return -event.noise_multiplier, 1.0, count
    if isinstance(event, PoissonGaussian):
        return -event.noise_multiplier, event.sampling_prob, count
    return None


def _canonical(leaves: _Leaves) -> Composition:
    full: Counter[float] = Counter()
    sampled: Counter[tuple[float, float]] = Counter()
    others: Counter[Event] = Counter()
    non_private = False
    for event, count in leaves.items():
        if contains_non_private(event):
            non_private = True
        elif isinstance(event, PoissonGaussian) and event.sampling_prob < 1:
            sampled[event.noise_multiplier, event.sampling_prob] += count
        elif isinstance(event, (Gaussian, PoissonGaussian)):
            full[event.noise_multiplier] += count
        elif isinstance(event, PoissonLaplace) and event.sampling_prob == 1:
            others[Laplace(noise_multiplier=event.noise_multiplier)] += count
        elif isinstance(event, (PureEpsilon, ApproximateDP, Zcdp)):
            others.update(_stated(event, count))
        else:
            others[event] += count
    return Composition(
        noise_multiplier=gaussian.composed(sorted(full.items())),
        subsampled=tuple(
            Subsampled(noise_multiplier=noise, sampling_prob=prob, count=count)
            for (noise, prob), count in sorted(sampled.items())
        ),
        non_private=non_private,
        others=tuple(sorted(others.items(), key=repr)),
    )


def _stated(event: PureEpsilon | ApproximateDP | Zcdp, count: int) -> dict[Event, int]:
    """A stated guarantee without what says nothing."""
    if isinstance(event, Zcdp):
        return {event: count} if event.rho or event.xi else {}
    if isinstance(event, ApproximateDP) and event.delta:
        return {event: count}
    return {PureEpsilon(epsilon=event.epsilon): count} if event.epsilon else {}
