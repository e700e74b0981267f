"""Training on public rows before the first private step: what it moves, what it reads, and that it costs nothing."""

import json
from dataclasses import replace

import pytest
import torch
import workbench
from torch import nn
from typer.testing import CliRunner

from dpsb import run
from dpsb.adapter import Provenance, attach, lora_layers
from dpsb.adapter_files import with_adapter
from dpsb.basis.setup import train_on_public_rows
from dpsb.basis.trained import trained
from dpsb.beginning import basis_setup, begin
from dpsb.cli import app
from dpsb.config import ConfigError, RunConfig
from dpsb.data import DataError
from dpsb.inputs import read_inputs
from dpsb.losses import IGNORED
from dpsb.models import HEAD_NAMES, load_base
from dpsb.warm_start import train_on_public
from dpsb_accounting import Ledger, verify

NEAR = {"warm_start_epochs": 3, "warm_start_learning_rate": 0.02}
HOW = {
    "trained": ("classification", {"basis": "trained"}),
    "random": ("classification", {"basis": "random"}),
    "lora-xs": ("classification", {"method": "lora-xs"}),
    "lora": ("classification", {"method": "lora"}),
    "ffa-lora": ("classification", {"method": "ffa-lora"}),
    "head-only": ("classification", {"method": "head-only"}),
    "lora-plus": ("classification", {"method": "lora-plus"}),
    "full": ("classification", {"method": "full", "warm_start_learning_rate": 0.002}),
    "trained, language model": ("causal-lm", {"basis": "trained"}),
    "lora, language model": ("causal-lm", {"method": "lora"}),
}


pytestmark = pytest.mark.usefixtures("quick_calibration")


def settings(out, how, **changes):
    task, given = HOW[how]
    public = str(workbench.data_file(task, seed=5))
    return workbench.run_config(out, task, **{"warm_start": public, **NEAR, **given, **changes})


def cold(out, how):
    """The same without training on public rows."""
    usual = RunConfig.warm_start_learning_rate
    changes = {
        "warm_start_epochs": 0,
        "warm_start_learning_rate": usual,
        "basis": HOW[how][1].get("basis", "weight").replace("trained", "weight"),
    }
    return settings(out, how, **changes, **({"warm_start": None} if HOW[how][0] == "causal-lm" else {}))


class Unread:
    """Private examples that nobody may look at."""

    def __len__(self):
        return 60

    def __getitem__(self, index):
        pytest.fail("a private example was read")

    __iter__ = __getitem__


def begun(config, inputs=None):
    inputs = inputs or read_inputs(config, warm=True)
    setup = basis_setup(inputs, 1e-3)
    unread = replace(inputs.prepared, examples=Unread(), units=Unread(), held_out=Unread())
    inputs, setup = replace(inputs, prepared=unread), replace(setup, examples=Unread())
    return begin(inputs, setup, lambda _status: None)[0], inputs, setup


def public_loss(inputs, setup):
    with torch.no_grad():
        batch = inputs.collate(list(setup.warm_start), inputs.prepared.max_length)
        return float(inputs.loss_fn(inputs.model.eval(), batch).mean())


@pytest.mark.parametrize("how", HOW)
def test_it_fits_the_public_rows_and_reads_no_private_one(tmp_path, how):
    config = settings(tmp_path / "run", how)
    adapter, inputs, setup = begun(config)
    _, untrained, _ = begun(cold(tmp_path / "run", how))
    assert public_loss(inputs, setup) < public_loss(untrained, setup)
    adapter.check_nothing_else_is_trained()
    assert all(parameter.grad is None for parameter in inputs.model.parameters())
    again, _, _ = begun(config)
    for name, value in again.state().items():
        assert torch.equal(value, adapter.state()[name]), name


def test_what_is_not_trained_stays_as_it_was(tmp_path):
    config = settings(tmp_path / "run", "lora")
    inputs = read_inputs(config, warm=True)
    before = {name: parameter.clone() for name, parameter in inputs.model.named_parameters()}
    adapter, _, _ = begun(config, inputs)
    moving = {id(parameter) for parameter in adapter.parameters()}
    for name, parameter in inputs.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) not in moving), name


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_a_trained_basis_is_the_lora_that_was_trained(tmp_path, task):
    how = "trained" if task == "classification" else "trained, language model"
    inputs = read_inputs(settings(tmp_path / "run", how), warm=True)
    setup = basis_setup(inputs, 1e-3)
    train_on_public_rows(setup, [p for p in inputs.model.parameters() if p.requires_grad])
    first = next(iter(lora_layers(inputs.model).values()))
    with torch.no_grad():
        first.lora_B["default"].weight.zero_()
    before = public_loss(inputs, setup)
    basis = trained(inputs.model, Provenance(kind="trained", access="public"))
    attach(inputs.model, basis, allow=HEAD_NAMES)  # which checks that A and B are orthonormal
    assert public_loss(inputs, setup) == pytest.approx(before, rel=1e-5)
    sizes = [float(factors.R0.diagonal().min()) for factors in basis.factors.values()]
    assert sizes[0] == 0
    assert min(sizes[1:]) > 0


