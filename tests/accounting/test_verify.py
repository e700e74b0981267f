import copy
import json
from pathlib import Path

import pytest
from plans import make_plan, two_phases

from dpsb_accounting import Gaussian, Ledger, Phase, PoissonGaussian, epsilon, make_report, verify

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture
def run(tmp_path):
    """A finished run: its ledger and its report beside it."""
    with Ledger.create(tmp_path / "ledger.jsonl", two_phases()) as ledger:
        ledger.charge("basis")
        for _ in range(6):
            ledger.charge("train")
        make_report(ledger).write(tmp_path / "report.json")
    return tmp_path


def test_verify_confirms_an_honest_run(run):
    outcome = verify(run / "ledger.jsonl")
    assert outcome.ok
    assert not outcome.failures
    assert outcome.report == run / "report.json"
    assert outcome.to_json()["ok"] is True


def change(run, edit):
    data = json.loads((run / "report.json").read_text())
    edited = copy.deepcopy(data)
    edit(edited)
    assert json.dumps(edited) != json.dumps(data)
    (run / "report.json").write_text(json.dumps(edited))
    return verify(run / "ledger.jsonl")


MANIPULATIONS = {
    "epsilon: upper": lambda r: r["epsilon"].update(upper=r["epsilon"]["upper"] * 0.999),
    "epsilon: lower": lambda r: r["epsilon"].update(lower=r["epsilon"]["lower"] * 1.5),
    "epsilon": lambda r: r.update(epsilon=1.0),
    "delta": lambda r: r.update(delta=1e-6),
    "unit": lambda r: r.update(unit="user"),
    "neighboring": lambda r: r.update(neighboring="replace_one"),
    "claim": lambda r: r.update(claim=1),
    "taints": lambda r: r.update(taints=[{"name": "x", "reason": "y"}]),
    "target_epsilon": lambda r: r.update(target_epsilon=1.0),
    "mechanism": lambda r: r["mechanism"].update(noise_multiplier=2.0),
    "num_examples": lambda r: r.update(num_examples=10**6),
    "num_examples_declared": lambda r: r.update(num_examples_declared=False),
    "basis": lambda r: r["basis"].update(access="public"),
    "phases": lambda r: r["phases"].pop(0),
    "spent: steps": lambda r: r["spent"].update(steps=5),
    "spent: of": lambda r: r["spent"].update(of=9),
    "spent: epsilon: upper": lambda r: r["spent"]["epsilon"].update(upper=0.0, lower=0.0),
    "statement": lambda r: r.update(statement="Perfectly private."),
    "fields": lambda r: r.update(epsilon_really=0.1),
    "software": lambda r: r["software"].update(python="9"),
    "ledger not behind the report": lambda r: r["ledger"].update(head="0" * 64),
    "ledger: file": lambda r: r["ledger"].update(file="other.jsonl"),
    "ledger: torn": lambda r: r["ledger"].update(torn=True),
    "ledger: length": lambda r: r["ledger"].update(length=1),
    "ledger: head": lambda r: r["ledger"].pop("head"),
    "ledger: run_id": lambda r: r["ledger"].update(run_id="another"),
    "accounting": lambda r: r["accounting"].append({"tool": "opacus", "epsilon": {"lower": 0.05, "upper": 0.05}}),
    "accounting: tool": lambda r: r["accounting"][0].update(tool="by hand"),
    "accounting: version": lambda r: r["accounting"][0].update(version="0.6.0, which proves epsilon 0.05"),
    "accounting: method": lambda r: r["accounting"][0].update(method="two engines that agree"),
    "accounting: epsilon": lambda r: r["accounting"][0]["epsilon"].update(upper=9.0),
    "accounting: epsilon: upper": lambda r: r["accounting"][0]["epsilon"].update(lower=0.04, upper=0.05),
    "cross_check": lambda r: r.update(cross_check="passed"),
    "cross_check_reason": lambda r: r.update(cross_check_reason="three engines agree"),
    "assumptions": lambda r: r["assumptions"].pop(1),
    "not_covered": lambda r: r.update(not_covered=[]),
    "held_out: note": lambda r: r.update(held_out={"note": "private too", "metrics": {"accuracy": 0.97}}),
    "held_out: metrics": lambda r: r.update(held_out={"note": "outside the guarantee", "metrics": 0.97}),
}


