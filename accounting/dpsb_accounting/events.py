"""Events: what one release of a mechanism was, as small frozen facts.

Compatibility constitution. A ledger outlives the program that wrote it, so:

* an event states its maths completely: whoever has the event needs no code of ours to know the mechanism;
* fields may only be added, and only as optional ones whose absence means what the event meant before;
* the meaning of a field never changes, not even to correct it: a corrected event gets a new tag;
* an event or a field that a reader does not know is refused, never skipped;
* a reader picks the class from an allow-list, never by importing a name found in a file.

Most events are about one aggregate query: each unit contributes a vector of L2 norm at most C
(`l2_clip_norm`), the vectors are summed, and Gaussian noise is added to each coordinate of the sum.
`noise_multiplier` is the standard deviation of that noise divided by C, **for every neighbouring relation**;
an engine applies the relation. (So a Gaussian with noise multiplier 2 under replace_one, where the sum can
move by 2C, is as private as noise multiplier 1 under add_or_remove_one.) The sums are in `sums`, other releases in
`releases`; here are those made of others, and the JSON form of all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from dpsb_accounting import _checks
from dpsb_accounting.releases import (
    ApproximateDP,
    DiscreteLaplace,
    Laplace,
    PoissonLaplace,
    PoissonSkellam,
    PureEpsilon,
    RandomizedResponse,
    Zcdp,
)
from dpsb_accounting.sums import (
    Gaussian,
    MatrixMechanism,
    PoissonGaussian,
    SampledWithoutReplacementGaussian,
    TruncatedPoissonGaussian,
    UserMixture,
    user_mixture,
)

__all__ = [
    "EVENT_CLASSES",
    "EVENT_TYPES",
    "MOST_COUNT",
    "MOST_DEPTH",
    "ApproximateDP",
    "Composed",
    "DiscreteLaplace",
    "Event",
    "Gaussian",
    "Laplace",
    "MatrixMechanism",
    "NonPrivate",
    "Parallel",
    "PoissonGaussian",
    "PoissonLaplace",
    "PoissonSkellam",
    "PureEpsilon",
    "RandomSelection",
    "RandomizedResponse",
    "Repeated",
    "SampledWithoutReplacementGaussian",
    "TruncatedPoissonGaussian",
    "UserMixture",
    "Zcdp",
    "children",
    "contains_non_private",
    "event_from_json",
    "event_to_json",
    "refuse_other_fields",
    "user_mixture",
]

MOST_DEPTH = 50  # of events nested in events
MOST_COUNT = 10**15  # far above any run; beyond, floats no longer count by ones


@dataclass(frozen=True, kw_only=True, slots=True)
class NonPrivate:
    """Something was released with no privacy guarantee at all: every epsilon is infinite from here on.

    Args:
        reason: What was released, in words. Public.
    """

    reason: str

    def __post_init__(self) -> None:
        _checks.text(reason=self.reason)


@dataclass(frozen=True, kw_only=True, slots=True)
class Repeated:
    """The same event `count` times, each release chosen knowing those before.

    Args:
        event: What is repeated. Public.
        count: From 1 to 10^15. Public.
    """

    event: Event
    count: int

    def __post_init__(self) -> None:
        _require_events("event", [self.event])
        object.__setattr__(self, "count", _checks.whole(at_least=1, count=self.count))
        if self.count > MOST_COUNT:
            raise ValueError(f"count must be at most {MOST_COUNT:.0e}, not {self.count!r}")
        _require_shallow(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Composed:
    """Several events on the same data, each chosen knowing those before; none at all is nothing released.

    Args:
        events: What is composed. Public.
    """

    events: tuple[Event, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "events", _event_tuple(self.events))
        _require_shallow(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallel:
    """Events on parts of the data that are disjoint: each unit is in one part, so the worst one counts.

    The parts must be fixed without looking at the data. In a repetition a unit may be in another part each
    time.

    Args:
        events: One for each part, at least one. Public.

    References:
        McSherry (2009), Theorem 4; adaptively, since the releases about the other parts do not depend on the unit.
    """

    events: tuple[Event, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "events", _event_tuple(self.events))
        if not self.events:
            raise ValueError("events of a parallel composition must not be empty")
        _require_shallow(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomSelection:
    r"""A mechanism is run a random number of times K, and only the best output, with its score, is released.

    K must be drawn from the stated law, independently of the data, and kept secret; running a fixed number of times
    is not this event. Only Rényi divergences of the run are used.

    Args:
        event: One run: anything composed, score included. Public.
        mean_runs: Mean of K. Public.
        shape: Law of K: 0 logarithmic, 1 geometric, another positive number truncated negative binomial,
            infinite Poisson (where no run at all is possible). Public.

    References:
        Papernot and Steinke (2021), arXiv:2110.03620, Theorems 2 and 6.
    """

    event: Event
    mean_runs: float
    shape: float

    def __post_init__(self) -> None:
        _require_events("event", [self.event])
        put = object.__setattr__
        put(self, "mean_runs", _checks.number(mean_runs=self.mean_runs))
        put(self, "shape", _checks.nonnegative(infinite=True, shape=self.shape))
        if self.mean_runs < 1:
            raise ValueError(f"mean_runs must be at least 1, not {self.mean_runs!r}")
        if self.mean_runs > 1e9 or 1e3 < self.shape < math.inf:
            raise ValueError(
                f"mean_runs={self.mean_runs!r} and shape={self.shape!r} are beyond the range that is computed: "
                "at most 1e9, and at most 1000 or infinite"
            )
        _require_shallow(self)


Event: TypeAlias = (
    Gaussian
    | PoissonGaussian
    | TruncatedPoissonGaussian
    | SampledWithoutReplacementGaussian
    | UserMixture
    | MatrixMechanism
    | Laplace
    | PoissonLaplace
    | DiscreteLaplace
    | PoissonSkellam
    | RandomizedResponse
    | PureEpsilon
    | ApproximateDP
    | Zcdp
    | NonPrivate
    | Repeated
    | Composed
    | Parallel
    | RandomSelection
)

EVENT_TYPES: Mapping[str, type[Event]] = {
    "gaussian": Gaussian,
    "poisson_gaussian": PoissonGaussian,
    "non_private": NonPrivate,
    "truncated_poisson_gaussian": TruncatedPoissonGaussian,
    "sampled_without_replacement_gaussian": SampledWithoutReplacementGaussian,
    "user_mixture": UserMixture,
    "matrix_mechanism": MatrixMechanism,
    "laplace": Laplace,
    "poisson_laplace": PoissonLaplace,
    "discrete_laplace": DiscreteLaplace,
    "poisson_skellam": PoissonSkellam,
    "randomized_response": RandomizedResponse,
    "pure_epsilon": PureEpsilon,
    "approximate_dp": ApproximateDP,
    "zcdp": Zcdp,
    "repeated": Repeated,
    "composed": Composed,
    "parallel": Parallel,
    "random_selection": RandomSelection,
}
EVENT_CLASSES: tuple[type[Event], ...] = tuple(EVENT_TYPES.values())
_TAGS = {event_type: tag for tag, event_type in EVENT_TYPES.items()}


def event_to_json(event: Event) -> dict[str, object]:
    """Returns the event as a JSON object, by tag; an infinite shape becomes the text "inf".

    Example:
        >>> event_to_json(PoissonGaussian(noise_multiplier=1, sampling_prob=0.01))
        {'type': 'poisson_gaussian', 'noise_multiplier': 1.0, 'sampling_prob': 0.01}
    """
    tag = _TAGS.get(type(event))
    if tag is None:
        raise ValueError(f"event must be one of {', '.join(EVENT_TYPES)}, not {event!r}")
    return {"type": tag, **{field.name: _to_json(getattr(event, field.name)) for field in dataclasses.fields(event)}}


def event_from_json(data: object) -> Event:
    """Returns the event that a JSON object states.

    Guarantees: the class comes from an allow-list; nothing is imported or executed by a name found in the
        data.

    Args:
        data: A mapping `{"type": tag, field: value, ...}` with exactly the fields of that event.

    Raises:
        ValueError: If the tag or a field is unknown, a field is missing, or a value is out of range.
    """
    return _from_json(data, 1)


def _from_json(data: object, depth: int) -> Event:
    if not isinstance(data, Mapping):
        raise ValueError(f"an event must be a JSON object, not {data!r}")
    if depth > MOST_DEPTH:
        raise ValueError(f"events must not be nested more than {MOST_DEPTH} deep")
    tag = data.get("type")
    event_type = EVENT_TYPES.get(tag) if isinstance(tag, str) else None
    if event_type is None:
        raise ValueError(f"event type must be one of {', '.join(EVENT_TYPES)}, not {tag!r}")
    fields: dict[str, Any] = {name: value for name, value in data.items() if name != "type"}
    known = dataclasses.fields(event_type)
    optional = {field.name for field in known if field.default is not dataclasses.MISSING}
    refuse_other_fields(f"event {tag!r}", {**dict.fromkeys(optional), **fields}, {field.name for field in known})
    if event_type in (Repeated, RandomSelection):
        fields["event"] = _from_json(fields["event"], depth + 1)
    if event_type in (Composed, Parallel):
        if not isinstance(fields["events"], (list, tuple)):
            raise ValueError(f"events of {tag!r} must be a JSON array, not {fields['events']!r}")
        fields["events"] = tuple(_from_json(entry, depth + 1) for entry in fields["events"])
    if event_type is RandomSelection and fields["shape"] == "inf":
        fields["shape"] = math.inf
    return event_type(**fields)


def _to_json(value: object) -> object:
    if isinstance(value, EVENT_CLASSES):
        return event_to_json(value)
    if isinstance(value, tuple):
        return [_to_json(entry) for entry in value]
    return "inf" if value == math.inf else value


def refuse_other_fields(what: str, data: Mapping[str, object], expected: set[str]) -> None:
    """Raises ValueError unless `data` has exactly the `expected` fields."""
    unknown, missing = sorted(map(str, set(data) - expected)), sorted(expected - set(data))
    if unknown:
        raise ValueError(f"{what} has unknown fields: {', '.join(map(repr, unknown))}")
    if missing:
        raise ValueError(f"{what} lacks fields: {', '.join(map(repr, missing))}")


def _event_tuple(events: object) -> tuple[Event, ...]:
    if not isinstance(events, (tuple, list)):
        raise ValueError(f"events must be a tuple of events, not {events!r}")
    _require_events("events", events)
    return tuple(events)


def _require_events(name: str, values: Iterable[object]) -> None:
    for value in values:
        if not isinstance(value, EVENT_CLASSES):
            raise ValueError(f"{name} must be an event of {', '.join(EVENT_TYPES)}, not {value!r}")


def _require_shallow(event: Event) -> None:
    level: list[Event] = [event]
    for _ in range(MOST_DEPTH):
        level = [child for parent in level for child in children(parent)]
        if not level:
            return
    raise ValueError(f"events must not be nested more than {MOST_DEPTH} deep")


def children(event: Event) -> tuple[Event, ...]:
    """Returns the events of which an event is made; none for a single release."""
    if isinstance(event, (Repeated, RandomSelection)):
        return (event.event,)
    if isinstance(event, (Composed, Parallel)):
        return event.events
    return ()


def contains_non_private(event: Event) -> bool:
    """Whether an event, or anything of which it is made, was released without a guarantee."""
    return isinstance(event, NonPrivate) or any(contains_non_private(child) for child in children(event))
