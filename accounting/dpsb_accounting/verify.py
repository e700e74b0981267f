"""Verification: recompute everything a report says from its ledger, trusting neither."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dpsb_accounting.bound import Bound
from dpsb_accounting.engines import ResourceLimit
from dpsb_accounting.ledger import Ledger, LedgerError, LedgerRecord
from dpsb_accounting.plan import number_from_json
from dpsb_accounting.report import SCHEMA, make_report, statement

REPORT_NAME = "report.json"
_SLACK = 1e-6


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was checked: its name, whether it holds, and what was found."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """The outcome of `verify`.

    Args:
        ledger: The ledger file.
        report: The report file that was compared; None if there was none beside the ledger.
        checks: Everything that was checked, in order.
        epsilon: The bounds recomputed from the ledger; None if the ledger could not be read.
    """

    ledger: Path
    report: Path | None
    checks: tuple[Check, ...]
    epsilon: Bound | None

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return all(check.ok for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that do not hold."""
        return tuple(check for check in self.checks if not check.ok)

    def to_json(self) -> dict[str, object]:
        """Returns the outcome as a JSON object."""
        checks = [{"name": check.name, "ok": check.ok, "detail": check.detail} for check in self.checks]
        report = None if self.report is None else str(self.report)
        return {"ok": self.ok, "ledger": str(self.ledger), "report": report, "checks": checks}


def verify(ledger_path: str | os.PathLike[str], report_path: str | os.PathLike[str] | None = None) -> Verification:
    """Verifies a ledger, and the report beside it, by recomputing every number from the ledger.

    Guarantees: a report is confirmed only if its epsilon is at least the upper bound recomputed (but for a
        relative
    1e-6), everything it states of the run is what the ledger states, and the ledger is not older than the
    report.

    Args:
        ledger_path: The ledger, JSON lines.
        report_path: The report, JSON. Left out, it is report.json beside the ledger, if there is one.

    Returns:
        Each check with what was found; nothing is raised for a bad file.
    """
    ledger_path = Path(ledger_path)
    beside = ledger_path.parent / REPORT_NAME
    report: Path | None = Path(report_path) if report_path is not None else (beside if beside.exists() else None)
    checks: list[Check] = []
    epsilon = None
    try:
        record = Ledger.read(ledger_path)
        checks.append(Check("ledger", True, f"{record.length} lines, chain and plan hold, head {record.head[:16]}"))
        if record.torn:
            detail = "the last line is unfinished, as a crash leaves it; it is counted as a charged step"
            checks.append(Check("last line", True, detail))
        expected = make_report(record)
        epsilon = expected.epsilon
        if report is None:
            checks.append(Check("report", True, f"there is no {REPORT_NAME} to compare; the ledger alone was verified"))
        else:
            stated = _load(report)
            checks.append(Check("report", True, f"{report.name} has schema {SCHEMA}"))
            checks += _compare(record, stated, expected.to_json())
    except LedgerError as error:
        checks.append(Check("ledger", False, str(error)))
    except ResourceLimit as error:
        checks.append(Check("epsilon", False, f"cannot be recomputed: {error}"))
    except _BadReport as error:
        checks.append(Check("report", False, str(error)))
    return Verification(ledger=ledger_path, report=report, checks=tuple(checks), epsilon=epsilon)


class _BadReport(Exception):
    """A report that cannot be compared at all."""


def _load(path: Path) -> Mapping[str, object]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _BadReport(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise _BadReport(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise _BadReport(f"{path} must have schema {SCHEMA!r}, not {found!r}")
    return data


def _compare(record: LedgerRecord, stated: Mapping[str, object], expected: Mapping[str, object]) -> list[Check]:
    checks = [_check_not_behind(record, stated.get("ledger"))]
    checks += _check_epsilon("epsilon", stated.get("epsilon"), expected["epsilon"])
    for name in ("delta", "unit", "neighboring", "claim", "taints", "target_epsilon", "mechanism"):
        checks.append(_same(name, stated.get(name), expected[name]))
    for name in ("num_examples", "num_examples_declared", "basis", "phases", "software"):
        checks.append(_same(name, stated.get(name), expected[name]))
    spent, expected_spent = _object(stated.get("spent")), _object(expected["spent"])
    for name in ("steps", "of"):
        checks.append(_same(f"spent: {name}", spent.get(name), expected_spent[name]))
    checks += _check_epsilon("spent: epsilon", spent.get("epsilon"), expected_spent["epsilon"])
    upper = _end(stated.get("epsilon"), "upper")
    if upper is not None:
        words = statement(record, upper, expected["claim"] is True)
        checks.append(_same("statement", stated.get("statement"), words))
    unknown = sorted(set(stated) - set(expected) - {"held_out"})
    found = f"unknown: {', '.join(unknown)}" if unknown else "none unknown"
    checks.append(Check("fields", not unknown, found))
    return checks


def _check_not_behind(record: LedgerRecord, stated: object) -> Check:
    where = _object(stated)
    length, head, run_id = where.get("length"), where.get("head"), where.get("run_id")
    if type(length) is not int or not isinstance(head, str):
        return Check("ledger not behind the report", False, f"the report names no state of the ledger: {stated!r}")
    if run_id != record.run_id:
        return Check("ledger not behind the report", False, f"run_id is {run_id!r}, not {record.run_id!r}")
    try:
        record.check_not_behind(length, head)
    except (LedgerError, ValueError) as error:
        return Check("ledger not behind the report", False, str(error))
    return Check("ledger not behind the report", True, f"line {length} has the head that the report names")


def _check_epsilon(name: str, stated: object, expected: object) -> list[Check]:
    upper, lower = _end(stated, "upper"), _end(stated, "lower")
    true_upper, true_lower = _end(expected, "upper"), _end(expected, "lower")
    if upper is None or lower is None or true_upper is None or true_lower is None:
        return [Check(name, False, f"must have numbers 'lower' and 'upper', not {stated!r}")]
    checks = [
        Check(
            f"{name}: upper",
            upper >= true_upper * (1 - _SLACK),
            f"stated {upper:.8g}, recomputed {true_upper:.8g}",
        ),
        Check(
            f"{name}: lower",
            lower <= true_lower * (1 + _SLACK) and lower <= upper,
            f"stated {lower:.8g}, recomputed {true_lower:.8g}",
        ),
    ]
    return checks


def _same(name: str, stated: object, expected: object) -> Check:
    same = json.dumps(stated, sort_keys=True) == json.dumps(expected, sort_keys=True)
    return Check(name, same, _short(expected) if same else f"stated {_short(stated)}, ledger {_short(expected)}")


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:197] + "..."


def _end(ends: object, name: str) -> float | None:
    value = number_from_json(_object(ends).get(name))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        return None
    return float(value)


def _object(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}
