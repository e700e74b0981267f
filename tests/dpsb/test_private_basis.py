"""The private basis: what it charges, the noise that every layer gets, and what an adversary can tell from it."""

import math

import numpy as np
import pytest
import torch
import workbench

from dpsb import run
from dpsb.adapter import lora_layers
from dpsb.basis import budget, mean_gradients
from dpsb.basis.choose import gradient_basis, held_energy
from dpsb.basis.per_example import WHOLE, Sketch
from dpsb.basis.private import private, private_provenance, releases_for, rounds_for, sampling_prob_for
from dpsb.basis.release import Clip, PrivateExamples, pass_budget
from dpsb.data import Collator, synthetic_examples
from dpsb.losses import classification_loss
from dpsb.mechanism import Mechanism
from dpsb.plan import make_plan
from dpsb.probe import ProbeError
from dpsb.randomness import SeededRandomness, SystemRandomness
from dpsb.train import StepError
from dpsb_accounting import BudgetSpent, Gaussian, Ledger, NonPrivate, Phase, Plan, PoissonGaussian, epsilon
from dpsb_accounting.agreement import cross_check
from dpsb_accounting.auditing import CanaryScores, FixedThresholds, audit

C, SIGMA = 0.5, 3.0
CLIP = Clip(l2_clip_norm=C, clipping="flat", share=0.1)
GRID = 2e-6  # released sums are rounded to 2**-20 here


def ledger_for(path, count=1, event=None, rounds=0, sigma=SIGMA):
    path.mkdir(parents=True, exist_ok=True)
    provenance = private_provenance(CLIP, rounds)
    phase = Phase("basis", event or Gaussian(noise_multiplier=sigma), count)
    plan = workbench.fit_plan(basis=provenance.to_json(), released_before=(phase,))
    return Ledger.create(path / "ledger.jsonl", plan), provenance


def examples_for(tiny, ledger, data, kind="bert", loss_fn=None, model=None, **changes):
    model = model or tiny.lora(tiny.base(kind))
    task = "classification" if kind == "bert" else "causal-lm"
    fields = {
        "loss_fn": loss_fn or tiny.loss[kind],
        "collate": Collator(0),
        "synthetic": synthetic_examples(task, 61, 3, workbench.PADDED),
        "max_length": workbench.PADDED,
        "token_budget": 512,
        "randomness": SystemRandomness(),
    }
    return PrivateExamples(model=model, layers=lora_layers(model), dataset=data, ledger=ledger, **{**fields, **changes})


class NoNoise(SystemRandomness):
    def normal(self, count):
        return torch.zeros(count, dtype=torch.float64)


# --- noise


def refuses(residuals, noise_std):
    """Why these residuals of one release are not independent noise of that size in every layer; empty if they are."""
    reasons = []
    for name, values in residuals.items():
        count, ratio = values.numel(), float(values.square().mean()) / noise_std**2
        if abs(ratio - 1) > 5 * math.sqrt(2 / count):
            reasons.append(f"{name}: variance {ratio:.3f} of what it should be")
    return reasons


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_every_layer_gets_the_whole_noise(tiny, tmp_path, kind):
    data = workbench.examples(12, kind=kind)
    ledger, _ = ledger_for(tmp_path / "a")
    quiet, _ = ledger_for(tmp_path / "b")
    noisy = examples_for(tiny, ledger, data, kind)
    sketches = dict.fromkeys(noisy.layers, WHOLE)
    released = noisy.release(sketches)
    exact = examples_for(tiny, quiet, data, kind, randomness=NoNoise()).release(sketches)
    residuals = {name: released[name] - exact[name] for name in released}
    assert refuses(residuals, SIGMA * C) == []
    assert refuses({name: 0.9 * r for name, r in residuals.items()}, SIGMA * C)
    per_layer = {name: r / math.sqrt(len(residuals)) for name, r in residuals.items()}
    assert len(refuses(per_layer, SIGMA * C)) == len(residuals), "noise of C / sqrt(L) in each layer is refused"
    one_without = {**residuals, next(iter(residuals)): torch.zeros(32, 32)}
    assert len(refuses(one_without, SIGMA * C)) == 1
    flat = torch.cat([r.flatten() for r in residuals.values()])
    half = flat.numel() // 2
    assert abs(float(flat[:half] @ flat[half : 2 * half])) / half < 5 * (SIGMA * C) ** 2 / math.sqrt(half)


