"""What goes wrong while ``fit`` runs: memory, disk, exceptions. Charged steps stay charged, the rest can be done."""

import os
import resource
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import workbench
from torch import nn

from dpsb.checkpoint import remove_checkpoint
from dpsb.losses import classification_loss
from dpsb.randomness import SeededRandomness
from dpsb.sampling import poisson_draw
from dpsb.train import Knobs, StepError, fit
from dpsb_accounting import BudgetSpent, Ledger, LedgerError

EVERY_STEP = Knobs(checkpoint_every=1)


@pytest.fixture
def training(tiny, tmp_path):
    """``fit`` on a new or an existing ledger in ``tmp_path``; the adapter is new each time."""

    def run(base=None, adapter=None, data=None, plan=None, **changes):
        adapter = adapter or tiny.adapter(base or tiny.base("bert"), scatter=0.0)
        path = tmp_path / "ledger.jsonl"
        changes = {"loss_fn": classification_loss, "knobs": EVERY_STEP, **changes}
        with Ledger.open(path) if path.exists() else workbench.new_ledger(tmp_path, **(plan or {})) as ledger:
            data = workbench.examples() if data is None else data
            positional, named = workbench.fit_arguments(adapter, data, ledger, **changes)
            fit(*positional, **named)
        return adapter

    return run


def charged(tmp_path):
    return Ledger.read(tmp_path / "ledger.jsonl").charged("train")


def stop(progress):
    raise RuntimeError("stop")


def theta(adapter):
    return torch.cat([value.flatten().double() for value in adapter.state().values()])


# --- modes and dropout


def modes(model):
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_in_eval_mode_is_trained_in_train_mode_and_put_back(tiny, training, fails):
    adapter, seen = tiny.adapter(tiny.base("bert"), scatter=0.0), []
    adapter.model.eval()
    adapter.model.base_model.model.bert.embeddings.train()
    before = modes(adapter.model)

    def loss(model, batch):
        seen.append(all(modes(model)))
        if fails and len(seen) > 12:
            raise RuntimeError("stop")
        return classification_loss(model, batch)

    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            training(adapter=adapter, loss_fn=loss)
    else:
        training(adapter=adapter, loss_fn=loss)
    assert all(seen)
    assert modes(adapter.model) == before


def dropouts(model):
    found = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    return found + [m.dropout_prob for m in model.modules() if isinstance(getattr(m, "dropout_prob", None), float)]


@pytest.mark.parametrize(("allow_dropout", "fails"), [(False, False), (False, True), (True, False)])
def test_dropout_is_off_while_training_unless_allowed_and_put_back(tiny, training, allow_dropout, fails):
    base = tiny.base("bert", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2)
    adapter, active = tiny.adapter(base, scatter=0.0), []
    before = dropouts(adapter.model)
    assert {0.1, 0.2} <= set(before)

    def loss(model, batch):
        active.append(any(dropouts(model)))
        if fails and len(active) > 12:
            raise RuntimeError("stop")
        return classification_loss(model, batch)

    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            training(adapter=adapter, loss_fn=loss)
    else:
        training(adapter=adapter, loss_fn=loss, allow_dropout=allow_dropout)
    assert any(active) is allow_dropout
    assert not active[0], "the probe runs without dropout"
    assert dropouts(adapter.model) == before


def test_dropout_masks_stay_secret_where_the_caller_seeds_between_steps(tiny, training):
    """Under a known seed an example's mask would follow from its place, so from who else was drawn."""
    adapter = tiny.adapter(tiny.base("bert", hidden_dropout_prob=0.1), scatter=0.0)
    in_steps, between = set(), []

    def loss(model, batch):
        if between:
            in_steps.add(torch.initial_seed())
        return classification_loss(model, batch)

    def seed_again(progress):
        between.append(torch.initial_seed())
        torch.manual_seed(7)

    training(adapter=adapter, loss_fn=loss, allow_dropout=True, on_step=seed_again)
    assert in_steps
    assert 7 not in in_steps
    assert set(between[1:]) == {7}, "between steps torch's generator is the caller's"


# --- memory


class Watched(list):
    """A data set that knows whether it was read: the probe does not."""

    was_read = False

    def __getitem__(self, index):
        self.was_read = True
        return super().__getitem__(index)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no"), RuntimeError("DefaultCPUAllocator: not enough memory")]
)
def test_a_microbatch_that_does_not_fit_is_halved_and_the_sum_is_the_same(tiny, training, tmp_path, error):
    data, sizes = Watched(workbench.examples()), []

    def loss(model, batch):
        losses = classification_loss(model, batch)
        if data.was_read and torch.is_grad_enabled():
            sizes.append(len(losses))
            if len(losses) > 2:
                raise error
        return losses

    halved = training(data=data, loss_fn=loss, randomness=SeededRandomness(4))
    assert max(sizes) > 2
    assert charged(tmp_path) == 3
    (tmp_path / "ledger.jsonl").unlink()
    remove_checkpoint(tmp_path)
    whole = training(randomness=SeededRandomness(4))
    assert tiny.distance(theta(halved), theta(whole)) < 1e-5


def test_out_of_memory_on_one_example_is_one_sentence_and_the_run_can_go_on(training, tmp_path):
    data = Watched(workbench.examples())

    def loss(model, batch):
        if data.was_read:
            raise torch.OutOfMemoryError("Tried to allocate 7 GiB")
        return classification_loss(model, batch)

    with pytest.raises(MemoryError, match=r"^Out of memory on a single example") as caught:
        training(data=data, loss_fn=loss, plan={"num_examples": 24, "expected_batch_size": 24})
    assert "7 GiB" not in str(caught.value)
    assert charged(tmp_path) == 1
    training()
    assert charged(tmp_path) == 3


