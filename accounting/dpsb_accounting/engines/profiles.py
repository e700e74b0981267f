r"""Privacy profiles of single releases that dp-accounting does not build, or builds too slowly.

The profile of a pair P, Q is :math:`\delta(\epsilon) = \sup_S P(S) - e^\epsilon Q(S)` for every real epsilon. A release
under one relation has one pair if the pair is as bad both ways, else two. From a profile on a grid, "connect the dots"
gives a distribution of losses that is never too small (Doroshenko et al. 2022, arXiv:2207.04380, Algorithm 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from dpsb_accounting.events import ApproximateDP, Event, PureEpsilon, RandomizedResponse, UserMixture

Array = npt.NDArray[np.float64]
_MARGIN = 10.0  # standard deviations beyond which a tail counts as an infinite loss (mass 1e-23)
_FORGOTTEN = 1e-18  # probability of rare sensitivities that counts as an infinite loss
_NEWTON_STEPS = 100


@dataclass(frozen=True, slots=True)
class Profile:
    """delta at each of an array of epsilons, which matter from `low` to `high`."""

    low: float
    high: float
    deltas: Callable[[Array], Array]


def of(event: Event, neighboring: str) -> list[Profile] | None:
    """Returns the profiles of one release, worst pair first; None for an event that is not of this module."""
    steps = 2 if neighboring == "replace_one" else 1
    if isinstance(event, PureEpsilon):
        return [_stated(steps * event.epsilon, 0.0)]
    if isinstance(event, ApproximateDP):
        # Two steps of (e, d) are (2e, d + e^e d): Vadhan (2017), Lemma 2.2, in its sharper form.
        slack = event.delta * (1 + math.exp(min(event.epsilon, 700.0))) if steps == 2 else event.delta
        return [_stated(steps * event.epsilon, min(slack, 1.0))]
    if isinstance(event, RandomizedResponse):
        return _randomized_response(event, neighboring)
    if isinstance(event, UserMixture) and neighboring != "replace_one":
        return _mixture(event)
    return None


def gaussian_sum(noise: float, prob: float, neighboring: str) -> list[Profile]:
    """Returns the profiles of a Gaussian sum under Poisson sampling, in closed form, worst pair first.

    Written so that nothing of the size of 1 is subtracted: the error is about 1e-16 of the sampling probability.
    """
    if neighboring == "replace_one":
        return [_replaced(noise, prob)]
    ends = _log_ratio(np.array([-_MARGIN * noise, 1 + _MARGIN * noise]), noise, prob)
    low, high = float(ends[0]), float(ends[1])

    def test(at: Array) -> Array:
        """The output x where the loss of the mixture is `at`, in units of the sensitivity; -inf where none is."""
        with np.errstate(all="ignore"):
            if prob == 1:
                found = noise**2 * at + 0.5
            else:
                small = np.log1p(np.expm1(np.minimum(at, 30.0)) / prob)
                large = at - math.log(prob) + np.log1p(-(1 - prob) * np.exp(-np.maximum(at, 1.0)))
                found = noise**2 * np.where(at < 30, small, large) + 0.5
        result: Array = np.where(np.isnan(found), -np.inf, found)
        return result

    def above(at: Array) -> Array:
        """P(X > x) - e^at Q(X > x) for at >= 0."""
        x = test(at)
        with np.errstate(over="ignore", invalid="ignore"):
            found = prob * (ndtr((1 - x) / noise) - (1 + np.expm1(at) / prob) * ndtr(-x / noise))
        result: Array = np.where(np.isnan(found), 0.0, np.maximum(found, 0.0))
        return result

    def below(at: Array) -> Array:
        """e^at Q(X <= x) - P(X <= x) for at <= 0."""
        x = test(at)
        factor = 1 + np.expm1(at) / prob
        found = np.where(np.isneginf(x), 0.0, prob * (factor * ndtr(x / noise) - ndtr((x - 1) / noise)))
        result: Array = np.maximum(found, 0.0)
        return result

    def removed(at: Array) -> Array:
        found = np.where(
            at >= 0, above(np.maximum(at, 0.0)), -np.expm1(np.minimum(at, 0.0)) + below(np.minimum(at, 0.0))
        )
        result: Array = np.minimum(found, 1.0)
        return result

    def added(at: Array) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):
            positive = np.exp(at) * below(-np.maximum(at, 0.0))
        negative = -np.expm1(np.minimum(at, 0.0)) + np.exp(np.minimum(at, 0.0)) * above(-np.minimum(at, 0.0))
        found = np.where(at >= 0, np.where(np.isnan(positive), 0.0, positive), negative)
        result: Array = np.minimum(found, 1.0)
        return result

    if prob == 1:
        return [Profile(low, high, removed)]
    return [Profile(low, high, removed), Profile(-high, -low, added)]


def _replaced(noise: float, prob: float) -> Profile:
    """The pair of +C and -C, each drawn with probability q; its loss is odd in the output."""
    log_shrink = -1 / (2 * noise**2)

    def positive(at: Array) -> Array:
        x = noise**2 * at / 2
        if prob < 1:
            with np.errstate(over="ignore", divide="ignore"):
                log_ratio = np.log(np.sinh(np.minimum(at, 60.0) / 2)) + math.log1p(-prob) - math.log(prob) - log_shrink
                log_ratio = log_ratio + np.maximum(at - 60.0, 0.0) / 2
                rise = np.where(
                    log_ratio < 300, np.arcsinh(np.exp(np.minimum(log_ratio, 300.0))), log_ratio + math.log(2)
                )
            x = x + noise**2 * rise
        with np.errstate(over="ignore", invalid="ignore"):
            found = prob * (ndtr((1 - x) / noise) - np.exp(at) * ndtr((-1 - x) / noise)) - (1 - prob) * np.expm1(
                at
            ) * ndtr(-x / noise)
        result: Array = np.where(np.isnan(found), 0.0, np.maximum(found, 0.0))
        return result

    def deltas(at: Array) -> Array:
        found = positive(np.abs(at))
        with np.errstate(under="ignore"):
            swapped = -np.expm1(np.minimum(at, 0.0)) + np.exp(np.minimum(at, 0.0)) * found
        result: Array = np.minimum(np.where(at >= 0, found, swapped), 1.0)
        return result

    far = np.array([1 + _MARGIN * noise])
    high = float((_log_ratio(far, noise, prob) - _log_ratio(-far, noise, prob))[0])
    return Profile(-high, high, deltas)


def _log_ratio(x: Array, noise: float, prob: float) -> Array:
    """log(1 - q + q e^((2x - 1) / (2 sigma^2))), the log ratio of the mixture to N(0, sigma^2)."""
    exponent = (2 * x - 1) / (2 * noise**2)
    if prob == 1:
        return exponent
    found: Array = np.logaddexp(math.log1p(-prob), math.log(prob) + exponent)
    return found


def _stated(epsilon: float, delta: float) -> Profile:
    """The worst (epsilon, delta)-DP mechanism: Kairouz, Oh and Viswanath (2015), arXiv:1311.0776."""

    def deltas(at: Array) -> Array:
        with np.errstate(over="ignore"):
            inside = -np.expm1(at - epsilon) / (1 + math.exp(-epsilon))
        pure = np.where(at >= epsilon, 0.0, np.where(at <= -epsilon, -np.expm1(np.minimum(at, 0.0)), inside))
        found: Array = delta + (1 - delta) * pure
        return found

    return Profile(-epsilon, epsilon, deltas)


def _randomized_response(event: RandomizedResponse, neighboring: str) -> list[Profile]:
    buckets, rate = event.num_buckets, event.noise_parameter
    kept, other = 1 - rate * (buckets - 1) / buckets, rate / buckets
    if neighboring == "replace_one":
        return [_atoms([kept, other, (buckets - 2) * other], [other, kept, (buckets - 2) * other])]
    answer, uniform = [kept, (buckets - 1) * other], [1 / buckets, 1 - 1 / buckets]
    return [_atoms(answer, uniform), _atoms(uniform, answer)]


def _atoms(p: list[float], q: list[float]) -> Profile:
    losses = [math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0]

    def deltas(at: Array) -> Array:
        with np.errstate(over="ignore"):
            scale = np.exp(at)
        total = np.zeros_like(at)
        for a, b in zip(p, q, strict=True):
            total += np.maximum(0.0, a - scale * b)
        found: Array = np.minimum(total, 1.0)
        return found

    return Profile(min(losses), max(losses), deltas)


def _mixture(event: UserMixture) -> list[Profile]:
    pairs = sorted(zip(event.probabilities, event.sensitivities, strict=True), reverse=True)
    kept, forgotten = list(pairs), 0.0
    while kept and forgotten + kept[-1][0] <= _FORGOTTEN:
        forgotten += kept.pop()[0]
    noise = event.noise_multiplier
    weights = np.array([prob for prob, _ in kept])
    sizes = np.array([size for _, size in kept]) / noise  # in standard deviations
    still = float(weights[sizes == 0].sum())
    top = float(sizes.max())

    def loss(x: Array) -> Array:
        """log of the mixture over N(0, 1), at x in standard deviations."""
        exponents = np.log(weights)[:, None] + sizes[:, None] * (x[None, :] - sizes[:, None] / 2)
        peak = exponents.max(axis=0)
        found: Array = peak + np.log(np.exp(exponents - peak).sum(axis=0))
        return found

    def removed(at: Array) -> Array:
        found = np.empty_like(at)
        for part in np.array_split(np.arange(len(at)), max(1, len(at) * len(sizes) // 2_000_000)):
            x = _threshold(at[part], weights, sizes, still)
            with np.errstate(over="ignore", invalid="ignore"):
                moved = sum(w * ndtr(s - x) for w, s in zip(weights, sizes, strict=True))
                found[part] = np.where(np.isneginf(x), -np.expm1(at[part]), moved - np.exp(at[part]) * ndtr(-x))
        return np.clip(found + forgotten, 0.0, 1.0)

    def added(at: Array) -> Array:
        found = np.empty_like(at)
        for part in np.array_split(np.arange(len(at)), max(1, len(at) * len(sizes) // 2_000_000)):
            x = _threshold(-at[part], weights, sizes, still)
            moved = sum(w * ndtr(x - s) for w, s in zip(weights, sizes, strict=True))
            found[part] = np.where(np.isneginf(x), 0.0, ndtr(x) - np.exp(at[part]) * moved)
        return np.clip(found + forgotten, 0.0, 1.0)

    ends = loss(np.array([-_MARGIN, top + _MARGIN]))
    low, high = float(ends[0]), float(ends[1])
    return [Profile(low, high, removed), Profile(-high, -low, added)]


def _threshold(at: Array, weights: Array, sizes: Array, still: float) -> Array:
    """The x where the loss of the mixture is `at`; -inf where it is larger everywhere.

    Newton's method from the right, where it falls steadily, the loss being convex in x. An x that is slightly off
    gives the delta of a slightly different test, short of the true one by the square of the error only.
    """
    log_weights = np.log(weights)
    moving = sizes > 0
    with np.errstate(divide="ignore"):
        floor = math.log(still) if still > 0 else -math.inf
    reachable = at > floor
    x = np.full(at.shape, np.inf)
    for log_weight, size in zip(log_weights[moving], sizes[moving], strict=True):
        x = np.minimum(x, (at - log_weight) / size + size / 2)
    x = np.where(reachable, x, 0.0)
    for _ in range(_NEWTON_STEPS):
        exponents = log_weights[:, None] + sizes[:, None] * (x[None, :] - sizes[:, None] / 2)
        peak = exponents.max(axis=0)
        shares = np.exp(exponents - peak)
        total = shares.sum(axis=0)
        slope = (sizes[:, None] * shares).sum(axis=0) / total
        with np.errstate(divide="ignore", invalid="ignore"):
            step = np.where(reachable & (slope > 1e-300), (peak + np.log(total) - at) / slope, 0.0)
        x = x - np.maximum(step, 0.0)
        if not np.any(step > 1e-9 * (1 + np.abs(x))):
            break
    x = np.maximum(x, -40.0)  # far enough left that every probability is 0 or 1
    return np.where(reachable, x, -np.inf)
