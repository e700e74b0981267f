"""Scores of canaries, the rules by which a threshold may be found, and bounds from both."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpsb_accounting import _checks
from dpsb_accounting.auditing.bounds import (
    UNSTATED,
    Counts,
    LowerBound,
    assumption_free,
    from_counts,
    gdp_from_counts,
    with_further,
)
from dpsb_accounting.auditing.one_run import one_run, one_run_fdp

if TYPE_CHECKING:
    import numpy
    from numpy.typing import ArrayLike, NDArray

METHODS = ("clopper-pearson", "gdp", "one-run", "one-run-fdp")
_COIN_DEVIATIONS = 6.0
_TIE_SEED = 20230515  # any fixed number: ties are broken, and data split, in an order that no score and no coin shaped


class CanaryScores:
    """Scores of canaries, higher where membership is more likely, and which of them were inserted.

    Args:
        values: One finite score per canary, shape (m,).
        included: Whether the canary was inserted, shape (m,), booleans or 0 and 1.
        threat_model: What the attacker saw and chose, in words.

    Raises:
        ValueError: If shapes differ, a score is not finite, or one of the two groups is empty.

    Example:
        >>> CanaryScores([3.0, 1.0, 2.5, 0.0], [1, 0, 1, 0]).counts(2.0)
        Counts(true_positives=2, positives=2, false_positives=0, negatives=2)
    """

    __slots__ = ("included", "threat_model", "values")

    values: NDArray[numpy.float64]
    included: NDArray[numpy.bool_]
    threat_model: str

    def __init__(self, values: ArrayLike, included: ArrayLike, threat_model: str = UNSTATED) -> None:
        import numpy

        self.values = numpy.array(values, dtype=numpy.float64)
        bits = numpy.array(included)
        if self.values.ndim != 1 or self.values.shape != bits.shape:
            raise ValueError(f"values {self.values.shape} and included {bits.shape} must be vectors of one length")
        if not numpy.isin(bits, (0, 1)).all():
            raise ValueError("included must hold only true and false, or 1 and 0")
        if not numpy.isfinite(self.values).all():
            raise ValueError("values must be finite: a score that is NaN or infinite is no score")
        self.included = bits.astype(bool)
        if not 0 < int(self.included.sum()) < len(bits):
            raise ValueError(f"included must hold both kinds; {int(self.included.sum())} of {len(bits)} are true")
        self.threat_model = _checks.text(threat_model=threat_model)
        self.values.flags.writeable = self.included.flags.writeable = False

    def __len__(self) -> int:
        return len(self.values)

    @property
    def inserted(self) -> NDArray[numpy.float64]:
        """Scores of the canaries that were inserted."""
        return self.values[self.included]

    @property
    def left_out(self) -> NDArray[numpy.float64]:
        """Scores of the canaries that were not."""
        return self.values[~self.included]

    def counts(self, threshold: float) -> Counts:
        """Counts of the rule "member if the score is at least `threshold`"."""
        return Counts(
            true_positives=int((self.inserted >= threshold).sum()),
            positives=len(self.inserted),
            false_positives=int((self.left_out >= threshold).sum()),
            negatives=len(self.left_out),
        )

    def correct_guesses(self, guesses: int) -> int:
        """How many are right if the highest half of `guesses` scores is called members, the lowest half not.

        The coins are not looked at before the guesses stand; ties are broken in an order that has nothing to do with
        the order in which the canaries were given.
        """
        import numpy

        highest = math.ceil(guesses / 2)
        shuffled = numpy.random.default_rng(_TIE_SEED).permutation(len(self))
        order = shuffled[numpy.argsort(-self.values[shuffled], kind="stable")]
        top, bottom = order[:highest], order[len(order) - (guesses - highest) :]
        return int(self.included[top].sum()) + int((~self.included[bottom]).sum())


@dataclass(frozen=True, slots=True)
class FixedThresholds:
    """Thresholds that were written down before any score was seen; several are paid for (Bonferroni).

    Args:
        values: At least one.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("values must hold at least one threshold")
        object.__setattr__(self, "values", tuple(_checks.number(threshold=value) for value in self.values))


@dataclass(frozen=True, slots=True)
class SplitThreshold:
    """The threshold is chosen on a part of the scores, which is then thrown away.

    Args:
        share: The part, in (0, 1).
    """

    share: float = 0.1

    def __post_init__(self) -> None:
        _checks.probability(open_interval=True, share=self.share)