@pytest.mark.parametrize("name", MANIPULATIONS)
def test_verify_names_each_manipulation_of_the_report(run, name):
    outcome = change(run, MANIPULATIONS[name])
    assert not outcome.ok
    assert name in [check.name for check in outcome.failures]


def leaves(value, path=()):
    if isinstance(value, (dict, list)) and value:
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for name, entry in entries:
            yield from leaves(entry, (*path, name))
    else:
        yield path


def test_no_part_of_a_report_can_be_changed_removed_or_added(run):
    """Walks over the whole report, so that a key added to it later cannot be forgotten in `verify`."""
    data = json.loads((run / "report.json").read_text())
    passed = []

    def attempt(what, path, edit):
        edited = copy.deepcopy(data)
        parent = edited
        for name in path[:-1]:
            parent = parent[name]
        edit(parent, path[-1])
        (run / "report.json").write_text(json.dumps(edited))
        if verify(run / "ledger.jsonl").ok:
            passed.append((what, *path))

    whole = list(leaves(data))
    parts = {leaf[: i + 1] for leaf in whole for i in range(len(leaf))}
    for path in whole:
        attempt("changed", path, lambda parent, name: parent.__setitem__(name, ["something else"]))
    for path in parts:
        attempt("removed", path, lambda parent, name: parent.__delitem__(name))
    for path in {(*part[:-1], "really") for part in parts if isinstance(part[-1], str)}:
        attempt("added", path, lambda parent, name: parent.__setitem__(name, 0.05))
    assert passed == []


@pytest.mark.parametrize(
    "prefix",
    [
        '{"epsilon": {"lower": 0.04, "upper": 0.05}, "claim": true, ',
        '{"statement": "Perfectly private.", ',
        '{"ledger": {"torn": false, "torn": false}, ',
        '{"extra": {"a": [{"b": 1, "b": 1}]}, ',
    ],
)
def test_a_key_that_occurs_twice_is_refused(run, prefix):
    text = (run / "report.json").read_text()
    (run / "report.json").write_text(prefix + text.lstrip()[1:])
    outcome = verify(run / "ledger.jsonl")
    assert not outcome.ok
    assert "occurs twice" in outcome.failures[0].detail


@pytest.mark.parametrize("token", ["NaN", "Infinity", "-Infinity", "1e400", "-1e999"])
def test_numbers_that_are_not_finite_are_refused(run, token):
    text = (run / "report.json").read_text()
    held_out = '{"held_out": {"note": "outside the guarantee", "metrics": {"accuracy": %s}}, '
    (run / "report.json").write_text(held_out % "0.5" + text.lstrip()[1:])
    assert verify(run / "ledger.jsonl").ok
    (run / "report.json").write_text(held_out % token + text.lstrip()[1:])
    outcome = verify(run / "ledger.jsonl")
    assert "not a finite number" in outcome.failures[0].detail


@pytest.mark.parametrize("upper", [-1.0, 5e-324, pytest.param(10**400, id="10^400"), "inf", "-inf", None, True, "0.05"])
def test_no_stated_epsilon_makes_verify_raise(run, upper):
    assert not change(run, lambda r: r["epsilon"].update(upper=upper)).ok


def test_another_version_of_the_tool_is_said_and_not_an_error(run):
    def edit(report):
        report["accounting"][0].update(version="0.5.9", method="pld, mesh 0.01; lower bound by binned losses")

    outcome = change(run, edit)
    assert outcome.ok, outcome.failures
    details = {check.name: check.detail for check in outcome.checks}
    assert 'stated "0.5.9", recomputed with' in details["accounting: version"]


def test_a_report_with_held_out_metrics_is_confirmed_and_excepts_them(run):
    made = make_report(Ledger.read(run / "ledger.jsonl"), held_out={"accuracy": 0.97})
    made.write(run / "report.json")
    assert verify(run / "ledger.jsonl").ok
    assert "its held-out metrics excepted, is (" in made.to_json()["statement"]
    assert not change(run, lambda r: r["held_out"].update(epsilon=0.05)).ok


def test_a_cautious_report_is_confirmed(run):
    """Claiming more epsilon than was spent, with the words to match, harms nobody."""

    def edit(report):
        words = f"({report['epsilon']['upper']:.4f}".rstrip("0")
        report["epsilon"]["upper"] *= 1 + 1e-9
        assert words[:4] in report["statement"]

    assert change(run, edit).ok


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"schema": "dpsb-report/9"}', "\x00", '{"schema": "dpsb-report/1"}', "[" * 10**5]
)
def test_a_broken_report_fails_in_one_sentence(run, content):
    (run / "report.json").write_text(content)
    outcome = verify(run / "ledger.jsonl")
    assert not outcome.ok
    assert all("\n" not in check.detail for check in outcome.checks)


