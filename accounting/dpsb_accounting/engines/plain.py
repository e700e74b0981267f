"""The bounds that always exist: sums without their sampling, stated guarantees added up."""

from __future__ import annotations

import math

from dpsb_accounting import gaussian
from dpsb_accounting.composition import Composition
from dpsb_accounting.events import (
    ApproximateDP,
    DiscreteLaplace,
    Event,
    Laplace,
    PoissonLaplace,
    PureEpsilon,
    RandomizedResponse,
    SampledWithoutReplacementGaussian,
    TruncatedPoissonGaussian,
    UserMixture,
)


def epsilon(composition: Composition, delta: float, neighboring: str) -> float:
    """Returns an upper bound on epsilon of a resolved composition; infinite where an event has none of this kind.

    Which units are drawn does not depend on their values, so sampling can be given away; then all Gaussian sums are
    one Gaussian, exact at what delta the others leave, and the epsilons of the others are added.
    """
    noise, pure, lost = _given_away(composition, neighboring)
    rest = delta - lost * (1 + 1e-9)
    if rest <= 0 or math.isinf(pure):
        return math.inf
    return (gaussian.epsilon(noise, rest)[1] if math.isfinite(noise) else 0.0) + pure * (1 + 1e-12)


def delta(composition: Composition, epsilon: float, neighboring: str) -> float:
    """Returns an upper bound on delta of a resolved composition at `epsilon`."""
    noise, pure, lost = _given_away(composition, neighboring)
    left = epsilon - pure * (1 + 1e-12)
    if left < 0:
        return 1.0
    return min(1.0, (gaussian.delta(noise, left)[1] if math.isfinite(noise) else 0.0) + lost * (1 + 1e-9))


def _given_away(composition: Composition, neighboring: str) -> tuple[float, float, float]:
    """(noise of the one Gaussian over its sensitivity, sum of pure epsilons, sum of deltas)."""
    steps = 2 if neighboring == "replace_one" else 1
    noises = [(part.noise_multiplier, part.count) for part in composition.subsampled]
    if math.isfinite(composition.noise_multiplier):
        noises.append((composition.noise_multiplier, 1))
    pure, lost = 0.0, 0.0
    for event, count in composition.others:
        if isinstance(event, (SampledWithoutReplacementGaussian, TruncatedPoissonGaussian)):
            noises.append((event.noise_multiplier, count))
        elif isinstance(event, UserMixture):
            noises.append((event.noise_multiplier / max(event.sensitivities), count))
        else:
            epsilon, delta = stated(event, steps)
            pure, lost = pure + count * epsilon, lost + count * delta
    return gaussian.composed(sorted(noises)) / steps, pure, lost


def stated(event: Event, steps: int) -> tuple[float, float]:
    """(epsilon, delta) that one release certainly has after `steps` changes of a unit; infinite if it has none."""
    if isinstance(event, PureEpsilon):
        return steps * event.epsilon, 0.0
    if isinstance(event, ApproximateDP):
        slack = event.delta * (1 + math.exp(min(event.epsilon, 700.0))) if steps == 2 else event.delta
        return steps * event.epsilon, min(slack, 1.0)
    if isinstance(event, (Laplace, PoissonLaplace)):
        return steps / event.noise_multiplier, 0.0
    if isinstance(event, DiscreteLaplace):
        return steps * event.noise_parameter * event.sensitivity, 0.0
    if isinstance(event, RandomizedResponse):
        # Replacing changes the two ends; a report at random instead is between them.
        buckets, rate = event.num_buckets, event.noise_parameter
        return math.log1p(buckets * (1 - rate) / rate), 0.0
    return math.inf, 0.0