def test_sums_of_all_examples_are_clipped_jointly(tiny, tmp_path):
    """The released mean, noise taken away, is that of one-by-one gradients, for any microbatching."""
    data, results = workbench.examples(12), []
    for index, token_budget in enumerate((16, 4096)):
        ledger, _ = ledger_for(tmp_path / str(index))
        examples = examples_for(tiny, ledger, data, randomness=NoNoise(), token_budget=token_budget)
        results.append(examples.release(dict.fromkeys(examples.layers, WHOLE)))
    assert all(float((results[0][name] - results[1][name]).abs().max()) <= GRID for name in results[0])
    model, collate, expected = tiny.lora(tiny.base("bert")), Collator(0), {}
    for example in data:
        one = mean_gradients(model, classification_loss, [collate([example], workbench.bucket(example))])
        norm = sum(float(g.double().square().sum()) for g in one.values()) ** 0.5
        for name, gradient in one.items():
            expected[name] = expected.get(name, 0) + gradient.double() * min(1.0, C / norm)
    assert all(float((results[0][name] - expected[name]).abs().max()) <= GRID for name in expected)


def test_memory_running_out_halves_the_microbatch(tiny, tmp_path):
    data, results = workbench.examples(12), []
    for index, largest in enumerate((99, 2)):
        ledger, _ = ledger_for(tmp_path / str(index))

        def narrow(model, batch, largest=largest):
            if len(batch["input_ids"]) > largest:
                raise torch.OutOfMemoryError("out of memory")
            return classification_loss(model, batch)

        examples = examples_for(tiny, ledger, data, randomness=NoNoise(), loss_fn=narrow)
        examples._rehearsed.append(True)
        results.append(examples.release(dict.fromkeys(examples.layers, WHOLE)))
    assert all(float((results[0][name] - results[1][name]).abs().max()) <= GRID for name in results[0])


# --- the charge


class Watched(list):
    def __init__(self, items, ledger):
        super().__init__(items)
        self.ledger, self.charged_at_first_look = ledger, None

    def __getitem__(self, index):
        if self.charged_at_first_look is None:
            self.charged_at_first_look = Ledger.read(self.ledger.path).charged("basis")
        return super().__getitem__(index)


def test_the_charge_is_on_disk_before_any_example_is_read(tiny, tmp_path):
    ledger, provenance = ledger_for(tmp_path)
    data = Watched(workbench.examples(6), ledger)
    basis = private(examples_for(tiny, ledger, data), provenance)
    assert data.charged_at_first_look == 1
    assert basis.provenance.access == "released"
    with pytest.raises(BudgetSpent):
        private(examples_for(tiny, ledger, data), provenance)
    assert ledger.charged("basis") == 1


def test_a_pass_that_fails_is_spent_and_says_nothing_of_the_data(tiny, tmp_path):
    ledger, provenance = ledger_for(tmp_path)
    data = workbench.examples(6)
    data[3] = {"input_ids": "zanzibar-4711", "labels": 0}
    with pytest.raises(StepError) as caught:
        private(examples_for(tiny, ledger, data), provenance)
    assert "zanzibar" not in str(caught.value)
    assert "The pass for the basis failed" in str(caught.value)
    assert ledger.charged("basis") == 1


def test_coupled_examples_are_refused_before_anything_is_charged(tiny, tmp_path):
    ledger, provenance = ledger_for(tmp_path)

    def coupled(model, batch):
        losses = classification_loss(model, batch)
        return losses * losses.detach().mean()

    model = tiny.lora(tiny.base("bert"))
    with pytest.raises(ProbeError, match="coupled"):
        private(examples_for(tiny, ledger, workbench.examples(6), loss_fn=coupled, model=model), provenance)
    assert ledger.charged("basis") == 0
    private(examples_for(tiny, ledger, workbench.examples(6), model=model), provenance)  # the model is as it was


