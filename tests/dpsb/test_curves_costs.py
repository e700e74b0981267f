"""Sweeps: what they cost together, how rates are chosen, and the command."""

import json
import math

import pytest
import workbench
from sweeps import STEPS, Silent, settings_of, shared
from typer.testing import CliRunner

from dpsb.cli import app
from dpsb.curves.composed import composed
from dpsb.curves.entries import CurveError
from dpsb.curves.page import page
from dpsb.curves.sweep import choose, run_sweep
from dpsb.curves.table import METRICS, Row
from dpsb.data import DataError, read_table
from dpsb_accounting import Ledger, epsilon
from dpsb_accounting.engines import ResourceLimit

pytestmark = pytest.mark.usefixtures("quick_calibration", "wide_terminal")


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
    (cut / "report.json").unlink()
    assert composed(tmp_path) == alone, "cut off before its ledger began, which is the first file of a run"
    (cut / "run.json").write_text("{}")
    assert composed(tmp_path).unreadable == ("cells/b/ledger.jsonl",)
    (cut / "run.json").unlink()
    (cut / "checkpoint").mkdir()
    assert composed(tmp_path).unreadable == ("cells/b/ledger.jsonl",)


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


def test_a_rate_that_diverged_is_never_chosen(tmp_path, monkeypatch):
    settings = settings_of(methods="lora,sb", epsilons="8", learning_rates="lora=0.1|0.2|0.3")
    rows = [row(math.nan, 0.1), row(0.5, 0.2), row(0.9, 0.3)]
    assert choose(settings, rows) == {("lora", 8.0): 0.3, ("sb:weight", 8.0): 0.02}
    assert choose(settings, [row(math.nan, 0.1), row(math.inf, 0.2)]) == {("sb:weight", 8.0): 0.02}

    def diverged(settings, cells, *_):
        return [row(math.nan, cell.learning_rate) for cell in cells if cell.tuning]

    monkeypatch.setattr("dpsb.curves.sweep._run", diverged)
    (failed,) = run_sweep(settings, tmp_path, Silent()).failures
    assert failed.method == "lora"
    assert failed.failure == "every run that was to choose its learning rate failed or has no finite accuracy."


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


@pytest.mark.parametrize("how", ["basis", "warm start"])
def test_whether_private_rows_are_in_a_public_file_is_in_no_file(tmp_path, how):
    """A page with a failed cell would tell: a public file of one row makes that a test of membership."""
    private = workbench.data_file()
    public = tmp_path / "public.jsonl"
    public.write_bytes(private.read_bytes().splitlines(keepends=True)[0])
    chosen = ("--methods", f"lora,sb:public:{public}") if how == "basis" else ("--warm-start", public)
    result = dpsb(*arguments(tmp_path / "out"), *chosen, "--epsilons", 8, "--json")
    assert result.exit_code == 1
    assert not result.stdout
    assert "1 of the 1 rows of" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("which", ["eval-data", "validation-data"])
def test_no_sweep_begins_that_judges_on_the_rows_of_its_warm_start(tmp_path, which):
    """Each of its cells would fail, and say that private rows are in the file."""
    public, held_out = workbench.data_file(seed=6), tmp_path / "held_out.jsonl"
    held_out.write_bytes(public.read_bytes().splitlines(keepends=True)[0])
    tuned = ("--methods", "lora", "--learning-rates", "lora=0.1|0.2") if which == "validation-data" else ()
    chosen = ("--warm-start", public, f"--{which}", held_out)
    result = dpsb(*arguments(tmp_path / "out"), *tuned, *chosen, "--epsilons", 8, "--json")
    assert result.exit_code == 1
    assert "1 of the 60 rows of" in result.stderr
    assert "are in the held-out data too" in result.stderr
    assert not (tmp_path / "out").exists()


def test_rows_that_are_held_out_of_the_data_are_no_public_rows(tmp_path):
    """A basis from them would be made of private rows, and of those that the curve is judged on."""
    settings = settings_of(shared(eval_data=None), methods="sb", epsilons="8")
    test = read_table(str(settings.split().other("test")))
    public = tmp_path / "public.jsonl"
    rows = zip(test.columns["text"], test.columns["label"], strict=True)
    public.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    with pytest.raises(DataError, match=r"named as public, are in the private data too"):
        run_sweep(settings_of(shared(eval_data=None), methods=f"sb:public:{public}", epsilons="8"), tmp_path, Silent())
    assert not (tmp_path / "cells").exists()


