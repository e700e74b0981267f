"""The self-test on real models: clean ones pass, faults planted in ``fit`` itself are found, and so are Opacus'."""

import json
import random

import pytest
import torch
import workbench
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn
from typer.testing import CliRunner

from dpsb import clipped_sums, mechanism, train
from dpsb.cli import app
from dpsb.data import Collator, synthetic_examples
from dpsb.losses import causal_lm_loss, classification_loss
from dpsb.probe import ProbeError
from dpsb.run import fine_tune
from dpsb.selftest import Step, run_selftest, selftest_model
from dpsb.selftest.command import Subject, selftest_subject
from dpsb_accounting import Ledger

LENGTH = 16


pytestmark = pytest.mark.usefixtures("quick_calibration", "wide_terminal")


def selftested(tiny, kind="bert", *, full=False, loss_fn=None, prepare=lambda adapter: None, **options):
    base = tiny.base(kind)
    adapter = tiny.adapter(base, allow=("classifier",) if kind == "bert" else (), scatter=0.0)
    prepare(adapter)
    before = adapter.state()
    task = "classification" if kind == "bert" else "causal-lm"
    found = selftest_model(
        adapter,
        loss_fn or tiny.loss[kind],
        Collator(0),
        synthetic_examples(task, tiny.vocab, 3, LENGTH),
        LENGTH,
        full=full,
        **options,
    )
    after = adapter.state()
    assert all(torch.equal(before[name], after[name]) for name in before), "theta is left as it was"
    return found


def failed(found):
    return {check.name for check in found.failures}


# --- clean models


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_clean_models_pass_the_short_test(tiny, kind):
    found = selftested(tiny, kind)
    assert found.ok, found.failures
    assert found["coupling_unclipped"].figure < 1e-4


@pytest.mark.parametrize(
    "kind", ["bert", pytest.param("llama", marks=pytest.mark.slow), pytest.param("gpt2", marks=pytest.mark.slow)]
)
def test_clean_models_pass_the_full_test(tiny, kind):
    found = selftested(tiny, kind, full=True, make_base=lambda: tiny.base(kind))
    assert found.ok, found.failures
    assert {"replay_remove", "update", "resume", "frozen", "reload"} <= {check.name for check in found.checks}


def test_half_precision_passes(tiny):
    base = tiny.base("llama", dtype=torch.bfloat16)
    adapter = tiny.adapter(base, scatter=0.0)
    synthetic = synthetic_examples("causal-lm", tiny.vocab, 3, LENGTH)
    found = selftest_model(adapter, causal_lm_loss, Collator(0), synthetic, LENGTH)
    assert found.ok, found.failures


@pytest.mark.slow
def test_clean_self_tests_of_random_small_models_raise_no_alarm(tiny):
    source = random.Random(5)
    for seed in range(25):
        kind = source.choice(["bert", "llama", "gpt2"])
        base = tiny.base(kind, seed=seed)
        rank, head = source.choice([1, 2, 4, 8]), source.random() < 0.5 and kind == "bert"
        adapter = tiny.adapter(base, rank, allow=("classifier",) if head else (), scatter=source.choice([0.0, 0.3]))
        task = "classification" if kind == "bert" else "causal-lm"
        synthetic = synthetic_examples(task, tiny.vocab, 3, LENGTH)
        found = selftest_model(adapter, tiny.loss[kind], Collator(0), synthetic, LENGTH)
        assert found.ok, (kind, seed, rank, found.failures)


# --- faults in the model, the loss or the collator


def test_a_trainable_tensor_left_over_is_found(tiny):
    def leave_one(adapter):
        next(p for p in adapter.model.parameters() if not p.requires_grad and p.is_floating_point()).requires_grad_()

    assert "nothing_else" in failed(selftested(tiny, prepare=leave_one))


def test_cores_in_eval_mode_are_found(tiny):
    def loss(model, batch):
        model.eval()
        return classification_loss(model, batch)

    assert {"probe", "runs"} & failed(selftested(tiny, loss_fn=loss))


def test_a_loss_averaged_over_the_batchs_tokens_is_found(tiny):
    def token_mean(model, batch):
        """Each example's share of transformers' own loss, which averages over all labelled tokens of the batch."""
        counts = (batch["labels"][:, 1:] != -100).sum(dim=1)
        return causal_lm_loss(model, batch) * counts / counts.sum()

    found = failed(selftested(tiny, "llama", loss_fn=token_mean))
    assert {"probe", "coupling_unclipped"} <= found
    assert "remove_one" not in found  # clipping hides it where every row is clipped


def test_a_loss_of_one_number_is_found(tiny):
    def scalar(model, batch):
        return classification_loss(model, batch).mean()

    assert {"probe", "runs"} <= failed(selftested(tiny, loss_fn=scalar))