def test_an_error_of_memory_does_not_tell_how_much_memory_was_wanted(training, tmp_path):
    """NumPy's message holds the shape of the array: the number of rows, or of those drawn."""

    class Huge(list):
        def __len__(self):
            raise MemoryError("Unable to allocate 3 GiB for an array with shape (48151,)")

    with pytest.raises(MemoryError, match=r"^Step 0 ran out of memory\. It is charged") as caught:
        training(data=Huge(workbench.examples()))
    assert "48151" not in str(caught.value)
    assert charged(tmp_path) == 1


class Panic(BaseException):
    """As code in Rust ends under Python: no ``Exception``."""


@pytest.mark.parametrize("error", [RuntimeError, Panic])
def test_another_error_is_not_taken_for_one_of_memory(training, tmp_path, error):
    data = Watched(workbench.examples())

    def loss(model, batch):
        if data.was_read:
            raise error("something else")
        return classification_loss(model, batch)

    with pytest.raises(StepError, match=rf"Step 0 failed \({error.__name__} at .*message is withheld") as caught:
        training(data=data, loss_fn=loss, plan={"num_examples": 24, "expected_batch_size": 24})
    assert "something else" not in str(caught.value)
    assert charged(tmp_path) == 1


# --- what does not belong together


def test_a_plan_that_states_another_basis_or_unit_is_refused(training, tmp_path):
    plan = workbench.fit_plan()
    for odd, match in (
        (replace(plan, basis={"kind": "weight_svd", "access": "data_free"}), "the adapter has"),
        (replace(plan, unit="user"), "unit is 'example'"),
    ):
        Ledger.create(tmp_path / "ledger.jsonl", odd).close()
        with pytest.raises(ValueError, match=match):
            training()
        assert charged(tmp_path) == 0
        (tmp_path / "ledger.jsonl").unlink()


# --- the ledger


def noting_draws(monkeypatch):
    draws = []

    def noted(*arguments):
        draws.append(0)
        return poisson_draw(*arguments)

    monkeypatch.setattr("dpsb.clipped_sums.poisson_draw", noted)
    return draws


@pytest.mark.parametrize("part", [0, 40])
def test_a_full_disk_stops_training_before_the_draw(training, tmp_path, monkeypatch, part):
    write, writes, draws, full = os.write, [], noting_draws(monkeypatch), [True]

    def on_a_disk(descriptor, line):
        if full[0] and b'"charge"' in line:
            writes.append(0)
            if len(writes) == 2:
                if not part:
                    raise OSError(28, "No space left on device")
                return write(descriptor, line[:part])
        return write(descriptor, line)

    monkeypatch.setattr(os, "write", on_a_disk)
    with pytest.raises(LedgerError, match="stopped before any data was drawn"):
        training()
    assert len(draws) == charged(tmp_path) == 1
    assert not Ledger.read(tmp_path / "ledger.jsonl").torn
    full[0] = False
    training()
    assert (len(draws), charged(tmp_path)) == (3, 3)


def test_a_real_limit_on_the_file_size_stops_training_before_the_draw(training, tmp_path):
    """In a forked process, because the limit would hold for all of pytest."""
    with workbench.new_ledger(tmp_path) as ledger:
        ledger.charge("train")
        size = ledger.path.stat().st_size
    child = os.fork()
    if child == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, size + 100))
            workbench.ignore_file_size_signal()
            training(knobs=Knobs(checkpoint_every=0))
        except LedgerError:
            code = 7
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert Ledger.read(tmp_path / "ledger.jsonl").charged("train") == 1
    training()
    assert charged(tmp_path) == 3


HOLD = """
import sys
from dpsb_accounting import Ledger
with Ledger.open(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_on_one_directory(training, tmp_path):
    workbench.new_ledger(tmp_path).close()
    command = [sys.executable, "-c", HOLD, str(tmp_path / "ledger.jsonl")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(LedgerError, match="in use by another run"):
            training()
        other.stdin.close()
        assert other.wait() == 0
    assert charged(tmp_path) == 0
    training()


def test_a_ledger_behind_its_checkpoint_is_refused(training, tmp_path):
    training()
    path = tmp_path / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(LedgerError, match=r"behind.*charged steps are missing"):
        training()
    path.write_bytes(b"".join(lines[:1]))  # no charge is left, but the checkpoint remembers
    with pytest.raises(LedgerError, match=r"behind.*charged steps are missing"):
        training()
    path.unlink()
    with pytest.raises(LedgerError, match="does not belong to the ledger"):
        training()


def test_a_checkpoint_of_another_run_is_refused(training, tmp_path):
    with pytest.raises(RuntimeError, match="stop"):
        training(on_step=stop)
    (tmp_path / "ledger.jsonl").unlink()
    with workbench.new_ledger(tmp_path) as ledger:
        ledger.charge("train")
    with pytest.raises(LedgerError, match="does not belong to the ledger"):
        training()


def test_no_step_is_left_after_the_last_one(training, tmp_path, monkeypatch):
    first = theta(training())
    draws = noting_draws(monkeypatch)
    again = theta(training())
    assert torch.equal(first, again), "the last checkpoint is loaded, nothing is drawn"
    assert not draws
    with Ledger.open(tmp_path / "ledger.jsonl") as ledger, pytest.raises(BudgetSpent, match="all 3 charges"):
        ledger.charge("train")
