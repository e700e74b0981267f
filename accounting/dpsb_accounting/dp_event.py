"""dp-accounting's `DpEvent`s, read and written: as their objects, and as nested JSON.

The JSON form is `{"type": class name, field: value, ...}` with the class and field names of dp-accounting 0.6, events
inside events, and one addition, `{"type": "ParallelComposition", "events": [...]}`. The class comes from an allow-list;
nothing is imported or run by a name found in a file (dp-accounting's own `from_named_tuple` would).

What a `DpEvent` means is kept, relation included; what no engine here computes is refused by name. A noise of 0 is a
release without a guarantee, a sampling probability of 0 no release at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from dpsb_accounting import _checks, gaussian
from dpsb_accounting._dp_out import FIELDS, Json, encoded, object_json, object_of
from dpsb_accounting.events import (
    MOST_DEPTH,
    Composed,
    DiscreteLaplace,
    Event,
    Gaussian,
    Laplace,
    MatrixMechanism,
    NonPrivate,
    Parallel,
    PoissonGaussian,
    PoissonLaplace,
    RandomizedResponse,
    RandomSelection,
    Repeated,
    SampledWithoutReplacementGaussian,
    TruncatedPoissonGaussian,
    UserMixture,
    Zcdp,
    refuse_other_fields,
)
from dpsb_accounting.participation import tree_sensitivity

_NOTHING = Composed(events=())
_NO_NOISE = NonPrivate(reason="a release without noise")

_REFUSED = {
    "UnsupportedDpEvent": "it stands for something that has no description",
    "SampledWithReplacementDpEvent": "no engine bounds sampling with replacement",
}


def event_from_dp_json(data: object) -> Event:
    """Returns the event that a nested JSON object with dp-accounting's names states.

    Guarantees: the class comes from an allow-list; an unknown type or field, a missing field, or a value out of range
        is refused and named.

    Raises:
        ValueError: As above, or where no engine computes the event.

    Example:
        >>> event_from_dp_json({"type": "PoissonSampledDpEvent", "sampling_probability": 0.01,
        ...                     "event": {"type": "GaussianDpEvent", "noise_multiplier": 1}})
        PoissonGaussian(noise_multiplier=1.0, sampling_prob=0.01)
    """
    return _decoded(data, 1)


def event_to_dp_json(event: Event) -> Json:
    """Returns the event as a nested JSON object with dp-accounting's names.

    The JSON has the same meaning under every relation the event allows, though not always the same form: a matrix
    mechanism becomes the Gaussian that it is. An infinite shape becomes the text "inf".

    Raises:
        ValueError: If dp-accounting has no such event; the message names it.
    """
    return encoded(event)


def from_dp_event(event: object) -> Event:
    """Returns the event that an object of dp-accounting's class states; ValueError where none is computed."""
    return event_from_dp_json(object_json(event, 1))


def to_dp_event(event: Event) -> Any:
    """Returns the event as an object of dp-accounting's classes; ValueError where it has none."""
    return object_of(encoded(event))


def _decoded(data: object, depth: int) -> Event:
    if not isinstance(data, Mapping):
        raise ValueError(f"an event must be a JSON object, not {_short(data)}")
    if depth > MOST_DEPTH:
        raise ValueError(f"events must not be nested more than {MOST_DEPTH} deep")
    name = data.get("type")
    if not isinstance(name, str) or name not in FIELDS:
        raise ValueError(f"event type must be one of {', '.join(FIELDS)}, not {_short(name)}")
    fields: dict[str, Any] = {key: value for key, value in data.items() if key != "type"}
    known, optional = FIELDS[name]
    refuse_other_fields(f"event {name!r}", {**dict.fromkeys(optional), **fields}, set(known))
    if name in _REFUSED:
        raise ValueError(f"{name} cannot be accounted for: {_REFUSED[name]}")
    return _DECODERS[name](fields, depth)


def _nothing(_fields: dict[str, Any], _depth: int) -> Event:
    return _NOTHING


def _non_private(_fields: dict[str, Any], _depth: int) -> Event:
    return NonPrivate(reason="NonPrivateDpEvent")


