"""Canaries: rows and texts of nobody, and what an audit of a real run finds with them."""

import numpy as np
import pytest
import torch
import workbench

from dpsb.canaries import GradientCanaries, InputCanaries, example_losses, expected_scores
from dpsb.losses import classification_loss
from dpsb.mechanism import Mechanism
from dpsb.randomness import SeededRandomness
from dpsb.train import StepError, fit
from dpsb_accounting import Ledger, make_report
from dpsb_accounting.auditing import audit


def plan(**changes):
    return workbench.fit_plan(**{"noise_multiplier": 2.0, "expected_batch_size": 12, "steps": 20, **changes})


def test_rows_are_orthogonal_and_clipped_to_length_c():
    canaries = GradientCanaries(40, plan(l2_clip_norm=0.5), 30, SeededRandomness(1))
    rows = canaries.rows(np.arange(len(canaries)))
    assert rows.shape == (int(canaries.included.sum()), 40)
    assert torch.allclose(rows @ rows.T, 25.0 * torch.eye(len(rows), dtype=torch.float64), atol=1e-12)
    mechanism = Mechanism.from_plan(plan(l2_clip_norm=0.5))
    assert float(mechanism.clip_and_sum(rows[:1]).norm()) == pytest.approx(0.5)
    assert canaries.rows(np.array([], dtype=int)).shape == (0, 40)


def test_coins_directions_and_signs_come_from_the_randomness():
    one, same, other = (GradientCanaries(40, plan(), 30, SeededRandomness(s)) for s in (1, 1, 2))
    assert torch.equal(one.rows(np.arange(3)), same.rows(np.arange(3)))
    assert not torch.equal(one.rows(np.arange(3)), other.rows(np.arange(3)))
    many = GradientCanaries(4000, plan(), 4000)
    assert 1700 < many.included.sum() < 2300


def test_scores_are_log_likelihood_ratios():
    """Against the ratio of the two densities, written out."""
    made = plan(l2_clip_norm=0.5)
    canaries = GradientCanaries(40, made, 40, SeededRandomness(1))
    unit = GradientCanaries(40, made, 40, SeededRandomness(1)).rows(np.array([0]))[0] / 5.0
    position = np.flatnonzero(canaries.included)[0]
    s, q = made.noise_std, made.sampling_prob
    expected = 0.0
    for x in (0.3, -1.1):
        canaries.observe(x * unit)
        ratio = (q * np.exp(-((x - 0.5) ** 2) / 2 / s**2) + (1 - q) * np.exp(-(x**2) / 2 / s**2)) / np.exp(
            -(x**2) / 2 / s**2
        )
        expected += np.log(ratio)
    assert canaries.scores().values[position] == pytest.approx(expected)


def drive(made, released_by, seed=0, dimension=1500):
    """Scores of a mechanism without a model: canaries only."""
    randomness = SeededRandomness(seed)
    canaries = GradientCanaries(dimension, made, dimension, randomness)
    for _ in range(made.steps):
        drawn = np.flatnonzero(randomness.bernoulli(len(canaries), made.sampling_prob))
        canaries.observe(released_by(canaries.rows(drawn), randomness))
    return canaries.scores()


def test_scores_have_the_law_that_the_plan_predicts():
    from scipy.stats import ks_2samp

    made = plan(noise_multiplier=1.5)
    mechanism = Mechanism.from_plan(made)
    found = drive(made, lambda rows, source: mechanism.release(mechanism.clip_and_sum(rows), source))
    expected = expected_scores(made, 20_000)
    assert ks_2samp(found.inserted, expected.inserted).pvalue > 1e-4
    assert ks_2samp(found.left_out, expected.left_out).pvalue > 1e-4


def test_a_missing_clip_refutes_the_claim_and_a_correct_mechanism_does_not():
    made = plan(noise_multiplier=1.5)
    mechanism = Mechanism.from_plan(made)
    claim = make_claim(made)
    right = drive(made, lambda rows, source: mechanism.release(mechanism.clip_and_sum(rows), source))
    assert 0.2 * claim < audit(right, "gdp", delta=made.delta).epsilon < claim
    wrong = drive(made, lambda rows, source: mechanism.release(rows.sum(dim=0), source))
    assert audit(wrong, "gdp", delta=made.delta).epsilon > claim


def make_claim(made):
    from dpsb_accounting import epsilon

    return epsilon(made).upper


def test_refuses():
    with pytest.raises(ValueError, match="count=50"):
        GradientCanaries(40, plan(), 50)
    with pytest.raises(ValueError, match="clipping and noise"):
        GradientCanaries(40, plan(epsilon=float("inf"), noise_multiplier=None), 10)
    with pytest.raises(ValueError, match="count=1"):
        InputCanaries("classification", 1, 61, 3, 8)


def test_fit_with_canaries_is_audited_and_claims_nothing(tiny, tmp_path):
    """The whole loop: real rows, real noise; the canaries' scores prove a part of the claim and the ledger says so."""
    adapter = tiny.adapter(tiny.base("bert"), rank=8, scatter=0.0, allow=("classifier",))
    made = plan(steps=30, noise_multiplier=3.0, num_examples=24, expected_batch_size=12)
    (tmp_path / "run").mkdir()
    ledger = Ledger.create(tmp_path / "run" / "ledger.jsonl", made)
    canaries = GradientCanaries(adapter.dimension, made, 700)
    arguments, options = workbench.fit_arguments(
        adapter, workbench.examples(), ledger, loss_fn=classification_loss, canaries=canaries
    )
    with ledger:
        fit(*arguments, **options)
    report = make_report(Ledger.read(tmp_path / "run" / "ledger.jsonl"))
    assert not report.claim
    assert [t["name"] for t in report.to_json()["taints"]] == ["gradient_canaries"]
    bound = audit(canaries.scores(), "gdp", delta=made.delta)
    assert 0.3 * report.epsilon.upper < bound.epsilon < report.epsilon.upper


def test_an_error_while_members_are_scored_quotes_none_of_them(tiny):
    def loss(_model, _batch):
        raise ValueError(workbench.CANARIES[0])

    with pytest.raises(StepError, match=r"audit failed \(ValueError at .*What was charged stays charged") as caught:
        example_losses(tiny.base("bert"), workbench.examples(), loss, workbench.Collator(0), 16, 512)
    assert workbench.CANARIES[0] not in str(caught.value)


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_input_canaries_that_were_trained_on_score_higher(tiny, task):
    kind = "bert" if task == "classification" else "llama"
    canaries = InputCanaries(task, 60, tiny.vocab, 3, 12, randomness=SeededRandomness(3))
    model, loss_fn = tiny.base(kind), tiny.loss[kind]
    collate = workbench.Collator(0)
    for example in canaries.examples():
        assert len(example["input_ids"]) == 12
        assert all(0 <= t < tiny.vocab for t in example["input_ids"])

    def losses(examples):
        return example_losses(model, examples, loss_fn, collate, 16, 512)

    canaries.before(losses)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batch = collate(canaries.examples(), 16)
    for _ in range(30):
        loss_fn(model, batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    scores = canaries.scores(losses)
    assert scores.inserted.mean() > scores.left_out.mean() + 0.5
    assert "black box" in scores.threat_model
