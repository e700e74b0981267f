"""Checkpoints: whole or not at all, true to the bit, and tied to their ledger."""

import json

import pytest
import torch
import workbench

from dpsb.checkpoint import load_checkpoint, remove_checkpoint, save_checkpoint
from dpsb.folders import replacing
from dpsb_accounting import Ledger, LedgerError


def stepped(adapter, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in adapter.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return optimizer


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw, two groups": lambda p: torch.optim.AdamW([{"params": p[:1], "lr": 0.1}, {"params": p[1:]}], lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
}


@pytest.fixture
def adapter(tiny):
    return tiny.adapter(tiny.base("bert"), allow=("classifier",))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_if_nothing_had_happened(tiny, adapter, tmp_path, name):
    make = OPTIMIZERS[name]
    with workbench.new_ledger(tmp_path) as ledger:
        ledger.charge("train")
        optimizer = stepped(adapter, make(adapter.parameters()), 3)
        save_checkpoint(tmp_path, adapter, optimizer, ledger)
        expected = stepped(adapter, optimizer, 2, seed=1) and adapter.state()
        other = tiny.adapter(tiny.base("bert"), allow=("classifier",), scatter=0.0)
        again = make(other.parameters())
        assert load_checkpoint(tmp_path, other, again, ledger)
        stepped(other, again, 2, seed=1)
    assert all(torch.equal(value, expected[key]) for key, value in other.state().items())


def test_a_checkpoint_holds_nothing_else(adapter, tmp_path):
    with workbench.new_ledger(tmp_path) as ledger:
        save_checkpoint(tmp_path, adapter, stepped(adapter, torch.optim.Adam(adapter.parameters()), 1), ledger)
        assert set(workbench.written(tmp_path / "checkpoint")) == {
            *("theta.safetensors", "optimizer.safetensors", "checkpoint.json")
        }
        facts = json.loads((tmp_path / "checkpoint" / "checkpoint.json").read_text())
        assert set(facts) == {"schema", "run_id", "ledger_length", "ledger_head", "optimizer"}
        assert (facts["ledger_length"], facts["ledger_head"]) == (ledger.length, ledger.head)
        remove_checkpoint(tmp_path)
    assert set(workbench.written(tmp_path)) == {"ledger.jsonl"}


def test_without_a_checkpoint_nothing_is_loaded(adapter, tmp_path):
    before = adapter.state()
    with workbench.new_ledger(tmp_path) as ledger:
        assert load_checkpoint(tmp_path, adapter, torch.optim.SGD(adapter.parameters(), lr=1.0), ledger) is False
    assert all(torch.equal(before[key], value) for key, value in adapter.state().items())


@pytest.fixture
def saved(adapter, tmp_path):
    optimizer = torch.optim.Adam(adapter.parameters())
    with workbench.new_ledger(tmp_path) as ledger:
        ledger.charge("train")
        save_checkpoint(tmp_path, adapter, optimizer, ledger)
    return optimizer


def loaded(tmp_path, adapter, optimizer):
    with Ledger.open(tmp_path / "ledger.jsonl") as ledger:
        return load_checkpoint(tmp_path, adapter, optimizer, ledger)


def test_the_old_folder_is_used_where_a_crash_left_only_that(adapter, saved, tmp_path):
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")
    assert loaded(tmp_path, adapter, saved)
    with Ledger.open(tmp_path / "ledger.jsonl") as ledger:
        save_checkpoint(tmp_path, adapter, saved, ledger)
    assert not (tmp_path / "checkpoint.old").exists()
    assert loaded(tmp_path, adapter, saved)


@pytest.mark.parametrize("name", ["theta.safetensors", "optimizer.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("how", ["gone", "cut"])
def test_a_broken_checkpoint_is_one_sentence(adapter, saved, tmp_path, name, how):
    path = tmp_path / "checkpoint" / name
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = adapter.state()
    with pytest.raises(LedgerError, match="checkpoint cannot be read"):
        loaded(tmp_path, adapter, saved)
    assert all(torch.equal(before[key], value) for key, value in adapter.state().items())


def test_another_adapter_is_refused(tiny, saved, tmp_path):
    other = tiny.adapter(tiny.base("bert"), rank=3)
    with pytest.raises(ValueError, match=r"state of this adapter|of shape"):
        loaded(tmp_path, other, torch.optim.Adam(other.parameters()))


def test_replacing_keeps_the_old_folder_when_the_block_fails(tmp_path):
    folder = tmp_path / "deep" / "results"
    with replacing(folder) as new:
        (new / "a").write_text("1")
    with pytest.raises(FileNotFoundError), replacing(folder) as new:
        (new / "missing" / "a").write_text("2")
    assert workbench.written(tmp_path) == {"deep/results/a": b"1"}
    with replacing(folder) as new:
        assert not list(new.iterdir())
        (new / "b").write_text("3")
    assert workbench.written(tmp_path) == {"deep/results/b": b"3"}
