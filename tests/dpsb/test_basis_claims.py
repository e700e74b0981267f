"""What is claimed of a paid basis: the total of basis and training, by both engines; and what a leak betrays."""

import numpy as np
import pytest
import torch
import workbench

from dpsb import run
from dpsb.basis.budget import default_share
from dpsb.basis.setup import Setup
from dpsb.basis.stage import plan_basis
from dpsb.data import Collator
from dpsb.losses import classification_loss
from dpsb_accounting import Gaussian, Ledger, NonPrivate, epsilon, make_report
from dpsb_accounting.auditing import CanaryScores, FixedThresholds, audit

TARGET = 8.0
PUBLIC = "public:" + ",".join(str(workbench.data_file(seed=seed)) for seed in (11, 12))


@pytest.mark.parametrize(
    ("changes", "releases", "prob"),
    [
        ({"basis": "private"}, 1, 1.0),
        ({"basis": "private", "basis_sampling_prob": 0.25}, 1, 0.25),
        ({"basis": "private", "basis_rounds": 2}, 4, 0.5),
        ({"basis": "private", "basis_rounds": 2, "basis_sampling_prob": 1.0}, 4, 1.0),
        ({"basis": "hybrid"}, 1, 1.0),
        ({"basis": PUBLIC, "basis_choice": "private"}, 1, 1.0),
        ({"basis": PUBLIC.replace("public", "hybrid", 1)}, 1, 1.0),
    ],
)
def test_a_run_claims_its_target_and_both_engines_agree(tmp_path, changes, releases, prob):
    settings = {"epsilon": TARGET, "num_examples": 60, "neighboring": "add_or_remove_one", **changes}
    finished = run.fine_tune(workbench.run_config(tmp_path / "run", **settings))
    ledger = Ledger.read(tmp_path / "run" / "ledger.jsonl")
    assert ledger.charged("basis") == releases
    event = ledger.plan.phase("basis").event
    assert isinstance(event, Gaussian) if prob == 1.0 else event.sampling_prob == prob
    assert 0.99 * TARGET <= epsilon(ledger).upper <= TARGET
    for report in (finished.report.to_json(), make_report(ledger).to_json()):
        assert report["claim"] is True
        assert report["cross_check"] == "agrees", report["cross_check_reason"]
        assert 0.99 * TARGET <= report["epsilon"]["upper"] <= TARGET
        assert report["cross_check_epsilon"]["upper"] == pytest.approx(TARGET, rel=0.01)
        assert report["cross_check_epsilon"]["lower"] == pytest.approx(TARGET, rel=0.02)


def leaked(tiny, examples):
    """The basis that ``--basis leak`` takes from these examples, and the phase that its plan owns up to."""
    config = workbench.run_config("unused", basis="leak", allow_non_private_basis=True)
    setup = Setup(
        config=config,
        model=tiny.lora(tiny.base("bert")),
        loss_fn=classification_loss,
        collate=Collator(0),
        examples=examples,
        public=(),
        max_length=workbench.PADDED,
        delta=1e-5,
        neighboring="add_or_remove_one",
    )
    planned = plan_basis(setup)
    return planned.basis.factors, planned.phases


@pytest.mark.parametrize(
    ("kind", "epsilon", "share"),
    [
        ("private", 1.0, 0.10),
        ("private", 2.99, 0.10),
        ("private", 3.0, 0.05),
        ("private", 8.0, 0.05),
        ("hybrid", 1.0, 0.02),
        ("hybrid", 8.0, 0.02),
        ("choice", 1.0, 0.01),
    ],
)
def test_the_share_that_a_release_takes_if_nobody_says(kind, epsilon, share):
    assert default_share(kind, epsilon) == share


def test_a_leaking_basis_fails_the_test_that_a_private_one_passes(tiny):
    """One canary among seven examples is read from A alone, every time: no epsilon of 1 allows that.

    The private basis' own test, at its claimed epsilon, is in ``test_private_basis``.
    """
    data, canary, trials = workbench.examples(6, seed=4), {"input_ids": [7] * 15, "labels": 2}, 60
    known, (phase,) = leaked(tiny, data)
    assert isinstance(phase.event, NonPrivate)
    assert epsilon([phase], 1e-5).upper == float("inf")
    seen = {included: leaked(tiny, [*data, canary] if included else data)[0] for included in (0, 1)}
    scores = []
    for trial in range(trials):  # nothing is drawn, so one basis of either kind is as good as many
        found = seen[trial % 2]
        moved = max(float(torch.linalg.norm(f.A.T @ f.A - known[n].A.T @ known[n].A)) for n, f in found.items())
        scores.append(float(moved > 1e-3))
    assert all(torch.equal(leaked(tiny, data)[0][name].A, known[name].A) for name in known), "nothing is drawn"
    result = audit(
        CanaryScores(scores, np.arange(trials) % 2),
        "clopper-pearson",
        delta=1e-5,
        confidence=0.99,
        thresholds=FixedThresholds((0.5,)),
    )
    assert result.epsilon > 1.0
