r"""An upper bound from Rényi divergences for every event: looser than losses, but the only one for some theorems.

Of a release, :math:`R(\alpha)` bounds the Rényi divergence of order alpha both ways, but for an event of probability d;
the R add up, the d add up and are taken from delta, and

.. math:: \epsilon = R(\alpha) + \log(1 - 1/\alpha) - \log(\alpha\delta) / (\alpha - 1)

at the best order. Gaussian sums are integrated here (`renyi`); dp-accounting gives sampling without replacement, with
the noise multiplier halved since it takes the sensitivity to be C where it is 2C, and Laplace noise; other events
are integrated over their pessimistic distribution of losses.

References:
    Mironov (2017), arXiv:1702.07476; Canonne, Kamath and Steinke (2020), arXiv:2004.00010, Proposition 12. Random
    selection: Papernot and Steinke (2021), arXiv:2110.03620, Theorems 2 and 6.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt

from dpsb_accounting import skellam
from dpsb_accounting.composition import Composition, alternatives
from dpsb_accounting.engines import plain, pld, renyi
from dpsb_accounting.engines.answer import Unavailable
from dpsb_accounting.events import (
    ApproximateDP,
    Event,
    Laplace,
    PoissonSkellam,
    PureEpsilon,
    RandomSelection,
    SampledWithoutReplacementGaussian,
    UserMixture,
    Zcdp,
)
from dpsb_accounting.relations import resolved

Array = npt.NDArray[np.float64]
ORDERS: Array = np.array(
    [1 + x / 10 for x in range(1, 100)]
    + [float(x) for x in range(11, 64)]
    + [float(2**x) for x in range(7, 18)]  # dp-accounting stops at 1024, which keeps epsilon above 0.0035
)
_ROUNDING = 1e-13  # absolute error of a log moment in floats, allowed for in each release
_MOST_WITHOUT_REPLACEMENT = 1024.0  # the largest order that is worth its cost
_CELLS = 20_000
_LOST = 1e-15  # mass that float errors may take from the far tails of a distribution of losses


def epsilon(composition: Composition, delta: float, neighboring: str) -> float:
    """Returns an upper bound on epsilon of a resolved composition; infinite where no order gives one."""
    if not composition.others:
        return renyi.epsilon(composition, delta, neighboring)
    divergences, lost = curve(composition, neighboring)
    rest = delta - lost * (1 + 1e-9)
    if rest <= 0:
        return math.inf
    found = divergences + np.log1p(-1 / ORDERS) - np.log(ORDERS * rest) / (ORDERS - 1)
    return max(0.0, float(np.min(found[np.isfinite(found)], initial=math.inf)))


def delta(composition: Composition, epsilon: float, neighboring: str) -> float:
    """Returns an upper bound on delta of a resolved composition at `epsilon`."""
    if not composition.others:
        return renyi.delta(composition, epsilon, neighboring)
    divergences, lost = curve(composition, neighboring)
    with np.errstate(over="ignore"):
        found = np.exp((ORDERS - 1) * (divergences - epsilon + np.log1p(-1 / ORDERS)) - np.log(ORDERS))
    least = max(float(np.min(found[np.isfinite(found)], initial=1.0)), renyi.SMALLEST)
    return min(1.0, least + lost * (1 + 1e-9))


def curve(composition: Composition, neighboring: str) -> tuple[Array, float]:
    """Returns (divergence at each of ORDERS, probability that is lost beside them) of a resolved composition."""
    scale = 2.0 if neighboring == "replace_one" else 1.0
    total = ORDERS / 2 * (scale / composition.noise_multiplier) ** 2
    lost = 0.0
    for part in composition.subsampled:
        total = total + part.count * _subsampled(part.noise_multiplier, part.sampling_prob, neighboring)
    for event, count in composition.others:
        divergence, share = _release(event, neighboring)
        with np.errstate(over="ignore"):
            total = total + count * divergence
        lost += count * share
    return np.where(np.isnan(total), math.inf, total), min(lost, 1.0)


@functools.lru_cache(maxsize=256)
def _subsampled(noise: float, prob: float, neighboring: str) -> Array:
    directions = ("replace",) if neighboring == "replace_one" else ("remove", "add")
    moments = [
        max(renyi.log_moment(noise, prob, float(order) - 1, direction) for direction in directions) for order in ORDERS
    ]
    found: Array = np.array(moments) * (1 + renyi.ROUNDING) / (ORDERS - 1)
    return found


@functools.lru_cache(maxsize=256)
def _release(event: Event, neighboring: str) -> tuple[Array, float]:
    steps = 2 if neighboring == "replace_one" else 1
    if isinstance(event, Zcdp):
        # Two steps: Bun and Steinke (2016), Proposition 1.9.
        rho, xi = (4 * event.rho, 3 * event.xi) if steps == 2 else (event.rho, event.xi)
        return xi + rho * ORDERS, 0.0
    if isinstance(event, PureEpsilon):
        return _pure(steps * event.epsilon), 0.0
    if isinstance(event, ApproximateDP):
        slack = event.delta * (1 + math.exp(min(event.epsilon, 700.0))) if steps == 2 else event.delta
        return _pure(steps * event.epsilon), min(slack, 1.0)
    if isinstance(event, Laplace):
        return _laplace(event.noise_multiplier / steps), 0.0
    if isinstance(event, PoissonSkellam):
        return _skellam(event, neighboring), 0.0
    if isinstance(event, SampledWithoutReplacementGaussian):
        return _without_replacement(event), 0.0
    if isinstance(event, UserMixture):
        return _mixture(event), 0.0
    if isinstance(event, RandomSelection):
        return _selection(event, neighboring)
    return _from_losses(event, neighboring)


def _pure(epsilon: float) -> Array:
    """Of randomized response, the worst epsilon-DP mechanism."""
    log_moment = np.logaddexp(ORDERS * epsilon, (1 - ORDERS) * epsilon) - np.logaddexp(0.0, epsilon)
    found: Array = np.minimum((log_moment + _ROUNDING) / (ORDERS - 1), epsilon)
    return found


def _laplace(scale: float) -> Array:
    from dp_accounting import LaplaceDpEvent
    from dp_accounting.rdp import RdpAccountant

    with np.errstate(all="ignore"):
        found = RdpAccountant(list(ORDERS)).compose(LaplaceDpEvent(scale)).rdp + _ROUNDING
    pure: Array = np.fmin(found, 1 / scale)
    return pure


def _skellam(event: PoissonSkellam, neighboring: str) -> Array:
    """At the next whole order, since a divergence is no larger at a smaller one. Replacing takes no amplification."""
    moved = skellam.sensitivity_after_rounding(
        l2_clip_norm=1, scale=event.clip_steps, dimension=event.dimension, neighboring=neighboring
    )
    prob = 1.0 if neighboring == "replace_one" else event.sampling_prob
    found = [skellam.sampled_renyi(max(2, math.ceil(order)), event.variance, moved, prob) for order in ORDERS]
    return np.array(found)


def _without_replacement(event: SampledWithoutReplacementGaussian) -> Array:
    from dp_accounting import GaussianDpEvent, NeighboringRelation, SampledWithoutReplacementDpEvent
    from dp_accounting.rdp import RdpAccountant

    sampled = SampledWithoutReplacementDpEvent(
        event.num_examples, event.batch_size, GaussianDpEvent(event.noise_multiplier / 2)
    )
    possible = ORDERS <= _MOST_WITHOUT_REPLACEMENT
    orders = ORDERS[possible]
    try:
        with np.errstate(all="ignore"):
            accountant = RdpAccountant(list(orders), NeighboringRelation.REPLACE_ONE).compose(sampled)
            divergences = np.maximum(accountant.rdp, 0.0) + _ROUNDING / (orders - 1)
    except (ArithmeticError, ValueError):  # extreme noise
        divergences = np.full(len(orders), math.inf)
    # Without amplification it is one Gaussian of sensitivity 2C, which bounds it at any order.
    found: Array = ORDERS / 2 * (2 / event.noise_multiplier) ** 2
    found[possible] = np.fmin(found[possible], divergences)
    return found


def _mixture(event: UserMixture) -> Array:
    pairs = [(w, s) for w, s in zip(event.probabilities, event.sensitivities, strict=True) if w > 0]
    weights, sizes = np.array([w for w, _ in pairs]), np.array([s for _, s in pairs]) / event.noise_multiplier
    moments = [
        max(renyi.mixture_log_moment(weights, sizes, float(order) - 1, direction) for direction in ("remove", "add"))
        for order in ORDERS
    ]
    found: Array = np.array(moments) * (1 + renyi.ROUNDING) / (ORDERS - 1)
    return found


def _selection(event: RandomSelection, neighboring: str) -> tuple[Array, float]:
    """Of the best of a random number of runs; what one run loses beside its divergence may be lost in any run."""
    base = np.zeros_like(ORDERS)
    lost = 0.0
    for choice in alternatives([(event.event, 1)]):
        divergences, share = curve(resolved(choice, neighboring), neighboring)
        base, lost = np.maximum(base, divergences), max(lost, share)
    mean, shape = event.mean_runs, event.shape
    if math.isinf(shape):
        found = np.array([_poisson_runs(base, float(order), r, mean) for order, r in zip(ORDERS, base, strict=True)])
    else:
        gamma = _stopping(mean, shape)
        with np.errstate(invalid="ignore"):
            constant = (1 + shape) * float(np.min((1 - 1 / ORDERS) * base - math.log(gamma) / ORDERS))
        found = base + math.log(mean) / (ORDERS - 1) + constant
        found = np.minimum.accumulate(found[::-1])[::-1]  # a divergence is no larger at a smaller order
    return found, min(1.0, lost * mean)


def _poisson_runs(base: Array, order: float, divergence: float, mean: float) -> float:
    """Theorem 6: one run is (epsilon', delta')-DP at epsilon' = log(1 + 1 / (order - 1))."""
    at = math.log1p(1 / (order - 1))
    with np.errstate(over="ignore"):
        deltas = np.exp((ORDERS - 1) * (base - at + np.log1p(-1 / ORDERS)) - np.log(ORDERS))
        # Small divergences: delta' is at most the total variation, bounded by Bretagnolle and Huber.
        deltas = np.minimum(deltas, np.sqrt(-np.expm1(-base)))
    return divergence + mean * min(1.0, float(np.min(deltas))) + math.log(mean) / (order - 1)


