"""A run that is cut off around its private basis: never two draws for a charge, no other basis than the bound one."""

import json
import signal
import subprocess
import sys
import time

import pytest
import workbench
from safetensors.torch import load_file, save_file

from dpsb import run
from dpsb.basis import release, stage
from dpsb.losses import classification_loss
from dpsb.train import fit
from dpsb_accounting import Gaussian, Ledger, LedgerError, Phase, epsilon, verify


class CutOff(KeyboardInterrupt):
    """Stands for a machine that went down."""


pytestmark = pytest.mark.usefixtures("quick_calibration")


KINDS = {"private": {"basis": "private"}, "hybrid": {"basis": "hybrid", "basis_width": 8}}


def cut_off(out, target, name, monkeypatch, *, when=lambda *_a: True, kind="private", resume=False):
    """Runs until ``name`` of ``target`` is called, which never returns."""
    original = getattr(target, name)

    def crash(*arguments, **named):
        if when(*arguments):
            raise CutOff
        return original(*arguments, **named)

    config = workbench.run_config(out, **KINDS[kind])
    with monkeypatch.context() as patch:
        patch.setattr(target, name, crash)
        with pytest.raises(CutOff):
            run.fine_tune(config, resume=resume)


def resume(out):
    return run.fine_tune(run.resumed_config(str(out), {}), resume=True)


@pytest.mark.parametrize("kind", KINDS)
def test_cut_off_in_training_goes_on_with_the_same_basis(tmp_path, monkeypatch, kind):
    out = tmp_path / "run"
    cut_off(out, run, "fit", monkeypatch, kind=kind)
    ledger = Ledger.read(out / "ledger.jsonl")
    released = load_file(out / "basis.safetensors")
    assert (ledger.charged("basis"), ledger.charged("train")) == (1, 0)
    assert set(ledger.files) == {"basis.safetensors"}
    reads = []
    monkeypatch.setattr(release.PrivateExamples, "release", lambda *_a: reads.append(1))
    finished = resume(out)
    assert reads == [], "nothing is released again"
    ledger = Ledger.read(out / "ledger.jsonl")
    assert (ledger.charged("basis"), ledger.charged("train")) == (1, 3)
    assert epsilon(ledger).upper <= 8
    tensors = load_file(out / "dpsb_core.safetensors")
    for name, value in tensors.items():
        if name.endswith(".B"):
            assert (value == released[name]).all()
    assert finished.report.claim is True
    assert verify(out / "ledger.jsonl").ok


@pytest.mark.parametrize(
    ("target", "name", "when"),
    [
        (release, "add_clipped_sum", lambda _m, _l, batch, *_a: "spoilt" in batch),
        (stage, "write_whole", lambda *_a: True),
        (Ledger, "bind_file", lambda *_a: True),
    ],
    ids=["during the pass", "before the basis is on disk", "before it is bound"],
)
def test_a_charge_whose_basis_was_not_saved_is_spent(tmp_path, monkeypatch, target, name, when):
    out = tmp_path / "run"
    if target is release:  # the rehearsal calls it too: crash only once the charge is there

        def when(*_arguments):
            return Ledger.read(out / "ledger.jsonl").charged("basis") > 0

    cut_off(out, target, name, monkeypatch, when=when)
    assert Ledger.read(out / "ledger.jsonl").charged("basis") == 1
    before = (out / "ledger.jsonl").read_bytes()
    for _ in range(2):
        with pytest.raises(LedgerError, match=r"1 of 1 charges for its basis.*spent and are not drawn again"):
            resume(out)
    ledger = Ledger.read(out / "ledger.jsonl")
    assert (ledger.charged("basis"), ledger.charged("train")) == (1, 0)
    assert (out / "ledger.jsonl").read_bytes() == before


def test_cut_off_before_the_charge_costs_nothing(tmp_path, monkeypatch):
    out = tmp_path / "run"
    cut_off(out, release.PrivateExamples, "_check_isolation", monkeypatch)
    assert Ledger.read(out / "ledger.jsonl").charged("basis") == 0
    with pytest.raises(LedgerError, match="before its basis was released"):
        resume(out)


def test_another_basis_is_not_taken(tmp_path, monkeypatch):
    out = tmp_path / "run"
    cut_off(out, run, "fit", monkeypatch)
    path = out / "basis.safetensors"
    tensors, content = load_file(path), path.read_bytes()
    first = next(iter(tensors))
    save_file({**tensors, first: -tensors[first]}, path)
    with pytest.raises(LedgerError, match="not the one that the ledger binds"):
        resume(out)
    path.unlink()
    with pytest.raises(LedgerError, match="is gone, and what it cost is spent"):
        resume(out)
    path.write_bytes(content)
    assert resume(out).report.claim is True


def test_a_hash_in_the_ledger_cannot_be_changed(tmp_path, monkeypatch):
    out = tmp_path / "run"
    cut_off(out, run, "fit", monkeypatch)
    path = out / "ledger.jsonl"
    bound = Ledger.read(path).files["basis.safetensors"]
    path.write_text(path.read_text().replace(bound, bound[::-1]))
    with pytest.raises(LedgerError, match="edited"):
        resume(out)


def test_the_ledger_says_what_happened_in_order(tmp_path):
    run.fine_tune(workbench.run_config(tmp_path / "run", basis="private"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["plan", "charge", "file", "charge", "charge", "charge"]
    assert [line.get("phase") for line in lines] == [None, "basis", None, "train", "train", "train"]


def test_training_waits_until_its_basis_is_paid_for(tiny, tmp_path):
    adapter = tiny.adapter(tiny.base("bert"))
    before = (Phase("basis", Gaussian(noise_multiplier=3.0), 1),)
    ledger = workbench.new_ledger(tmp_path, released_before=before)
    args, named = workbench.fit_arguments(adapter, workbench.examples(), ledger, loss_fn=classification_loss)
    with pytest.raises(ValueError, match="pays for basis first"):
        fit(*args, **named)
    assert ledger.charged("train") == 0
    ledger.charge("basis")
    fit(*args, **named)
    assert ledger.charged("train") == 3


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(4))
def test_a_real_process_killed_anywhere(tmp_path, attempt):
    """kill -9 at different times; afterwards the run goes on within its plan or says that its basis is spent."""
    out = tmp_path / "run"
    settings = workbench.run_settings(out, basis="private", steps=200)
    command = [sys.executable, "-m", "dpsb.cli", "train", *workbench.options(settings)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ledger = out / "ledger.jsonl"
    while process.poll() is None and not (ledger.exists() and b"\n" in ledger.read_bytes()):
        time.sleep(0.005)
    time.sleep(0.15 * attempt)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = subprocess.run(
        [sys.executable, "-m", "dpsb.cli", "train", "--out", str(out), "--resume"], capture_output=True, check=False
    )
    ledger = Ledger.read(out / "ledger.jsonl")
    assert ledger.charged("basis") <= 1
    assert ledger.charged("train") <= 200
    if again.returncode:
        words = " ".join(again.stderr.decode().split())
        assert "spent and are not drawn again" in words or "start anew" in words or "cut off" in words
    else:
        assert ledger.charged("train") == 200
        assert verify(out / "ledger.jsonl").ok
