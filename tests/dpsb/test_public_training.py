"""Training on public rows before the first private step: what it moves, what it reads, and that it costs nothing."""

import json

import pytest
import torch
import workbench
from torch import nn

from dpsb import run
from dpsb.adapter import Provenance, attach, lora_layers
from dpsb.basis.setup import train_on_public_rows
from dpsb.basis.trained import trained
from dpsb.beginning import basis_setup, begin
from dpsb.config import ConfigError
from dpsb.data import DataError
from dpsb.inputs import read_inputs
from dpsb.losses import IGNORED
from dpsb.models import HEAD_NAMES
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
    "trained, language model": ("causal-lm", {"basis": "trained"}),
    "lora, language model": ("causal-lm", {"method": "lora"}),
}


@pytest.fixture(autouse=True)
def quick_calibration(monkeypatch):
    monkeypatch.setattr("dpsb.plan.noise_multiplier_for", workbench.calibrated)


def settings(out, how, **changes):
    task, given = HOW[how]
    public = str(workbench.data_file(task, seed=5))
    return workbench.run_config(out, task, **{"warm_start": public, **NEAR, **given, **changes})


def cold(out, how):
    """The same without training on public rows."""
    changes = {"warm_start_epochs": 0, "basis": HOW[how][1].get("basis", "weight").replace("trained", "weight")}
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
    object.__setattr__(setup, "examples", Unread())
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
    assert {name: plan.details[name] for name in NEAR} == NEAR
    assert plan.details["warm_start"] == "rows.jsonl"
    assert len(plan.phases) == 1
    if config.basis == "trained":
        assert (plan.basis["kind"], plan.basis["access"], plan.basis["epochs"]) == ("trained", "public", 3)
    monkeypatch.setattr("dpsb.basis.setup.train_on_public", lambda *_a, **_n: pytest.fail("the start is on disk"))
    report = run.fine_tune(run.resumed_config(str(out), {}), resume=True).report
    plain = run.fine_tune(cold(tmp_path / "plain", how))
    assert report.claim
    assert report.epsilon == plain.report.epsilon
    assert verify(out / "ledger.jsonl").ok


def test_frozen_blocks_may_be_remembered_meanwhile(tmp_path):
    upper = {"targets": r"re:.*layer\.1\..*(query|value)"}
    whole, _, _ = begun(settings(tmp_path / "run", "trained", **upper))
    short, inputs, _ = begun(settings(tmp_path / "run", "trained", **upper, remember_frozen_blocks=True))
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


def test_rows_without_a_label_count_for_nothing():
    weight = nn.Parameter(torch.zeros(1))

    def losses(batch):
        return (weight - batch["x"]).square()

    def batches(rows):
        return [{"x": torch.tensor([row["x"] for row in rows])}]

    rows = [{"x": 1.0, "labels": 0}] * 70 + [{"x": -9.0, "labels": IGNORED}] * 70
    train_on_public([weight], losses, rows, batches, epochs=40, learning_rate=0.1)
    assert weight.item() == pytest.approx(1.0, abs=0.05)
    with pytest.raises(DataError, match="none of 70 has one"):
        train_on_public([weight], losses, rows[70:], batches, epochs=1, learning_rate=0.1)
    with pytest.raises(DataError, match=r"The loss on public rows is inf; lower warm_start_learning_rate=1e\+30"):
        train_on_public([weight], losses, rows, batches, epochs=2, learning_rate=1e30)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"warm_start_epochs": 2}, "warm_start_epochs=2 needs a file of public rows: warm_start=FILE"),
        ({"warm_start_epochs": -1}, "warm_start_epochs=-1 of at least 0"),
        ({"warm_start_learning_rate": 0.0}, r"warm_start_learning_rate=0\.0"),
        ({"basis": "trained"}, "basis='trained' needs public rows to train on"),
        ({"basis": "trained", "warm_start": "near.jsonl"}, "basis='trained' needs public rows to train on"),
        ({"basis": "trained:near.jsonl"}, "basis='trained' takes no file"),
        ({"basis": "private", "warm_start": "near.jsonl", "warm_start_epochs": 2}, "'private' is not known by then"),
        ({"basis": "hybrid", "warm_start": "near.jsonl", "warm_start_epochs": 2}, "'hybrid' is not known by then"),
        ({"basis": "trained", "warm_start": "near.jsonl", "warm_start_epochs": 2, "rebase_every": 2}, "rebase_every=2"),
    ],
)
def test_refused(tmp_path, changes, match):
    with pytest.raises(ConfigError, match=match):
        workbench.run_config(tmp_path, **changes)


def test_public_rows_of_another_label_space_are_refused(tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in "xyz"))
    with pytest.raises(DataError, match="at least two of the run's labels; 0 of 3"):
        run.fine_tune(settings(tmp_path / "run", "trained", warm_start=str(other)))
    assert not (tmp_path / "run").exists()
