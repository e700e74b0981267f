"""Empirical lower bounds on epsilon from counts of right and wrong guesses about membership."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dpsb_accounting import _checks, gaussian

UNSTATED = "not stated by whoever made the scores"
INDEPENDENT = "the {positives} member and {negatives} non-member trials are independent of each other"
GAUSSIAN = (
    "the mechanism's trade-off curve is that of a Gaussian (mu-GDP with the mu found); without this assumption the "
    "same counts support only epsilon {epsilon:.4g}"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LowerBound:
    """What an attack proves: with the stated confidence, no epsilon below `epsilon` is true at `delta`.

    It can refute a claim; it can never support one: a weak attack gives a small number for a leaking mechanism, too.

    Args:
        epsilon: The bound, at least 0. Sensitive or public as the scores are.
        delta: The delta at which epsilon is bounded, in [0, 1).
        confidence: Probability with which the statement holds if its assumptions do, over the attack's coins.
        method: "clopper-pearson", "gdp", "one-run" or "one-run-fdp".
        assumptions: What has to be true besides; each a sentence, with its number where it has one.
        threat_model: What the attacker saw and chose.
        inputs: The numbers that the bound was computed from.
        mu: The lower bound on mu, for methods that go through Gaussian DP; otherwise None.

    Raises:
        ValueError: If a number is out of range.
    """

    epsilon: float
    delta: float
    confidence: float
    method: str
    assumptions: tuple[str, ...]
    threat_model: str = UNSTATED
    inputs: Mapping[str, object] = field(default_factory=dict)
    mu: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", _checks.nonnegative(infinite=True, epsilon=self.epsilon))
        object.__setattr__(self, "delta", _delta(self.delta))
        object.__setattr__(self, "confidence", _checks.probability(open_interval=True, confidence=self.confidence))
        _checks.text(method=self.method)
        _checks.text(threat_model=self.threat_model)

    def refutes(self, claimed_epsilon: float) -> bool:
        """Whether the bound lies above a claimed upper bound on epsilon: then one of the two is wrong."""
        return self.epsilon > claimed_epsilon

    def to_json(self) -> dict[str, object]:
        """Returns the bound as a JSON object."""
        content: dict[str, object] = {
            "epsilon_lower": self.epsilon if math.isfinite(self.epsilon) else "inf",
            "delta": self.delta,
            "confidence": self.confidence,
            "method": self.method,
            "threat_model": self.threat_model,
            "assumptions": list(self.assumptions),
            "inputs": dict(self.inputs),
        }
        if self.mu is not None:
            content["mu_lower"] = self.mu
        result: dict[str, object] = json.loads(json.dumps(content))
        return result

    def __str__(self) -> str:
        return f"epsilon >= {self.epsilon:.5g} at delta {self.delta:g} ({self.method}, confidence {self.confidence:g})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """How often an attack said "member", among members and among non-members.

    Args:
        true_positives: Members called members.
        positives: Members.
        false_positives: Non-members called members.
        negatives: Non-members.

    Raises:
        ValueError: If a count is not a whole number in its range.

    Example:
        >>> Counts(true_positives=900, positives=1000, false_positives=50, negatives=1000).bounds(0.05)
        (0.8797..., 0.0654...)
    """

    true_positives: int
    positives: int
    false_positives: int
    negatives: int

    def __post_init__(self) -> None:
        for part, whole in (("true_positives", "positives"), ("false_positives", "negatives")):
            trials = _checks.whole(at_least=1, **{whole: getattr(self, whole)})
            found = _checks.whole(at_least=0, **{part: getattr(self, part)})
            if found > trials:
                raise ValueError(f"{part} must not exceed {whole}={trials!r}, not {found!r}")
            object.__setattr__(self, whole, trials)
            object.__setattr__(self, part, found)

    def bounds(self, alpha: float) -> tuple[float, float]:
        """Returns (lower bound on the true positive rate, upper bound on the false positive rate).

        Clopper–Pearson, `alpha / 2` each, so that both hold together with probability at least 1 - `alpha`.
        """
        low, _ = clopper_pearson(self.true_positives, self.positives, alpha)
        _, high = clopper_pearson(self.false_positives, self.negatives, alpha)
        return low, high

    def to_json(self) -> dict[str, object]:
        """Returns the four counts by name."""
        names = ("true_positives", "positives", "false_positives", "negatives")
        return {name: getattr(self, name) for name in names}


def clopper_pearson(successes: int, trials: int, alpha: float) -> tuple[float, float]:
    """Returns the exact two-sided interval for a binomial probability.

    Each end is missed with probability at most `alpha / 2`.

    Args:
        successes: From 0 to `trials`.
        trials: At least 1.
        alpha: In (0, 1).

    References:
        Clopper and Pearson (1934).

    Example:
        >>> low, high = clopper_pearson(50, 1000, alpha=0.05)
        >>> round(low, 5), round(high, 5)
        (0.03734, 0.06539)
    """
    from scipy.special import betaincinv

    low = float(betaincinv(successes, trials - successes + 1, alpha / 2)) if successes else 0.0
    high = float(betaincinv(successes + 1, trials - successes, 1 - alpha / 2)) if successes < trials else 1.0
    return low, high


def from_counts(
    counts: Counts, *, delta: float, confidence: float = 0.95, comparisons: int = 1, threat_model: str = UNSTATED
) -> LowerBound:
    r"""Bounds epsilon from independent trials, with no assumption about the mechanism.

    (epsilon, delta)-DP forces :math:`TPR \le e^\epsilon FPR + \delta` and :math:`TNR \le e^\epsilon FNR + \delta`, so
    :math:`\epsilon \ge \max\{\log\frac{TPR_{lo}-\delta}{FPR_{hi}}, \log\frac{1-FPR_{hi}-\delta}{1-TPR_{lo}}\}`.

    Guarantees: the statement fails with probability at most 1 - `confidence`, if the rule that called members was
        fixed before these trials (or is one of `comparisons` that were) and the trials are independent.

    Args:
        counts: Outcomes of the trials.
        delta: In [0, 1).
        confidence: In (0, 1).
        comparisons: How many rules, fixed beforehand, the reported one was chosen from (Bonferroni).
        threat_model: What the attacker saw and chose.

    References:
        Jagielski, Ullman and Oprea (2020), arXiv:2006.07709; Nasr et al. (2021), arXiv:2101.04535.

    Example:
        >>> counts = Counts(true_positives=900, positives=1000, false_positives=50, negatives=1000)
        >>> print(from_counts(counts, delta=1e-5))
        epsilon >= 2.5992 at delta 1e-05 (clopper-pearson, confidence 0.95)
    """
    delta, alpha = _delta(delta), _alpha(confidence, comparisons)
    return LowerBound(
        epsilon=assumption_free(*counts.bounds(alpha), delta),
        delta=delta,
        confidence=confidence,
        method="clopper-pearson",
        assumptions=(INDEPENDENT.format(positives=counts.positives, negatives=counts.negatives),),
        threat_model=threat_model,
        inputs={**counts.to_json(), "comparisons": comparisons},
    )


def gdp_from_counts(
    counts: Counts, *, delta: float, confidence: float = 0.95, comparisons: int = 1, threat_model: str = UNSTATED
) -> LowerBound:
    r"""Bounds epsilon from independent trials, for a mechanism whose trade-off curve is Gaussian.

    :math:`\mu \ge \Phi^{-1}(1-FPR_{hi}) - \Phi^{-1}(1-TPR_{lo})`, and epsilon is that of a Gaussian of noise
    multiplier 1/mu. Negative mu counts as 0: upper bounds on both error rates support nothing in the other direction.

    Guarantees: as `from_counts`, if besides the trade-off curve is Gaussian. The bound on mu holds for any mechanism
        that is mu-GDP; only the step from mu to epsilon needs the curve to *be* Gaussian.

    Args:
        counts: Outcomes of the trials.
        delta: In (0, 1).
        confidence: In (0, 1).
        comparisons: How many rules, fixed beforehand, the reported one was chosen from (Bonferroni).
        threat_model: What the attacker saw and chose.

    References:
        Nasr et al. (2023), arXiv:2302.07956, Section 4; Dong, Roth and Su (2022), arXiv:1905.02383, Corollary 2.13.

    Example:
        >>> counts = Counts(true_positives=900, positives=1000, false_positives=50, negatives=1000)
        >>> round(gdp_from_counts(counts, delta=1e-5).mu, 4)
        2.6846
    """
    delta, alpha = _checks.probability(open_interval=True, delta=delta), _alpha(confidence, comparisons)
    low, high = counts.bounds(alpha)
    mu, without = gdp_mu(low, high), assumption_free(low, high, delta)
    independent = INDEPENDENT.format(positives=counts.positives, negatives=counts.negatives)
    return LowerBound(
        epsilon=epsilon_of_mu(mu, delta),
        delta=delta,
        confidence=confidence,
        method="gdp",
        assumptions=(independent, GAUSSIAN.format(epsilon=without)),
        threat_model=threat_model,
        inputs={**counts.to_json(), "comparisons": comparisons, "epsilon_without_gaussian_assumption": without},
        mu=mu,
    )


def gdp_mu(tpr_low: float, fpr_high: float) -> float:
    """Returns the smallest mu whose Gaussian trade-off curve allows these two rates, at least 0."""
    from scipy.special import ndtri

    if tpr_low <= 0.0 or fpr_high >= 1.0:
        return 0.0
    return max(0.0, float(ndtri(tpr_low)) - float(ndtri(fpr_high)))


def epsilon_of_mu(mu: float, delta: float) -> float:
    """Returns the epsilon at `delta` of a mu-GDP mechanism, from below; infinite for infinite mu."""
    if math.isinf(mu):
        return math.inf
    return gaussian.epsilon(1 / mu, delta)[0] if mu > 1e-9 else 0.0


def with_further(bound: LowerBound, *, assumptions: tuple[str, ...], inputs: Mapping[str, object]) -> LowerBound:
    """Returns the bound with more assumptions and inputs on record."""
    return replace(bound, assumptions=(*bound.assumptions, *assumptions), inputs={**dict(bound.inputs), **dict(inputs)})


def assumption_free(tpr_low: float, fpr_high: float, delta: float) -> float:
    """Returns the smallest epsilon that (epsilon, delta)-DP allows for these two rates, at least 0."""
    ratios = [(tpr_low - delta, fpr_high), (1 - fpr_high - delta, 1 - tpr_low)]
    return max([0.0, *(math.log(top / bottom) for top, bottom in ratios if top > 0 and bottom > 0)])


def _delta(delta: object) -> float:
    found = _checks.nonnegative(delta=delta)
    if found >= 1:
        raise ValueError(f"delta must be in [0, 1), not {delta!r}")
    return found


def _alpha(confidence: float, comparisons: int) -> float:
    level = _checks.probability(open_interval=True, confidence=confidence)
    return (1 - level) / _checks.whole(at_least=1, comparisons=comparisons)
