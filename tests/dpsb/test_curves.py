"""Sweeps: what is asked, what is kept, what it costs, what the files say."""

import csv
import hashlib
import json
import math
import os
import re
import signal

import pyarrow.parquet
import pytest
import workbench
from typer.testing import CliRunner

from dpsb import run as run_module
from dpsb.cli import app
from dpsb.curves.composed import composed
from dpsb.curves.entries import CurveError, labels_of, parse_entries, parse_epsilons, parse_rates
from dpsb.curves.folder import FolderError, lost_steps
from dpsb.curves.page import page, write_page
from dpsb.curves.settings import curve_settings
from dpsb.curves.sweep import choose, run_sweep
from dpsb.curves.table import METRICS, Row
from dpsb_accounting import Ledger, epsilon
from dpsb_accounting.engines import ResourceLimit
from dpsb_accounting.report.words import up

STEPS = 3


@pytest.fixture(autouse=True)
def quick_calibration(monkeypatch):
    monkeypatch.setattr("dpsb.plan.noise_multiplier_for", workbench.calibrated)
    monkeypatch.setenv("COLUMNS", "160")


class Silent:
    """A watch that only counts."""

    def __init__(self):
        self.total = self.kept = 0
        self.ended = []

    def begin(self, total, kept):
        self.total, self.kept = total, kept

    def step(self, job, step, steps):
        pass

    def end(self, row):
        self.ended.append(row)


def shared(**changes):
    """Settings of every cell."""
    settings = workbench.run_settings("nowhere", steps=STEPS, eval_data=str(workbench.data_file(seed=5)))
    return {name: value for name, value in {**settings, **changes}.items() if value is not None}


def settings_of(given=None, **changes):
    usual = {
        "methods": "sb,lora",
        "epsilons": "8,inf",
        "repeats": 1,
        "learning_rates": None,
        "tuning_repeats": 1,
        "validation_data": None,
        "test_share": 0.2,
        "validation_share": 0.1,
        "split_seed": 0,
    }
    return curve_settings(shared() if given is None else given, **{**usual, **changes})


