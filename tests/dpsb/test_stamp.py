"""The header of every tensor file names the ledger's state; verify refuses a ledger that is behind it."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dpsb.models import target_shapes
from dpsb.stamp import stamp
from dpsb_accounting import Gaussian, Ledger, Phase, Plan, verify

TENSORS = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2, 3], dtype=torch.int8)}


def private_plan():
    return Plan(
        phases=(Phase("train", Gaussian(noise_multiplier=4.0), 5),),
        delta=1e-5,
        target_epsilon=3.0,
        neighboring="zero_out",
        num_examples=1000,
        num_examples_declared=False,
        expected_batch_size=1000,
        sampling_prob=1,
        l2_clip_norm=1.0,
        clipping="flat",
        basis={"kind": "random", "access": "data_free"},
    )


@pytest.fixture
def ended(tmp_path):
    with Ledger.create(tmp_path / "ledger.jsonl", private_plan()) as ledger:
        for _ in range(4):
            ledger.charge("train")
        save_file(TENSORS, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
        stamp(tmp_path, ledger)
    return tmp_path


def test_tensors_and_other_metadata_stay(ended):
    path = ended / "adapter_model.safetensors"
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)
    record = Ledger.read(ended / "ledger.jsonl")
    with safe_open(path, "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "run_id": record.run_id,
            "ledger_length": "5",
            "ledger_head": record.head,
        }
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    assert [file.name for file in ended.iterdir() if file.name.endswith(".new")] == []


def test_a_ledger_behind_the_adapter_is_refused(ended):
    assert verify(ended / "ledger.jsonl").ok
    lines = (ended / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (ended / "ledger.jsonl").write_bytes(b"".join(lines[:-1]))
    (failure,) = verify(ended / "ledger.jsonl").failures
    assert failure.name == "adapter_model.safetensors"
    assert "it has 4 lines, but 5 were there before" in failure.detail


def test_an_adapter_of_another_run_is_refused(ended, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    with Ledger.create(other / "ledger.jsonl", private_plan()) as ledger:
        for _ in range(4):
            ledger.charge("train")
    shutil.copy(ended / "adapter_model.safetensors", other)
    assert "belongs to another run" in verify(other / "ledger.jsonl").failures[0].detail


def test_shapes_of_the_targets(tiny):
    adapter = tiny.adapter(tiny.base("bert"))
    shapes = target_shapes(adapter.model)
    assert shapes
    assert sum(shape["count"] for shape in shapes) == len(adapter.cores)
    assert json.loads(json.dumps(shapes)) == shapes
    assert target_shapes(torch.nn.Linear(2, 2)) is None