@pytest.mark.parametrize("how", HOW)
def test_a_run_starts_there_at_the_same_price_and_resumes(tmp_path, monkeypatch, how):
    out = tmp_path / "run"
    config = settings(out, how)

    def cut(*_args, **_named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dpsb.train._step", cut)
        with pytest.raises(KeyboardInterrupt):
            run.fine_tune(config)
    plan = Ledger.read(out / "ledger.jsonl").plan
    assert {name: plan.details[name] for name in NEAR} == {name: getattr(config, name) for name in NEAR}
    assert plan.details["warm_start"] == "rows.jsonl"
    assert len(plan.phases) == 1
    assert (plan.basis["access"], plan.basis["source"], plan.basis["epochs"]) == ("public", "rows.jsonl", 3)
    assert plan.basis["source_sha256"] == plan.details["warm_start_sha256"]
    monkeypatch.setattr("dpsb.basis.setup.train_on_public", lambda *_a, **_n: pytest.fail("the start is on disk"))
    report = run.fine_tune(run.resumed_config(str(out), {}), resume=True).report
    plain = run.fine_tune(cold(tmp_path / "plain", how))
    assert report.claim
    assert "data declared public, which nothing here protects" in report.to_text()
    assert report.epsilon == plain.report.epsilon
    assert verify(out / "ledger.jsonl").ok


def test_frozen_blocks_may_be_remembered_meanwhile(tmp_path):
    upper = {"targets": r"re:.*layer\.1\..*(query|value)"}
    whole, _, _ = begun(settings(tmp_path / "run", "trained", **upper))
    calls, config = [], settings(tmp_path / "run", "trained", **upper, remember_frozen_blocks=True)
    inputs = read_inputs(config, warm=True)
    lowest = next(
        module for name, module in inputs.model.named_modules() if name.endswith("layer.0.attention.self.query")
    )
    lowest.register_forward_hook(lambda *_a: calls.append(1))
    short, inputs, _ = begun(config, inputs)
    assert 0 < len(calls) <= 2
    for name, value in short.state().items():
        torch.testing.assert_close(value, whole.state()[name], rtol=1e-3, atol=1e-4)
    assert not any(module._forward_pre_hooks for module in inputs.model.modules())


@pytest.mark.parametrize("how", ["trained", "lora"])
def test_another_private_file_starts_at_the_same_place(tmp_path, how):
    first, _, _ = begun(settings(tmp_path / "run", how))
    other, _, _ = begun(settings(tmp_path / "run", how, data=str(workbench.data_file(seed=9))))
    for name, value in other.state().items():
        assert torch.equal(value, first.state()[name]), name


def test_nothing_random_of_torch_is_used_and_dropout_is_off(tmp_path):
    states = []
    for seed in (1, 2):
        config = settings(tmp_path / "run", "lora")
        inputs = read_inputs(config, warm=True)
        for module in inputs.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        inputs.model.train()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        adapter, _, _ = begun(config, inputs)
        assert torch.equal(torch.get_rng_state(), before)
        assert inputs.model.training
        states.append(adapter.state())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def one_number(rows, epochs, learning_rate, size=1000):
    """A number that is to become the mean of the rows'; and the learning rates on the way."""
    weight = nn.Parameter(torch.zeros(1))

    def losses(batch):
        return (weight - batch["x"]).square()

    def batches(found):
        return [{"x": torch.tensor([row["x"] for row in found[i : i + size]])} for i in range(0, len(found), size)]

    rates, step = [], torch.optim.Adam.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.optim.Adam.step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self))
        train_on_public([weight], losses, rows, batches, source="near.csv", epochs=epochs, learning_rate=learning_rate)
    return weight.item(), rates


def test_rows_without_a_label_count_for_nothing():
    rows = [{"x": 1.0, "labels": 0}] * 70 + [{"x": -9.0, "labels": IGNORED}] * 70
    assert one_number(rows, 40, 0.1)[0] == pytest.approx(1.0, abs=0.05)
    with pytest.raises(DataError, match=r"warm_start='near.csv' teaches nothing: none of its 70 rows"):
        one_number(rows[70:], 1, 0.1)
    untaught = [{"x": 1.0, "labels": [5, IGNORED]}, {"x": 1.0, "labels": []}]
    with pytest.raises(DataError, match=r"none of its 2 rows has .* a token to learn within max_length"):
        one_number(untaught, 1, 0.1)
    taught = {"x": 1.0, "labels": [IGNORED, 5]}
    assert one_number([*[taught] * 5, *[{"x": -9.0, "labels": [5, IGNORED]}] * 5], 40, 0.1)[0] > 0.9


