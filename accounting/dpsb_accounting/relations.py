"""Which neighbouring relation an event can be accounted for under, and what follows for a composition.

* add_or_remove_one: a unit is added or removed. Sums move by C.
* zero_out: a unit is replaced by one that contributes zero; the number of units stays. For sums it is the same pair
  of distributions as add_or_remove_one, and the right relation where the number of units or the order is public.
* replace_one: a unit is replaced by any other. Sums move by up to 2C. It is at most two steps of zero_out, which
  bounds it for every event by group privacy of size 2 (see `group`).
"""

from __future__ import annotations

import math

from dpsb_accounting import gaussian
from dpsb_accounting.composition import Composition, Subsampled
from dpsb_accounting.events import (
    Event,
    MatrixMechanism,
    PoissonLaplace,
    PoissonSkellam,
    RandomizedResponse,
    SampledWithoutReplacementGaussian,
    TruncatedPoissonGaussian,
    UserMixture,
    children,
)

_ONLY_FIXED_SIZE = {
    TruncatedPoissonGaussian: "its number of units is public, so adding or removing one hides nothing",
    SampledWithoutReplacementGaussian: "its batches are of fixed size from a public number of units",
    MatrixMechanism: "its order of the data is public, and adding or removing a unit would move all others",
    RandomizedResponse: "the number of reports is public, so adding or removing one hides nothing",
}
_NO_PAIR_FOR_REPLACEMENT = (UserMixture, PoissonLaplace)


def refuse_relation(event: Event, neighboring: str) -> None:
    """Raises ValueError, naming the event and the reason, where it has no meaning under the relation."""
    reason = _ONLY_FIXED_SIZE.get(type(event))
    if reason is not None and neighboring == "add_or_remove_one":
        raise ValueError(
            f"{type(event).__name__} cannot be accounted for under neighboring='add_or_remove_one': {reason}; "
            "use 'zero_out' or 'replace_one'"
        )
    for child in children(event):
        refuse_relation(child, neighboring)


def needs_two_steps(composition: Composition, neighboring: str) -> bool:
    """Whether replace_one has to be bounded by two steps of zero_out, as an event states no pair for it."""
    return neighboring == "replace_one" and any(_has_no_pair(event) for event, _ in composition.others)


def resolved(composition: Composition, neighboring: str) -> Composition:
    """Returns the composition under one relation, with what is a Gaussian sum there taken as one.

    A matrix mechanism is one Gaussian; a mixture of 0 and one sensitivity is Poisson sampling; a batch of all units
    is no sampling.

    Raises:
        ValueError: If an event has no meaning under the relation; the message names it and says why.
    """
    full: list[tuple[float, int]] = []
    sampled = {(part.noise_multiplier, part.sampling_prob): part.count for part in composition.subsampled}
    others: list[tuple[Event, int]] = []
    for event, count in composition.others:
        refuse_relation(event, neighboring)
        simple = _as_gaussian_sum(event)
        if simple is None:
            others.append((event, count))
        elif simple[1] == 1:
            full.append((simple[0], count))
        elif simple[1] > 0:
            sampled[simple] = sampled.get(simple, 0) + count
    if math.isfinite(composition.noise_multiplier):
        full.append((composition.noise_multiplier, 1))
    return Composition(
        noise_multiplier=gaussian.composed(sorted(full)),
        subsampled=tuple(
            Subsampled(noise_multiplier=noise, sampling_prob=prob, count=count)
            for (noise, prob), count in sorted(sampled.items())
        ),
        non_private=composition.non_private,
        others=tuple(others),
    )


def _as_gaussian_sum(event: Event) -> tuple[float, float] | None:
    """(noise multiplier, sampling probability) of an event that is a Gaussian sum; probability 0 if it is nothing."""
    if isinstance(event, MatrixMechanism):
        return event.noise_multiplier / event.sensitivity, 1.0
    if isinstance(event, SampledWithoutReplacementGaussian) and event.batch_size == event.num_examples:
        return event.noise_multiplier, 1.0
    if isinstance(event, TruncatedPoissonGaussian) and event.max_batch_size >= event.num_examples:
        return event.noise_multiplier, event.sampling_prob
    if isinstance(event, UserMixture):
        pairs = zip(event.sensitivities, event.probabilities, strict=True)
        moved = [(size, prob) for size, prob in pairs if size > 0 and prob > 0]
        if not moved:
            return 1.0, 0.0
        if len({size for size, _ in moved}) == 1:
            still = math.fsum(
                prob for size, prob in zip(event.sensitivities, event.probabilities, strict=True) if size == 0
            )
            prob = 1.0 if still == 0 else min(1.0, math.fsum(prob for _, prob in moved) * (1 + 1e-15))
            return event.noise_multiplier / moved[0][0], prob
    return None


def _has_no_pair(event: Event) -> bool:
    if isinstance(event, PoissonSkellam):
        return event.sampling_prob < 1
    return isinstance(event, _NO_PAIR_FOR_REPLACEMENT) or any(_has_no_pair(child) for child in children(event))
