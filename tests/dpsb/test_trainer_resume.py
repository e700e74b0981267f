"""A private Trainer that is cut off goes on with T minus the charged steps, whatever checkpoint it is given."""

import json
import os
import signal

import pytest
import torch
import trainers
from safetensors.torch import load_file
from transformers import TrainerCallback

from dpsb import train
from dpsb.randomness import SeededRandomness
from dpsb.start import StartError
from dpsb.trainer import files
from dpsb.trainer.files import TrainerRunError, remove_old
from dpsb_accounting import Ledger, LedgerError, make_report, verify
from dpsb_accounting.record import in_use

pytestmark = [
    pytest.mark.usefixtures("quick_calibration"),
    *(pytest.mark.filterwarnings(line) for line in trainers.IGNORED_WARNINGS),
]
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}


class Stop(TrainerCallback):
    """Stops training cleanly, or by an error, after a step."""

    def __init__(self, step, error=None):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            if self.error:
                raise self.error
            control.should_training_stop = True


def build(out, stop=None, error=None, **changes):
    callbacks = [] if stop is None else [Stop(stop, error)]
    return trainers.build(out, args={**SAVING, **changes}, callbacks=callbacks)


def charged(out):
    return Ledger.read(out / "ledger.jsonl").charged("train")


def test_a_run_that_was_stopped_goes_on(tmp_path):
    first = build(tmp_path, stop=2)
    first.train()
    assert charged(tmp_path) == 2
    second = build(tmp_path)
    first_report = (tmp_path / "report.json").read_bytes()
    result = second.train(resume_from_checkpoint=True)
    assert (charged(tmp_path), result.global_step) == (4, 4)
    assert [entry["step"] for entry in second.state.log_history if "learning_rate" in entry] == [1, 2, 3, 4]
    report = make_report(Ledger.read(tmp_path / "ledger.jsonl"))
    assert report.claim is True
    assert (tmp_path / "report.json").read_bytes() != first_report
    assert verify(tmp_path / "ledger.jsonl").ok


def test_the_ledger_wins_over_an_older_checkpoint(tmp_path):
    with pytest.raises(RuntimeError, match="cut off"):
        build(tmp_path, stop=3, error=RuntimeError("cut off"), save_steps=2).train()
    assert charged(tmp_path) == 3, "step 3 is charged and in no checkpoint"
    saved = load_file(tmp_path / "checkpoint-2" / "theta.safetensors")
    trainer = build(tmp_path, save_steps=2)
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append((state.global_step, trainer.adapter.state(), trainer.lr_scheduler.get_last_lr()[0]))

    trainer.add_callback(Look())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert charged(tmp_path) == 4
    assert len(seen) == 1
    step, theta, _ = seen[0]
    assert step == 3
    assert all(torch.equal(theta[name], saved[name]) for name in saved)