def test_a_rate_that_is_too_high_is_named():
    rows = [{"x": 1.0, "labels": 0}] * 10
    with pytest.raises(DataError, match=r"from 1 to 8.08e\+05; lower warm_start_learning_rate=900.0"):
        one_number(rows, 1, 900.0)
    with pytest.raises(DataError, match=r"to inf; lower warm_start_learning_rate=1e\+30"):
        one_number(rows, 1, 1e30)


def test_the_rate_falls_to_nothing_and_microbatches_change_nothing():
    rows = [{"x": float(i % 7), "labels": 0} for i in range(150)]
    whole, rates = one_number(rows, 2, 0.3)
    assert rates == pytest.approx([0.3 * (1 - step / 6) for step in range(6)])
    assert one_number(rows, 2, 0.3, size=5)[0] == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"warm_start_epochs": 2}, "warm_start_epochs=2 needs a file of public rows: warm_start=FILE"),
        ({"warm_start_epochs": -1}, "warm_start_epochs=-1 of at least 0"),
        ({"warm_start_learning_rate": 0.0}, r"warm_start_learning_rate=0\.0"),
        ({"basis": "trained"}, "basis='trained' needs public rows to train on"),
        ({"basis": "trained", "warm_start": "near.jsonl"}, "basis='trained' needs public rows to train on"),
        ({"basis": "trained:near.jsonl"}, "basis='trained' takes no file"),
        ({"warm_start_learning_rate": 0.1}, r"warm_start_learning_rate=0\.1 needs public rows to train on"),
        (
            {"method": "peft:pissa", "warm_start": "near.jsonl", "warm_start_epochs": 1},
            "method='peft:pissa': it moves",
        ),
        (
            {"method": "peft:lora_ga:a.csv", "warm_start": "b.csv", "warm_start_epochs": 1},
            "it moves the frozen weights too",
        ),
        (
            {"basis": "public:a.csv,b.csv", "basis_choice": "private", "warm_start": "c.csv", "warm_start_epochs": 1},
            "basis_choice='private' may be",
        ),
        ({"basis": "private", "warm_start": "near.jsonl", "warm_start_epochs": 2}, "basis='private' is one"),
        ({"basis": "hybrid", "warm_start": "near.jsonl", "warm_start_epochs": 2}, "basis='hybrid' is one"),
        ({"basis": "trained", "warm_start": "near.jsonl", "warm_start_epochs": 2, "rebase_every": 2}, "rebase_every=2"),
    ],
)
def test_refused(tmp_path, changes, match):
    with pytest.raises(ConfigError, match=match):
        workbench.run_config(tmp_path, **changes)


def test_public_rows_that_are_held_out_too_are_refused(tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    rows = [*workbench.rows(seed=5)[:4], *workbench.rows(seed=7)]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"rows of .*, named as public, are in the held-out data too") as caught:
        run.fine_tune(settings(tmp_path / "run", "trained", eval_data=str(held_out)))
    assert not any(word in str(caught.value) for word in workbench.CANARIES)
    assert not (tmp_path / "run").exists()


def test_public_rows_of_another_label_space_are_refused(tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in "xyz"))
    with pytest.raises(DataError, match="at least two of the run's labels; 0 of 3"):
        run.fine_tune(settings(tmp_path / "run", "trained", warm_start=str(other)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", ["trained", "lora"])
def test_what_is_saved_is_what_was_trained(tmp_path, how):
    """The plain LoRA file of a run whose private steps move nothing is the publicly trained model."""
    _, inputs, setup = begun(settings(tmp_path / "run", how))
    expected = public_loss(inputs, setup)
    run.fine_tune(settings(tmp_path / "run", how, learning_rate=1e-12, head_learning_rate=1e-12))
    base = load_base(str(workbench.bert_folder()), "classification", ["ham", "spam"])[0]
    loaded = replace(inputs, model=with_adapter(base, tmp_path / "run"))
    assert public_loss(loaded, setup) == pytest.approx(expected, rel=1e-4)


def test_the_command_line_takes_it(tmp_path):
    given = workbench.run_settings(tmp_path / "run", warm_start=str(workbench.data_file(seed=5)), basis="trained")
    options = [*workbench.options(given), "--warm-start-epochs", "1", "--warm-start-lr", "0.01", "--json"]
    result = CliRunner().invoke(app, ["train", *options])
    assert result.exit_code == 0, result.output
    plan = Ledger.read(tmp_path / "run" / "ledger.jsonl").plan
    assert plan.details["warm_start_learning_rate"] == 0.01
