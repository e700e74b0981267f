"""Composition: what is composed, in one canonical form that every engine reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from dpsb_accounting import gaussian
from dpsb_accounting.events import Event, Gaussian, NonPrivate, PoissonGaussian


@dataclass(frozen=True, kw_only=True, slots=True)
class Subsampled:
    """`count` equal Poisson-subsampled Gaussians, sampling_prob < 1."""

    noise_multiplier: float
    sampling_prob: float
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Composition:
    """Events in canonical form: all Gaussians as one, equal subsampled ones merged and sorted.

    So neither the order of the events nor how they were grouped can change a result.

    Args:
        noise_multiplier: Of the one Gaussian that all unsampled Gaussians compose to; infinite if there is
            none.
        subsampled: The subsampled Gaussians, sorted.
        non_private: Whether anything was released without a guarantee.
    """

    noise_multiplier: float
    subsampled: tuple[Subsampled, ...]
    non_private: bool

    @staticmethod
    def of(parts: Iterable[tuple[Event, int]]) -> Composition:
        """Returns the canonical form of events with their counts; sampling probability 1 is no sampling."""
        full: Counter[float] = Counter()
        sampled: Counter[tuple[float, float]] = Counter()
        non_private = False
        for event, count in parts:
            if isinstance(event, NonPrivate):
                non_private = non_private or count > 0
            elif isinstance(event, PoissonGaussian) and event.sampling_prob < 1:
                sampled[event.noise_multiplier, event.sampling_prob] += count
            elif isinstance(event, (Gaussian, PoissonGaussian)):
                full[event.noise_multiplier] += count
            else:
                raise ValueError(f"event must be an event that an engine knows, not {event!r}")
        subsampled = tuple(
            Subsampled(noise_multiplier=noise, sampling_prob=prob, count=count)
            for (noise, prob), count in sorted(sampled.items())
            if count
        )
        return Composition(
            noise_multiplier=gaussian.composed(sorted(full.items())),
            subsampled=subsampled,
            non_private=non_private,
        )

    @property
    def count(self) -> int:
        """How many distributions are convolved, the one Gaussian counted once if there is one."""
        return sum(part.count for part in self.subsampled) + int(self.noise_multiplier != float("inf"))
