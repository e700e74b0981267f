"""The way out to dp-accounting: events as its nested JSON and as its objects; the way in is `dp_event`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

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
)

Json = dict[str, object]

# Class name: its fields, and those of them that may be left out.
FIELDS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "NoOpDpEvent": ((), ()),
    "NonPrivateDpEvent": ((), ()),
    "UnsupportedDpEvent": ((), ()),
    "RandomizedResponseDpEvent": (("noise_parameter", "num_buckets"), ()),
    "GaussianDpEvent": (("noise_multiplier",), ()),
    "LaplaceDpEvent": (("noise_multiplier",), ()),
    "DiscreteLaplaceDpEvent": (("noise_parameter", "sensitivity"), ()),
    "SelfComposedDpEvent": (("event", "count"), ()),
    "ComposedDpEvent": (("events",), ()),
    "PoissonSampledDpEvent": (("sampling_probability", "event"), ()),
    "SampledWithReplacementDpEvent": (("source_dataset_size", "sample_size", "event"), ()),
    "SampledWithoutReplacementDpEvent": (("source_dataset_size", "sample_size", "event"), ()),
    "SingleEpochTreeAggregationDpEvent": (("noise_multiplier", "step_counts"), ()),
    "RepeatAndSelectDpEvent": (("event", "mean", "shape"), ()),
    "MixtureOfGaussiansDpEvent": (("standard_deviation", "sensitivities", "sampling_probs"), ()),
    "ZCDpEvent": (("rho", "xi"), ("xi",)),
    "TruncatedSubsampledGaussianDpEvent": (
        ("dataset_size", "sampling_probability", "truncated_batch_size", "noise_multiplier"),
        (),
    ),
    "ParallelComposition": (("events",), ()),
}


def encoded(event: Event) -> Json:
    """An event as the JSON of a dp-accounting object's fields."""
    for event_type, encode in _ENCODERS.items():
        if isinstance(event, event_type):
            return encode(event)
    raise ValueError(f"dp-accounting has no event for {type(event).__name__}")


def _sample(prob: float, event: Json) -> Json:
    return {"type": "PoissonSampledDpEvent", "sampling_probability": prob, "event": event}


def _noise(name: str, noise: float) -> Json:
    return {"type": name, "noise_multiplier": noise}


_ENCODERS: Mapping[type[Any], Callable[[Any], Json]] = {
    Gaussian: lambda e: _noise("GaussianDpEvent", e.noise_multiplier),
    PoissonGaussian: lambda e: _sample(e.sampling_prob, _noise("GaussianDpEvent", e.noise_multiplier)),
    MatrixMechanism: lambda e: _noise("GaussianDpEvent", e.noise_multiplier / e.sensitivity),
    Laplace: lambda e: _noise("LaplaceDpEvent", e.noise_multiplier),
    PoissonLaplace: lambda e: _sample(e.sampling_prob, _noise("LaplaceDpEvent", e.noise_multiplier)),
    NonPrivate: lambda _: {"type": "NonPrivateDpEvent"},
    TruncatedPoissonGaussian: lambda e: {
        "type": "TruncatedSubsampledGaussianDpEvent",
        "dataset_size": e.num_examples,
        "sampling_probability": e.sampling_prob,
        "truncated_batch_size": e.max_batch_size,
        "noise_multiplier": e.noise_multiplier,
    },
    SampledWithoutReplacementGaussian: lambda e: {
        "type": "SampledWithoutReplacementDpEvent",
        "source_dataset_size": e.num_examples,
        "sample_size": e.batch_size,
        "event": _noise("GaussianDpEvent", e.noise_multiplier),
    },
    UserMixture: lambda e: {
        "type": "MixtureOfGaussiansDpEvent",
        "standard_deviation": e.noise_multiplier,
        "sensitivities": list(e.sensitivities),
        "sampling_probs": list(e.probabilities),
    },
    DiscreteLaplace: lambda e: {
        "type": "DiscreteLaplaceDpEvent",
        "noise_parameter": e.noise_parameter,
        "sensitivity": e.sensitivity,
    },
    RandomizedResponse: lambda e: {
        "type": "RandomizedResponseDpEvent",
        "noise_parameter": e.noise_parameter,
        "num_buckets": e.num_buckets,
    },
    Zcdp: lambda e: {"type": "ZCDpEvent", "rho": e.rho, "xi": e.xi},
    Repeated: lambda e: {"type": "SelfComposedDpEvent", "event": encoded(e.event), "count": e.count},
    Composed: lambda e: {"type": "ComposedDpEvent", "events": [encoded(child) for child in e.events]},
    Parallel: lambda e: {"type": "ParallelComposition", "events": [encoded(child) for child in e.events]},
    RandomSelection: lambda e: {
        "type": "RepeatAndSelectDpEvent",
        "event": encoded(e.event),
        "mean": e.mean_runs,
        "shape": "inf" if math.isinf(e.shape) else e.shape,
    },
}


def object_json(event: object, depth: int) -> Json:
    """A dp-accounting object as JSON; by the name of its class, which must be one of dp-accounting's own."""
    import attr
    from dp_accounting import dp_event

    name = type(event).__name__
    if name not in FIELDS or type(event) is not getattr(dp_event, name, None):
        raise ValueError(f"event must be a DpEvent of dp-accounting that is known here, not {type(event).__name__}")
    if depth > MOST_DEPTH:
        raise ValueError(f"events must not be nested more than {MOST_DEPTH} deep")
    found: Json = {"type": name}
    kind: Any = type(event)
    for field in attr.fields(kind):
        value = getattr(event, field.name)
        if field.name == "event":
            found[field.name] = object_json(value, depth + 1)
        elif field.name == "events":
            found[field.name] = [object_json(entry, depth + 1) for entry in value]
        else:
            found[field.name] = _plain(value)
    return found


def object_of(data: Any) -> Any:
    """The dp-accounting object for JSON that `encoded` made; the name is one of FIELDS, never one from a file."""
    from dp_accounting import dp_event

    name = data["type"]
    if name == "ParallelComposition":
        raise ValueError("dp-accounting has no event for Parallel")
    values = {}
    for key in FIELDS[name][0]:
        value = data[key]
        if key == "event":
            value = object_of(value)
        elif key == "events":
            value = [object_of(entry) for entry in value]
        elif key == "shape" and value == "inf":
            value = math.inf
        values[key] = value
    return getattr(dp_event, name)(**values)


def _plain(value: object) -> object:
    """A number as Python's own, so that numpy's pass the checks; lists alike."""
    if isinstance(value, (list, tuple)) or type(value).__module__ == "numpy":
        plain = getattr(value, "tolist", None)
        return plain() if plain is not None else [_plain(entry) for entry in value]  # type: ignore[attr-defined]
    return value
