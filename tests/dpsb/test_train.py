"""``fit`` does what its loop says: charge, draw, clip, noise, step; and nothing else reaches theta."""

import random as python_random

import numpy as np
import pytest
import torch
import workbench
from torch import nn

from dpsb.adapter import CoreUp
from dpsb.capture import _CheckpointSafeHooks
from dpsb.losses import IGNORED, classification_loss
from dpsb.mechanism import Mechanism, clip_and_sum
from dpsb.probe import ProbeError
from dpsb.randomness import SeededRandomness
from dpsb.train import Knobs, fit
from dpsb_accounting import Ledger, make_report

NO_CHECKPOINTS = Knobs(checkpoint_every=0)


def flat(adapter):
    return torch.cat([value.flatten().double() for value in adapter.state().values()])


@pytest.fixture
def trained(tiny, tmp_path):
    """Runs ``fit`` on a new BERT with its head in theta; returns adapter and ledger."""

    def run(name="run", data=None, plan=None, adapter=None, base=None, **changes):
        adapter = adapter or tiny.adapter(base or tiny.base("bert"), allow=("classifier",), scatter=0.0)
        changes = {"loss_fn": classification_loss, "knobs": NO_CHECKPOINTS, **changes}
        data = workbench.examples() if data is None else data
        with workbench.new_ledger(tmp_path / name, **(plan or {})) as ledger:
            positional, named = workbench.fit_arguments(adapter, data, ledger, **changes)
            fit(*positional, **named)
        return adapter, Ledger.read(tmp_path / name / "ledger.jsonl")

    return run


@pytest.fixture
def refused(trained, tmp_path):
    """Runs ``fit`` and returns the error and how many steps were charged."""

    def run(error, match, **changes):
        with pytest.raises(error, match=match) as caught:
            trained("refused", **changes)
        return caught.value, Ledger.read(tmp_path / "refused" / "ledger.jsonl").charged("train")

    return run


class Recorded(list):
    """A data set that notes what is read."""

    def __init__(self, items, notes):
        super().__init__(items)
        self.notes = notes

    def __getitem__(self, index):
        self.notes.append("read")
        return super().__getitem__(index)

    def __iter__(self):
        self.notes.append("read")
        return super().__iter__()

    def __len__(self):
        self.notes.append("length")
        return super().__len__()


class Noted(SeededRandomness):
    """A source of randomness that notes what is drawn, and calls ``on_draw`` first."""

    def __init__(self, notes, on_draw=lambda: None):
        super().__init__(11)
        self.notes, self.on_draw = notes, on_draw

    def bernoulli(self, count, probability):
        self.on_draw()
        self.notes.append("draw")
        return super().bernoulli(count, probability)

    def normal(self, count):
        self.notes.append("noise")
        return super().normal(count)


# --- the loop


def test_charges_on_disk_before_the_draw_and_before_any_data_is_read(trained, tmp_path, monkeypatch):
    notes, on_disk = [], []
    charge = Ledger.charge

    def noted_charge(self, phase):
        number = charge(self, phase)
        notes.append("charge")
        return number

    def look():
        on_disk.append(Ledger.read(tmp_path / "run" / "ledger.jsonl").charged("train"))

    monkeypatch.setattr(Ledger, "charge", noted_charge)
    _, ledger = trained(data=Recorded(workbench.examples(), notes), randomness=Noted(notes, look))
    assert on_disk == [1, 2, 3]
    assert ledger.charged("train") == 3 == ledger.plan.steps
    order = [note for i, note in enumerate(notes) if note != "length" and (i == 0 or notes[i - 1] != note)]
    assert order == ["charge", "draw", "read", "noise"] * 3
    assert notes[0] == "charge", "not even the length is looked at before"


