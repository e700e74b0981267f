"""Plan: everything a run may do to the sensitive data, fixed and public before any of it is read."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from dpsb_accounting import _checks
from dpsb_accounting.events import (
    EVENT_CLASSES,
    Event,
    Gaussian,
    NonPrivate,
    PoissonGaussian,
    PoissonSkellam,
    contains_non_private,
    event_from_json,
    event_to_json,
    refuse_other_fields,
)
from dpsb_accounting.relations import refuse_relation

UNITS = ("example", "user", "client")
CLIPPINGS = ("flat", "automatic", "adaptive", "none")
ACCESSES = ("data_free", "public", "released", "non_private")
_LEAST_NOISE_STD, _MOST_NOISE_STD = 1e-100, 1e100  # beyond, sums and squares underflow or overflow


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the schedule: `count` releases of the same event under one name.

    Args:
        name: Such as "basis" or "train"; unique in a plan. Public.
        event: What each release is. Public.
        count: How many releases may be charged, at least 1. Public.
    """

    name: str
    event: Event
    count: int

    def __post_init__(self) -> None:
        _checks.text(name=self.name)
        if not isinstance(self.event, EVENT_CLASSES):
            raise ValueError(f"event of phase {self.name!r} must be an event, not {self.event!r}")
        object.__setattr__(self, "count", _checks.whole(at_least=1, count=self.count))

    def to_json(self) -> dict[str, object]:
        """Returns the phase as a JSON object."""
        return {"name": self.name, "event": event_to_json(self.event), "count": self.count}

    @staticmethod
    def from_json(data: object) -> Phase:
        """Returns the phase that a JSON object states; refuses unknown and missing fields."""
        if not isinstance(data, Mapping):
            raise ValueError(f"a phase must be a JSON object, not {data!r}")
        refuse_other_fields("phase", data, {"name", "event", "count"})
        return Phase(data["name"], event_from_json(data["event"]), data["count"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    r"""One frozen object from which the sampler, the clip norm, the noise and the accounting all come.

    Guarantees: every field is public and was chosen without looking at the sensitive data; no field repeats
    another, except `sampling_prob`, which is checked to be the one of the train event; the JSON form restores
    every float exactly.

    Args:
        phases: Everything that may be charged, in order; one of them is named "train". A later phase may
            begin before an earlier one is used up, but the earlier one is closed from then on.
        delta: In (0, 1); for a private plan less than 1 / num_examples.
        target_epsilon: What the user asked for; may be infinite.
        neighboring: "add_or_remove_one", "zero_out" or "replace_one".
        unit: Whose data is protected: "example", "user" or "client".
        num_examples: Number of units N. A declared public number, or else the true one.
        num_examples_declared: Whether N was declared without looking at the data. If not, the true number
            counts as public, and the relation must keep it fixed.
        expected_batch_size: The public divisor of the noisy sum; at least 1.
        sampling_prob: q in (0, 1], what the sampler uses.
        l2_clip_norm: C > 0; infinite only if nothing is private. The noise of a private training step, C times
            its noise multiplier, must be between 1e-100 and 1e100.
        clipping: "flat", "automatic", "adaptive" (C follows a quantile of the norms, from `l2_clip_norm` on; each
            release is the clipped sum and a count, and the train event covers both) or "none" (only if nothing is
            private).
        basis: Where the frozen basis comes from: {"kind": ..., "access": "data_free" | "public" | "released"
            | "non_private", ...}.
        details: Further public facts: model, rank, targets, labels, learning rate, versions...

    Raises:
        ValueError: If a field is out of range or contradicts another; the message says why.
    """

    phases: tuple[Phase, ...]
    delta: float
    target_epsilon: float
    neighboring: str
    unit: str = "example"
    num_examples: int
    num_examples_declared: bool
    expected_batch_size: int
    sampling_prob: float
    l2_clip_norm: float
    clipping: str
    basis: Mapping[str, object]
    details: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "phases", _phases(self.phases))
        put(self, "delta", _checks.probability(open_interval=True, delta=self.delta))
        put(self, "target_epsilon", _checks.positive(infinite=True, target_epsilon=self.target_epsilon))
        _checks.one_of(choices=_checks.RELATIONS, neighboring=self.neighboring)
        _checks.one_of(choices=UNITS, unit=self.unit)
        put(self, "num_examples", _checks.whole(at_least=1, num_examples=self.num_examples))
        _checks.flag(num_examples_declared=self.num_examples_declared)
        put(
            self,
            "expected_batch_size",
            _checks.whole(at_least=1, expected_batch_size=self.expected_batch_size),
        )
        put(self, "sampling_prob", _checks.probability(sampling_prob=self.sampling_prob))
        put(self, "l2_clip_norm", _checks.positive(infinite=True, l2_clip_norm=self.l2_clip_norm))
        _checks.one_of(choices=CLIPPINGS, clipping=self.clipping)
        put(self, "basis", _json_copy("basis", self.basis))
        put(self, "details", _json_copy("details", self.details))
        self._check_together()

    def _check_together(self) -> None:
        non_private = [contains_non_private(phase.event) for phase in self.phases]
        if not all(non_private):
            self.check_delta(self.delta)
            if math.isinf(self.l2_clip_norm) or self.clipping == "none":
                raise ValueError(
                    f"l2_clip_norm={self.l2_clip_norm!r} with clipping={self.clipping!r} bounds nothing; a plan "
                    "with private events needs a finite l2_clip_norm and clipping other than 'none'"
                )
        self._check_noise()
        if not self.num_examples_declared and self.neighboring == "add_or_remove_one":
            raise ValueError(
                "neighboring='add_or_remove_one' needs num_examples_declared=True: where the number of examples "
                "is not declared, the true number counts as public, and a relation that changes it protects "
                "nothing; use 'zero_out' or 'replace_one'"
            )
        for phase in self.phases:
            refuse_relation(phase.event, self.neighboring)
        event = self.train.event
        if not isinstance(event, (Gaussian, PoissonGaussian, PoissonSkellam, NonPrivate)):
            raise ValueError(
                "the train event must be Gaussian, PoissonGaussian, PoissonSkellam or NonPrivate, which the trainer "
                f"can sample, not {event!r}"
            )
        if isinstance(event, (PoissonGaussian, PoissonSkellam)) and event.sampling_prob != self.sampling_prob:
            raise ValueError(
                f"sampling_prob={self.sampling_prob!r} must equal that of the train event, {event.sampling_prob!r}"
            )
        if isinstance(event, Gaussian) and self.sampling_prob != 1:
            raise ValueError(f"sampling_prob={self.sampling_prob!r} must be 1 where the train event is Gaussian")
        self._check_basis(any(non_private))

    def _check_noise(self) -> None:
        """Refuses noise that floats cannot add faithfully: with C = 5e-324 it would be exactly 0."""
        if self.noise_multiplier and not _LEAST_NOISE_STD <= self.noise_std <= _MOST_NOISE_STD:
            raise ValueError(
                f"l2_clip_norm={self.l2_clip_norm!r} times the noise multiplier {self.noise_multiplier!r} gives noise "
                f"of standard deviation {self.noise_std!r}, which must be between {_LEAST_NOISE_STD:g} and "
                f"{_MOST_NOISE_STD:g} for floating point to hold it"
            )

    def _check_basis(self, has_non_private: bool) -> None:
        _checks.text(**{"basis['kind']": self.basis.get("kind")})
        access = _checks.one_of(choices=ACCESSES, **{"basis['access']": self.basis.get("access")})
        if access == "non_private" and not has_non_private:
            raise ValueError("basis['access'] is 'non_private', so the plan needs a NonPrivate phase that says so")
        if access == "released" and self.phases[0].name == "train":
            raise ValueError("basis['access'] is 'released', so the plan needs the phase that pays for it first")

    @property
    def train(self) -> Phase:
        """The phase named "train"."""
        return next(phase for phase in self.phases if phase.name == "train")

    @property
    def steps(self) -> int:
        """T: the number of training steps planned."""
        return self.train.count

    @property
    def noise_multiplier(self) -> float:
        """Noise standard deviation divided by `l2_clip_norm` of a training step; 0 if it is not private."""
        event = self.train.event
        return event.noise_multiplier if isinstance(event, (Gaussian, PoissonGaussian, PoissonSkellam)) else 0.0

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on each coordinate of the clipped sum of a training step."""
        return self.noise_multiplier * self.l2_clip_norm if self.noise_multiplier else 0.0

    @property
    def is_private(self) -> bool:
        """Whether no phase is NonPrivate, so that a finite epsilon can be claimed."""
        return not any(contains_non_private(phase.event) for phase in self.phases)

    def check_delta(self, delta: float, whose: str = "") -> None:
        """Raises ValueError for a delta at which a run could publish one of its units at random: 1/N or more.

        Args:
            delta: In (0, 1). Public.
            whose: Words for the message, such as " of silo 'north'".
        """
        _checks.delta_below(self.num_examples, whose, delta=delta)

    def phase(self, name: str) -> Phase:
        """Returns the phase of that name; ValueError names those there are."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise ValueError(f"phase must be one of {', '.join(repr(p.name) for p in self.phases)}, not {name!r}")

    def to_json(self) -> dict[str, object]:
        """Returns the plan as a JSON object; infinity is the text "inf", every other float restores exactly."""
        data: dict[str, object] = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        data["phases"] = [phase.to_json() for phase in self.phases]
        for name in ("target_epsilon", "l2_clip_norm"):
            data[name] = number_to_json(float(getattr(self, name)))
        for name in ("basis", "details"):
            data[name] = copy.deepcopy(dict(getattr(self, name)))
        return data

    @staticmethod
    def from_json(data: object) -> Plan:
        """Returns the plan that a JSON object states; refuses unknown and missing fields."""
        if not isinstance(data, Mapping):
            raise ValueError(f"a plan must be a JSON object, not {data!r}")
        refuse_other_fields("plan", data, {entry.name for entry in fields(Plan)})
        values = dict(data)
        if not isinstance(values["phases"], list):
            raise ValueError(f"phases must be a JSON array, not {values['phases']!r}")
        values["phases"] = tuple(Phase.from_json(phase) for phase in values["phases"])
        for name in ("target_epsilon", "l2_clip_norm"):
            values[name] = number_from_json(values[name])
        return Plan(**values)


def number_to_json(value: float) -> float | str:
    """Returns a float as JSON can hold it: infinity becomes the text "inf"."""
    return "inf" if math.isinf(value) and value > 0 else value


def number_from_json(value: object) -> object:
    """The inverse of `number_to_json`; anything but the text "inf" is handed on for its own check."""
    return math.inf if value == "inf" else value


def _phases(phases: object) -> tuple[Phase, ...]:
    if not isinstance(phases, (tuple, list)) or not all(isinstance(phase, Phase) for phase in phases):
        raise ValueError(f"phases must be a tuple of Phase, not {phases!r}")
    names = [phase.name for phase in phases]
    if len(set(names)) != len(names):
        raise ValueError(f"phases must have different names, not {names!r}")
    if "train" not in names:
        raise ValueError(f"phases must contain one named 'train', not only {names!r}")
    return tuple(phases)


def _json_copy(name: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a mapping, not {value!r}")
    try:
        result = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must hold only what JSON can hold ({error}): {value!r}") from None
    if result != _lists(dict(value)):
        raise ValueError(f"{name} must hold only what JSON restores (text keys, no objects): {value!r}")
    return dict(result)


def _lists(value: object) -> object:
    """Returns the value with tuples as lists and mappings as dicts, the way JSON restores them."""
    if isinstance(value, Mapping):
        return {key: _lists(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [_lists(entry) for entry in value]
    return value