def test_a_resumed_run_draws_new_noise(tmp_path, monkeypatch):
    sources = []
    release = train.Mechanism.release

    def noted(self, total, randomness):
        released = release(self, total, randomness)
        sources.append((released - total).clone())
        return released

    monkeypatch.setattr(train.Mechanism, "release", noted)
    build(tmp_path, stop=2).train()
    build(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert len(sources) == 4
    for i, one in enumerate(sources):
        for other in sources[:i]:
            assert float((one - other).abs().max()) > 0.1


def test_a_finished_run_stops_cleanly_and_charges_nothing(tmp_path):
    build(tmp_path).train()
    before = (tmp_path / "ledger.jsonl").read_bytes()
    result = build(tmp_path).train(resume_from_checkpoint=True)
    assert result.global_step == 4
    assert (tmp_path / "ledger.jsonl").read_bytes() == before


def test_training_again_over_a_run_is_refused(tmp_path):
    trainer = build(tmp_path, stop=1)
    trainer.train()
    for again in (trainer, build(tmp_path)):
        with pytest.raises(TrainerRunError, match="already holds a run: its charged steps are spent"):
            again.train()
    assert charged(tmp_path) == 1


def test_a_folder_without_a_ledger(tmp_path):
    with pytest.raises(TrainerRunError, match="holds no run to resume"):
        build(tmp_path).train(resume_from_checkpoint=True)
    build(tmp_path, stop=1).train()
    (tmp_path / "ledger.jsonl").unlink()
    with pytest.raises(TrainerRunError, match=r"whose ledger.jsonl is gone"):
        build(tmp_path).train()


def test_a_run_without_a_checkpoint_starts_from_its_start(tmp_path):
    with pytest.raises(RuntimeError, match="cut off"):
        build(tmp_path, stop=1, error=RuntimeError("cut off"), save_strategy="no").train()
    build(tmp_path, save_strategy="no").train(resume_from_checkpoint=True)
    assert charged(tmp_path) == 4


def test_arguments_that_change_the_plan_are_refused(tmp_path):
    build(tmp_path, stop=1).train()
    for changes, match in (({"max_steps": 9}, "phases"), ({"learning_rate": 0.1}, "details")):
        with pytest.raises(TrainerRunError, match=f"differ from the run's plan in .*{match}"):
            build(tmp_path, **changes).train(resume_from_checkpoint=True)
    assert charged(tmp_path) == 1


def test_a_rolled_back_ledger_is_found(tmp_path):
    build(tmp_path, stop=2).train()
    lines = (tmp_path / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(lines[:-1]))
    with pytest.raises(LedgerError):
        build(tmp_path).train(resume_from_checkpoint=True)


def test_a_rolled_back_ledger_is_found_by_any_checkpoint(tmp_path):
    """Not only by the one to go on from, which may be older than what was lost."""
    build(tmp_path, stop=3).train()
    lines = (tmp_path / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(lines[:2]))
    with pytest.raises(LedgerError, match=r"checkpoint-2.* is behind"):
        build(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert charged(tmp_path) == 1
    assert not verify(tmp_path / "ledger.jsonl").ok


def test_training_again_elsewhere_is_refused(tmp_path):
    """A second ledger would not count the steps that the weights already come from."""
    trainer = build(tmp_path / "a", stop=1)
    trainer.train()
    trainer.args.output_dir = str(tmp_path / "b")
    for again in (trainer, trainers.build(tmp_path / "b", model=trainer.model)):
        with pytest.raises(TrainerRunError, match="has been trained privately already"):
            again.train()
    assert not (tmp_path / "b" / "ledger.jsonl").exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    build(tmp_path / "a", stop=1).train()
    build(tmp_path / "b", stop=1).train()
    with pytest.raises(LedgerError, match="does not belong to the ledger"):
        build(tmp_path / "a").train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-1"))
    assert charged(tmp_path / "a") == 1


def test_another_start_is_refused(tmp_path):
    build(tmp_path / "a", stop=1).train()
    build(tmp_path / "b", stop=1).train()
    start = (tmp_path / "a" / "start.safetensors").read_bytes()
    (tmp_path / "a" / "start.safetensors").write_bytes(start[:-4] + b"abcd")
    with pytest.raises(StartError, match="is not the one that the ledger's plan names"):
        build(tmp_path / "a").train(resume_from_checkpoint=True)


def test_nobody_is_told_to_delete_a_ledger_with_charges(tmp_path):
    build(tmp_path, stop=1).train()
    (tmp_path / "start.safetensors").unlink()
    with pytest.raises(StartError, match="steps are charged: keep its ledger"):
        build(tmp_path).train(resume_from_checkpoint=True)


def test_a_run_that_charged_nothing_is_forgotten_under_its_lock(tmp_path, monkeypatch):
    """Otherwise another process could open the ledger and charge it before it is deleted."""
    forget, seen = files.forget, []
    monkeypatch.setattr(files, "forget", lambda out: (seen.append(in_use(out / "ledger.jsonl")), forget(out)))
    trainer = build(tmp_path)
    trainer.per_example_loss = lambda model, batch: model(**batch).loss
    with pytest.raises(ValueError, match="one loss per example"):
        trainer.train()
    assert seen == [True]
    assert not (tmp_path / "ledger.jsonl").exists()


def test_a_resumed_model_has_the_basis_of_its_start(tmp_path):
    """Even if the basis would come out otherwise today, as it may on another machine."""
    trainers.build(tmp_path, args=SAVING, callbacks=[Stop(1)], privacy_changes={"basis": "random"}).train()
    trainer = trainers.build(tmp_path, args=SAVING, privacy_changes={"basis": "random"})
    for core in trainer.adapter.cores:
        with torch.no_grad():
            core.up.up.copy_(core.up.up.flip(1))
    trainer.train(resume_from_checkpoint=True)
    start = load_file(tmp_path / "start.safetensors")
    for core in trainer.adapter.cores:
        assert torch.equal(core.up.up, start[f"{core.name}.B"])
    assert charged(tmp_path) == 4


def test_resuming_equals_an_uninterrupted_run(tmp_path):
    """With the randomness of a test: the same numbers, taken up where they were left."""
    whole = trainers.build(tmp_path / "whole", randomness=SeededRandomness(4), args=SAVING)
    whole.train()
    source = SeededRandomness(4)
    trainers.build(tmp_path / "cut", randomness=source, args=SAVING, callbacks=[Stop(2)]).train()
    second = trainers.build(tmp_path / "cut", randomness=source, args=SAVING)
    second.train(resume_from_checkpoint=True)
    one, other = trainers.theta(whole.adapter), trainers.theta(second.adapter)
    assert float((one - other).norm() / one.norm()) < 1e-6


@pytest.mark.parametrize("adaptive", [None, 0.5])
def test_an_adaptive_clip_norm_is_taken_up(tmp_path, adaptive):
    changes = {} if adaptive is None else {"adaptive_clip": adaptive}
    trainers.build(tmp_path, args=SAVING, callbacks=[Stop(2)], privacy_changes=changes).train()
    stood = json.loads((tmp_path / "checkpoint-2" / "checkpoint.json").read_text()).get("l2_clip_norm")
    assert (stood is None) is (adaptive is None)
    trainer = trainers.build(tmp_path, args=SAVING, privacy_changes=changes)
    trainer.train(resume_from_checkpoint=True)
    if adaptive is not None:
        after = json.loads((tmp_path / "checkpoint-3" / "checkpoint.json").read_text())["l2_clip_norm"]
        assert 0 < abs(after / stood - 1) <= 0.2214, "one step of the rule, from where C stood"


def test_killed_in_the_middle_of_a_step(tmp_path):
    child = os.fork()
    if child == 0:
        train.set_gradient = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        build(tmp_path).train()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert charged(tmp_path) == 1
    build(tmp_path).train(resume_from_checkpoint=True)
    assert charged(tmp_path) == 4


def test_old_checkpoints_go(tmp_path):
    for step in (1, 2, 10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    remove_old(tmp_path, None, None)
    assert len(list(tmp_path.iterdir())) == 4
    remove_old(tmp_path, 2, str(tmp_path / "checkpoint-1"))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-10"}
