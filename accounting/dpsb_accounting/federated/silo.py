"""Silo: what one party of a federation did to its data, from its ledger or from an explicit description.

What a ledger may say about the federation stands in its plan, under `details["federated"]`; every key is optional:

* "model": one of `MODELS`; a report of another model refuses the ledger;
* "federation": a public name of the federation; ledgers of different ones are never mixed;
* "silo": the silo's public name;
* "clients", "dropouts", "colluders": how many parties a sum has, how many may be missing before it is thrown away,
  and how many may help the server;
* "local_steps": how many gradient steps lie between two aggregations;
* "noise_of": what the noise multiplier of the train phase stands for, one of `NOISE_OF`;
* "noise_by": "server" or "shares"; "participation": "every_round", "poisson" or "fixed_cohort";
* "noise": "gaussian" or "skellam"; with "skellam" also "scale", "dimension" and "share_variance".

What a caller says and a ledger states otherwise is refused, never overridden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dpsb_accounting import _checks
from dpsb_accounting.events import Event
from dpsb_accounting.ledger import LedgerRecord
from dpsb_accounting.plan import UNITS, Phase

MODELS = ("silo_local", "secagg", "client_level", "trusted_server")
NOISE_OF = ("sum", "share", "guaranteed")
_PLACE = {"model", "federation", "silo", "clients", "dropouts", "colluders", "local_steps", "participation"}
_NOISE = {"noise", "noise_of", "noise_by", "scale", "dimension", "share_variance"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Silo:
    """One party: its schedule, its guarantee's terms, and what is known of the state of its ledger.

    Args:
        name: Public name, unique in a federation.
        phases: Everything it may charge; one of them is named "train". Public.
        delta: At which its own guarantee is stated, in (0, 1).
        neighboring: "add_or_remove_one", "zero_out" or "replace_one".
        unit: "example", "user" or "client".
        l2_clip_norm: C of its training step.
        num_examples: Its number of units, if known; delta must be below one over it.
        taints: Names of what voids its claim; empty for an honest run.
        charged: How many training steps its ledger charges; None without a ledger.
        run_id: Of its ledger; None without one. A ledger given twice is refused.
        stated: What its plan says about the federation.
    """

    name: str
    phases: tuple[Phase, ...]
    delta: float
    neighboring: str = "add_or_remove_one"
    unit: str = "example"
    l2_clip_norm: float = 1.0
    num_examples: int | None = None
    taints: tuple[str, ...] = ()
    charged: int | None = None
    run_id: str | None = None
    stated: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        put = object.__setattr__
        _checks.text(name=self.name)
        names = [phase.name for phase in self.phases]
        if "train" not in names:
            raise ValueError(f"phases of silo {self.name!r} must contain one named 'train', not only {names!r}")
        if len(set(names)) != len(names):
            raise ValueError(f"phases of silo {self.name!r} must have different names, not {names!r}")
        put(self, "phases", tuple(self.phases))
        put(self, "delta", _checks.probability(open_interval=True, delta=self.delta))
        _checks.one_of(choices=_checks.RELATIONS, neighboring=self.neighboring)
        _checks.one_of(choices=UNITS, unit=self.unit)
        put(self, "l2_clip_norm", _checks.positive(infinite=True, l2_clip_norm=self.l2_clip_norm))
        if self.num_examples is not None:
            put(self, "num_examples", _checks.whole(at_least=1, num_examples=self.num_examples))
        unknown = sorted(set(self.stated) - _PLACE - _NOISE)
        if unknown:
            raise ValueError(
                f"silo {self.name!r} states unknown facts of a federation: {', '.join(map(repr, unknown))}"
            )

    @staticmethod
    def from_ledger(record: LedgerRecord, name: str | None = None) -> Silo:
        """Returns the silo that a ledger describes; its plan's whole schedule counts, whatever was charged so far."""
        plan = record.plan
        stated = plan.details.get("federated", {})
        if not isinstance(stated, Mapping):
            raise ValueError(f"{record.path}: details['federated'] must be a JSON object, not {stated!r}")
        return Silo(
            name=name or str(stated.get("silo") or record.path),
            phases=plan.phases,
            delta=plan.delta,
            neighboring=plan.neighboring,
            unit=plan.unit,
            l2_clip_norm=plan.l2_clip_norm,
            num_examples=plan.num_examples,
            taints=tuple(taint.name for taint in record.taints),
            charged=record.charged("train"),
            run_id=record.run_id,
            stated=dict(stated),
        )

    @property
    def train(self) -> Phase:
        """The phase named "train"."""
        return next(phase for phase in self.phases if phase.name == "train")

    @property
    def parts(self) -> tuple[tuple[Event, int], ...]:
        """Everything the silo may release, as events with counts."""
        return tuple((phase.event, phase.count) for phase in self.phases)

    def says(self, fact: str, value: object) -> None:
        """Refuses `value` if the silo's plan states another one for that fact of the federation."""
        stated = self.stated.get(fact, value)
        if stated != value:
            raise ValueError(f"silo {self.name!r} states {fact}={stated!r} in its plan, which is not {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """What all silos of one report share: delta, relation and unit."""

    delta: float
    neighboring: str
    unit: str


def silos_of(parties: Sequence[Silo | LedgerRecord]) -> tuple[Silo, ...]:
    """Returns every party as a `Silo`.

    Raises:
        ValueError: If there is none, or something that is neither.
    """
    if not parties:
        raise ValueError("a federation needs the ledger of at least one silo")
    found = []
    for party in parties:
        if isinstance(party, LedgerRecord):
            party = Silo.from_ledger(party)
        if not isinstance(party, Silo):
            raise ValueError(f"a party must be a Silo or a LedgerRecord, not {party!r}")
        found.append(party)
    return tuple(found)


def common_terms(silos: Sequence[Silo], model: str, delta: float | None) -> Terms:
    """Returns what the silos share, or refuses by name what they do not.

    Args:
        silos: At least one.
        model: The report's privacy model; a silo that states another one is refused.
        delta: Align all of them at this delta explicitly; left out, they must agree.

    Raises:
        ValueError: If relations, units or federations differ, deltas differ and none is given, delta is not below
            one over the number of units of some silo, or a silo or ledger is there twice.
    """
    first = silos[0]
    for silo in silos:
        silo.says("model", model)
        for what in ("neighboring", "unit"):
            ours, theirs = getattr(first, what), getattr(silo, what)
            if ours != theirs:
                raise ValueError(
                    f"silos {first.name!r} and {silo.name!r} differ in {what}: {ours!r} and {theirs!r}; "
                    "guarantees of different kinds cannot be put into one report"
                )
        named, other = first.stated.get("federation"), silo.stated.get("federation")
        if named != other:
            raise ValueError(f"silos {first.name!r} and {silo.name!r} state federation {named!r} and {other!r}")
    _refuse_twice("name", [silo.name for silo in silos])
    _refuse_twice("ledger of run", [silo.run_id for silo in silos if silo.run_id is not None])
    if delta is None:
        other = next((silo for silo in silos if silo.delta != first.delta), None)
        if other is not None:
            raise ValueError(
                f"silos {first.name!r} and {other.name!r} differ in delta: {first.delta!r} and {other.delta!r}; "
                "give one delta at which all of them are to be recomputed"
            )
        delta = first.delta
    delta = _checks.probability(open_interval=True, delta=delta)
    for silo in silos:
        if silo.num_examples is not None:
            _checks.delta_below(silo.num_examples, f" of silo {silo.name!r}", delta=delta)
    return Terms(delta=delta, neighboring=first.neighboring, unit=first.unit)


def _refuse_twice(what: str, values: Sequence[str]) -> None:
    twice = sorted({value for value in values if values.count(value) > 1})
    if twice:
        raise ValueError(f"the {what} {twice[0]!r} is there twice; every silo counts once")