def test_hidden_states_normalized_over_the_batch_are_found(tiny):
    def centre(adapter):
        embeddings = adapter.model.get_input_embeddings()
        embeddings.register_forward_hook(lambda _module, _inputs, out: out - 0.5 * out.mean(dim=0, keepdim=True))

    assert {"probe", "coupling"} <= failed(selftested(tiny, prepare=centre))


def test_weights_that_come_from_the_batch_are_found(tiny):
    def weighted(model, batch):
        losses = classification_loss(model, batch)
        return losses * losses.detach().mean()

    assert {"probe", "coupling_unclipped"} <= failed(selftested(tiny, loss_fn=weighted))


def test_cores_that_the_model_does_not_use_are_found(tiny):
    def bypass(model, batch):
        with model.disable_adapter():
            return classification_loss(model, batch)

    assert "probe" in failed(selftested(tiny, loss_fn=bypass))


# --- faults planted in dpsb


def test_no_clipping_is_found(tiny, monkeypatch):
    monkeypatch.setattr(mechanism, "clip_scale", lambda norms, *_: torch.ones_like(norms))
    assert {"row_bound", "remove_one"} <= failed(selftested(tiny))


def test_nan_that_passes_is_found(tiny, monkeypatch):
    def trusting(rows, l2_clip_norm, clipping="flat"):
        exact = rows.double()
        return ((l2_clip_norm / exact.norm(dim=1)).clamp(max=1.0)[:, None] * exact).sum(dim=0)

    monkeypatch.setattr(mechanism, "clip_and_sum", trusting)
    assert failed(selftested(tiny)) == {"nan_example"}


def test_less_noise_is_found(tiny, monkeypatch):
    honest = mechanism.Mechanism.noise_std.fget
    monkeypatch.setattr(mechanism.Mechanism, "noise_std", property(lambda self: 0.9 * honest(self)))
    assert {"noise_scale"} <= failed(selftested(tiny)) <= {"noise_scale", "noise_law"}


def test_a_head_that_escapes_the_clip_is_found(tiny, monkeypatch):
    honest = mechanism.Mechanism.clip_and_sum

    def all_but_the_head(self, rows):
        head = rows.shape[1] - 99
        return torch.cat([honest(self, rows[:, :head]), rows[:, head:].double().sum(dim=0)])

    monkeypatch.setattr(mechanism.Mechanism, "clip_and_sum", all_but_the_head)
    assert "row_bound" in failed(selftested(tiny))


def test_a_double_step_is_found(tiny, monkeypatch):
    honest = train._step

    def twice(*given):
        honest(*given)
        honest(*given)

    monkeypatch.setattr(train, "_step", twice)
    assert failed(selftested(tiny, full=True)) == {"update"}


def test_a_frozen_tensor_that_moves_is_found(tiny, monkeypatch):
    honest = train._step

    def and_the_embeddings(optimizer, adapter, *given):
        honest(optimizer, adapter, *given)
        with torch.no_grad():
            adapter.model.get_input_embeddings().weight.mul_(0.999)

    monkeypatch.setattr(train, "_step", and_the_embeddings)
    assert "frozen" in failed(selftested(tiny, full=True))


def test_a_wrong_divisor_and_a_wrong_draw_are_found(tiny, monkeypatch):
    honest_gradient, honest_draw = train.set_gradient, clipped_sums.poisson_draw
    monkeypatch.setattr(train, "set_gradient", lambda adapter, gradient: honest_gradient(adapter, 1.5 * gradient))
    monkeypatch.setattr(clipped_sums, "poisson_draw", lambda n, q, source: honest_draw(n, min(1.0, 1.2 * q), source))
    assert failed(selftested(tiny, full=True)) == {"update", "replay_draws"}


def test_an_adapter_that_reloads_differently_is_found(tiny):
    def another_base():
        return tiny.base("bert", seed=1)

    assert failed(selftested(tiny, full=True, make_base=another_base)) == {"reload"}


# --- other people's steps


class Regression(nn.Module):
    """A linear model whose outputs have the shape that Opacus' documentation asks losses to have."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape))

    def forward(self, x):
        return self.layer(x)


def people(count=6):
    source = torch.Generator().manual_seed(2)
    x = torch.randn(count, 8, generator=source) * torch.linspace(0.5, 3, count)[:, None]
    return [(one, torch.tensor([3.0])) for one in x]


def opacus_ghost_step(shape, c=0.4):
    """One step of Opacus' ghost clipping, taken apart: what reaches ``summed_grad``."""
    module = GradSampleModuleFastGradientClipping(Regression(), max_grad_norm=c, loss_reduction="sum")
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(module.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=c,
        expected_batch_size=4,
        loss_reduction="sum",
    )

    class Loss(nn.MSELoss):
        def forward(self, outputs, targets):
            return super().forward(outputs.reshape(shape), targets.reshape(shape))

    criterion = DPLossFastGradientClipping(module, optimizer, Loss(reduction="sum"), loss_reduction="sum")

    def clipped_sum(chosen):
        if not chosen:
            return torch.zeros(9)
        optimizer.zero_grad()
        module.zero_grad()
        x, y = (torch.stack(part) for part in zip(*chosen, strict=True))
        criterion(module(x), y).backward()
        found = torch.cat([parameter.grad.flatten() for parameter in module.parameters()])
        optimizer.zero_grad()
        return found

    return Step(name=f"Opacus ghost, losses {shape}", l2_clip_norm=c, clipped_sum=clipped_sum)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_opacus_ghost_clipping_does_not_clip_losses_of_shape_b_1():
    broken = run_selftest(opacus_ghost_step((-1, 1)), people())
    assert {"sum_bound", "remove_one", "add_one", "coupling"} <= failed(broken)
    assert broken["remove_one"].figure > 2
    assert run_selftest(opacus_ghost_step((-1,)), people()).ok