def test_a_seeded_release_taints_the_ledger(tiny, tmp_path):
    ledger, provenance = ledger_for(tmp_path)
    private(examples_for(tiny, ledger, workbench.examples(6), randomness=SeededRandomness(1)), provenance)
    assert [taint.name for taint in ledger.taints] == ["seeded_randomness"]


def test_a_poisson_draw_reads_what_it_drew(tiny, tmp_path):
    ledger, provenance = ledger_for(tmp_path, event=PoissonGaussian(noise_multiplier=SIGMA, sampling_prob=0.25))
    seen = []

    class Seen(list):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    private(examples_for(tiny, ledger, Seen(workbench.examples(200))), provenance)
    assert len(set(seen)) == len(seen)
    assert 20 < len(seen) < 80


# --- the basis


@pytest.mark.parametrize(("rounds", "releases"), [(0, 1), (1, 2), (2, 4)])
def test_frames_are_orthonormal_and_every_release_is_charged(tiny, tmp_path, rounds, releases):
    assert releases_for(rounds) == releases
    ledger, provenance = ledger_for(tmp_path, count=releases, rounds=rounds)
    examples = examples_for(tiny, ledger, workbench.examples(12))
    basis = private(examples, provenance)
    assert ledger.remaining("basis") == 0
    for name, (A, B, R0) in basis.factors.items():
        layer = examples.layers[name]
        assert A.shape == (4, layer.in_features)
        assert B.shape == (layer.out_features, 4)
        assert R0 is None
        assert float((A @ A.T - torch.eye(4)).abs().max()) < 1e-5
        assert float((B.T @ B - torch.eye(4)).abs().max()) < 1e-5


def test_without_noise_both_ways_find_the_gradient(tiny, tmp_path):
    """Whole gradients give the truncated SVD; subspace iteration comes near it."""
    data, held = workbench.examples(24), {}
    for rounds in (0, 2):
        ledger, provenance = ledger_for(tmp_path / str(rounds), count=releases_for(rounds), rounds=rounds)
        examples = examples_for(tiny, ledger, data, randomness=NoNoise())
        basis = private(examples, provenance)
        other, _ = ledger_for(tmp_path / f"{rounds} again")
        truth = examples_for(tiny, other, data, randomness=NoNoise()).release(dict.fromkeys(examples.layers, WHOLE))
        best = sum(float(torch.linalg.svdvals(g)[:4].square().sum()) for g in truth.values())
        held[rounds] = held_energy(basis.factors, truth) * sum(float(g.square().sum()) for g in truth.values()) / best
    assert held[0] == pytest.approx(1.0, abs=1e-5)
    assert held[2] > 0.9


def test_a_release_per_example_does_not_protect_people(tiny, tmp_path):
    provenance = private_provenance(CLIP, 0)
    phase = Phase("basis", Gaussian(noise_multiplier=SIGMA), 1)
    people = {"unit": "user", "details": {"examples_per_unit": 2}}
    plan = workbench.fit_plan(basis=provenance.to_json(), released_before=(phase,), **people)
    with Ledger.create(tmp_path / "ledger.jsonl", plan) as ledger:
        examples = examples_for(tiny, ledger, workbench.examples(12))
        sketches = [dict.fromkeys(examples.layers, WHOLE)]
        for release in (lambda: examples.release(sketches[0]), lambda: examples.release_preferences(sketches)):
            with pytest.raises(ValueError, match="does not protect a user"):
                release()
        assert ledger.charged("basis") == 0


def test_wide_weights_are_sketched(tiny):
    assert rounds_for(lora_layers(tiny.lora(tiny.base("bert")))) == 0
    assert rounds_for(lora_layers(tiny.lora(tiny.base("bert"))), 3) == 3

    class Wide:
        in_features, out_features = 4096, 1025

    assert rounds_for({"a": Wide()}) == 2


