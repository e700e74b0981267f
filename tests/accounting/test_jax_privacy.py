"""The bounds against jax_privacy's ``CanaryScoreAuditor`` on the same scores; skipped where it is not installed."""

import numpy as np
import pytest

from dpsb_accounting.auditing import (
    CanaryScores,
    FixedThresholds,
    audit,
    gdp_from_counts,
    one_run,
    one_run_fdp,
)

theirs = pytest.importorskip("jax_privacy.auditing", exc_type=ImportError)

SIZE = 2000
CASES = [(mu, delta, threshold) for mu in (0.5, 1.0, 2.5) for delta in (1e-5, 1e-3) for threshold in (0.3, 1.0)]


def both(mu, size=SIZE, seed=7):
    """Scores of a Gaussian mechanism, for both auditors."""
    source = np.random.default_rng(seed)
    included = source.random(size) < 0.5
    values = source.standard_normal(size) + mu * included
    scores = CanaryScores(values, included)
    return scores, theirs.CanaryScoreAuditor(scores.inserted, scores.left_out)


@pytest.mark.parametrize(("mu", "delta", "threshold"), CASES)
@pytest.mark.parametrize("significance", [0.05, 0.01])
def test_clopper_pearson(mu, delta, threshold, significance):
    ours, other = both(mu)
    expected = other.epsilon_clopper_pearson(
        significance, delta, one_sided=False, threshold_strategy=theirs.Explicit(threshold)
    )
    rule = FixedThresholds((threshold,))
    found = audit(ours, "clopper-pearson", delta=delta, confidence=1 - significance, thresholds=rule)
    assert found.epsilon == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("mu", "delta", "threshold"), CASES)
def test_one_run(mu, delta, threshold):
    ours, other = both(mu)
    counts = ours.counts(threshold)
    facts = {
        "num_canaries": SIZE,
        "guesses": counts.true_positives + counts.false_positives,
        "correct": counts.true_positives,
        "delta": delta,
    }
    strategy = {"threshold_strategy": theirs.Explicit(threshold)}
    assert one_run(**facts).epsilon == pytest.approx(other.epsilon_one_run(0.05, delta, **strategy), abs=2e-6)
    assert one_run_fdp(**facts).epsilon == pytest.approx(other.epsilon_one_run_fdp(0.05, delta, **strategy), abs=2e-6)


@pytest.mark.parametrize(("mu", "delta"), [(1.0, 1e-5), (2.0, 1e-3), (3.0, 1e-5)])
def test_gdp_over_all_thresholds(mu, delta):
    """Theirs tries every threshold and pays for each; ours, given the same thresholds and the same price, agrees."""
    ours, other = both(mu, size=300)
    paid = len(other._thresholds)
    thresholds = [*np.unique(ours.values), np.inf]
    best = max(gdp_from_counts(ours.counts(t), delta=delta, comparisons=paid).epsilon for t in thresholds)
    expected = other.epsilon_from_gdp(0.05, delta, eps_tol=1e-9)
    assert expected > 0
    assert best == pytest.approx(expected, abs=1e-6)
