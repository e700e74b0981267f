"""Lower bounds from one training run with many canaries, each inserted by a fair coin of its own."""

from __future__ import annotations

import math
from collections.abc import Callable

from dpsb_accounting import _checks
from dpsb_accounting.auditing.bounds import GAUSSIAN, UNSTATED, LowerBound, _alpha, _delta, epsilon_of_mu

COINS = "each of the {num_canaries} canaries was inserted by an independent fair coin that the guesser did not see"
_LARGEST = 1e4
_TOLERANCE = 1e-9


def one_run_p_value(num_canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    r"""Returns the largest probability of so many correct guesses under (epsilon, delta)-DP.

    :math:`p = \beta + 2 m \delta \max_{1 \le i \le v} \frac1i P[v > \check W \ge v - i]` with :math:`\check W \sim
    Bin(r, \frac{e^\epsilon}{1+e^\epsilon})`, :math:`\beta = P[\check W \ge v]`, m canaries, r guesses, v of them
    correct.

    References:
        Steinke, Nasr and Jagielski (2023), arXiv:2305.08846, Theorem 5.2 and Appendix D.
    """
    import numpy
    from scipy.stats import binom

    success = 1 / (1 + math.exp(-epsilon))
    beta = float(binom.sf(correct - 1, guesses, success))
    if delta == 0 or correct == 0:
        return min(1.0, beta)
    i = numpy.arange(1, correct + 1)
    between = binom.sf(correct - i - 1, guesses, success) - beta
    return min(1.0, beta + 2 * num_canaries * delta * float(numpy.max(between / i)))


def one_run(
    *,
    num_canaries: int,
    guesses: int,
    correct: int,
    delta: float,
    confidence: float = 0.95,
    comparisons: int = 1,
    threat_model: str = UNSTATED,
) -> LowerBound:
    """Bounds epsilon from the guesses about one run, with no assumption about the mechanism.

    Guarantees: the statement fails with probability at most 1 - `confidence`, whatever the mechanism and however
        dependent the scores, if the coins were fair and independent, and the *number* of guesses was fixed before the
        coins were looked at (or is one of `comparisons` that were).

    Args:
        num_canaries: m, all canaries, those without a guess included.
        guesses: r, fixed beforehand.
        correct: v, how many of the guesses were right.
        delta: In [0, 1).
        confidence: In (0, 1).
        comparisons: How many numbers of guesses, fixed beforehand, this one was chosen from (Bonferroni).
        threat_model: What the attacker saw and chose.

    References:
        Steinke, Nasr and Jagielski (2023), arXiv:2305.08846.

    Example:
        >>> print(one_run(num_canaries=1000, guesses=200, correct=150, delta=1e-5))
        epsilon >= 0.81997 at delta 1e-05 (one-run, confidence 0.95)
    """
    m, r, v = _guesses(num_canaries, guesses, correct)
    delta, alpha = _delta(delta), _alpha(confidence, comparisons)

    def rejected(epsilon: float) -> bool:
        return one_run_p_value(m, r, v, epsilon, delta) <= alpha

    return LowerBound(
        epsilon=_largest_rejected(rejected),
        delta=delta,
        confidence=confidence,
        method="one-run",
        assumptions=(COINS.format(num_canaries=m),),
        threat_model=threat_model,
        inputs={"num_canaries": m, "guesses": r, "correct": v, "comparisons": comparisons},
    )


def one_run_fdp(
    *,
    num_canaries: int,
    guesses: int,
    correct: int,
    delta: float,
    confidence: float = 0.95,
    comparisons: int = 1,
    threat_model: str = UNSTATED,
) -> LowerBound:
    r"""Bounds epsilon from the guesses about one run, for a mechanism whose trade-off curve is Gaussian.

    The mu for which the recursion of the reference, with the Gaussian's inverse blow-up :math:`p \mapsto
    \Phi(\Phi^{-1}(p) - \mu)`, says that so many correct guesses have probability at most 1 - `confidence`.

    Guarantees: as `one_run`, for mechanisms that are mu-GDP; only the step from mu to epsilon needs the curve to *be*
        Gaussian.

    Args:
        num_canaries: m, all canaries.
        guesses: r, fixed beforehand.
        correct: v.
        delta: In (0, 1).
        confidence: In (0, 1).
        comparisons: How many numbers of guesses, fixed beforehand, this one was chosen from (Bonferroni).
        threat_model: What the attacker saw and chose.

    References:
        Mahloujifar, Melis and Chaudhuri (2024), arXiv:2410.22235, Algorithm 3.

    Example:
        >>> print(one_run_fdp(num_canaries=1000, guesses=200, correct=150, delta=1e-5))
        epsilon >= 1.2969 at delta 1e-05 (one-run-fdp, confidence 0.95)
    """
    m, r, v = _guesses(num_canaries, guesses, correct)
    delta, alpha = _checks.probability(open_interval=True, delta=delta), _alpha(confidence, comparisons)

    def rejected(mu: float) -> bool:
        return _fdp_rejects(m, r, v, mu, alpha)

    mu = _largest_rejected(rejected)
    without = one_run(
        num_canaries=m, guesses=r, correct=v, delta=delta, confidence=confidence, comparisons=comparisons
    ).epsilon
    return LowerBound(
        epsilon=epsilon_of_mu(mu, delta),
        delta=delta,
        confidence=confidence,
        method="one-run-fdp",
        assumptions=(COINS.format(num_canaries=m), GAUSSIAN.format(epsilon=without)),
        threat_model=threat_model,
        inputs={
            "num_canaries": m,
            "guesses": r,
            "correct": v,
            "comparisons": comparisons,
            "epsilon_without_gaussian_assumption": without,
        },
        mu=mu,
    )


def _fdp_rejects(num_canaries: int, guesses: int, correct: int, mu: float, alpha: float) -> bool:
    """Whether `correct` of `guesses` right guesses have probability at most `alpha` under mu-GDP."""
    from scipy.special import ndtr, ndtri

    right = alpha * correct / num_canaries
    wrong = alpha * (guesses - correct) / num_canaries
    for i in range(correct - 1, -1, -1):
        larger = max(wrong, float(ndtr(ndtri(right) - mu)))
        if larger == wrong:  # nothing changes from here on
            break
        right = min(1.0, right + i / (guesses - i) * (larger - wrong))
        wrong = larger
    return right + wrong > guesses / num_canaries


def _largest_rejected(rejected: Callable[[float], bool]) -> float:
    """Returns a parameter just below where a monotone test stops rejecting; 0 if it rejects nothing."""
    if not rejected(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while rejected(high):
        low, high = high, 2 * high
        if high > _LARGEST:
            return low
    while high - low > _TOLERANCE * max(1.0, low):
        middle = (low + high) / 2
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return low


def _guesses(num_canaries: int, guesses: int, correct: int) -> tuple[int, int, int]:
    m = _checks.whole(at_least=1, num_canaries=num_canaries)
    r = _checks.whole(at_least=1, guesses=guesses)
    v = _checks.whole(at_least=0, correct=correct)
    if not v <= r <= m:
        raise ValueError(f"correct={v!r} must not exceed guesses={r!r}, nor they num_canaries={m!r}")
    return m, r, v
