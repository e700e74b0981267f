"""``dpsb selftest --on-private-data``: for one's own screen; tainted, no report, no file."""

import pytest
import torch
import workbench
from typer.testing import CliRunner

from dpsb import mechanism
from dpsb.cli import app
from dpsb.data import Collator, DataError, synthetic_examples
from dpsb.selftest import Check, SelfTest, selftest_model
from dpsb.selftest.command import Subject, selftest_subject

pytestmark = pytest.mark.usefixtures("quick_calibration", "wide_terminal")


def subject():
    return Subject(str(workbench.bert_folder()), labels=("ham", "spam"), rank=4, max_length=workbench.PADDED)


def command(*further):
    model = ["--model", str(workbench.bert_folder()), "--labels", "ham,spam", "--rank", "4", "--max-length", "16"]
    return CliRunner().invoke(app, ["selftest", *model, "--on-private-data", str(workbench.data_file()), *further])


def test_it_is_tainted_says_so_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = command()
    assert found.exit_code == 0, found.output
    assert "Tainted:" in found.output
    assert "do not keep, send or publish them" in " ".join(found.output.split())
    assert not any(text in found.output for text in workbench.CANARIES)
    assert not list(tmp_path.rglob("*"))


def test_there_is_no_report_of_it():
    refused = command("--json")
    assert refused.exit_code == 1
    assert "writes no report" in refused.stderr
    assert not refused.stdout
    check = Check(name="row_bound", passed=True, figure=0.5, limit="<= 1", detail="")
    assert SelfTest("mine", (check,)).to_json()["passed"]
    with pytest.raises(ValueError, match="writes no report"):
        SelfTest("mine", (check,), tainted=True).to_json()


def test_without_it_nothing_is_tainted():
    assert not selftest_subject(subject()).tainted


def test_the_private_rows_are_what_is_summed(tiny):
    """A fault that synthetic examples do not show: the loss of one kind of example alone looks at its neighbours."""
    rare, kind = 60, "bert"

    def loss(model, batch):
        losses = tiny.loss[kind](model, batch)
        peeks = (batch["input_ids"] == rare).any(dim=1)
        return torch.where(peeks, losses * (len(losses) + 1), losses)

    synthetic = [
        {**example, "input_ids": [7 if token == rare else token for token in example["input_ids"]]}
        for example in synthetic_examples("classification", tiny.vocab, 3, 16)
    ]
    private = [{"input_ids": [rare, *range(3, 9 + i)], "labels": i % 3} for i in range(6)]

    def tested(**options):
        adapter = tiny.adapter(tiny.base(kind), allow=("classifier",), scatter=0.0)
        return selftest_model(adapter, loss, Collator(0), synthetic, 16, **options)

    assert tested().ok
    found = tested(private=private)
    assert found.tainted
    assert "coupling_unclipped" in {check.name for check in found.failures}


@pytest.mark.slow
def test_the_full_form_trains_on_them_and_finds_what_it_finds_otherwise(monkeypatch):
    assert selftest_subject(subject(), full=True, private=str(workbench.data_file())).ok
    monkeypatch.setattr(mechanism, "clip_scale", lambda norms, *_: norms * 0 + 1)
    found = selftest_subject(subject(), full=True, private=str(workbench.data_file()))
    assert {"row_bound", "replay_remove"} <= {check.name for check in found.failures}


def test_too_few_rows_are_refused(tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "free money", "label": "spam"}\n' * 5)
    with pytest.raises(DataError, match="at least 6 examples"):
        selftest_subject(subject(), private=str(few))