def opacus_language_model_step(tiny, mean_over):
    """Opacus' hooks on a small language model, with transformers' own loss: the mean over the batch's tokens."""
    model = nn.Sequential(nn.Embedding(tiny.vocab, 8), nn.Linear(8, tiny.vocab)).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    model[1].requires_grad_(True)
    module = GradSampleModule(model, loss_reduction="mean" if mean_over == "tokens" else "sum")

    def clipped_sum(chosen, c=1.0):
        if not chosen:
            return torch.zeros(9 * tiny.vocab)
        module.zero_grad()
        batch = Collator(0)(chosen, LENGTH)
        labels = batch["labels"][:, 1:]
        logits = module(batch["input_ids"])[:, :-1].transpose(1, 2)
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        counts = (labels != -100).sum(dim=1)
        loss = losses.sum() / counts.sum() if mean_over == "tokens" else (losses.sum(dim=1) / counts).sum()
        loss.backward()
        rows = torch.cat([p.grad_sample.flatten(1) for p in module.parameters() if p.requires_grad], dim=1)
        module.zero_grad()
        return mechanism.clip_and_sum(rows, c)

    return Step(
        name=f"Opacus hooks, mean over {mean_over}",
        l2_clip_norm=1.0,
        clipped_sum=clipped_sum,
        unclipped=lambda chosen: clipped_sum(chosen, 1e6),
    )


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_a_mean_over_the_batchs_tokens_is_found_in_opacus(tiny):
    texts = [{**one, "labels": one["input_ids"]} for one in synthetic_examples("causal-lm", tiny.vocab, 2, LENGTH)]
    found = run_selftest(opacus_language_model_step(tiny, "tokens"), texts)
    assert {"coupling_unclipped"} <= failed(found)
    assert found["coupling_unclipped"].figure > 0.1
    assert run_selftest(opacus_language_model_step(tiny, "an example's own tokens"), texts).ok


# --- the command


def dpsb(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_prints_a_table_or_json():
    model = workbench.bert_folder(pooled=True)
    page = dpsb("selftest", "--model", model, "--max-length", LENGTH, "--rank", 4)
    assert page.exit_code == 0, page.output
    for name in ("remove_one", "noise_scale", "draw_empty"):
        assert name in page.output
    found = dpsb("selftest", "--model", model, "--max-length", LENGTH, "--rank", 4, "--json")
    content = json.loads(found.stdout)
    assert content["passed"] is True
    assert {"name", "passed", "figure", "limit", "detail"} == set(content["checks"][0])


def test_the_command_fails_where_a_check_fails(monkeypatch):
    monkeypatch.setattr(mechanism, "clip_scale", lambda norms, *_: torch.ones_like(norms))
    found = dpsb("selftest", "--model", workbench.bert_folder(), "--max-length", LENGTH, "--rank", 4)
    assert found.exit_code == 1
    assert found.stderr.startswith("error: ")
    assert "row_bound" in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


def test_the_command_refuses_what_train_refuses():
    found = dpsb("selftest", "--model", workbench.bert_folder(), "--rank", 0)
    assert found.exit_code == 1
    assert "rank" in found.stderr


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_the_full_test_of_a_model_folder(task):
    model = workbench.bert_folder(pooled=True) if task == "classification" else workbench.llama_folder()
    labels = ("no", "yes") if task == "classification" else ()
    found = selftest_subject(Subject(str(model), task, labels, rank=4, max_length=LENGTH), full=True)
    assert found.ok, found.failures
    assert found["no_trace"].passed
    assert found["reload"].passed


# --- at the start of a run


def test_a_run_tests_itself_before_it_charges_anything(tmp_path, monkeypatch):
    honest = mechanism.Mechanism.noise_std.fget
    monkeypatch.setattr(mechanism.Mechanism, "noise_std", property(lambda self: 0.9 * honest(self)))
    with pytest.raises(ProbeError, match=r"self-test of the private step failed before .* \(noise_scale"):
        fine_tune(workbench.run_config(tmp_path / "run"))
    assert Ledger.read(tmp_path / "run" / "ledger.jsonl").charged("train") == 0
    fine_tune(workbench.run_config(tmp_path / "without", epsilon=float("inf")))  # claims nothing, needs no test