def _stopping(mean: float, shape: float) -> float:
    """The parameter gamma of the truncated negative binomial law with this mean, on the safe (small) side."""
    if shape == 1:
        return 1 / mean
    low, high = 1e-18, 1.0  # on a logarithmic scale: the mean falls in gamma
    while high > low * (1 + 1e-12):
        middle = math.sqrt(low * high)
        if _mean_runs(middle, shape) < mean:
            high = middle
        else:
            low = middle
    return low


def _mean_runs(gamma: float, shape: float) -> float:
    log_gamma = math.log(gamma)
    spread = log_gamma / (gamma - 1) if abs(gamma - 1) > 1e-6 else 1 - (gamma - 1) / 2
    growth = math.expm1(shape * log_gamma) / (shape * log_gamma) if shape * log_gamma < -1e-12 else 1.0
    return 1 / (gamma * growth * spread)


def _from_losses(event: Event, neighboring: str) -> tuple[Array, float]:
    """From the pessimistic distribution of losses; an infinite loss is lost beside the divergence."""
    try:
        mesh, masses = pld.trial(event, neighboring)
        distribution = pld.single(event, neighboring, max(mesh * len(masses) / _CELLS, 1e-12))
    except Unavailable:
        pure, rest = plain.stated(event, 2 if neighboring == "replace_one" else 1)
        return (_pure(pure) if math.isfinite(pure) else np.full(len(ORDERS), math.inf)), rest
    found, lost = np.zeros_like(ORDERS), 0.0
    sides = (
        [distribution._pmf_remove]
        if distribution._symmetric
        else [
            distribution._pmf_remove,
            distribution._pmf_add,
        ]
    )
    for side in sides:
        cells = side.to_dense_pmf()
        probs = np.maximum(np.asarray(cells._probs), 0.0)
        losses = (cells._lower_loss + np.arange(len(probs))) * cells._discretization
        kept = probs > 0
        terms = np.log(probs[kept])[None, :] + (ORDERS[:, None] - 1) * losses[kept][None, :]
        peak = terms.max(axis=1)
        log_moments = peak + np.log(np.exp(terms - peak[:, None]).sum(axis=1))
        divergences = (np.maximum(log_moments, 0.0) + _ROUNDING) / (ORDERS - 1)
        found, lost = np.maximum(found, divergences), max(lost, float(cells._infinity_mass) + _LOST)
    return found, lost