def _gaussian(fields: dict[str, Any], _depth: int) -> Event:
    noise = _checks.nonnegative(noise_multiplier=fields["noise_multiplier"])
    return Gaussian(noise_multiplier=noise) if noise else _NO_NOISE


def _laplace(fields: dict[str, Any], _depth: int) -> Event:
    noise = _checks.nonnegative(noise_multiplier=fields["noise_multiplier"])
    return Laplace(noise_multiplier=noise) if noise else _NO_NOISE


def _discrete_laplace(fields: dict[str, Any], _depth: int) -> Event:
    return DiscreteLaplace(noise_parameter=fields["noise_parameter"], sensitivity=fields["sensitivity"])


def _randomized_response(fields: dict[str, Any], _depth: int) -> Event:
    rate = _checks.nonnegative(noise_parameter=fields["noise_parameter"])
    buckets = _checks.whole(at_least=1, num_buckets=fields["num_buckets"])
    if rate > 1:
        raise ValueError(f"noise_parameter must be in [0, 1], not {rate!r}")
    if buckets == 1:
        return _NOTHING
    return RandomizedResponse(noise_parameter=rate, num_buckets=buckets) if rate else _NO_NOISE


def _repeated(fields: dict[str, Any], depth: int) -> Event:
    event = _decoded(fields["event"], depth + 1)
    count = _checks.whole(at_least=0, count=fields["count"])
    return Repeated(event=event, count=count) if count else _NOTHING


def _several(fields: dict[str, Any], depth: int) -> tuple[Event, ...]:
    if not isinstance(fields["events"], (list, tuple)):
        raise ValueError(f"events must be a JSON array, not {_short(fields['events'])}")
    return tuple(_decoded(entry, depth + 1) for entry in fields["events"])


def _poisson(fields: dict[str, Any], depth: int) -> Event:
    prob = _probability("sampling_probability", fields["sampling_probability"])
    return _sampled(_decoded(fields["event"], depth + 1), prob)


def _sampled(event: Event, prob: float) -> Event:
    """One Poisson sample on which the event is run."""
    if prob == 0 or event == _NOTHING:
        return _NOTHING
    if isinstance(event, NonPrivate) or prob == 1:
        return event
    if isinstance(event, (PoissonGaussian, Gaussian, PoissonLaplace, Laplace)):
        again = getattr(event, "sampling_prob", 1.0) * prob
        if not again:
            raise ValueError(f"sampling probabilities multiply to less than floats hold: {prob!r}")
        if isinstance(event, (Gaussian, PoissonGaussian)):
            return PoissonGaussian(noise_multiplier=event.noise_multiplier, sampling_prob=again)
        return PoissonLaplace(noise_multiplier=event.noise_multiplier, sampling_prob=again)
    noise = _one_gaussian(event, 1)
    if noise is None:
        raise ValueError(
            f"PoissonSampledDpEvent cannot be accounted for around {type(event).__name__}: engines know Gaussian and "
            "Laplace releases on a Poisson sample, and Gaussians composed on the same sample"
        )
    if noise == math.inf:
        return _NOTHING
    return PoissonGaussian(noise_multiplier=noise, sampling_prob=prob) if noise else _NO_NOISE


def _one_gaussian(event: Event, count: int) -> float | None:
    """The noise multiplier of the one Gaussian to which Gaussians on the same sample compose; None for others."""
    if isinstance(event, Gaussian):
        return event.noise_multiplier / math.sqrt(count)
    if isinstance(event, NonPrivate):
        return 0.0
    if isinstance(event, Repeated):
        return _one_gaussian(event.event, event.count * count)
    if isinstance(event, Composed):
        found = [_one_gaussian(child, count) for child in event.events]
        noises = [noise for noise in found if noise is not None]
        if len(noises) < len(found):
            return None
        return 0.0 if 0.0 in noises else gaussian.composed((noise, 1) for noise in noises)
    return None