@pytest.mark.parametrize(("clipping", "token_budget"), [("flat", 16), ("flat", 40), ("flat", 4096), ("automatic", 40)])
def test_three_steps_equal_a_loop_written_by_hand(tiny, trained, clipping, token_budget):
    data, lr = workbench.examples(), 0.3
    plan = {"clipping": clipping, "l2_clip_norm": 0.4}
    reference = tiny.adapter(tiny.base("bert"), allow=("classifier",), scatter=0.0)
    source = SeededRandomness(5)
    for step in range(3):
        chosen = np.flatnonzero(source.bernoulli(len(data), 8 / 24))
        assert 0 < len(chosen) != 8, "the divisor must be told from the drawn size"
        total = torch.zeros(reference.dimension, dtype=torch.float64)
        for example in (data[i] for i in chosen):
            batch = workbench.Collator(0)([example], workbench.bucket(example))
            row = tiny.autograd_row(reference, classification_loss(reference.model, batch)[0]).double()
            factor = 0.4 / (row.norm() + 0.01) if clipping == "automatic" else min(1.0, 0.4 / float(row.norm()))
            total += row * factor
        update = (total + 0.7 * 0.4 * source.normal(len(total))) / 8 * lr * (1 - step / 3)
        parts = update.split([p.numel() for p in reference.parameters()])
        with torch.no_grad():
            for parameter, part in zip(reference.parameters(), parts, strict=True):
                parameter -= part.view_as(parameter).float()
    adapter, _ = trained(
        plan=plan,
        data=data,
        lr=lr,
        randomness=SeededRandomness(5),
        schedule=lambda done: 1 - done,
        knobs=Knobs(token_budget=token_budget, checkpoint_every=0),
    )
    assert tiny.distance(flat(adapter), flat(reference)) < 1e-5


def test_an_empty_draw_is_a_step_with_noise(trained):
    notes = []
    adapter, ledger = trained(
        plan={"num_examples": 10**6, "expected_batch_size": 1, "delta": 1e-7}, randomness=Noted(notes)
    )
    assert ledger.charged("train") == 3
    assert notes == ["draw", "noise"] * 3
    spread = float(flat(adapter).std()) / (0.1 * 0.7 * 3**0.5)
    assert spread == pytest.approx(1, rel=0.2), "noise alone, divided by the public 1"


@pytest.mark.parametrize("count", [1, 7, 60])
def test_the_declared_number_of_examples_is_not_compared_with_the_data(trained, count):
    _, ledger = trained(data=workbench.examples(count))
    assert (ledger.plan.num_examples, ledger.charged("train")) == (24, 3)


def test_a_single_example(trained):
    plan = {"num_examples": 1, "expected_batch_size": 1, "num_examples_declared": False}
    adapter, _ = trained(data=workbench.examples(1), plan=plan)
    assert bool(torch.isfinite(flat(adapter)).all())


def test_an_example_with_a_loss_of_nan_contributes_zero(trained, tiny):
    data = workbench.examples()
    bad, ignored = [dict(e) for e in data], [dict(e) for e in data]
    for index in (0, 5, 6, 7):
        bad[index]["input_ids"] = [60, *bad[index]["input_ids"][1:]]
        ignored[index]["labels"] = IGNORED
    clean = [i for i in range(24) if i not in (0, 5, 6, 7)]
    for index in clean:
        bad[index]["input_ids"] = ignored[index]["input_ids"] = [7, *data[index]["input_ids"][1:]]

    def loss(model, batch):
        return classification_loss(model, batch) * torch.where(batch["input_ids"][:, 0] == 60, float("nan"), 1.0)

    with_nan, ledger = trained("nan", data=bad, loss_fn=loss, randomness=SeededRandomness(2))
    without, _ = trained("zero", data=ignored, randomness=SeededRandomness(2))
    assert ledger.charged("train") == 3
    assert tiny.distance(flat(with_nan), flat(without)) < 1e-5


def test_the_optimizer_sees_the_released_gradient_only(trained, monkeypatch):
    totals, released, seen = [], [], []
    release = Mechanism.release

    def noted_release(self, total, randomness):
        totals.append(total.clone())
        released.append(release(self, total, randomness))
        return released[-1]

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            held = [p for group in self.param_groups for p in group["params"]]
            seen.append(torch.cat([p.grad.flatten() for p in held]).clone())
            assert not any(hasattr(p, "grad_sample") for p in held)
            super().step()

    monkeypatch.setattr(Mechanism, "release", noted_release)
    adapter, _ = trained(optimizer=Spy)
    assert len(seen) == len(released) == 3
    for gradient, value, total in zip(seen, released, totals, strict=True):
        torch.testing.assert_close(gradient, (value / 8).float())
        assert float((gradient - total / 8).norm()) > 0.01
    assert all(p.grad is None for p in adapter.parameters())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_optimizers(trained, optimizer):
    adapter, _ = trained(optimizer=optimizer)
    assert float(flat(adapter).norm()) > 0


