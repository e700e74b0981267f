"""Events: what one release of a mechanism was, as small frozen facts.

Compatibility constitution. A ledger outlives the program that wrote it, so:

* an event states its maths completely: whoever has the event needs no code of ours to know the mechanism;
* fields may only be added, and only as optional ones whose absence means what the event meant before;
* the meaning of a field never changes, not even to correct it: a corrected event gets a new tag;
* an event or a field that a reader does not know is refused, never skipped;
* a reader picks the class from an allow-list, never by importing a name found in a file.

Every event here is about one aggregate query: each unit contributes a vector of L2 norm at most C
(`l2_clip_norm`), the vectors are summed, and Gaussian noise is added to each coordinate of the sum.
`noise_multiplier` is the standard deviation of that noise divided by C, **for every neighbouring relation**;
an engine applies the relation. (So a Gaussian with noise multiplier 2 under replace_one, where the sum can
move by 2C, is as private as noise multiplier 1 under add_or_remove_one.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from dpsb_accounting import _checks


@dataclass(frozen=True, kw_only=True, slots=True)
class Gaussian:
    r"""The sum over *all* units is released with Gaussian noise.

    :math:`M(x) = \sum_i x_i + N(0, (\sigma C)^2 I)` with :math:`\|x_i\| \le C`.

    Args:
        noise_multiplier: :math:`\sigma > 0`, noise standard deviation divided by C. Public.

    References:
        Balle and Wang (2018), arXiv:1805.06530.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_multiplier", _checks.positive(noise_multiplier=self.noise_multiplier))


@dataclass(frozen=True, kw_only=True, slots=True)
class PoissonGaussian:
    r"""Each unit is included independently with probability q; the sum of the included gets Gaussian noise.

    :math:`M(x) = \sum_{i} b_i x_i + N(0, (\sigma C)^2 I)`, :math:`b_i \sim \mathrm{Bernoulli}(q)`
    independent, :math:`\|x_i\| \le C`. An empty draw is a release like any other. The observer sees the sum,
    not the :math:`b_i` and not how many were drawn.

    Args:
        noise_multiplier: :math:`\sigma > 0`, noise standard deviation divided by C. Public.
        sampling_prob: :math:`q \in (0, 1]`, per unit and per release. Public.

    References:
        Abadi et al. (2016), arXiv:1607.00133; Zhu, Dong and Wang (2022), arXiv:2106.08567.
    """

    noise_multiplier: float
    sampling_prob: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_multiplier", _checks.positive(noise_multiplier=self.noise_multiplier))
        object.__setattr__(self, "sampling_prob", _checks.probability(sampling_prob=self.sampling_prob))


@dataclass(frozen=True, kw_only=True, slots=True)
class NonPrivate:
    """Something was released with no privacy guarantee at all: every epsilon is infinite from here on.

    Args:
        reason: What was released, in words. Public.
    """

    reason: str

    def __post_init__(self) -> None:
        _checks.text(reason=self.reason)


Event: TypeAlias = Gaussian | PoissonGaussian | NonPrivate

EVENT_TYPES: Mapping[str, type[Gaussian] | type[PoissonGaussian] | type[NonPrivate]] = {
    "gaussian": Gaussian,
    "poisson_gaussian": PoissonGaussian,
    "non_private": NonPrivate,
}
_TAGS = {event_type: tag for tag, event_type in EVENT_TYPES.items()}


def event_to_json(event: Event) -> dict[str, object]:
    """Returns the event as a JSON object, by tag.

    Example:
        >>> event_to_json(PoissonGaussian(noise_multiplier=1, sampling_prob=0.01))
        {'type': 'poisson_gaussian', 'noise_multiplier': 1.0, 'sampling_prob': 0.01}
    """
    tag = _TAGS.get(type(event))
    if tag is None:
        raise ValueError(f"event must be one of {', '.join(EVENT_TYPES)}, not {event!r}")
    return {"type": tag, **dataclasses.asdict(event)}


def event_from_json(data: object) -> Event:
    """Returns the event that a JSON object states.

    Guarantees: the class comes from an allow-list; nothing is imported or executed by a name found in the
        data.

    Args:
        data: A mapping `{"type": tag, field: value, ...}` with exactly the fields of that event.

    Raises:
        ValueError: If the tag or a field is unknown, a field is missing, or a value is out of range.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"an event must be a JSON object, not {data!r}")
    tag = data.get("type")
    event_type = EVENT_TYPES.get(tag) if isinstance(tag, str) else None
    if event_type is None:
        raise ValueError(f"event type must be one of {', '.join(EVENT_TYPES)}, not {tag!r}")
    fields = {name: value for name, value in data.items() if name != "type"}
    refuse_other_fields(f"event {tag!r}", fields, {field.name for field in dataclasses.fields(event_type)})
    return event_type(**fields)


def refuse_other_fields(what: str, data: Mapping[str, object], expected: set[str]) -> None:
    """Raises ValueError unless `data` has exactly the `expected` fields."""
    unknown, missing = sorted(set(data) - expected), sorted(expected - set(data))
    if unknown:
        raise ValueError(f"{what} has unknown fields: {', '.join(map(repr, unknown))}")
    if missing:
        raise ValueError(f"{what} lacks fields: {', '.join(map(repr, missing))}")
