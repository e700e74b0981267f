"""The report: what a ledger supports claiming, in words for a lawyer and in numbers for a mathematician."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import tempfile
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dpsb_accounting import accountant
from dpsb_accounting.bound import Bound
from dpsb_accounting.events import event_to_json
from dpsb_accounting.ledger import LedgerRecord
from dpsb_accounting.plan import Plan, number_to_json

SCHEMA = "dpsb-report/1"
WIDTH = 98
CROSS_CHECK = "none"
HELD_OUT_NOTE = "outside the guarantee"
CROSS_CHECK_REASON = (
    "one rigorous engine computes the upper bound; the lower bound is computed by separate code, and the two were "
    "checked to be in order, but no second upper bound was computed"
)

_RELATIONS = {
    "add_or_remove_one": "two data sets are neighbours if one has one {unit} more than the other",
    "zero_out": "two data sets are neighbours if one {unit} contributes nothing in one of them; their size is the "
    "same and counts as public",
    "replace_one": "two data sets are neighbours if one {unit} is exchanged for any other; their size is the same "
    "and counts as public",
}

_ASSUMPTIONS = (
    "The program that wrote the ledger did what its lines say; the hash chain shows consistency, not honesty.",
    "Each {unit}'s contribution is clipped to the stated L2 norm before it is summed, whatever it holds.",
    "Units are drawn independently with the stated probability and in secret; empty draws are steps too.",
    "Noise and draws come from a cryptographic generator keyed by the operating system, and are never kept.",
    "All facts of the plan (model, labels, lengths, learning rate, number of steps) are public.",
    "One person contributes one {unit}; with k of them the guarantee for that person is weaker.",
)

_NOT_COVERED = (
    "Choosing hyper-parameters, or among several runs, by looking at the same data.",
    "Metrics computed on private held-out people, and any other use of the data outside this ledger.",
    "What the base model learned about anyone before this run.",
    "Whoever sees the machine while it trains: time, memory, unreleased gradients.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What one ledger supports claiming; made by `make_report`.

    Args:
        epsilon: The bounds on epsilon of the plan's whole schedule; `upper` is the claim, if there is one.
            Public.
        spent: The bounds on epsilon of the steps charged: information. Public.
        claim: Whether a claim may be made: no taint, and a finite upper bound.
        content: The whole report as JSON holds it.
    """

    epsilon: Bound
    spent: Bound
    claim: bool
    content: Mapping[str, object]

    def to_json(self) -> dict[str, object]:
        """Returns the report as a new JSON object; an infinite number is the text "inf"."""
        result: dict[str, object] = json.loads(json.dumps(self.content))
        return result

    def to_text(self) -> str:
        """Returns the report as a page of plain text, at most 100 columns wide."""
        return _page(self.to_json())

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON form atomically: another process sees the old file or the whole new one."""
        path = Path(path)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(self.content, file, indent=2, allow_nan=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def make_report(ledger: LedgerRecord, *, held_out: Mapping[str, object] | None = None) -> Report:
    """Returns the report of a ledger or its record.

    Guarantees: every number comes from the ledger; the claim is the epsilon of the plan's whole schedule,
        whatever
    made the run stop, and there is none for a tainted or non-private run.

    Args:
        ledger: A `Ledger` or a `LedgerRecord`.
        held_out: Metrics on private held-out data, if they must be shown; marked as outside the guarantee.

    Returns:
        The report. Public, except for what `held_out` brings.
    """
    plan = ledger.plan
    whole, spent = accountant.epsilon(ledger), accountant.spent(ledger)
    claim = whole.is_finite and not ledger.taints
    content: dict[str, object] = {
        "schema": SCHEMA,
        "epsilon": _ends(whole),
        "delta": plan.delta,
        "unit": plan.unit,
        "neighboring": plan.neighboring,
        "claim": claim,
        "taints": [{"name": taint.name, "reason": taint.reason} for taint in ledger.taints],
        "target_epsilon": number_to_json(plan.target_epsilon),
        "spent": {"epsilon": _ends(spent), "steps": ledger.charged("train"), "of": plan.steps},
        "mechanism": _mechanism(plan),
        "phases": [{**phase.to_json(), "charged": ledger.charged(phase.name)} for phase in plan.phases],
        "num_examples": plan.num_examples,
        "num_examples_declared": plan.num_examples_declared,
        "basis": dict(plan.basis),
        "accounting": [_tool(whole)],
        "cross_check": CROSS_CHECK,
        "cross_check_reason": CROSS_CHECK_REASON,
        "statement": statement(ledger, whole.upper, claim),
        "assumptions": [line.format(unit=plan.unit) for line in _ASSUMPTIONS],
        "not_covered": list(_NOT_COVERED),
        "ledger": {
            "file": ledger.path.name,
            "head": ledger.head,
            "length": ledger.length,
            "run_id": ledger.run_id,
            "torn": ledger.torn,
        },
        "software": dict(ledger.software),
    }
    if held_out is not None:
        content["held_out"] = {"note": HELD_OUT_NOTE, "metrics": dict(held_out)}
    return Report(epsilon=whole, spent=spent, claim=claim, content=content)


def _ends(bound: Bound) -> dict[str, object]:
    return {"lower": number_to_json(bound.lower), "upper": number_to_json(bound.upper)}


def _mechanism(plan: Plan) -> dict[str, object]:
    return {
        "type": event_to_json(plan.train.event)["type"],
        "noise_multiplier": plan.noise_multiplier,
        "sampling_prob": plan.sampling_prob,
        "steps": plan.steps,
        "l2_clip_norm": number_to_json(plan.l2_clip_norm),
        "noise_std": plan.noise_std,
        "expected_batch_size": plan.expected_batch_size,
        "clipping": plan.clipping,
    }


def _tool(bound: Bound) -> dict[str, object]:
    version = importlib.metadata.version("dp-accounting")
    return {"tool": "dp-accounting", "version": version, "method": bound.method, "epsilon": _ends(bound)}


def statement(ledger: LedgerRecord, upper: float, claim: bool) -> str:
    """Returns the claim in words; under this schema the wording never changes, so that it can be verified."""
    plan = ledger.plan
    unit = plan.unit
    if claim:
        first = (
            f"Whatever is published of this run, its held-out metrics excepted, is ({_up(upper)}, {plan.delta:g})-"
            f"differentially private for each single {unit}: with or without the data of any one {unit}, every outcome "
            f"is almost equally likely, up to a factor of e^{_up(upper)} and an additional probability of "
            f"{plan.delta:g}."
        )
    elif ledger.taints:
        names = ", ".join(repr(taint.name) for taint in ledger.taints)
        first = f"No privacy claim can be made for this run: it is tainted by {names}."
    else:
        first = "No privacy claim can be made for this run: something was released with no guarantee (epsilon = inf)."
    parts = [first, f"The relation is {plan.neighboring}: {_RELATIONS[plan.neighboring].format(unit=unit)}."]
    if not plan.num_examples_declared:
        parts.append(
            f"The number of examples was not declared, so the true number, {plan.num_examples}, counts as public."
        )
    if claim:
        parts.append(
            f"The epsilon is that of the whole plan of {plan.steps} steps, whatever made the run stop; "
            f"{ledger.charged('train')} of them were charged."
        )
    return " ".join(parts)


def _up(value: float) -> str:
    """Four digits, rounded up, so that a printed claim is never smaller than the bound."""
    if value == 0:
        return "0"
    digits = 3 - math.floor(math.log10(value))
    scale = 10.0**digits
    return f"{math.ceil(value * scale - 1e-9) / scale:.{max(digits, 0)}f}"


def _page(content: dict[str, object]) -> str:
    lines = ["PRIVACY REPORT", "=" * WIDTH, ""]
    lines += [*textwrap.wrap(str(content["statement"]), WIDTH), ""]
    lines += _table("Guarantee", _guarantee(content))
    lines += _table("Mechanism of a training step", _mapping(content["mechanism"]))
    for phase in _rows(content["phases"]):
        event = ", ".join(f"{name} {value}" for name, value in _mapping(phase["event"]).items())
        text = f"{phase['charged']} of {phase['count']} charged: {event}"
        lines += _table(f"Phase {phase['name']}", {"schedule": text})
    lines += _table("Basis", _mapping(content["basis"]))
    lines += _list("Taints", [f"{taint['name']}: {taint['reason']}" for taint in _rows(content["taints"])])
    lines += _list("This rests on", [str(line) for line in _items(content["assumptions"])])
    lines += _list("This does not cover", [str(line) for line in _items(content["not_covered"])])
    lines += _table("Accounting", _accounting(content))
    lines += _table("Ledger", _mapping(content["ledger"]))
    if "held_out" in content:
        lines += _table("Held-out metrics: OUTSIDE THE GUARANTEE", _mapping(_mapping(content["held_out"])["metrics"]))
    return "\n".join(lines).rstrip() + "\n"


def _guarantee(content: dict[str, object]) -> dict[str, object]:
    ends, spent = _mapping(content["epsilon"]), _mapping(content["spent"])
    used = _mapping(spent["epsilon"])
    return {
        "claim": "yes" if content["claim"] else "NO",
        "epsilon": f"{_number(ends['upper'])} (at least {_number(ends['lower'])})",
        "delta": content["delta"],
        "protected unit": content["unit"],
        "relation": content["neighboring"],
        "examples": f"{content['num_examples']}"
        + (" (declared)" if content["num_examples_declared"] else " (true number, counts as public)"),
        "target epsilon": content["target_epsilon"],
        "spent so far": f"{_number(used['upper'])} after {spent['steps']} of {spent['of']} steps (information only)",
    }


def _accounting(content: dict[str, object]) -> dict[str, object]:
    tools = {f"{entry['tool']} {entry['version']}": entry["method"] for entry in _rows(content["accounting"])}
    return {**tools, "cross-check": f"{content['cross_check']}: {content['cross_check_reason']}"}


def _number(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _table(title: str, rows: Mapping[str, object]) -> list[str]:
    lines = [title, "-" * len(title)]
    for name, value in rows.items():
        text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
        lines += textwrap.wrap(
            f"{name.replace('_', ' '):<22} {text}", WIDTH, initial_indent="  ", subsequent_indent=" " * 25
        )
    return [*lines, ""]


def _list(title: str, entries: list[str]) -> list[str]:
    lines = [title, "-" * len(title)]
    for entry in entries or ["none"]:
        lines += textwrap.wrap(entry, WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return [*lines, ""]


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _items(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _rows(value: object) -> list[Mapping[str, object]]:
    return [_mapping(entry) for entry in _items(value)]