@pytest.mark.parametrize("how", ["step", "evaluation"])
def test_no_row_is_quoted_in_a_table_even_when_the_screen_shows_a_traceback(tmp_path, monkeypatch, capfd, how):
    def broken(*_args, **_more):
        raise ValueError(f"cannot collate {workbench.CANARIES[0]}")

    place = {"step": "dpsb.clipped_sums.clipped_sum", "evaluation": "dpsb.evaluate.microbatches"}[how]
    monkeypatch.setattr(place, broken)
    monkeypatch.setenv("DPSB_TRACEBACK", "1")
    (failed,) = run_sweep(settings_of(methods="head-only", epsilons="8"), tmp_path, Silent()).failures
    assert "message is withheld" in failed.failure
    assert workbench.CANARIES[0] in capfd.readouterr().err
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or workbench.CANARIES[0].encode() not in file.read_bytes(), file
    assert b"failed; why is on the screen" in (tmp_path / "curve.csv").read_bytes()


@pytest.mark.parametrize("name", ["test_share", "validation_share"])
def test_no_run_is_paid_for_that_nothing_judges(name):
    tuned = {"learning_rates": "0.1,0.2", "methods": "sb"}
    with pytest.raises(CurveError, match=f"{name}=0 leaves no rows to judge runs on"):
        settings_of(shared(eval_data=None), **tuned, **{name: 0.0})
    with pytest.raises(CurveError, match="equal in 12 digits"):
        settings_of(epsilons="1,1.0000000000001")


def test_a_public_file_that_changes_during_a_sweep_tells_no_number_either(tmp_path, monkeypatch):
    public = tmp_path / "public.jsonl"
    public.write_bytes(workbench.data_file().read_bytes().splitlines(keepends=True)[0])
    monkeypatch.setattr("dpsb.curves.sweep.check_public_files", lambda _settings: None)
    out = tmp_path / "out"
    (failed,) = run_sweep(settings_of(methods=f"sb:public:{public}", epsilons="8"), out, Silent()).failures
    assert "1 of the 1 rows" in failed.failure, "for the screen"
    for file in ("curve.csv", "curve.parquet", "summary.csv"):
        assert b"private data" not in (out / file).read_bytes()
        assert b"1 of the 1" not in (out / file).read_bytes()


def test_the_page_says_whom_its_epsilon_covers(tmp_path):
    given = shared(eval_data=None)
    curve = run_sweep(settings_of(given, methods="head-only", epsilons="8"), tmp_path, Silent())
    text = page(curve)
    assert "Everything on this page together, for the rows trained on" in text
    assert "Of the data 20 % for the curve are held out and not covered." in text
    assert "a person with several rows is protected less" in text
    assert curve.price.to_json()["covers"].startswith("the rows trained on")


def test_a_cell_that_fails_is_recorded_and_the_others_go_on(tmp_path):
    useless = tmp_path / "useless.csv"
    useless.write_text("x,y\n1,2\n")
    command = (*arguments(tmp_path / "out"), "--methods", f"sb:public:{useless},head-only", "--epsilons", 8, "--json")
    result = dpsb(*command)
    assert result.exit_code == 1
    facts = json.loads(result.stdout)
    (failed,) = facts["failed"]
    assert failed["folder"].startswith("cells/sb-public-")
    assert failed["reason"].startswith("failed; why is on the screen")
    assert [point["n"] for point in facts["points"]] == [0, 1]
    assert facts["composed"]["runs"]["all"] == 1
    assert result.stderr.count("error:") == 1
    assert "1 of 2 cells failed, the first with:" in result.stderr
    assert "useless.csv" in result.stderr
    for name in facts["files"]:
        assert (tmp_path / "out" / name).exists()
    assert "What failed" in (tmp_path / "out" / "curve.html").read_text()


def test_errors_of_the_command_are_one_sentence(tmp_path):
    for further, match in (
        (("--methods", "lorra"), "those that exist: sb, lora-xs"),
        (("--epsilons", "0"), "epsilons='0'"),
        (("--processes", 0), "processes=0"),
        (("--lr", -1), "learning_rate"),
        (("--learning-rate", -1), "learning_rate"),
    ):
        result = dpsb(*arguments(tmp_path / "x"), *further)
        assert result.exit_code == 1
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert match in lines[0]
        assert not (tmp_path / "x").exists()


def test_ctrl_c_is_one_sentence(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("dpsb.curves.sweep.run_sweep", interrupted)
    result = dpsb(*arguments(tmp_path / "x"))
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "error: interrupted; charged steps are spent, finished cells are kept, and the same command goes on."
    ]


@pytest.mark.slow
def test_a_causal_model_is_judged_by_perplexity(tmp_path):
    settings = workbench.run_settings("nowhere", "causal-lm", steps=STEPS)
    given = {name: value for name, value in settings.items() if value is not None}
    curve = run_sweep(settings_of(given, methods="sb", epsilons="8"), tmp_path, Silent())
    assert not curve.failures
    assert curve.metric == "perplexity"
    assert curve.points[0].mean > 1
    assert "held-out perplexity" in page(curve)
