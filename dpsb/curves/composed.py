"""What a whole sweep costs: every ledger in its folder together, since every accuracy is a release."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpsb.curves.cells import TUNING
from dpsb.curves.folder import ABANDONED, CELLS, begun, is_finished
from dpsb_accounting import Bound, Ledger, LedgerError, LedgerRecord, Plan, epsilon
from dpsb_accounting.engines import ResourceLimit
from dpsb_accounting.ledger import LEDGER_NAME
from dpsb_accounting.plan import number_to_json


@dataclass(frozen=True, kw_only=True)
class Composed:
    """The price of a sweep.

    Args:
      bound: Bounds on epsilon of all runs together at ``bound.delta``; None if there is no run, or a ledger that was
        written to cannot be read.
      private: The same without the runs that have no guarantee: information, where ``bound`` is infinite.
      curve: Finished runs that the curve shows.
      tuning: Finished runs that chose a learning rate.
      abandoned: Runs moved aside, cut off before they could go on.
      unfinished: Runs that failed or were cut off.
      non_private: Runs among them without a guarantee.
      num_examples: N of the runs, in words; None if there is none.
      tainted: Reasons that void a run's claim.
      unreadable: Ledgers that are damaged or gone.
    """

    bound: Bound | None
    private: Bound | None
    curve: int
    tuning: int
    abandoned: int
    unfinished: int
    non_private: int
    num_examples: str | None
    tainted: tuple[str, ...]
    unreadable: tuple[str, ...]

    @property
    def runs(self) -> int:
        return self.curve + self.tuning + self.abandoned + self.unfinished

    def to_json(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in ("curve", "tuning", "abandoned", "unfinished", "non_private")}
        return {
            "epsilon": _ends(self.bound),
            "epsilon_of_private_runs": _ends(self.private),
            "delta": None if self.bound is None else self.bound.delta,
            "neighboring": None if self.bound is None else self.bound.neighboring,
            "unit": None if self.bound is None else self.bound.unit,
            "method": None if self.bound is None else self.bound.method,
            "covers": "the rows trained on; metrics on held-out rows are outside of it",
            "runs": {"all": self.runs, **counts},
            "taints": list(self.tainted),
            "unreadable": list(self.unreadable),
        }


def composed(out: Path) -> Composed:
    """Composes the events of every ledger in a sweep's folder.

    A run counts with its plan's whole schedule, whatever it charged: that is what it may claim, and a stop may have had
    its reason in the data. Delta is the largest of the runs' deltas, which are equal unless the data changed.
    """
    from dpsb.run import has_remains

    records: list[tuple[LedgerRecord, str]] = []
    unreadable = [
        f"{folder.relative_to(out)}/{LEDGER_NAME}"  # a run that has charged, and whose price is not known
        for folder in sorted([*out.glob(f"{CELLS}/*"), *out.glob(f"{ABANDONED}/*")])
        if has_remains(folder)
    ]
    for path in sorted(out.glob(f"{CELLS}/*/{LEDGER_NAME}")) + sorted(out.glob(f"{ABANDONED}/*/{LEDGER_NAME}")):
        try:
            record = Ledger.read(path)
        except LedgerError:
            if b"\n" in path.read_bytes():  # without one whole line nothing can have been charged
                unreadable.append(str(path.relative_to(out)))
            continue
        records.append((record, _kind(path)))
    here = {record.run_id for record, _ in records}
    if not unreadable:
        gone = [(run_id, name) for run_id, name in begun(out) if run_id not in here]
        unreadable = [f"{CELLS}/{name}/{LEDGER_NAME} of run {run_id}" for run_id, name in gone]
    kinds = [kind for _, kind in records]
    plans = [record.plan for record, _ in records]
    bound = private = None
    if plans and not unreadable:
        bound = _bound(plans)
        private = bound if bound.is_finite else _bound([plan for plan in plans if plan.is_private], like=plans[0])
    return Composed(
        bound=bound,
        private=private,
        curve=kinds.count("curve"),
        tuning=kinds.count("tuning"),
        abandoned=kinds.count("abandoned"),
        unfinished=kinds.count("unfinished"),
        non_private=sum(not plan.is_private for plan in plans),
        num_examples=_size(plans),
        tainted=tuple(sorted({taint.reason for record, _ in records for taint in record.taints})),
        unreadable=tuple(unreadable),
    )


def _kind(path: Path) -> str:
    if path.parent.parent.name == ABANDONED:
        return "abandoned"
    if not is_finished(path.parent):
        return "unfinished"
    return "tuning" if path.parent.name.rstrip("0123456789").endswith(f"-{TUNING}") else "curve"


def _size(plans: Sequence[Plan]) -> str | None:
    if not plans:
        return None
    declared = "declared" if plans[0].num_examples_declared else "the true number, which counts as public"
    return f"{plans[0].num_examples:,} ({declared}), each drawn with probability {plans[0].sampling_prob:.4g} in a step"


def _bound(plans: Sequence[Plan], like: Plan | None = None) -> Bound:
    first = like or plans[0]
    relations = {plan.neighboring for plan in plans} or {first.neighboring}
    if len(relations) > 1:
        raise ValueError(f"The ledgers of the sweep state different relations: {', '.join(sorted(relations))}.")
    delta = max((plan.delta for plan in plans), default=first.delta)
    parts = [(phase.event, phase.count) for plan in plans for phase in plan.phases]
    try:
        found = epsilon(parts, delta, first.neighboring)
        ends, method = (found.lower, found.upper), found.method
    except ResourceLimit:
        delta = sum(plan.delta for plan in plans)
        # at the sum of the deltas no single run is below the whole; at its own delta each is part of a valid sum
        least = [epsilon(plan, delta).lower for plan in plans]
        ends = max(least), sum(epsilon(plan).upper for plan in plans)
        method = "basic composition: the sum of the runs' epsilons at the sum of their deltas"
    return Bound(
        lower=ends[0], upper=ends[1], delta=delta, neighboring=first.neighboring, unit=first.unit, method=method
    )


def _ends(bound: Bound | None) -> dict[str, object] | None:
    return None if bound is None else {"lower": number_to_json(bound.lower), "upper": number_to_json(bound.upper)}