def test_the_schedule_is_a_function_of_the_charged_steps(trained):
    asked = []
    trained(schedule=lambda done: asked.append(done) or 1.0)
    assert asked == [0, pytest.approx(1 / 3), pytest.approx(2 / 3)]


def test_a_warm_up_from_zero_is_no_fault(trained):
    adapter, _ = trained(schedule=lambda done: done)
    assert float(flat(adapter).norm()) > 0


def test_causal_language_model(tiny, trained):
    adapter = tiny.adapter(tiny.base("llama"), scatter=0.0)
    data = workbench.examples(kind="llama")
    trained(adapter=adapter, data=data, kind="llama", loss_fn=tiny.loss["llama"])
    assert float(flat(adapter).norm()) > 0


# --- randomness


def test_two_default_runs_differ_whatever_the_global_seeds(trained, tmp_path):
    found = []
    for name in ("one", "two"):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        python_random.seed(0)
        adapter, ledger = trained(name)
        assert ledger.taints == ()
        assert make_report(ledger).claim is True
        found.append(flat(adapter))
    moved = (found[0] - found[1]) / 0.1 * 8
    assert float(moved.std()) > 0.7, "every coordinate has noise of its own"


def test_seeded_noise_taints_the_ledger_before_the_first_charge(trained):
    _, ledger = trained(randomness=SeededRandomness(0))
    kinds = [workbench.json.loads(line)["kind"] for line in ledger.path.read_text().splitlines()]
    assert kinds == ["plan", "taint", "charge", "charge", "charge"]
    report = make_report(ledger).to_json()
    assert report["claim"] is False
    assert [taint["name"] for taint in report["taints"]] == ["seeded_randomness"]


# --- refused before anything is charged


def test_stale_optimizer(tiny, refused):
    adapter = tiny.adapter(tiny.base("bert"), scatter=0.0)

    def stale(parameters, lr):
        optimizer = torch.optim.SGD(parameters, lr=lr)
        core = adapter.cores[0].up.core
        core.weight = nn.Parameter(core.weight.detach().clone())
        return optimizer

    assert refused(ValueError, "does not hold .* as it is now", adapter=adapter, optimizer=stale)[1] == 0


def test_optimizer_over_other_parameters(refused):
    other = nn.Linear(3, 3)
    made = lambda _parameters, lr: torch.optim.SGD(other.parameters(), lr=lr)  # noqa: E731
    assert refused(ValueError, "does not hold", optimizer=made)[1] == 0


def test_an_optimizer_that_also_trains_the_loss(refused):
    """The loss' own parameter would get the raw gradient of the batch, and follow it."""
    made = lambda parameters, lr: torch.optim.SGD([*parameters, nn.Parameter(torch.ones(3))], lr=lr)  # noqa: E731
    assert refused(ValueError, r"trainable tensor of shape \(3,\) that is no part", optimizer=made)[1] == 0


def test_a_frozen_tensor_that_still_has_a_gradient_stays(tiny, trained):
    """Of earlier training, say: an optimizer moves whatever has a gradient, frozen or not."""
    adapter = tiny.adapter(tiny.base("bert"), scatter=0.0)
    frozen = adapter.model.get_input_embeddings().weight
    before = frozen.detach().clone()
    frozen.grad = torch.ones_like(frozen)
    made = lambda parameters, lr: torch.optim.SGD([*parameters, frozen], lr=lr)  # noqa: E731
    trained("stays", adapter=adapter, optimizer=made)
    assert torch.equal(frozen, before)


def test_trainable_tensor_left_over(tiny, refused):
    adapter = tiny.adapter(tiny.base("bert"), scatter=0.0)
    adapter.model.get_input_embeddings().weight.requires_grad_(True)
    assert refused(ValueError, "requires a gradient but is no part", adapter=adapter)[1] == 0


def token_mean(model, batch):
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits, labels = model(**inputs).logits[:, :-1], batch["labels"][:, 1:]
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(labels)
    return losses.sum(dim=1) / (labels != IGNORED).sum() * len(labels)