def test_each_release_of_subspace_iteration_reads_half_the_rows():
    assert sampling_prob_for(0) == 1.0
    assert sampling_prob_for(2) == 0.5


def test_the_microbatches_of_a_pass_are_an_eighth_smaller():
    assert [pass_budget(tokens) for tokens in (2048, 16, 8, 7, 1)] == [1792, 14, 7, 7, 1]


# --- what an adversary can tell


def canary_scores(tiny, tmp_path, trials, sigma):
    """A canary's share in the released sum, with and without it, where the adversary knows all other examples."""
    data, canary = workbench.examples(6, seed=4), {"input_ids": [7] * 15, "labels": 2}
    model = tiny.lora(tiny.base("bert"))
    layers = lora_layers(model)
    own = mean_gradients(model, classification_loss, [Collator(0)([canary], 16)])
    size = sum(float(g.double().square().sum()) for g in own.values()) ** 0.5
    quiet, _ = ledger_for(tmp_path / "known", sigma=sigma)
    known = examples_for(tiny, quiet, data, model=model, randomness=NoNoise()).release(dict.fromkeys(layers, WHOLE))
    ledger, _ = ledger_for(tmp_path, count=trials, sigma=sigma)
    scores, rehearsed = [], [True]
    for trial in range(trials):
        dataset = [*data, canary] if trial % 2 else data
        examples = examples_for(tiny, ledger, dataset, model=model, token_budget=48, _rehearsed=rehearsed)
        released = examples.release(dict.fromkeys(layers, WHOLE))
        scores.append(sum(float(((released[n] - known[n]) * own[n].double()).sum()) for n in layers) / size / C)
    return CanaryScores(scores, np.arange(trials) % 2)


def scores_of_raw_bases(tiny, trials):
    """Whether the basis differs from the one that all other examples give: nothing random is in it."""
    data, canary = workbench.examples(6, seed=4), {"input_ids": [7] * 15, "labels": 2}
    model, collate = tiny.lora(tiny.base("bert")), Collator(0)
    provenance = private_provenance(CLIP, 0)

    def basis(dataset):
        batches = [collate([example], workbench.bucket(example)) for example in dataset]
        return gradient_basis(model, mean_gradients(model, classification_loss, batches), provenance).factors

    known, scores = basis(data), []
    for trial in range(trials):
        found = basis([*data, canary] if trial % 2 else data)
        moved = max(float((f.A.T @ f.A - known[name].A.T @ known[name].A).norm()) for name, f in found.items())
        scores.append(1.0 if moved > 1e-3 else 0.0)
    return CanaryScores(scores, np.arange(trials) % 2)


@pytest.mark.slow
def test_a_canary_is_told_apart_no_better_than_claimed(tiny, tmp_path):
    """At the claimed epsilon the audit finds nothing beyond it; from raw gradients, or with less noise, it does."""
    claimed, delta, trials = 1.0, 1e-5, 60
    sigma = 1 / budget.gaussian_level(claimed, delta)
    half = FixedThresholds((0.5,))

    def found(scores):
        return audit(scores, "clopper-pearson", delta=delta, confidence=0.99, thresholds=half).epsilon

    honest = canary_scores(tiny, tmp_path / "honest", trials, sigma)
    assert found(honest) <= claimed
    assert found(scores_of_raw_bases(tiny, trials)) > claimed
    assert found(canary_scores(tiny, tmp_path / "weak", trials, sigma / 20)) > claimed
    inside = honest.values[honest.included].mean() - honest.values[~honest.included].mean()
    assert abs(inside - 1) < 6 * sigma * 2 / math.sqrt(trials), "the canary is in the sum, at length C"


# --- the budget


SETTINGS = {"delta": 1e-5, "num_examples": 4000, "expected_batch_size": 256, "steps": 60}