def test_a_missing_report(run):
    assert not verify(run / "ledger.jsonl", run / "other.json").ok
    (run / "report.json").unlink()
    outcome = verify(run / "ledger.jsonl")
    assert outcome.ok
    assert outcome.report is None


def test_a_ledger_that_was_cut_back_fails(run):
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (run / "ledger.jsonl").write_bytes(b"".join(lines[:-2]))
    outcome = verify(run / "ledger.jsonl")
    assert "ledger not behind the report" in [check.name for check in outcome.failures]


def test_a_ledger_of_another_run_fails(run, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "ledger.jsonl"
    with Ledger.create(other, two_phases()) as ledger:
        ledger.charge("basis")
        for _ in range(6):
            ledger.charge("train")
    assert not verify(other, run / "report.json").ok


def test_a_taint_after_the_report_fails(run):
    with Ledger.open(run / "ledger.jsonl") as ledger:
        ledger.taint("seeded", "afterwards")
    names = [check.name for check in verify(run / "ledger.jsonl").failures]
    assert {"claim", "taints"} <= set(names)


def test_an_edited_ledger_fails_and_the_line_is_named(run):
    content = (run / "ledger.jsonl").read_bytes()
    lines = content.splitlines(keepends=True)
    lines[3] = lines[3].replace(b'"number":1', b'"number":7')
    (run / "ledger.jsonl").write_bytes(b"".join(lines))
    outcome = verify(run / "ledger.jsonl")
    assert not outcome.ok
    assert outcome.epsilon is None
    assert "line 4 of the ledger is wrong" in outcome.failures[0].detail


def test_a_torn_last_line_is_reported_and_counted(run):
    (run / "report.json").unlink()
    content = (run / "ledger.jsonl").read_bytes()
    (run / "ledger.jsonl").write_bytes(content[:-40])
    outcome = verify(run / "ledger.jsonl")
    assert outcome.ok
    assert "last line" in [check.name for check in outcome.checks]
    data = make_report(Ledger.read(run / "ledger.jsonl")).to_json()
    assert data["spent"]["steps"] == 6
    assert data["ledger"]["torn"] is True


def test_seeded_fault_sensitivity_of_replace_one(tmp_path):
    """A report that used C where replace_one moves the sum by 2C is refused."""
    phases = (Phase("train", Gaussian(noise_multiplier=4.0), 4),)
    plan = make_plan(phases=phases, sampling_prob=1, neighboring="replace_one")
    with Ledger.create(tmp_path / "ledger.jsonl", plan) as ledger:
        data = make_report(ledger).to_json()
    wrong = epsilon(plan, neighboring="add_or_remove_one")
    assert wrong.upper < data["epsilon"]["lower"]
    data["epsilon"] = {"lower": wrong.lower, "upper": wrong.upper}
    (tmp_path / "report.json").write_text(json.dumps(data))
    assert not verify(tmp_path / "ledger.jsonl").ok


@pytest.mark.parametrize("folder", sorted(path.name for path in GOLDEN.glob("schema-*")))
def test_golden_files_are_read_for_ever(folder):
    outcome = verify(GOLDEN / folder / "ledger.jsonl")
    assert outcome.ok, outcome.failures
    record = Ledger.read(GOLDEN / folder / "ledger.jsonl")
    stated = json.loads((GOLDEN / folder / "report.json").read_text())
    assert stated["ledger"]["head"] == record.head
    assert make_report(record).to_json()["statement"] == stated["statement"]


def test_golden_content():
    record = Ledger.read(GOLDEN / "schema-1-private" / "ledger.jsonl")
    assert record.plan.phases == (
        Phase("basis", Gaussian(noise_multiplier=5.0), 1),
        Phase("train", PoissonGaussian(noise_multiplier=1.0, sampling_prob=0.01), 5),
    )
    assert (record.charged("basis"), record.charged("train"), record.repairs) == (1, 4, 1)
    tainted = Ledger.read(GOLDEN / "schema-1-tainted" / "ledger.jsonl")
    assert [taint.name for taint in tainted.taints] == ["seeded randomness"]
    assert not tainted.plan.is_private
