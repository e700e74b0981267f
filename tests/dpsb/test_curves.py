"""Sweeps: what is asked, what is kept, what it costs, what the files say."""

import json
import math
import re
import shutil
import signal

import pyarrow.parquet
import pytest
import workbench
from kills import at, in_a_fork
from sweeps import STEPS, Silent, hashes, read_csv, settings_of, shared
from typer.testing import CliRunner

from dpsb import run as run_module
from dpsb.cli import app
from dpsb.curves.entries import CurveError, labels_of, parse_entries, parse_epsilons, parse_rates
from dpsb.curves.folder import FolderError, lost_steps
from dpsb.curves.page import page, write_page
from dpsb.curves.sweep import Curve, run_sweep
from dpsb.curves.words import findings
from dpsb.frozen_prefix import _Memory
from dpsb_accounting import Ledger, epsilon
from dpsb_accounting.report.words import up

pytestmark = pytest.mark.usefixtures("quick_calibration", "wide_terminal")


def kill_after(count, place, name, settings, out):
    """Begins a sweep in a fork, which dies after so many calls of a function."""

    def work():
        at(place, name, count=count, before=False)
        run_sweep(settings, out, Silent())

    assert in_a_fork(work) == signal.SIGKILL


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of two methods and two epsilons, one of them without privacy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpsb.plan.noise_multiplier_for", workbench.calibrated)
        out = tmp_path_factory.mktemp("curve") / "out"
        curve = run_sweep(settings_of(), out, Silent())
        write_page(curve, out)
    return curve, out


@pytest.mark.parametrize("processes", [1, 2])
def test_frozen_blocks_run_once_per_row_for_all_cells_of_a_worker(tmp_path, monkeypatch, processes):
    """Each worker of two computes at most what there is; in one process, where it can be counted, all cells do so."""
    computed, original = [], _Memory._run_lower

    def counting(memory, inputs):
        computed.append(len(inputs["input_ids"]))
        return original(memory, inputs)

    monkeypatch.setattr(_Memory, "_run_lower", counting)
    upper = {"targets": r"re:.*layer\.1\..*(query|value)", "remember_frozen_blocks": True}
    settings = settings_of(shared(**upper), epsilons="4,8,inf")
    curve = run_sweep(settings, tmp_path / "out", Silent(), processes=processes)
    assert not curve.failures
    assert len(curve.rows) == 6
    if processes == 1:
        assert sum(computed) < 130, "60 rows to train on at most, 60 to evaluate on, and the probes'"


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


TEST_SPELT_OTHERWISE = f"{workbench.data_file(seed=5).parent}/./rows.jsonl"


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
        ({}, {"validation_data": TEST_SPELT_OTHERWISE, "learning_rates": "1,2"}, "tuned on flatters"),
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
    both = settings_of(methods="sb:private,sb:hybrid,lora").left_out()
    assert both == "sb (private) and sb (hybrid) have no run at ε = ∞: their bases take a share of ε."
    one = settings_of(methods="sb:private,lora")
    assert one.left_out() == "sb (private) has no run at ε = ∞: its basis takes a share of ε."
    assert one.left_out() in findings(Curve(one, (), (), None, {})), "on the screen and on the page"
    assert settings_of(methods="sb:private,lora", epsilons="8").left_out() == ""
    assert settings_of(methods="sb,lora").left_out() == ""


def test_a_sweep_without_any_cell_is_refused_and_writes_nothing(tmp_path):
    given = {**shared(), "out": str(tmp_path / "curve"), "epsilons": "inf", "methods": "sb:private,sb:hybrid"}
    del given["epsilon"]
    result = CliRunner().invoke(app, ["curve", *workbench.options(given)])
    assert result.exit_code == 1
    said = " ".join(result.stderr.split())
    assert "methods='sb:private,sb:hybrid' have no run at epsilons='inf': a paid basis takes" in said
    assert list(tmp_path.iterdir()) == []


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
    held_out = workbench.data_file(seed=5)
    assert held_out.name in text
    assert str(held_out.parent) not in text
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
    (tmp_path / "mine.csv").write_text("x")
    with pytest.raises(FolderError, match=r"is not empty and holds no curve \(mine.csv\)"):
        run_sweep(settings_of(), tmp_path, Silent())


# --- cut off


def test_killed_in_a_step_the_cell_goes_on(tmp_path):
    """Charged steps stay charged and are never made again; the plan is kept; the curve says what was lost."""
    settings = settings_of(shared(checkpoint_every=2), methods="sb,head-only", epsilons="8")
    kill_after(2 * STEPS, Ledger, "charge", settings, tmp_path)  # in the third step of the second cell
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


def test_a_finished_cell_whose_folder_was_deleted_still_counts(tmp_path):
    """Somebody has seen its accuracy. Run again, the cell has another ledger, and nothing bounds the two together."""
    settings = settings_of(methods="sb,head-only", epsilons="8")
    whole = run_sweep(settings, tmp_path, Silent())
    assert whole.price.unreadable == ()
    noted = (tmp_path / "begun.txt").read_text()
    cell = next(tmp_path.glob("cells/head-only*"))
    run_id = Ledger.read(cell / "ledger.jsonl").run_id
    assert noted.count(run_id) == 1
    assert len(noted.splitlines()) == 2
    shutil.rmtree(cell)
    again = run_sweep(settings, tmp_path, Silent())
    assert not again.failures
    assert again.price.bound is None
    assert again.price.unreadable == (f"cells/{cell.name}/ledger.jsonl of run {run_id}",)
    assert f"of run {run_id} cannot be read or is gone, so nothing bounds what was spent" in page(again)


def test_a_basis_that_was_paid_for_still_counts_if_its_run_is_deleted_before_a_step(tmp_path):
    settings = settings_of(methods="sb:private", epsilons="8")
    kill_after(1, Ledger, "charge", settings, tmp_path)
    cell = next(tmp_path.glob("cells/*"))
    record = Ledger.read(cell / "ledger.jsonl")
    assert (record.charged("basis"), record.charged("train")) == (1, 0)
    shutil.rmtree(cell)
    assert run_sweep(settings, tmp_path, Silent()).price.bound is None


def test_a_cell_says_that_it_is_one_of_several(swept):
    _, out = swept
    for report in (out / "cells").glob("*/report.json"):
        assert any("one of several on the same data" in line for line in json.loads(report.read_text())["assumptions"])


def test_cut_off_before_it_could_go_on_it_is_moved_aside_and_still_counts(tmp_path):
    settings = settings_of(methods="sb", epsilons="8")
    kill_after(1, run_module, "write_whole", settings, tmp_path)
    cell = tmp_path / "cells" / "sb-weight-eps8-lr0.02-run1"
    spent = (cell / "ledger.jsonl").read_bytes()
    curve = run_sweep(settings, tmp_path, Silent())
    assert not curve.failures
    assert (tmp_path / "abandoned" / f"{cell.name}-1" / "ledger.jsonl").read_bytes() == spent
    assert (curve.price.curve, curve.price.abandoned) == (1, 1)
    single = epsilon(Ledger.read(cell / "ledger.jsonl"))
    assert curve.price.bound.upper > single.upper
    assert "1 abandoned" in page(curve)
