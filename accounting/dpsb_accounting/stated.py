"""What a report states, held against what its ledger gives: every key, every number, every sentence."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping

from dpsb_accounting.agreement import ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE
from dpsb_accounting.plan import number_from_json
from dpsb_accounting.positions import Check, check_position
from dpsb_accounting.record import LedgerRecord
from dpsb_accounting.report import HELD_OUT_NOTE, attackers, statement
from dpsb_accounting.report.build import checked_audit
from dpsb_accounting.strict import items, mapping, short

_SLACK = 1e-6
_VERSION = re.compile(r"[0-9][0-9A-Za-z.+!-]{0,39}")
_MESH = re.compile(r"mesh [0-9.e+-]+")
_NUMBER = re.compile(r"[0-9][0-9.]*(e[+-]?[0-9]+)?")
_FIRST_METHODS = re.compile(
    r"exact Gaussian|non-private release|nothing was released"
    r"|(pld, mesh [0-9.e+-]+|rdp, as delta is too small for pld); lower bound by binned losses"
)
# Each of these has a check of its own.
_NOT_EXACT = {
    *("schema", "epsilon", "spent", "accounting", "statement", "ledger", "attackers"),
    *("cross_check", "cross_check_reason", "cross_check_engine", "cross_check_epsilon"),
}
_OPTIONAL: Mapping[str, object] = {
    "held_out": {"note": None, "metrics": None},
    "audits": [],
}


def compare(record: LedgerRecord, stated: Mapping[str, object], expected: Mapping[str, object]) -> list[Check]:
    """Compares a report with what its ledger gives under the same revision; `verify` states the guarantees.

    Args:
        record: The ledger.
        stated: The report as its file holds it.
        expected: The report that the ledger supports now.

    Returns:
        A check for every key, and one that there is no other.
    """
    first = "revision" not in expected
    checks = _check_ledger(record, stated.get("ledger"), expected["ledger"])
    checks += _check_epsilon("epsilon", stated.get("epsilon"), expected["epsilon"], first)
    for name in expected:
        if name not in _NOT_EXACT:
            checks.append(_same(name, stated.get(name), expected[name]))
    spent, expected_spent = mapping(stated.get("spent")), mapping(expected["spent"])
    for name in ("steps", "of"):
        checks.append(_same(f"spent: {name}", spent.get(name), expected_spent[name]))
    checks += _check_epsilon("spent: epsilon", spent.get("epsilon"), expected_spent["epsilon"], first)
    checks += _check_accounting(stated, expected, first)
    checks += _check_second_engine(stated, expected)
    checks.append(_same("statement", stated.get("statement"), _words(record, stated, expected)))
    if "attackers" in expected:
        checks.append(_same("attackers", stated.get("attackers"), _attackers(stated, expected)))
    if "held_out" in stated:
        checks += _check_held_out(stated["held_out"])
    if "audits" in stated:
        checks.append(_check_audits(stated["audits"], expected))
    unknown = _unknown(stated, {**expected, **_OPTIONAL})
    lacking = sorted(set(expected) - set(stated))
    found = "none unknown, none lacking"
    if unknown or lacking:
        found = f"unknown: {short(unknown)}, lacking: {short(lacking)}"
    checks.append(Check("fields", not unknown and not lacking, found))
    return checks


def _words(record: LedgerRecord, stated: Mapping[str, object], expected: Mapping[str, object]) -> object:
    """The statement that goes with the stated epsilon, which may be a cautious one."""
    upper = _end(stated.get("epsilon"), "upper")
    try:
        return expected["statement"] if upper is None else statement(record, upper, expected["claim"] is True)
    except (ValueError, OverflowError):  # no number to write down; its own check has failed
        return expected["statement"]


def _attackers(stated: Mapping[str, object], expected: Mapping[str, object]) -> object:
    """What an attacker gains under the stated epsilon, which may be a cautious one."""
    upper, delta = _end(stated.get("epsilon"), "upper"), expected["delta"]
    if upper is None or not math.isfinite(upper) or upper < 0 or not expected["attackers"]:
        return expected["attackers"]
    return attackers(upper, delta) if isinstance(delta, float) else expected["attackers"]


def _check_accounting(stated: Mapping[str, object], expected: Mapping[str, object], first: bool) -> list[Check]:
    """Compares the tools; a tool's version and its mesh may differ from the one here: what counts is its epsilon.

    Engines have changed since revision 1 (`first`), so its method need only be one of those that there were.
    """
    entries, here = items(stated.get("accounting")), items(expected["accounting"])
    if len(entries) != len(here):
        return [Check("accounting", False, f"must have {len(here)} entries, not {short(stated.get('accounting'))}")]
    checks = []
    for entry, wanted in zip(map(mapping, entries), map(mapping, here), strict=True):
        checks.append(_same("accounting: tool", entry.get("tool"), wanted["tool"]))
        version, method, wanted_method = entry.get("version"), entry.get("method"), wanted["method"]
        is_version = isinstance(version, str) and _VERSION.fullmatch(version) is not None
        if version == wanted["version"]:
            detail = f"{version}, the same as here"
        else:
            detail = f"stated {short(version)}, recomputed with {wanted['version']}; a difference is not an error"
        method, wanted_method = _without_mesh(method), _without_mesh(wanted_method)
        checks.append(Check("accounting: version", is_version, detail if is_version else f"no version: {detail}"))
        if first and isinstance(method, str) and _FIRST_METHODS.fullmatch(method):
            checks.append(Check("accounting: method", True, f"{method}, as reports of revision 1 did"))
        else:
            checks.append(_same("accounting: method", method, wanted_method))
        ends = entry.get("epsilon")
        checks += _check_epsilon("accounting: epsilon", ends, wanted["epsilon"], first)
        agree = all(_close(_end(ends, name), _end(stated.get("epsilon"), name)) for name in ("lower", "upper"))
        found = "that of the report" if agree else f"{short(ends)} is not that of the report"
        checks.append(Check("accounting: epsilon", agree, found))
    return checks


def _without_mesh(method: object) -> object:
    return _MESH.sub("mesh", method) if isinstance(method, str) else method


def _close(first: float | None, second: float | None) -> bool:
    return first is not None and second is not None and math.isclose(first, second, rel_tol=_SLACK)


def _check_second_engine(stated: Mapping[str, object], expected: Mapping[str, object]) -> list[Check]:
    """Compares the cross-check; its numbers need agree only as far as engines do."""
    checks = [_same("cross_check", stated.get("cross_check"), expected["cross_check"])]
    reason, wanted = stated.get("cross_check_reason"), expected["cross_check_reason"]
    same = isinstance(reason, str) and isinstance(wanted, str) and _alike(reason, wanted)
    found = short(wanted) if same else f"stated {short(reason)}, here {short(wanted)}"
    checks.append(Check("cross_check_reason", same, found))
    if "cross_check_engine" in expected:
        name = "cross_check_engine"
        checks.append(_same(name, stated.get(name), expected[name]))
        ends, wanted_ends = stated.get("cross_check_epsilon"), expected["cross_check_epsilon"]
        pairs = [(_end(ends, end), _end(wanted_ends, end)) for end in ("lower", "upper")]
        same = (ends is None and wanted_ends is None) or all(
            mine is not None and theirs is not None and _near(mine, theirs) for mine, theirs in pairs
        )
        checks.append(Check("cross_check_epsilon", same, f"stated {short(ends)}, here {short(wanted_ends)}"))
    return checks


def _alike(first: str, second: str) -> bool:
    """Whether two sentences are the same but for numbers that differ as little as engines do."""
    if _NUMBER.sub("#", first) != _NUMBER.sub("#", second):
        return False
    pairs = zip(_NUMBER.finditer(first), _NUMBER.finditer(second), strict=True)
    return all(one[0] == other[0] or _near_text(one[0], other[0]) for one, other in pairs)


def _near_text(first: str, second: str) -> bool:
    try:
        return _near(float(first), float(second))
    except ValueError:
        return False


def _near(first: float, second: float) -> bool:
    return first == second or math.isclose(first, second, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE)


def _check_audits(stated: object, expected: Mapping[str, object]) -> Check:
    upper, delta = _end(expected["epsilon"], "upper"), expected["delta"]
    if not isinstance(stated, list) or not isinstance(delta, float):
        return Check("audits", False, f"must be a list, not {short(stated)}")
    try:
        for audit in stated:
            checked_audit(audit, math.inf if upper is None else upper, delta)
    except ValueError as error:
        return Check("audits", False, str(error))
    return Check("audits", True, "none is above the claim; otherwise taken as stated, since no ledger knows them")


def _check_held_out(stated: object) -> list[Check]:
    held_out = mapping(stated)
    is_object = isinstance(held_out.get("metrics"), Mapping)
    found = "not compared: no ledger knows them" if is_object else f"must be an object, not {short(stated)}"
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
    where, wanted = mapping(stated), mapping(expected)
    behind = check_position(record, "ledger not behind the report", where)  # the graver fault, named apart
    return [behind, *(_same(f"ledger: {name}", where.get(name), wanted[name]) for name in wanted)]


def _check_epsilon(name: str, stated: object, expected: object, first: bool) -> list[Check]:
    """Compares two ends; the stated upper one may be larger, never smaller.

    The lower one claims nothing, and engines get better: it may differ as much as engines do, in revision 1 even as
    much as is possible.
    """
    upper, lower = _end(stated, "upper"), _end(stated, "lower")
    true_upper, true_lower = _end(expected, "upper"), _end(expected, "lower")
    if upper is None or lower is None or true_upper is None or true_lower is None:
        return [Check(name, False, f"must have numbers 'lower' and 'upper', not {short(stated)}")]
    highest = true_upper if first else min(true_upper, true_lower * (1 + RELATIVE_TOLERANCE) + ABSOLUTE_TOLERANCE)
    return [
        Check(
            f"{name}: upper",
            upper >= true_upper * (1 - _SLACK),
            f"stated {upper:.8g}, recomputed {true_upper:.8g}",
        ),
        Check(
            f"{name}: lower",
            lower <= max(highest, true_lower) * (1 + _SLACK) and lower <= upper,
            f"stated {lower:.8g}, recomputed {true_lower:.8g}",
        ),
    ]


def _same(name: str, stated: object, expected: object) -> Check:
    same = json.dumps(stated, sort_keys=True) == json.dumps(expected, sort_keys=True)
    return Check(name, same, short(expected) if same else f"stated {short(stated)}, ledger {short(expected)}")


def _end(ends: object, name: str) -> float | None:
    value = number_from_json(mapping(ends).get(name))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return None if math.isnan(number) else number
