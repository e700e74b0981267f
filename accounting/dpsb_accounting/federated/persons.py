"""A person with records in several silos that are added up in the same sum."""

from __future__ import annotations

from collections.abc import Sequence

from dpsb_accounting.events import Event, Gaussian, NonPrivate, PoissonGaussian, UserMixture
from dpsb_accounting.plan import Phase


def person_parts(schedules: Sequence[Sequence[Phase]], together: int) -> tuple[tuple[Event, int], ...]:
    r"""Returns what a person with one record in each of `together` silos is exposed to, for the worst choice of silos.

    Each release moves by at most C times the number of the person's records that were drawn, a sum of independent
    Bernoulli variables, one per silo. A stochastically larger number is easier to tell from none: the likelihood
    ratio grows with the sum, and so does the probability of every event {sum > t}. So the silos with the largest
    sampling probabilities and the least noise in the sum are the worst choice, release by release.

    Args:
        schedules: Per silo its phases, with the noise that is certainly in the sums; the same names and counts.
        together: How many silos hold a record of the person.

    Raises:
        ValueError: If a phase releases anything but sums with Gaussian noise.

    References:
        Choquette-Choo et al. (2023), arXiv:2310.15526 (a random number of records dominates any vectors).
    """
    parts: list[tuple[Event, int]] = []
    for phases in zip(*schedules, strict=True):
        events = [phase.event for phase in phases]
        hidden = next((event for event in events if isinstance(event, NonPrivate)), None)
        if hidden is not None:
            parts.append((hidden, phases[0].count))
            continue
        noise, probs = [], []
        for event in events:
            if not isinstance(event, (Gaussian, PoissonGaussian)):
                raise ValueError(
                    f"phase {phases[0].name!r} releases a {type(event).__name__}; records of one person in several "
                    "silos are accounted for only where each release is a Gaussian or a PoissonGaussian"
                )
            noise.append(event.noise_multiplier)
            probs.append(event.sampling_prob if isinstance(event, PoissonGaussian) else 1.0)
        parts.append((drawn_records(min(noise), sorted(probs)[-together:]), phases[0].count))
    return tuple(parts)


def drawn_records(noise_multiplier: float, probs: Sequence[float]) -> Event:
    """Returns the event of records drawn independently with the given probabilities, all of one person.

    Example:
        >>> drawn_records(2.0, [1.0, 1.0])
        Gaussian(noise_multiplier=1.0)
        >>> drawn_records(2.0, [0.5, 0.5]).probabilities
        (0.25, 0.5, 0.25)
    """
    if all(prob == 1 for prob in probs):
        return Gaussian(noise_multiplier=noise_multiplier / len(probs))
    chances = [1.0]
    for prob in probs:
        chances = [
            (chances[drawn] if drawn < len(chances) else 0.0) * (1 - prob)
            + (chances[drawn - 1] * prob if drawn else 0.0)
            for drawn in range(len(chances) + 1)
        ]
    return UserMixture(
        noise_multiplier=noise_multiplier,
        sensitivities=tuple(float(drawn) for drawn in range(len(chances))),
        probabilities=tuple(chances),
    )
