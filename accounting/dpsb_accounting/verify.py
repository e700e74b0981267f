"""Verification: recompute everything a report says from its ledger, trusting neither."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dpsb_accounting.bound import Bound
from dpsb_accounting.engines import ResourceLimit
from dpsb_accounting.ledger import Ledger, LedgerError, LedgerRecord
from dpsb_accounting.plan import number_from_json
from dpsb_accounting.report import HELD_OUT_NOTE, SCHEMA, make_report, statement

REPORT_NAME = "report.json"
_SLACK = 1e-6
_NOT_EXACT = {"schema", "epsilon", "spent", "accounting", "statement", "ledger"}  # each has a check of its own
_VERSION = re.compile(r"[0-9][0-9A-Za-z.+!-]{0,39}")
_MESH = re.compile(r"mesh [0-9.e+-]+")


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
    1e-6), every other key is what `make_report` gives for this ledger now, no key occurs twice, and the ledger is
    not older than the report. Only the values of held-out metrics, which no ledger knows, and the version of the
    accounting tool, which may be another one now, are taken as they are stated.

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
        data = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=_object_once,
            parse_constant=_finite,
            parse_float=_finite,
        )
    except OSError as error:
        raise _BadReport(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise _BadReport(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise _BadReport(f"{path} must have schema {SCHEMA!r}, not {found!r}")
    return data


def _object_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuses a key that occurs twice: one reader would take the first value, another the last."""
    result: dict[str, object] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the key {name!r} occurs twice in one object")
        result[name] = value
    return result


def _finite(text: str) -> float:
    """Refuses NaN and Infinity, which are not JSON, and numbers too large for a float."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def _compare(record: LedgerRecord, stated: Mapping[str, object], expected: Mapping[str, object]) -> list[Check]:
    checks = _check_ledger(record, stated.get("ledger"), expected["ledger"])
    checks += _check_epsilon("epsilon", stated.get("epsilon"), expected["epsilon"])
    for name in expected:
        if name not in _NOT_EXACT:
            checks.append(_same(name, stated.get(name), expected[name]))
    spent, expected_spent = _object(stated.get("spent")), _object(expected["spent"])
    for name in ("steps", "of"):
        checks.append(_same(f"spent: {name}", spent.get(name), expected_spent[name]))
    checks += _check_epsilon("spent: epsilon", spent.get("epsilon"), expected_spent["epsilon"])
    checks += _check_accounting(stated, expected)
    checks.append(_same("statement", stated.get("statement"), _words(record, stated, expected)))
    if "held_out" in stated:
        checks += _check_held_out(stated["held_out"])
    unknown = _unknown(stated, {**expected, "held_out": {"note": None, "metrics": None}})
    found = f"unknown: {_short(unknown)}" if unknown else "none unknown"
    checks.append(Check("fields", not unknown, found))
    return checks


def _words(record: LedgerRecord, stated: Mapping[str, object], expected: Mapping[str, object]) -> object:
    """The statement that goes with the stated epsilon, which may be a cautious one."""
    upper = _end(stated.get("epsilon"), "upper")
    try:
        return expected["statement"] if upper is None else statement(record, upper, expected["claim"] is True)
    except (ValueError, OverflowError):  # no number to write down; its own check has failed
        return expected["statement"]


def _check_accounting(stated: Mapping[str, object], expected: Mapping[str, object]) -> list[Check]:
    """Compares the tools; a tool's version, and with another version its mesh, may differ from the one here."""
    entries, here = _list(stated.get("accounting")), _list(expected["accounting"])
    if len(entries) != len(here):
        return [Check("accounting", False, f"must have {len(here)} entries, not {_short(stated.get('accounting'))}")]
    checks = []
    for entry, wanted in zip(map(_object, entries), map(_object, here), strict=True):
        checks.append(_same("accounting: tool", entry.get("tool"), wanted["tool"]))
        version, method, wanted_method = entry.get("version"), entry.get("method"), wanted["method"]
        is_version = isinstance(version, str) and _VERSION.fullmatch(version) is not None
        if version == wanted["version"]:
            detail = f"{version}, the same as here"
        else:
            detail = f"stated {_short(version)}, recomputed with {wanted['version']}; a difference is not an error"
            method, wanted_method = _without_mesh(method), _without_mesh(wanted_method)
        checks.append(Check("accounting: version", is_version, detail if is_version else f"no version: {detail}"))
        checks.append(_same("accounting: method", method, wanted_method))
        ends = entry.get("epsilon")
        checks += _check_epsilon("accounting: epsilon", ends, wanted["epsilon"])
        agree = all(_close(_end(ends, name), _end(stated.get("epsilon"), name)) for name in ("lower", "upper"))
        found = "that of the report" if agree else f"{_short(ends)} is not that of the report"
        checks.append(Check("accounting: epsilon", agree, found))
    return checks


def _without_mesh(method: object) -> object:
    return _MESH.sub("mesh", method) if isinstance(method, str) else method


def _close(first: float | None, second: float | None) -> bool:
    return first is not None and second is not None and math.isclose(first, second, rel_tol=_SLACK)


def _check_held_out(stated: object) -> list[Check]:
    held_out = _object(stated)
    is_object = isinstance(held_out.get("metrics"), Mapping)
    found = "not compared: no ledger knows them" if is_object else f"must be an object, not {_short(stated)}"
    return [
        _same("held_out: note", held_out.get("note"), HELD_OUT_NOTE),
        Check("held_out: metrics", is_object, found),
    ]


def _unknown(stated: object, expected: object, where: str = "") -> list[str]:
    """The keys, with their paths, that the report has and should not."""
    if isinstance(stated, list) and isinstance(expected, list):
        pairs = zip(stated, expected, strict=False)
        return [name for one, other in pairs for name in _unknown(one, other, where)]
    found: list[str] = []
    if isinstance(stated, Mapping) and isinstance(expected, Mapping):
        for name in sorted(stated):
            path = f"{where}{name}"
            found += _unknown(stated[name], expected[name], f"{path}: ") if name in expected else [path]
    return found


def _check_ledger(record: LedgerRecord, stated: object, expected: object) -> list[Check]:
    where, wanted = _object(stated), _object(expected)
    behind = _check_not_behind(record, stated)  # the graver fault, named apart
    return [behind, *(_same(f"ledger: {name}", where.get(name), wanted[name]) for name in wanted)]


def _check_not_behind(record: LedgerRecord, stated: object) -> Check:
    where = _object(stated)
    length, head, run_id = where.get("length"), where.get("head"), where.get("run_id")
    if type(length) is not int or not isinstance(head, str):
        return Check(
            "ledger not behind the report", False, f"the report names no state of the ledger: {_short(stated)}"
        )
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
        return [Check(name, False, f"must have numbers 'lower' and 'upper', not {_short(stated)}")]
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
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return None if math.isnan(number) else number


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _object(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}