@pytest.mark.parametrize(
    ("target", "share", "neighboring"),
    [(1.0, 0.1, None), (8.0, 0.02, "zero_out"), (3.0, 0.1, "replace_one")],
)
def test_basis_and_training_together_meet_the_target(tmp_path, target, share, neighboring):
    relation = neighboring or "add_or_remove_one"
    phase = budget.basis_phase(epsilon=target, delta=1e-5, share=share, neighboring=relation)
    provenance = private_provenance(Clip(l2_clip_norm=1.0, clipping="automatic", share=share), 0)
    plan = make_plan(
        epsilon=target, basis=provenance.to_json(), released_before=(phase,), neighboring=neighboring, **SETTINGS
    )
    with Ledger.create(tmp_path / "ledger.jsonl", plan) as ledger:
        total = epsilon(ledger)
        assert 0.99 * target <= total.upper <= target
        assert total.lower >= 0.98 * target
        if relation != "replace_one":
            second = cross_check(ledger)
            assert second.status == "agrees"
            assert second.upper == pytest.approx(target, rel=0.01)
    realised = budget.realised_share(plan)
    assert realised["share"] == pytest.approx(share, rel=0.2)
    assert realised["basis_epsilon"] < target
    without = make_plan(epsilon=target, neighboring=neighboring, **SETTINGS).noise_multiplier
    assert 1 < plan.noise_multiplier / without < 1 + share, "the price is about share / 2"


def test_several_releases_cost_what_one_does():
    one, four = (budget.basis_phase(epsilon=3, delta=1e-5, share=0.1, releases=k) for k in (1, 4))
    assert four.event.noise_multiplier == pytest.approx(2 * one.event.noise_multiplier)
    assert epsilon([one], 1e-5).upper == pytest.approx(epsilon([four], 1e-5).upper, rel=1e-6)


def test_a_poisson_draw_takes_about_its_share():
    drawn = budget.basis_phase(epsilon=3, delta=1e-5, share=0.1, sampling_prob=0.5)
    whole = budget.basis_phase(epsilon=3, delta=1e-5, share=0.1)
    assert epsilon([drawn], 1e-5).upper == pytest.approx(epsilon([whole], 1e-5).upper, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"share": 0.95}, "leaves no budget to train"),
        ({"share": 0.0}, r"basis_share=0\.0 from 0\.0001 to 0\.9"),
        ({"share": 0.99e-4}, "less saves training nothing, and gives the release over 100 times the noise"),
        ({"share": math.nan}, "basis_share=nan"),
        ({"epsilon": math.inf}, "needs a finite epsilon"),
    ],
)
def test_shares_that_cannot_be_spent(changes, match):
    with pytest.raises(budget.BudgetError, match=match):
        budget.basis_noise_multiplier(**{"epsilon": 3.0, "delta": 1e-5, "share": 0.1, **changes})


def test_nothing_private_has_no_share():
    plan = make_plan(epsilon=3.0, noise_multiplier=1.0, **SETTINGS)
    assert budget.realised_share(plan) is None
    leak = Phase("basis", NonPrivate(reason="raw"), 1)
    tainted = make_plan(epsilon=3.0, released_before=(leak,), noise_multiplier=1.0, **SETTINGS)
    assert budget.realised_share(tainted) is None
    assert math.isinf(epsilon(tainted).upper)


def test_the_mechanism_comes_from_the_plan(tiny, tmp_path):
    ledger, _ = ledger_for(tmp_path)
    examples = examples_for(tiny, ledger, workbench.examples(6))
    assert examples.mechanism == Mechanism(l2_clip_norm=C, noise_multiplier=SIGMA, clipping="flat")
    facts = ledger.plan.to_json()
    facts["basis"] = {"kind": "private", "access": "released"}
    other = Ledger.create(tmp_path / "other.jsonl", Plan.from_json(facts))
    with other, pytest.raises(ValueError, match="state l2_clip_norm and clipping"):
        _ = examples_for(tiny, other, []).mechanism
    assert Sketch().is_small is False
    assert run.BASIS_NAME == "basis.safetensors"