LOSSES = {
    "column": (lambda m, b: classification_loss(m, b)[:, None], ValueError, "one loss per example"),
    "scalar": (lambda m, b: classification_loss(m, b).mean(), ValueError, "one loss per example"),
    "centred": (lambda m, b: (x := classification_loss(m, b)) - 0.5 * x.mean(), ProbeError, "coupled"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_are_not_per_example(refused, name):
    loss, error, match = LOSSES[name]
    assert refused(error, match, loss_fn=loss)[1] == 0


def test_token_mean_loss_and_hugging_face_loss(tiny, refused, tmp_path):
    adapter = tiny.adapter(tiny.base("llama"), scatter=0.0)
    options = {"adapter": adapter, "kind": "llama", "data": workbench.examples(kind="llama")}
    assert refused(ProbeError, "coupled", loss_fn=token_mean, **options)[1] == 0
    (tmp_path / "refused" / "ledger.jsonl").unlink()
    assert refused(ValueError, "one loss per example", loss_fn=lambda m, b: m(**b).loss, **options)[1] == 0


def test_batch_norm(tiny, refused):
    class Normed(tiny.twice):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(16)

        def _once(self, h):
            return torch.tanh(self.layer(self.norm(h.transpose(1, 2)).transpose(1, 2)))

    adapter = tiny.adapter(Normed(), target_modules=["layer"], scatter=0.0)
    assert refused(ProbeError, "coupled", adapter=adapter)[1] == 0


def test_a_model_of_nan(tiny, refused):
    base = tiny.base("bert")
    base.bert.encoder.layer[0].output.dense.weight.data.fill_(float("nan"))
    adapter = tiny.adapter(base, scatter=0.0)
    assert refused(ProbeError, "not finite", adapter=adapter)[1] == 0


def without_hooks(monkeypatch, when):
    start = _CheckpointSafeHooks.__init__

    def detached(self, *args, **kwargs):
        start(self, *args, **kwargs)
        if when():
            for hook in self.autograd_grad_sample_hooks:
                hook.remove()

    monkeypatch.setattr(_CheckpointSafeHooks, "__init__", detached)


def test_hooks_that_are_silently_gone_before_the_first_step(refused, monkeypatch):
    without_hooks(monkeypatch, lambda: True)
    assert refused(RuntimeError, "got no per-example gradient")[1] == 0


def test_hooks_that_are_silently_gone_while_training(refused, monkeypatch):
    notes = []
    without_hooks(monkeypatch, lambda: "read" in notes)
    assert refused(RuntimeError, "got no per-example gradient", data=Recorded(workbench.examples(), notes))[1] == 1


# --- the first step


def test_learning_rate_of_zero(refused):
    assert refused(ProbeError, "left every trained tensor where it was", lr=0.0)[1] == 1


def test_a_forward_pass_that_ignores_what_was_trained(refused):
    def loss(model, batch):
        losses = classification_loss(model, batch)
        return losses if torch.is_grad_enabled() else torch.zeros_like(losses)

    assert refused(ProbeError, "does not reach the model's output", loss_fn=loss)[1] == 1


def test_the_model_uses_what_the_optimizer_moved(tiny, trained):
    adapter = tiny.adapter(tiny.base("bert"), allow=("classifier",), scatter=0.0)
    batch = tiny.batch("bert")
    before = classification_loss(adapter.model, batch).detach()
    trained(adapter=adapter, lr=1.0)
    after = classification_loss(adapter.model, batch).detach()
    assert float((after - before).abs().min()) > 0
    assert all(float(core.up.core.weight.detach().norm()) > 0 for core in adapter.cores)
    assert all(isinstance(core.up, CoreUp) for core in adapter.cores)


def test_clip_bounds_the_sum_of_what_training_saw(tiny, trained, monkeypatch):
    norms = []

    def noted(rows, bound, clipping="flat"):
        norms.extend(clip_and_sum(row[None], bound, clipping).norm().item() for row in rows)
        return clip_and_sum(rows, bound, clipping)

    monkeypatch.setattr("dpsb.mechanism.clip_and_sum", noted)
    trained(plan={"l2_clip_norm": 0.01})
    assert norms
    assert max(norms) <= 0.01 * (1 + 1e-9)
