"""``dpsb audit``: a second run with canaries under the settings of a first, and what its scores prove."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm

from dpsb.basis.canaries import BasisCanaries, plan_of_release
from dpsb.canaries import CanaryAudit, expected_scores
from dpsb.config import RunConfig
from dpsb.run import Callbacks, RunError, fine_tune
from dpsb_accounting import Ledger, Plan, auditing, make_report
from dpsb_accounting import delta as delta_of
from dpsb_accounting import epsilon as epsilon_of
from dpsb_accounting.auditing import METHODS, CanaryScores, Counts, FixedThresholds, LowerBound, SplitThreshold
from dpsb_accounting.auditing.page import Attack, to_html, to_json
from dpsb_accounting.files import write_whole
from dpsb_accounting.ledger import LEDGER_NAME

CANARY_RUN, REPORT_NAME = "canary-run", "report.json"
_GRADIENT, _BASIS = "gradient canaries", "basis canaries"
_WHITE_BOX = METHODS
_SIMULATIONS, _MANY = 5, 40_000
_GUESS_SHARES = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32)


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
    canaries = CanaryAudit(gradient_canaries, input_canaries, _basis_canaries(gradient_canaries))
    fine_tune(replace(config, out=str(out / CANARY_RUN)), callbacks=callbacks, audit=canaries)
    plan = Ledger.read(out / CANARY_RUN / LEDGER_NAME).plan
    claimed = epsilon_of(plan).upper
    callbacks.on_status("bounding epsilon by the scores")
    attacks = []
    makers: dict[str, Callable[[CanaryScores], Attack]] = {
        "gradient": lambda scores: white_box(_GRADIENT, plan, scores, confidence),
        "basis": lambda scores: white_box(_BASIS, plan_of_release(plan), scores, confidence, part=True),
        "input": lambda scores: _black_box("input canaries", scores, plan.delta, confidence),
        "secret-rank": lambda scores: _black_box("secrets, by rank", scores, plan.delta, confidence),
        "secret-writing": lambda scores: _black_box("secrets, by generation", scores, plan.delta, confidence),
        "membership": _membership,
    }
    for kind, make in makers.items():
        if kind in canaries.scores:
            attacks.append(make(canaries.scores[kind]))
            auditing.write_scores(canaries.scores[kind], out / f"{kind}-scores.npz")
    tv = delta_of(plan, 0.0).upper
    notes = [
        f"The attacks were made on a separate run of {plan.steps} steps with canaries, under the same plan as the run "
        "that is audited; its ledger is tainted and its model is not for release.",
        "Thresholds and numbers of guesses were fixed from the plan before the run started; each attack's error "
        "probability is shared among its methods, so that the largest bound may be quoted.",
        f"How Gaussian the claimed mechanism is: its epsilon {claimed:.4g} at delta {plan.delta:g} is that of mu = "
        f"{_mu(claimed, plan.delta):.3f}, its total variation distance that of mu = {2 * norm.ppf((1 + tv) / 2):.3f}. "
        "The nearer the two, the better the Gaussian assumption; if the second is smaller, the gdp bounds err low.",
        "For the operator, not for release: the canary run read the private data again and claims nothing, and scores "
        "of members against held-out examples are computed on people. Keep this page, audit.json and the scores as you "
        "keep the data.",
    ]
    further: dict[str, Any] = {"canary_run": {"ledger": f"{CANARY_RUN}/{LEDGER_NAME}", "released": False}}
    if canaries.secrets is not None:
        further["secrets"] = found = canaries.secrets.summary()
        notes.append(
            f"Of the secrets that were put in, the model writes {found['written_inserted']:.1%} to the last token, of "
            f"those left out {found['written_left_out']:.1%}; exposure {found['exposure_inserted']:.2f} and "
            f"{found['exposure_left_out']:.2f} bits (1.44 where the model knows nothing of them)."
        )
    return write_audit(out, f"Audit of {Path(config.out).name}", plan, claimed, confidence, attacks, notes, further)


def write_audit(
    out: Path,
    title: str,
    plan: Plan,
    claimed: float,
    confidence: float,
    attacks: Sequence[Attack],
    notes: Sequence[str],
    further: Mapping[str, Any],
) -> Audit:
    """Writes ``audit.json``, with ``further`` facts, and ``audit.html``, each whole or not at all."""
    content = to_json(claimed, plan.delta, confidence, attacks) | {**further, "notes": list(notes)}
    page = to_html(
        title=title,
        claimed_epsilon=claimed,
        delta=plan.delta,
        confidence=confidence,
        attacks=attacks,
        notes=notes,
    )
    write_whole(out / "audit.json", (json.dumps(content, indent=1) + "\n").encode())
    write_whole(out / "audit.html", page.encode())
    return Audit(out, content, tuple(attacks))


def into_report(folder: Path, found: Audit) -> None:
    """Puts the best bound that the gradient canaries prove into the report of the run that was audited.

    Those scores are a function of canaries and noise, so the report stays as public as it was; what input canaries and
    real examples gave stays with the operator.

    Raises:
      RunError: If the run has no report yet.
      ValueError: If the bound exceeds the claim: one of the two is wrong, and nothing is written.
    """
    path = folder / REPORT_NAME
    if not path.exists():
        raise RunError(f"{folder} holds no {REPORT_NAME}; finish the run first.")
    ledger = Ledger.read(folder / LEDGER_NAME)
    bounds = [bound for attack in found.attacks if attack.name == _GRADIENT for bound in attack.bounds]
    best = max(bounds, key=lambda bound: bound.epsilon)
    audit = {
        "method": f"{_GRADIENT}, {best.method}",
        "epsilon_lower": best.epsilon,
        "confidence": float(str(found.content["confidence"])),  # of the largest among its methods
        "delta": best.delta,
    }
    held_out = json.loads(path.read_text()).get("held_out")
    make_report(ledger, held_out=held_out["metrics"] if held_out else None, audits=[audit]).write(path)


def white_box(name: str, plan: Plan, scores: CanaryScores, confidence: float, *, part: bool = False) -> Attack:
    """Canaries that see every release: each method's rule is the best one on simulated scores of the plan's mechanism.

    Args:
      name: Of the attack.
      plan: Of the releases that were attacked.
      scores: What the canaries gave.
      confidence: With which the largest bound holds; its error is shared among the methods.
      part: Whether the plan is of a part of the run, which is held against the part's own epsilon.
    """
    each = 1 - (1 - confidence) / len(_WHITE_BOX)
    simulated = [expected_scores(plan, len(scores), seed) for seed in range(_SIMULATIONS)]
    many = expected_scores(plan, _MANY, _SIMULATIONS)
    bounds, expected = [], {}
    for method in _WHITE_BOX:
        rule = _best_rule(method, many, simulated, plan.delta, each)
        bounds.append(rule(scores))
        expected[method] = sum(rule(one).epsilon for one in simulated) / len(simulated)
    return Attack(
        name=name,
        threat_model=scores.threat_model,
        bounds=bounds,
        roc=auditing.roc(scores),
        expected=expected,
        claimed_epsilon=epsilon_of(plan).upper if part else None,
    )


Rule = Callable[[CanaryScores], LowerBound]


def _best_rule(
    method: str, many: CanaryScores, simulated: Sequence[CanaryScores], delta: float, confidence: float
) -> Rule:
    """The threshold, or number of guesses, with which simulated scores prove the most; no real score is looked at."""

    def rule(thresholds: tuple[float, ...] = (), guesses: tuple[int, ...] = ()) -> Rule:
        how = FixedThresholds(thresholds) if thresholds else SplitThreshold()
        return lambda found: auditing.audit(
            found, method, delta=delta, confidence=confidence, thresholds=how, guesses=guesses
        )

    size = len(simulated[0])
    if method.startswith("one-run"):
        numbers = sorted({min(size, max(2, round(size * share))) for share in _GUESS_SHARES})
        return max((rule(guesses=(n,)) for n in numbers), key=lambda one: sum(one(s).epsilon for s in simulated))
    bound = auditing.from_counts if method == "clopper-pearson" else auditing.gdp_from_counts
    ranks = np.concatenate([np.linspace(0.02, 0.95, 60), 1 - np.geomspace(0.05, 20 / len(many), 40)])
    values = [float(t) + 1e-9 for t in np.quantile(many.values, ranks)]  # beside a score, not on it
    proven = [bound(_scaled(many.counts(t), size), delta=delta, confidence=confidence).epsilon for t in values]
    return rule(thresholds=(values[int(np.argmax(proven))],))


def _scaled(counts: Counts, size: int) -> Counts:
    """The counts that ``size`` scores are expected to give; a false alarm is counted for a share of one."""
    half = size // 2
    return Counts(
        true_positives=math.floor(half * counts.true_positives / counts.positives),
        positives=half,
        false_positives=math.ceil(half * counts.false_positives / counts.negatives),
        negatives=half,
    )


def _black_box(name: str, scores: CanaryScores, delta: float, confidence: float) -> Attack:
    bounds = [auditing.audit(scores, "one-run", delta=delta, confidence=confidence)]
    return Attack(name=name, threat_model=scores.threat_model, bounds=bounds, roc=auditing.roc(scores))


def _membership(scores: CanaryScores) -> Attack:
    """Members were not put in by coins, so their scores describe, and bound nothing."""
    return Attack(name="real examples", threat_model=scores.threat_model, bounds=(), roc=auditing.roc(scores))


def _basis_canaries(count: int) -> BasisCanaries | None:
    return BasisCanaries(count) if count else None


def _mu(epsilon: float, delta: float) -> float:
    from dpsb_accounting import gaussian

    return 1 / gaussian.noise_multiplier(epsilon, delta)
