"""kill -9 at any moment, then ``--resume``: nothing uncharged, no noise twice, never more than T charges.

The killed process is a fork of the test's own, which saves the imports; it dies by SIGKILL at the given call.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import workbench
from kills import at, die, in_a_fork

from dpsb import artifacts, checkpoint, clipped_sums, run, train
from dpsb.mechanism import Mechanism
from dpsb.randomness import Randomness
from dpsb.start import StartError
from dpsb_accounting import Ledger, LedgerError, Report, verify

STEPS = 3


pytestmark = pytest.mark.usefixtures("quick_calibration")


@pytest.fixture(autouse=True)
def no_selftest(monkeypatch):
    monkeypatch.setattr(run, "check_before_run", lambda *_args: None)  # it releases and draws; these tests count that


def half_a_line():
    write, charges = os.write, []

    def torn(descriptor, line):
        if b'"charge"' in line:
            charges.append(0)
            if len(charges) == 2:
                write(descriptor, line[: len(line) // 2])
                die()
        return write(descriptor, line)

    os.write = torn


def named(suffix):
    return lambda path, *_args: Path(path).name == suffix


POINTS = {
    "in the middle of a ledger line": half_a_line,
    "after the charge": lambda: at(Ledger, "charge", count=2, before=False),
    "after the draw": lambda: at(clipped_sums, "poisson_draw", count=2, before=False),
    "after the microbatches": lambda: at(Mechanism, "release", count=2),
    "after the release": lambda: at(Mechanism, "release", count=2, before=False),
    "after the optimizer": lambda: at(train, "_step", count=2, before=False),
    "before the first checkpoint": lambda: at(train, "save_checkpoint"),
    "while writing a checkpoint": lambda: at(checkpoint, "save_file", count=4),
    "before the old checkpoint is moved": lambda: at(Path, "rename", count=1, when=named("checkpoint")),
    "between the two renames": lambda: at(Path, "rename", count=1, before=False, when=named("checkpoint")),
    "after the new checkpoint is there": lambda: at(
        Path, "rename", count=2, before=False, when=named("checkpoint.new")
    ),
    "before the last save": lambda: at(train, "save_checkpoint", count=STEPS + 1),
    "before the results": lambda: at(run, "save_run"),
    "between two result files": lambda: at(os, "replace", count=4),  # after settings and start
    "before the report": lambda: at(Report, "write"),
}
FAST = ("in the middle of a ledger line", "after the draw", "between the two renames", "between two result files")


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """A file in which this process and its forks note every noise vector, and the charges held at every reading."""
    path, ledger = tmp_path / "notes", tmp_path / "run" / "ledger.jsonl"
    normal, clipped_sum = Randomness.normal, clipped_sums.clipped_sum

    def note(*facts):
        with path.open("a") as file:
            file.write(json.dumps(facts) + "\n")

    def noted_normal(self, count):
        noise = normal(self, count)
        note("noise", hashlib.sha256(noise.numpy().tobytes()).hexdigest())
        return noise

    def noted_sum(*args):
        note("read", Ledger.read(ledger).charged("train"), os.getpid())
        return clipped_sum(*args)

    monkeypatch.setattr(Randomness, "normal", noted_normal)
    monkeypatch.setattr(clipped_sums, "clipped_sum", noted_sum)
    return lambda: [json.loads(line) for line in path.read_text().splitlines()]


def check_end(out, notes):
    ledger = Ledger.read(out / "ledger.jsonl")
    assert ledger.charged("train") == STEPS
    noises = [fact[1] for fact in notes if fact[0] == "noise"]
    assert len(noises) <= STEPS
    assert len(set(noises)) == len(noises), "noise was used twice"
    reads = {(charged, process) for kind, charged, *process in notes if kind == "read" for process in process}
    assert len(reads) == len({charged for charged, _ in reads}), "two processes read data under the same charge"
    outcome = verify(out / "ledger.jsonl")
    assert outcome.ok, outcome.failures
    assert outcome.report is not None
    report = json.loads((out / "report.json").read_text())
    assert report["claim"] is True
    assert report["spent"]["steps"] == STEPS
    assert report["epsilon"]["upper"] <= 8
    names = set(workbench.written(out))
    assert not [name for name in names if "checkpoint" in name or "saving" in name or "start" in name]
    assert {"adapter_model.safetensors", "dpsb_core.safetensors", "README.md", "run.json"} <= names


@pytest.mark.parametrize("point", [p if p in FAST else pytest.param(p, marks=pytest.mark.slow) for p in POINTS])
def test_kill_and_resume(tmp_path, notes, point):
    config = workbench.run_config(tmp_path / "run", steps=STEPS)

    def killed():
        POINTS[point]()
        run.fine_tune(config)

    assert in_a_fork(killed) == signal.SIGKILL
    before = Ledger.read(tmp_path / "run" / "ledger.jsonl").charged("train")
    assert before <= STEPS
    assert not (tmp_path / "run" / "report.json").exists()
    run.fine_tune(run.resumed_config(str(tmp_path / "run"), {}), resume=True)
    check_end(tmp_path / "run", notes())


def test_killed_again_and_again(tmp_path, notes):
    out = tmp_path / "run"

    def start():
        at(Mechanism, "release")
        run.fine_tune(workbench.run_config(out, steps=STEPS))

    def again():
        at(Mechanism, "release")
        run.fine_tune(run.resumed_config(str(out), {}), resume=True)

    assert in_a_fork(start) == signal.SIGKILL
    for _ in range(STEPS - 1):
        assert in_a_fork(again) == signal.SIGKILL
    assert Ledger.read(out / "ledger.jsonl").charged("train") == STEPS
    finished = run.fine_tune(run.resumed_config(str(out), {}), resume=True)
    assert finished.report.claim
    check_end(out, notes())


def test_charged_all_but_nothing_saved_writes_the_results_without_a_further_charge(tmp_path, notes):
    out = tmp_path / "run"

    def killed():
        at(Mechanism, "release", count=STEPS, before=False)
        run.fine_tune(workbench.run_config(out, steps=STEPS))

    assert in_a_fork(killed) == signal.SIGKILL
    lines = (out / "ledger.jsonl").read_bytes()
    run.fine_tune(run.resumed_config(str(out), {}), resume=True)
    assert (out / "ledger.jsonl").read_bytes() == lines
    check_end(out, notes())


def test_killed_after_the_report_is_finished_and_its_leftovers_go(tmp_path, notes):
    out = tmp_path / "run"

    def killed():
        at(Report, "write", before=False)
        run.fine_tune(workbench.run_config(out, steps=STEPS))

    assert in_a_fork(killed) == signal.SIGKILL
    assert (out / "checkpoint").exists()
    with pytest.raises(run.RunError, match="is finished: its budget is spent"):
        run.fine_tune(run.resumed_config(str(out), {}), resume=True)
    check_end(out, notes())


@pytest.mark.parametrize("file", ["run.json", "start.safetensors"])
def test_killed_while_a_file_of_the_start_is_written_says_what_to_do(tmp_path, file):
    out = tmp_path / "run"

    def killed():
        at(os, "replace", when=lambda _new, path: named(file)(path))
        run.fine_tune(workbench.run_config(out))

    assert in_a_fork(killed) == signal.SIGKILL
    with pytest.raises((run.RunError, StartError), match="cut off before its first step; delete the folder"):
        run.fine_tune(run.resumed_config(str(out), {}), resume=True)
    with pytest.raises(run.RunError, match="already holds a run"):
        run.fine_tune(workbench.run_config(out))


def stopped(out, after=2, **changes):
    """A run that ended with an error after some steps."""

    def stop(progress):
        if progress.step == after:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run.fine_tune(workbench.run_config(out, **changes), callbacks=run.Callbacks(on_step=stop))


def resume(out, **changes):
    return run.fine_tune(run.resumed_config(str(out), changes), resume=True)


def test_the_schedule_goes_on_and_the_start_is_the_saved_one(tmp_path, monkeypatch):
    out, factors = tmp_path / "run", []
    stopped(out, basis="random")
    step = train._step
    monkeypatch.setattr(train, "_step", lambda *args: (factors.append(args[4]), step(*args)))
    before = (out / "start.safetensors").read_bytes()
    assert before
    resume(out)
    assert factors == [pytest.approx(1 / 3)]


def test_knobs_may_change_on_resume_and_the_plan_may_not(tmp_path):
    out = tmp_path / "run"
    stopped(out)
    for changes, odd in (
        ({"epsilon": 9.0}, "target_epsilon"),
        ({"steps": 5}, "phases"),
        ({"l2_clip_norm": 2.0}, "l2_clip_norm"),
        ({"learning_rate": 0.5}, "details"),
        ({"num_examples": 500}, "num_examples"),
        ({"expected_batch_size": 13}, "expected_batch_size"),
    ):
        with pytest.raises(run.RunError, match=f"differ from the run's plan in .*{odd}.*cannot change on resume"):
            resume(out, **changes)
    assert Ledger.read(out / "ledger.jsonl").charged("train") == 2
    assert resume(out, token_budget=32, checkpoint_every=0).report.claim


def test_a_tampered_run_is_not_resumed(tmp_path):
    out = tmp_path / "run"
    stopped(out)
    ledger = out / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    more_steps = lines[0].replace(b'"count":3', b'"count":9')
    assert more_steps != lines[0]
    for content, match in (
        (lines[:-1], "behind"),
        (lines[:1], "behind"),
        ([*lines[:-1], lines[-1].replace(b'"number":1', b'"number":0')], "line 3 of the ledger is wrong"),
        ([more_steps, *lines[1:]], "line 1 of the ledger is wrong"),
    ):
        ledger.write_bytes(b"".join(content))
        with pytest.raises(LedgerError, match=match):
            resume(out)
    ledger.write_bytes(b"".join(lines))
    (out / "checkpoint" / "theta.safetensors").write_bytes(b"junk")
    with pytest.raises(LedgerError, match="cannot be read"):
        resume(out)


def test_a_run_in_progress_cannot_be_joined(tmp_path):
    out = tmp_path / "run"
    stopped(out)
    with Ledger.open(out / "ledger.jsonl"), pytest.raises(LedgerError, match="in use by another run"):
        resume(out)
    resume(out)
    with pytest.raises(run.RunError, match="is finished: its budget is spent"):
        resume(out)


def test_the_folder_of_a_lost_ledger_takes_no_new_run(tmp_path):
    out = tmp_path / "run"
    stopped(out)
    (out / "ledger.jsonl").unlink()
    with pytest.raises(run.RunError, match=r"remains of a run whose ledger\.jsonl is gone"):
        run.fine_tune(workbench.run_config(out))
    with pytest.raises(run.RunError, match="holds no run to resume"):
        resume(out)
    with pytest.raises(run.RunError, match="holds no run to resume"):
        resume(tmp_path / "nowhere")


@pytest.mark.slow
def test_a_real_process_killed_at_a_random_moment(tmp_path, notes):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "dpsb.cli", "train", *workbench.options(workbench.run_settings(out, steps=150))]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 300
        while not (out / "ledger.jsonl").exists() or (out / "ledger.jsonl").read_bytes().count(b"\n") < 3:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
    done = Ledger.read(out / "ledger.jsonl").charged("train")
    assert 2 <= done < 150
    finished = subprocess.run(
        [sys.executable, "-m", "dpsb.cli", "train", "--out", str(out), "--resume", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["spent"]["steps"] == 150
    assert verify(out / "ledger.jsonl").ok
    assert artifacts.CORE_NAME in workbench.written(out)


SOAK = Path(__file__).resolve().parents[1] / "benchmarks" / "soak.py"


@pytest.mark.slow
def test_the_ledger_equals_what_was_released_whenever_the_run_was_killed():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(SOAK), "--steps", "200", "--charges", "30"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["steps"] == 200
    assert found["kills"] >= 2
    assert found["releases"] + found["spent_without_release"] == 200