def _without_replacement(fields: dict[str, Any], depth: int) -> Event:
    size = _checks.whole(at_least=1, source_dataset_size=fields["source_dataset_size"])
    batch = _checks.whole(at_least=0, sample_size=fields["sample_size"])
    event = _decoded(fields["event"], depth + 1)
    if batch > size:
        raise ValueError(f"sample_size={batch!r} must not exceed source_dataset_size={size!r}")
    noise = _one_gaussian(event, 1)
    if noise is None:
        raise ValueError(
            f"SampledWithoutReplacementDpEvent cannot be accounted for around {type(event).__name__}: only Gaussians "
            "on the same sample are computed"
        )
    if batch == 0 or noise == math.inf:
        return _NOTHING
    if noise == 0:
        return _NO_NOISE
    return SampledWithoutReplacementGaussian(noise_multiplier=noise, batch_size=batch, num_examples=size)


def _tree(fields: dict[str, Any], _depth: int) -> Event:
    noise = _checks.nonnegative(noise_multiplier=fields["noise_multiplier"])
    counts = fields["step_counts"]
    steps = [_checks.whole(at_least=0, step_counts=count) for count in _list(counts)]
    if not steps or max(steps) == 0:
        raise ValueError(f"step_counts must name at least one step, not {_short(counts)}")
    if not noise:
        return _NO_NOISE
    return MatrixMechanism(noise_multiplier=noise, sensitivity=tree_sensitivity(max(steps)))


def _selection(fields: dict[str, Any], depth: int) -> Event:
    shape = math.inf if fields["shape"] in ("inf", "Infinity") else fields["shape"]
    return RandomSelection(event=_decoded(fields["event"], depth + 1), mean_runs=fields["mean"], shape=shape)


def _mixture(fields: dict[str, Any], _depth: int) -> Event:
    noise = _checks.nonnegative(standard_deviation=fields["standard_deviation"])
    sensitivities, probs = _list(fields["sensitivities"]), _list(fields["sampling_probs"])
    event = UserMixture(noise_multiplier=noise or 1.0, sensitivities=tuple(sensitivities), probabilities=tuple(probs))
    return event if noise or not any(event.sensitivities) else _NO_NOISE


def _zcdp(fields: dict[str, Any], _depth: int) -> Event:
    return Zcdp(rho=fields["rho"], xi=fields.get("xi", 0.0))


def _truncated(fields: dict[str, Any], _depth: int) -> Event:
    size = _checks.whole(at_least=0, dataset_size=fields["dataset_size"])
    most = _checks.whole(at_least=0, truncated_batch_size=fields["truncated_batch_size"])
    prob = _probability("sampling_probability", fields["sampling_probability"])
    noise = _checks.nonnegative(noise_multiplier=fields["noise_multiplier"])
    if not size or not most or not prob:
        return _NOTHING
    if not noise:
        return _NO_NOISE
    return TruncatedPoissonGaussian(noise_multiplier=noise, sampling_prob=prob, max_batch_size=most, num_examples=size)


_DECODERS: Mapping[str, Callable[[dict[str, Any], int], Event]] = {
    "NoOpDpEvent": _nothing,
    "NonPrivateDpEvent": _non_private,
    "RandomizedResponseDpEvent": _randomized_response,
    "GaussianDpEvent": _gaussian,
    "LaplaceDpEvent": _laplace,
    "DiscreteLaplaceDpEvent": _discrete_laplace,
    "SelfComposedDpEvent": _repeated,
    "ComposedDpEvent": lambda fields, depth: Composed(events=_several(fields, depth)),
    "PoissonSampledDpEvent": _poisson,
    "SampledWithoutReplacementDpEvent": _without_replacement,
    "SingleEpochTreeAggregationDpEvent": _tree,
    "RepeatAndSelectDpEvent": _selection,
    "MixtureOfGaussiansDpEvent": _mixture,
    "ZCDpEvent": _zcdp,
    "TruncatedSubsampledGaussianDpEvent": _truncated,
    "ParallelComposition": lambda fields, depth: Parallel(events=_several(fields, depth)),
}


def _probability(name: str, value: object) -> float:
    found = _checks.number(**{name: value})  # type: ignore[arg-type]
    if not 0 <= found <= 1:
        raise ValueError(f"{name} must be in [0, 1], not {value!r}")
    return found


def _list(value: object) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
