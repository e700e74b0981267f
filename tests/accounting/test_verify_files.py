"""Whatever lies beside a ledger and saw a later state of it shows that the ledger was put back."""

import json
import struct
from hashlib import sha256

import pytest
from plans import make_plan

from dpsb_accounting import Ledger, make_report, verify
from dpsb_accounting.positions import metadata, safetensors_metadata
from dpsb_accounting.strict import StrictError


def write_tensors(path, found, tensors=b"\0" * 4):
    header = {"__metadata__": found, "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + tensors)


def write_checkpoint(run, name, ledger, **changes):
    (run / name).mkdir()
    facts = {
        "schema": "dpsb-checkpoint/1",
        "run_id": ledger.run_id,
        "ledger_length": ledger.length,
        "ledger_head": ledger.head,
    }
    (run / name / "checkpoint.json").write_text(json.dumps({**facts, **changes}))


@pytest.fixture
def run(tmp_path):
    """A run of four charges whose files saw states 3, 4 and 5 of the ledger."""
    with Ledger.create(tmp_path / "ledger.jsonl", make_plan()) as ledger:
        for number in range(4):
            ledger.charge("train")
            if number == 1:
                write_checkpoint(tmp_path, "checkpoint.old", ledger)
            if number == 2:
                write_checkpoint(tmp_path, "checkpoint", ledger)
        write_tensors(tmp_path / "adapter_model.safetensors", metadata(ledger) | {"format": "pt"})
    return tmp_path


def cut(run, lines):
    kept = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)[:lines]
    (run / "ledger.jsonl").write_bytes(b"".join(kept))


def failures(run):
    return [failure.name for failure in verify(run / "ledger.jsonl").failures]


def test_all_of_them_are_checked(run):
    outcome = verify(run / "ledger.jsonl")
    assert outcome.ok, outcome.failures
    assert {"adapter_model.safetensors", "checkpoint", "checkpoint.old"} <= {check.name for check in outcome.checks}


def test_a_ledger_behind_any_of_them_is_refused(run):
    cut(run, 4)
    assert failures(run) == ["adapter_model.safetensors"]
    (run / "adapter_model.safetensors").unlink()
    assert verify(run / "ledger.jsonl").ok
    cut(run, 3)
    assert failures(run) == ["checkpoint"]
    cut(run, 2)
    assert failures(run) == ["checkpoint", "checkpoint.old"]


def test_the_checkpoints_of_a_trainer_are_checked_too(run):
    (run / "checkpoint").rename(run / "checkpoint-3")
    (run / "checkpoint.old").rename(run / "checkpoint-2")
    (run / "adapter_model.safetensors").unlink()
    assert verify(run / "ledger.jsonl").ok
    cut(run, 3)
    assert failures(run) == ["checkpoint-3"]


def test_files_of_another_run_are_refused(run, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    with Ledger.create(other / "ledger.jsonl", make_plan()) as ledger:
        for _ in range(4):
            ledger.charge("train")
        write_tensors(run / "adapter_model.safetensors", metadata(ledger))
    (failure,) = verify(run / "ledger.jsonl").failures
    assert "belongs to another run" in failure.detail
    write_tensors(run / "adapter_model.safetensors", {"format": "dpsb-core/1", "run_id": "another"})
    assert failures(run) == ["adapter_model.safetensors"]


@pytest.mark.parametrize(
    "found",
    [
        {"ledger_length": "9" * 5000, "ledger_head": "0" * 64, "run_id": "x"},
        {"ledger_length": "-1", "ledger_head": "0" * 64},
        {"ledger_head": "0" * 64},
        {"ledger_length": "5"},
        {"ledger_length": 5, "ledger_head": "0" * 64},
        ["a"],
    ],
)
def test_states_that_no_ledger_can_have_are_refused(run, found):
    write_tensors(run / "adapter_model.safetensors", found)
    assert failures(run) == ["adapter_model.safetensors"]


def test_a_file_that_names_no_state_says_so(run):
    write_tensors(run / "adapter_model.safetensors", {"format": "pt"})
    write_tensors(run / "somebody_elses.safetensors", {"format": "pt"})
    outcome = verify(run / "ledger.jsonl")
    assert outcome.ok
    (found,) = [check for check in outcome.checks if check.name.endswith(".safetensors")]
    assert "names no state of the ledger" in found.detail


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 50) + b"{}",
        struct.pack("<Q", 2) + b"[}",
        struct.pack("<Q", 5) + b'"\xff"}}',
        struct.pack("<Q", 40) + b'{"__metadata__":{"a":"1","a":"2"}}      ',
        struct.pack("<Q", 30) + b'{"__metadata__":"text"}       ',
        struct.pack("<Q", 100_000) + b"[" * 100_000,
    ],
)
def test_a_broken_tensor_file_is_one_sentence(run, content):
    path = run / "adapter_model.safetensors"
    path.write_bytes(content)
    with pytest.raises(StrictError, match="no safetensors file"):
        safetensors_metadata(path)
    (failure,) = verify(run / "ledger.jsonl").failures
    assert "\n" not in failure.detail


@pytest.mark.parametrize(
    "changes", [{"ledger_length": "3"}, {"ledger_head": None}, {"run_id": "x"}, {"ledger_length": 0}]
)
def test_a_wrong_checkpoint_is_refused(run, changes):
    facts = json.loads((run / "checkpoint" / "checkpoint.json").read_text())
    (run / "checkpoint" / "checkpoint.json").write_text(json.dumps({**facts, **changes}))
    assert failures(run) == ["checkpoint"]
    (run / "checkpoint" / "checkpoint.json").unlink()
    assert failures(run) == ["checkpoint"]


def test_the_start_is_the_one_that_the_plan_names(tmp_path):
    with Ledger.create(tmp_path / "ledger.jsonl", make_plan(details={"start_sha256": "0" * 64})):
        pass
    write_tensors(tmp_path / "start.safetensors", {})
    assert failures(tmp_path) == ["start.safetensors"]


@pytest.mark.parametrize("name", ["basis.safetensors", "basis_choice.json"])
def test_what_a_charged_release_produced_is_what_the_ledger_binds(tmp_path, name):
    with Ledger.create(tmp_path / "ledger.jsonl", make_plan()) as ledger:
        write_tensors(tmp_path / name, {})
        ledger.bind_file(name, sha256((tmp_path / name).read_bytes()).hexdigest())
    assert failures(tmp_path) == []
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b" ")
    assert name in failures(tmp_path)
    (tmp_path / name).unlink()  # a finished run does without it
    assert failures(tmp_path) == []


def test_a_run_that_is_still_going_is_not_confirmed(run):
    with Ledger.open(run / "ledger.jsonl") as ledger:
        make_report(ledger).write(run / "report.json")
        (failure,) = verify(run / "ledger.jsonl").failures
        assert failure.name == "run has ended"
        assert "steps and taints may follow" in failure.detail
    assert verify(run / "ledger.jsonl").ok


def test_a_repair_is_reported(run):
    whole = (run / "ledger.jsonl").read_bytes()
    for path in ("adapter_model.safetensors",):
        (run / path).unlink()
    (run / "ledger.jsonl").write_bytes(whole[:-30])
    Ledger.open(run / "ledger.jsonl").close()
    found = {check.name: check.detail for check in verify(run / "ledger.jsonl").checks}
    assert found["repairs"].startswith("1 times a line")
