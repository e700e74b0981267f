"""``dpsb audit``: a second run with canaries under the settings of a first, and what its scores prove."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.stats import norm

from dpsb.canaries import CanaryAudit, expected_scores
from dpsb.checkpoint import write_durably
from dpsb.config import RunConfig
from dpsb.run import Callbacks, RunError, fine_tune
from dpsb_accounting import Ledger, auditing
from dpsb_accounting import delta as delta_of
from dpsb_accounting import epsilon as epsilon_of
from dpsb_accounting.auditing import CanaryScores, FixedThresholds, LowerBound
from dpsb_accounting.auditing.page import Attack, to_html, to_json

CANARY_RUN = "canary-run"
_WHITE_BOX = ("gdp", "one-run", "one-run-fdp")
_SIMULATIONS = 5


@dataclass(frozen=True)
class Audit:
    """A finished audit.

    Args:
      out: Its folder: ``audit.html``, ``audit.json``, the scores, and the canary run.
      content: What ``audit.json`` holds.
      attacks: Bounds and ROC of each attack.
    """

    out: Path
    content: dict[str, object]
    attacks: tuple[Attack, ...]


def audit_run(
    config: RunConfig,
    out: Path,
    *,
    gradient_canaries: int = 3000,
    input_canaries: int = 200,
    confidence: float = 0.95,
    callbacks: Callbacks = Callbacks(),  # noqa: B008
) -> Audit:
    """Trains once more with canaries, under the same plan, and bounds epsilon from below by their scores.

    Guarantees:
      * The canary run has a ledger of its own, which is tainted: neither its model nor its claim can be taken for that
        of the run that is audited. It reads the same data; its files stay with the operator.
      * Thresholds and numbers of guesses are fixed before it starts: from the plan, by simulation.
      * Gradient scores are a function of canaries and noise only: what the examples added to a sum is taken off.

    Args:
      config: Settings of the run that is audited.
      out: New folder.
      gradient_canaries: At most the length of theta are used.
      input_canaries: Examples of random tokens, in the data with probability 1/2.
      confidence: With which each attack's best bound holds.
      callbacks: Where progress goes.

    Raises:
      RunError: If ``out`` exists and is not empty.
      ValueError: If the plan is not private.
    """
    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out} is not empty; choose another folder for the audit.")
    canaries = CanaryAudit(gradient_canaries, input_canaries)
    fine_tune(replace(config, out=str(out / CANARY_RUN)), callbacks=callbacks, audit=canaries)
    plan = Ledger.read(out / CANARY_RUN / "ledger.jsonl").plan
    claimed = epsilon_of(plan).upper
    callbacks.on_status("bounding epsilon by the scores")
    attacks = []
    for kind, make in (("gradient", _white_box), ("input", _black_box), ("membership", _membership)):
        if kind in canaries.scores:
            scores = canaries.scores[kind]
            attacks.append(make(canaries, scores, plan.delta, confidence))
            auditing.write_scores(scores, out / f"{kind}-scores.npz")
    tv = delta_of(plan, 0.0).upper
    notes = [
        f"The attacks were made on a separate run of {plan.steps} steps with canaries, under the same plan as the run "
        "that is audited; its ledger is tainted and its model is not for release.",
        "Thresholds and numbers of guesses were fixed from the plan before the run started; each attack's error "
        "probability is shared among its methods, so that the largest bound may be quoted.",
        f"How Gaussian the claimed mechanism is: its epsilon {claimed:.4g} at delta {plan.delta:g} is that of mu = "
        f"{_mu(claimed, plan.delta):.3f}, its total variation distance that of mu = {2 * norm.ppf((1 + tv) / 2):.3f}. "
        "The nearer the two, the better the Gaussian assumption; if the second is smaller, the gdp bounds err low.",
        "Scores of members against held-out examples are computed on people: keep that file as you keep the data.",
    ]
    content = to_json(claimed, plan.delta, confidence, attacks)
    content |= {"notes": notes, "canary_run": {"ledger": f"{CANARY_RUN}/ledger.jsonl", "released": False}}
    page = to_html(
        title=f"Audit of {Path(config.out).name}",
        claimed_epsilon=claimed,
        delta=plan.delta,
        confidence=confidence,
        attacks=attacks,
        notes=notes,
    )
    write_durably(out / "audit.json", (json.dumps(content, indent=1) + "\n").encode())
    write_durably(out / "audit.html", page.encode())
    return Audit(out, content, tuple(attacks))


def _white_box(canaries: CanaryAudit, scores: CanaryScores, delta: float, confidence: float) -> Attack:
    """Gradient canaries: the threshold is the best one on simulated scores of the plan's own mechanism."""
    if canaries.plan is None:
        raise RunError("The canary run ended before its canaries were planted.")
    each = 1 - (1 - confidence) / len(_WHITE_BOX)
    simulated = [expected_scores(canaries.plan, len(scores), seed) for seed in range(_SIMULATIONS)]
    rule = FixedThresholds((_simulated_threshold(expected_scores(canaries.plan, 20_000, 99), len(scores) / 2),))

    def bounds(found: CanaryScores) -> list[LowerBound]:
        return [auditing.audit(found, method, delta=delta, confidence=each, thresholds=rule) for method in _WHITE_BOX]

    expected = sum(bounds(one)[0].epsilon for one in simulated) / len(simulated)
    return Attack(
        name="gradient canaries",
        threat_model=scores.threat_model,
        bounds=bounds(scores),
        roc=auditing.roc(scores),
        expected=expected,
    )


def _simulated_threshold(simulated: CanaryScores, per_group: float) -> float:
    """The threshold at which ``per_group`` scores in each group are expected to prove the largest mu."""
    rates = [(simulated.counts(float(t)), float(t)) for t in np.quantile(simulated.values, np.linspace(0.05, 0.95, 91))]
    gaps = []
    for counts, _ in rates:
        tpr, fpr = counts.true_positives / counts.positives, counts.false_positives / counts.negatives
        gaps.append(norm.ppf(tpr) - norm.ppf(fpr) - 1.96 * (_spread(tpr, per_group) + _spread(fpr, per_group)))
    return rates[int(np.nanargmax(gaps))][1] + 1e-9  # beside the score, not on it


def _spread(rate: float, trials: float) -> float:
    """Standard error of the normal quantile of a rate that was estimated from ``trials`` scores."""
    return float((rate * (1 - rate) / trials) ** 0.5 / norm.pdf(norm.ppf(rate)))


def _black_box(_canaries: CanaryAudit, scores: CanaryScores, delta: float, confidence: float) -> Attack:
    bounds = [auditing.audit(scores, "one-run", delta=delta, confidence=confidence)]
    return Attack(name="input canaries", threat_model=scores.threat_model, bounds=bounds, roc=auditing.roc(scores))


def _membership(_canaries: CanaryAudit, scores: CanaryScores, _delta: float, _confidence: float) -> Attack:
    """Members were not put in by coins, so their scores describe, and bound nothing."""
    return Attack(name="members", threat_model=scores.threat_model, bounds=(), roc=auditing.roc(scores))


def _mu(epsilon: float, delta: float) -> float:
    from dpsb_accounting import gaussian

    return 1 / gaussian.noise_multiplier(epsilon, delta)