def hashes(folder):
    """Content and time of every file below a folder."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def in_a_fork(work):
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return max(0, -os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of two methods and two epsilons, one of them without privacy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpsb.plan.noise_multiplier_for", workbench.calibrated)
        out = tmp_path_factory.mktemp("curve") / "out"
        curve = run_sweep(settings_of(), out, Silent())
        write_page(curve, out)
    return curve, out


# --- what is asked


def test_methods_may_carry_a_basis():
    entries = parse_entries("sb, sb:private,sb:public:a.csv+/b/c.csv, lora,peft:pissa", "random")
    assert [entry.text for entry in entries] == [
        "sb:random",
        "sb:private",
        "sb:public:a.csv+/b/c.csv",
        "lora",
        "peft:pissa",
    ]
    assert entries[2].basis == "public:a.csv,/b/c.csv"
    assert entries[2].label == "sb (public a.csv c.csv)"
    twins = parse_entries("sb:public:a/x.csv,sb:public:b/x.csv,lora", "weight")
    assert list(labels_of(twins).values()) == ["sb:public:a/x.csv", "sb:public:b/x.csv", "lora"]
    assert [entry.pays_for_basis for entry in entries] == [False, True, False, False, False]


@pytest.mark.parametrize(
    ("methods", "match"),
    [
        ("sb,lorra", "'lorra' to be one of those that exist: sb, lora-xs, lora, .*head-only, full, peft:pissa"),
        ("sb:wight", "'wight' to be one of weight, random, .*hybrid"),
        ("sb:public", "needs a file of public data"),
        ("lora:weight", "'lora' has no basis to choose, got 'lora:weight'"),
        ("sb,sb:weight", "names 'sb:weight' twice"),
        ("peft:VeraConfig", "is refused: it trains bare tensors"),
        (" , ", "at least one of sb"),
    ],
)
def test_unknown_methods_are_refused_with_those_that_exist(methods, match):
    with pytest.raises(ValueError, match=match):
        parse_entries(methods, "weight")


@pytest.mark.parametrize("text", ["0", "1,x", "-1,2", "nan", "", "2,2"])
def test_epsilons_out_of_range(text):
    with pytest.raises(CurveError, match="epsilons="):
        parse_epsilons(text)


def test_epsilons_are_sorted():
    assert parse_epsilons("inf, 8,0.5") == (0.5, 8.0, math.inf)


def test_learning_rates_for_all_or_by_method():
    entries = parse_entries("sb,sb:random,lora", "weight")
    usual = dict.fromkeys([entry.text for entry in entries], 0.02)
    assert parse_rates(None, entries, usual) == {"sb:weight": (0.02,), "sb:random": (0.02,), "lora": (0.02,)}
    assert set(parse_rates("0.1,0.2", entries, usual).values()) == {(0.1, 0.2)}
    assert parse_rates("sb=0.1|0.2,sb:random=0.5", entries, usual) == {
        "sb:weight": (0.1, 0.2),
        "sb:random": (0.5,),
        "lora": (0.02,),
    }
    for text, match in (
        ("full=0.1", "METHOD=RATE"),
        ("0.1,lora=2", "METHOD=RATE"),
        ("sb=-1", "positive"),
        ("0.1,0.1", "twice"),
        ("lora=1,lora=2", "twice"),
        ("a", "numbers"),
    ):
        with pytest.raises(CurveError, match=f"learning_rates.*{match}"):
            parse_rates(text, entries, usual)


@pytest.mark.parametrize(
    ("given", "changes", "match"),
    [
        ({}, {"repeats": 0}, "repeats=0"),
        ({}, {"tuning_repeats": 0}, "tuning_repeats=0"),
        ({"eval_data": None}, {"test_share": 1.5}, "test_share=1.5"),
        (
            {"eval_data": None},
            {"test_share": 0.6, "validation_share": 0.5, "learning_rates": "1,2"},
            "nothing to train",
        ),
        ({"insecure_seed": 1}, {}, "insecure_seed"),
        ({"rank": 0}, {}, "rank=0"),
        ({"model": None}, {}, "model is missing"),
        ({"eval_data": str(workbench.data_file())}, {}, "eval_data"),
        ({}, {"validation_data": str(workbench.data_file()), "learning_rates": "1,2"}, "training data"),
        ({}, {"validation_data": str(workbench.data_file(seed=5)), "learning_rates": "1,2"}, "tuned on flatters"),
        ({}, {"validation_data": "v.csv"}, "validation_data='v.csv' is not used"),
        ({"data": "gone.csv"}, {}, "data='gone.csv' does not exist"),
        ({}, {"validation_data": "gone.csv", "learning_rates": "1,2"}, "validation_data='gone.csv' does not exist"),
        ({"eval_data": None}, {"methods": f"sb:public:{workbench.data_file()}"}, "private training data as public"),
    ],
)
def test_bad_settings_are_one_sentence_before_anything_runs(given, changes, match):
    with pytest.raises(ValueError, match=match):
        settings_of(shared(**given), **changes)


def test_parts_of_the_file_stand_in_for_missing_files():
    settings = settings_of(shared(eval_data=None, num_examples=100), learning_rates="0.1,0.2")
    entry = settings.entries[0]
    curve, tuning = (settings.run(entry, 8.0, 0.1, workbench.folder("x"), tuning=t) for t in (False, True))
    spec = "(test=0.2,validation=0.1,seed=0)"
    assert curve.data == tuning.data == f"{workbench.data_file()}#train{spec}"
    assert curve.eval_data == f"{workbench.data_file()}#test{spec}"
    assert tuning.eval_data == f"{workbench.data_file()}#validation{spec}"
    assert curve.num_examples == 70, "a declared N shrinks by the expected share, whatever the file holds"
    whole = settings_of()
    assert whole.run(entry, 8.0, 0.1, workbench.folder("x")).data == str(workbench.data_file())


def test_a_paid_basis_has_no_cell_at_infinity():
    from dpsb.curves.cells import pairs

    found = [(entry.text, value) for entry, value in pairs(settings_of(methods="sb:private,lora"))]
    assert found == [("sb:private", 8.0), ("lora", 8.0), ("lora", math.inf)]


# --- what came out


def test_every_cell_is_a_run_of_its_own(swept):
    curve, out = swept
    assert [(row.method, row.epsilon) for row in curve.rows] == [
        ("sb", 8.0),
        ("lora", 8.0),
        ("sb", math.inf),
        ("lora", math.inf),
    ]
    ids = {Ledger.read(out / row.folder / "ledger.jsonl").run_id for row in curve.rows}
    assert len(ids) == 4
    for row in curve.rows:
        ledger = Ledger.read(out / row.folder / "ledger.jsonl")
        assert ledger.charged("train") == STEPS
        assert not ledger.taints, "fresh randomness, never a seed"
        assert row.epsilon_upper == epsilon(ledger).upper


def test_csv_and_parquet_agree_and_hold_no_times(swept):
    curve, out = swept
    text = read_csv(out / "curve.csv")
    table = pyarrow.parquet.read_table(out / "curve.parquet").to_pylist()
    assert len(text) == len(table) == len(curve.rows)
    assert list(text[0]) == list(table[0])
    assert not any("second" in name or "time" in name for name in text[0])
    for one, other in zip(text, table, strict=True):
        for name, value in other.items():
            assert one[name] == ("" if value is None else value if isinstance(value, str) else one[name])
            if isinstance(value, (int, float)):
                assert float(one[name]) == value
    summary = read_csv(out / "summary.csv")
    assert [float(row["mean"]) for row in summary] == [point.mean for point in curve.points]
    assert {row["n"] for row in summary} == {"1"}


def test_the_page_is_whole_and_loads_nothing(swept):
    curve, out = swept
    text = (out / "curve.html").read_text()
    bare = re.sub(r'xmlns(:\w+)?="http://www.w3.org/[^"]*"', "", text)
    assert "http://" not in bare
    assert "https://" not in bare
    assert "<script" not in text
    assert "default-src 'none'" in text
    assert "<svg" in text
    for row in curve.rows:
        shown = "∞" if math.isinf(row.epsilon_upper) else up(row.epsilon_upper, 6)
        assert shown in text
        assert row.folder.rpartition("/")[2] in text
    assert "ε = ∞" in text
    assert "outside the guarantee" in text
    assert "no tuning runs in this sweep" in text
    for name in ("curve.svg", "curve.png"):
        assert (out / name).stat().st_size > 5000


def test_nothing_private_is_written_beside_the_cells(swept):
    _, out = swept
    for path in out.iterdir():
        if path.is_file():
            for canary in workbench.CANARIES:
                assert canary.split("-")[0].encode() not in path.read_bytes()


def test_a_cell_without_privacy_makes_the_sum_infinite(swept):
    curve, out = swept
    assert math.isinf(curve.price.bound.upper)
    assert (curve.price.curve, curve.price.non_private, curve.price.abandoned) == (4, 2, 0)
    ledgers = [Ledger.read(path) for path in out.glob("cells/*eps8*/ledger.jsonl")]
    events = [(phase.event, phase.count) for ledger in ledgers for phase in ledger.plan.phases]
    expected = epsilon(events, ledgers[0].plan.delta, ledgers[0].plan.neighboring)
    assert (curve.price.private.lower, curve.price.private.upper) == (expected.lower, expected.upper)
    assert expected.upper > 8


def test_started_again_finished_cells_stay_to_the_byte(swept):
    curve, out = swept
    before, watch = hashes(out / "cells"), Silent()
    again = run_sweep(settings_of(), out, watch)
    assert hashes(out / "cells") == before
    assert (watch.total, watch.kept, watch.ended) == (4, 4, [])
    assert again.rows == curve.rows
    assert page(again) == page(curve)


@pytest.mark.parametrize(
    ("given", "changes", "key"),
    [
        ({}, {"repeats": 2}, "repeats=1, not 2"),
        ({}, {"methods": "sb"}, "methods="),
        ({"rank": 2}, {}, "rank=4, not 2"),
        ({"labels": "spam,ham"}, {}, "labels='ham,spam', not 'spam,ham'"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(swept, given, changes, key):
    _, out = swept
    with pytest.raises(FolderError, match=key):
        run_sweep(settings_of(shared(**given), **changes), out, Silent())


def test_settings_of_the_machine_may_change(swept):
    _, out = swept
    run_sweep(settings_of(shared(token_budget=64)), out, Silent())


def test_folders_of_something_else_are_refused(swept, tmp_path):
    curve, out = swept
    with pytest.raises(FolderError, match="holds a single run"):
        run_sweep(settings_of(), out / curve.rows[0].folder, Silent())
    (tmp_path / "cells" / "x").mkdir(parents=True)
    with pytest.raises(FolderError, match=r"curve.json is gone"):
        run_sweep(settings_of(), tmp_path, Silent())


# --- cut off


def test_killed_in_a_step_the_cell_goes_on(tmp_path, monkeypatch):
    """Charged steps stay charged and are never made again; the plan is kept; the curve says what was lost."""
    settings = settings_of(shared(checkpoint_every=2), methods="sb,head-only", epsilons="8")
    charge, count = Ledger.charge, []

    def deadly(self, phase):
        number = charge(self, phase)
        count.append(number)
        if len(count) == 2 * STEPS:  # the third step of the second cell
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    def work():
        monkeypatch.setattr(Ledger, "charge", deadly)
        run_sweep(settings, tmp_path, Silent())

    assert in_a_fork(work) == signal.SIGKILL
    first, second = (tmp_path / "cells" / f"{name}-eps8-lr0.02-run1" for name in ("sb-weight", "head-only"))
    before, head = hashes(first), (second / "ledger.jsonl").read_bytes()
    assert not (second / "report.json").exists()
    watch = Silent()
    curve = run_sweep(settings, tmp_path, watch)
    assert (watch.total, watch.kept, len(watch.ended)) == (2, 1, 1)
    assert hashes(first) == before
    assert (second / "ledger.jsonl").read_bytes().startswith(head), "what was charged stays"
    assert Ledger.read(second / "ledger.jsonl").charged("train") == STEPS
    assert [row.lost_steps for row in curve.rows] == [0, 1] == [lost_steps(first), lost_steps(second)]
    assert curve.price.runs == 2


def test_a_cell_says_that_it_is_one_of_several(swept):
    _, out = swept
    for report in (out / "cells").glob("*/report.json"):
        assert any("one of several on the same data" in line for line in json.loads(report.read_text())["assumptions"])


def test_cut_off_before_it_could_go_on_it_is_moved_aside_and_still_counts(tmp_path, monkeypatch):
    settings = settings_of(methods="sb", epsilons="8")
    write = run_module.write_whole

    def deadly(path, content):
        write(path, content)
        os.kill(os.getpid(), signal.SIGKILL)

    def work():
        monkeypatch.setattr(run_module, "write_whole", deadly)
        run_sweep(settings, tmp_path, Silent())

    assert in_a_fork(work) == signal.SIGKILL
    cell = tmp_path / "cells" / "sb-weight-eps8-lr0.02-run1"
    spent = (cell / "ledger.jsonl").read_bytes()
    curve = run_sweep(settings, tmp_path, Silent())
    assert not curve.failures
    assert (tmp_path / "abandoned" / f"{cell.name}-1" / "ledger.jsonl").read_bytes() == spent
    assert (curve.price.curve, curve.price.abandoned) == (1, 1)
    single = epsilon(Ledger.read(cell / "ledger.jsonl"))
    assert curve.price.bound.upper > single.upper
    assert "1 abandoned" in page(curve)


# --- what it costs


def put_run(folder, *, finished=True, **changes):
    """A ledger as a run leaves it, without training."""
    folder.mkdir(parents=True)
    with workbench.new_ledger(folder, **changes):
        pass
    if finished:
        (folder / "report.json").write_text("{}")


def test_everything_in_the_folder_is_composed(tmp_path):
    put_run(tmp_path / "cells" / "sb-eps1-run1")
    put_run(tmp_path / "cells" / "sb-eps1-lr1-tuning1", noise_multiplier=0.9)
    put_run(tmp_path / "cells" / "lora-eps1-run1", finished=False)
    put_run(tmp_path / "abandoned" / "lora-eps1-run1-1", steps=7)
    found = composed(tmp_path)
    plans = [Ledger.read(path).plan for path in tmp_path.glob("*/*/ledger.jsonl")]
    expected = epsilon(
        [(phase.event, phase.count) for plan in plans for phase in plan.phases], 1e-3, plans[0].neighboring
    )
    assert (found.bound.lower, found.bound.upper) == (expected.lower, expected.upper)
    assert (found.curve, found.tuning, found.unfinished, found.abandoned) == (1, 1, 1, 1)
    assert found.bound.delta == 1e-3
    assert found.private == found.bound


def test_where_no_engine_composes_the_epsilons_add_up(tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        put_run(tmp_path / "cells" / name)
    single = epsilon(Ledger.read(tmp_path / "cells" / "a" / "ledger.jsonl"))

    def limited(schedule, *arguments):
        if isinstance(schedule, list):
            raise ResourceLimit("too much")
        return epsilon(schedule, *arguments)

    monkeypatch.setattr("dpsb.curves.composed.epsilon", limited)
    bound = composed(tmp_path).bound
    assert bound.upper == pytest.approx(3 * single.upper)
    assert bound.delta == pytest.approx(3e-3)
    assert bound.lower == epsilon(Ledger.read(tmp_path / "cells" / "a" / "ledger.jsonl"), 3e-3).lower < single.lower
    assert "basic composition" in bound.method


def test_a_ledger_without_a_line_charged_nothing_and_a_damaged_one_bounds_nothing(tmp_path):
    put_run(tmp_path / "cells" / "a")
    alone = composed(tmp_path)
    cut = tmp_path / "cells" / "b"
    cut.mkdir()
    (cut / "ledger.jsonl").write_bytes(b'{"created_utc":"2')
    assert composed(tmp_path) == alone
    (cut / "ledger.jsonl").write_bytes(b'{"created_utc":"2\n')
    damaged = composed(tmp_path)
    assert damaged.bound is None
    assert damaged.unreadable == ("cells/b/ledger.jsonl",)
    (cut / "ledger.jsonl").unlink()
    (cut / "report.json").write_text("{}")
    gone = composed(tmp_path)
    assert gone.bound is None
    assert gone.unreadable == ("cells/b/ledger.jsonl",)


# --- tuning


def row(value, rate, *, repeat=1, purpose="tuning", failure=None):
    metrics = dict.fromkeys(METRICS["classification"], value)
    return Row(
        method="lora",
        basis=None,
        epsilon=8.0,
        epsilon_lower=7.0,
        epsilon_upper=8.0,
        delta=1e-3,
        purpose=purpose,
        repeat=repeat,
        learning_rate=rate,
        noise_multiplier=1.0,
        evaluated_on="validation",
        metrics=metrics,
        lost_steps=0,
        failure=failure,
        folder="cells/x",
    )


def test_the_best_mean_on_validation_is_chosen():
    settings = settings_of(methods="lora", epsilons="8", learning_rates="0.1,0.2,0.3", tuning_repeats=2)
    rows = [row(0.5, 0.1), row(0.9, 0.1, repeat=2), row(0.8, 0.2), row(0.7, 0.2, repeat=2), row(None, 0.3, failure="x")]
    assert choose(settings, rows) == {("lora", 8.0): 0.2}
    assert choose(settings, [row(None, rate, failure="x") for rate in (0.1, 0.2, 0.3)]) == {}


def test_tuning_runs_are_counted_and_stated(tmp_path):
    """From one file: parts by a public seed, two rates, one of them chosen, all three runs in the sum."""
    given = shared(eval_data=None, data=str(workbench.data_file(count=120)))
    settings = settings_of(given, methods="head-only", epsilons="8", learning_rates="0.01,0.1")
    curve = run_sweep(settings, tmp_path, Silent())
    assert not curve.failures
    assert [r.purpose for r in curve.rows] == ["tuning", "tuning", "curve"]
    assert [r.evaluated_on for r in curve.rows] == ["validation", "validation", "test"]
    assert curve.rows[2].learning_rate == curve.chosen["head-only", 8.0]
    assert curve.points[0].tuning_runs == 2
    assert (curve.price.curve, curve.price.tuning) == (1, 2)
    assert "2 tuning runs over 0.01, 0.1" in page(curve)
    data = {Ledger.read(tmp_path / r.folder / "ledger.jsonl").plan.details["data"] for r in curve.rows}
    assert data == {"rows.jsonl#train(test=0.2,validation=0.1,seed=0)"}, "the ledger says what was trained on"


# --- the command


def dpsb(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    for canary in workbench.CANARIES:
        assert canary.split("-")[0] not in result.output
    return result


def arguments(out, **changes):
    settings = {name: value for name, value in shared(**changes).items() if name not in ("out", "epsilon")}
    return ("curve", "--out", out, *workbench.options(settings))


def test_help_teaches():
    text = " ".join(dpsb("curve", "--help").output.replace("│", " ").split())
    for words in (
        "Example: dpsb curve",
        "--methods",
        "--learning-rates",
        "--test-share",
        "--basis-share",
        "sb:private",
    ):
        assert words in text
    for words in ("--insecure-seed", "--epsilon ", "--resume"):
        assert words not in text


def test_a_cell_that_fails_is_recorded_and_the_others_go_on(tmp_path):
    command = (*arguments(tmp_path, rank=40), "--methods", "sb,head-only", "--epsilons", 8, "--json")
    result = dpsb(*command)
    assert result.exit_code == 1
    facts = json.loads(result.stdout)
    assert [entry["folder"] for entry in facts["failed"]] == ["cells/sb-weight-eps8-lr0.02-run1"]
    assert "rank" in facts["failed"][0]["reason"]
    assert [point["n"] for point in facts["points"]] == [0, 1]
    assert facts["composed"]["runs"]["all"] == 1
    assert "1 of 2 cells failed, the first with:" in " ".join(result.stderr.split())
    for name in facts["files"]:
        assert (tmp_path / name).exists()
    assert "What failed" in (tmp_path / "curve.html").read_text()


def test_errors_of_the_command_are_one_sentence(tmp_path):
    for further, match in (
        (("--methods", "lorra"), "those that exist: sb, lora-xs"),
        (("--epsilons", "0"), "epsilons='0'"),
        (("--processes", 0), "processes=0"),
        (("--lr", -1), "learning_rate"),
    ):
        result = dpsb(*arguments(tmp_path / "x"), *further)
        assert result.exit_code == 1
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert match in lines[0]
        assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_causal_model_is_judged_by_perplexity(tmp_path):
    settings = workbench.run_settings("nowhere", "causal-lm", steps=STEPS)
    given = {name: value for name, value in settings.items() if value is not None}
    curve = run_sweep(settings_of(given, methods="sb", epsilons="8"), tmp_path, Silent())
    assert not curve.failures
    assert curve.metric == "perplexity"
    assert curve.points[0].mean > 1
    assert "held-out perplexity" in page(curve)