Thresholds = FixedThresholds | SplitThreshold


def default_guesses(num_canaries: int) -> int:
    """Returns the number of guesses if none is given: 4 % of the canaries, at least 50; no score is looked at.

    Close to the best for epsilon from 1 to 8 on an exact Gaussian with 10,000 canaries (docs/auditing.md).

    Example:
        >>> default_guesses(10_000), default_guesses(1_000), default_guesses(30)
        (400, 50, 30)
    """
    return min(num_canaries, max(50, num_canaries // 25))


def audit(
    scores: CanaryScores,
    method: str,
    *,
    delta: float,
    confidence: float = 0.95,
    thresholds: Thresholds = SplitThreshold(),
    guesses: tuple[int, ...] = (),
) -> LowerBound:
    """Bounds epsilon from below by the scores of canaries.

    There is no way to ask for the best threshold on the scores it is evaluated on: without a correction that certifies
    a positive epsilon for mechanisms that leak nothing.

    Guarantees: the statement fails with probability at most 1 - `confidence` if the assumptions that it prints hold.

    Args:
        scores: Canaries of one run or one canary from each of many runs.
        method: "clopper-pearson", "gdp" (these use `thresholds`; scores must be independent), "one-run" or
            "one-run-fdp" (these use `guesses`; canaries must be inserted by fair coins).
        delta: In (0, 1).
        confidence: In (0, 1).
        thresholds: How the threshold was or is to be found.
        guesses: Numbers of guesses that were fixed beforehand; several are paid for. Left out: `default_guesses`.

    Returns:
        The bound; with several thresholds or numbers of guesses, the best of the corrected ones.

    Raises:
        ValueError: If an argument is out of range, a fixed threshold equals a score (then it was read off the data), or
            the coins of a one-run audit were clearly not fair.

    Example:
        >>> import numpy
        >>> coins = numpy.arange(2000) % 2
        >>> noise = numpy.random.default_rng(0).normal(size=2000)
        >>> half = FixedThresholds((0.5,))
        >>> print(audit(CanaryScores(noise + coins, coins), "gdp", delta=1e-5, thresholds=half))
        epsilon >= 3.3... at delta 1e-05 (gdp, confidence 0.95)
    """
    _checks.one_of(choices=METHODS, method=method)
    if not isinstance(thresholds, FixedThresholds | SplitThreshold):
        raise ValueError(f"thresholds must be FixedThresholds or SplitThreshold, not {thresholds!r}")
    if method.startswith("one-run"):
        return _audit_guesses(scores, method, delta, confidence, guesses or (default_guesses(len(scores)),))
    bound = from_counts if method == "clopper-pearson" else gdp_from_counts
    if isinstance(thresholds, SplitThreshold):
        chosen_on, rest = _split(scores, thresholds.share)
        values: tuple[float, ...] = (_best_threshold(chosen_on, method, delta, confidence),)
        how = f"split: chosen on {len(chosen_on)} scores that were then thrown away"
    else:
        values, rest, how = thresholds.values, scores, "fixed beforehand"
        for value in values:
            if bool((scores.values == value).any()):
                raise ValueError(f"threshold {value!r} equals a score: a threshold read off the scores bounds nothing")
    found = [
        bound(
            rest.counts(value),
            delta=delta,
            confidence=confidence,
            comparisons=len(values),
            threat_model=scores.threat_model,
        )
        for value in values
    ]
    best = max(range(len(values)), key=lambda k: found[k].epsilon)
    inputs: dict[str, object] = {"threshold": values[best], "threshold_rule": how, "thresholds": list(values)}
    assumptions: tuple[str, ...] = ()
    if method == "gdp":
        distance, critical = gaussian_distance(rest)
        inputs |= {"gaussian_distance": distance, "gaussian_distance_95": critical}
        look = "look" if distance <= critical else "do not look"
        assumptions = (
            f"the scores {look} Gaussian: largest distance of their distribution from a normal one {distance:.4f}, "
            f"where normal scores stay below {critical:.4f} in 95 % of cases",
        )
    return with_further(found[best], assumptions=assumptions, inputs=inputs)


def gaussian_distance(scores: CanaryScores) -> tuple[float, float]:
    """Returns (distance, its 95 % point under normality) of the scores from a normal law, the worse of both groups.

    Lilliefors' statistic: the largest distance between the empirical distribution and the normal one of the same mean
    and variance. Its 95 % point is 0.895 / (sqrt(n) - 0.01 + 0.85 / sqrt(n)).

    References:
        Lilliefors (1967); Stephens (1974), Table 1A.
    """
    import numpy
    from scipy.special import ndtr

    worst = (0.0, 1.0)
    for group in (scores.inserted, scores.left_out):
        size, spread = len(group), float(group.std(ddof=1)) if len(group) > 1 else 0.0
        if size < 5 or spread == 0.0:
            return 1.0, 0.0
        normal = ndtr((numpy.sort(group) - group.mean()) / spread)
        steps = numpy.arange(size + 1) / size
        distance = float(max(numpy.max(steps[1:] - normal), numpy.max(normal - steps[:-1])))
        critical = 0.895 / (math.sqrt(size) - 0.01 + 0.85 / math.sqrt(size))
        worst = max(worst, (distance, critical), key=lambda pair: pair[0] / pair[1])
    return worst


def _audit_guesses(
    scores: CanaryScores, method: str, delta: float, confidence: float, guesses: tuple[int, ...]
) -> LowerBound:
    members, total = int(scores.included.sum()), len(scores)
    if abs(members - total / 2) > _COIN_DEVIATIONS * math.sqrt(total) / 2:
        raise ValueError(
            f"included must come from fair coins for method={method!r}, but {members} of {total} are true; use "
            "'clopper-pearson' or 'gdp' for groups of fixed sizes"
        )
    bound: Callable[..., LowerBound] = one_run if method == "one-run" else one_run_fdp
    for count in guesses:
        if _checks.whole(at_least=1, guesses=count) > total:
            raise ValueError(f"guesses must not exceed the {total} canaries, not {count!r}")
    found = [
        bound(
            num_canaries=total,
            guesses=count,
            correct=scores.correct_guesses(count),
            delta=delta,
            confidence=confidence,
            comparisons=len(guesses),
            threat_model=scores.threat_model,
        )
        for count in guesses
    ]
    return max(found, key=lambda one: one.epsilon)


def _split(scores: CanaryScores, share: float) -> tuple[CanaryScores, CanaryScores]:
    """Cuts both groups in the same proportion, in an order that does not depend on the scores."""
    import numpy

    source = numpy.random.default_rng(_TIE_SEED)
    first = numpy.zeros(len(scores), dtype=bool)
    for members in (scores.included, ~scores.included):
        where = numpy.flatnonzero(members)
        taken = math.ceil(share * len(where))
        if taken >= len(where):
            raise ValueError(f"share={share!r} leaves none of {len(where)} scores to evaluate the threshold on")
        first[source.permutation(where)[:taken]] = True
    parts = (CanaryScores(scores.values[part], scores.included[part], scores.threat_model) for part in (first, ~first))
    return next(parts), next(parts)


def _best_threshold(scores: CanaryScores, method: str, delta: float, confidence: float) -> float:
    """Returns a threshold that would give a good bound on these scores; it must not be evaluated on them.

    For "gdp" the middle between the medians, which is the best for Gaussian scores and hardly moves by chance;
    otherwise the one with the best bound.
    """
    import numpy
    from scipy.special import betaincinv

    if method == "gdp":
        return float(numpy.median(scores.inserted) + numpy.median(scores.left_out)) / 2
    alpha = 1 - confidence
    inserted, left_out = numpy.sort(scores.inserted), numpy.sort(scores.left_out)
    ordered = numpy.unique(scores.values)
    candidates = (ordered[1:] + ordered[:-1]) / 2 if len(ordered) > 1 else ordered
    candidates = candidates[numpy.linspace(0, len(candidates) - 1, min(len(candidates), 512)).astype(int)]
    positives = len(inserted) - numpy.searchsorted(inserted, candidates, side="left")
    negatives = len(left_out) - numpy.searchsorted(left_out, candidates, side="left")
    low = betaincinv(numpy.maximum(positives, 1), len(inserted) - positives + 1, alpha / 2)
    low = numpy.where(positives > 0, low, 0.0)
    high = betaincinv(negatives + 1, numpy.maximum(len(left_out) - negatives, 1), 1 - alpha / 2)
    high = numpy.where(negatives < len(left_out), high, 1.0)
    quality = [assumption_free(a, b, delta) for a, b in zip(low, high, strict=True)]
    return float(candidates[int(numpy.argmax(quality))])
