r"""An upper bound from Rényi divergences by quadrature: loose by some per cent, but at home at any delta.

For orders :math:`\lambda > 0`, :math:`M(\lambda) = E_P[(P/Q)^\lambda]` multiplies over releases, and
:math:`\delta(\epsilon) \le \frac{\lambda^\lambda}{(1+\lambda)^{1+\lambda}} e^{-\lambda\epsilon} \prod_k
M_k(\lambda)`. M is an integral over the real line of a smooth function that falls off like a Gaussian, so the
trapezoid rule converges faster than any power of its step, and what is left is allowed for (`ROUNDING`); where M
is close to 1 the excess M - 1 is integrated, so that nothing cancels.

References:
    Mironov (2017), arXiv:1702.07476; Canonne, Kamath and Steinke (2020), arXiv:2004.00010, Corollary 13.
    Trapezoid rule: Trefethen and Weideman (2014), SIAM Review 56.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt

from dpsb_accounting.composition import Composition

Array = npt.NDArray[np.float64]
_ORDERS = np.geomspace(1e-2, 1e5, 225)  # every 8th first, then the neighbours of the best
ROUNDING = 1e-8  # relative error of each log M, far above what a finer and wider grid was seen to change (1.4e-10)
_MOST_POINTS = 200_000
SMALLEST = 5e-324  # the smallest float: a delta of this kind is never 0


def epsilon(composition: Composition, delta: float, neighboring: str) -> float:
    """Returns an upper bound on epsilon at `delta`; infinite where no order can be computed."""
    found = []
    for direction in ("replace",) if neighboring == "replace_one" else ("remove", "add"):
        coarse = [_epsilon_at(composition, float(order), delta, direction) for order in _ORDERS[::8]]
        best = 8 * coarse.index(min(coarse))
        near = _ORDERS[max(0, best - 7) : best + 8]
        found.append(min(_epsilon_at(composition, float(order), delta, direction) for order in near))
    return max(found)


def delta(composition: Composition, epsilon: float, neighboring: str) -> float:
    """Returns an upper bound on delta at `epsilon`; 1 where no order can be computed."""
    found = []
    for direction in ("replace",) if neighboring == "replace_one" else ("remove", "add"):
        coarse = [_log_delta_at(composition, float(order), epsilon, direction) for order in _ORDERS[::8]]
        best = 8 * coarse.index(min(coarse))
        near = _ORDERS[max(0, best - 7) : best + 8]
        found.append(min(_log_delta_at(composition, float(order), epsilon, direction) for order in near))
    return max(math.exp(min(0.0, max(found))), SMALLEST)


def _epsilon_at(composition: Composition, order: float, delta: float, direction: str) -> float:
    total = _total(composition, order, direction)
    if not math.isfinite(total):
        return math.inf
    return max(0.0, (total - math.log(delta) + _conversion(order)) / order)


def _log_delta_at(composition: Composition, order: float, epsilon: float, direction: str) -> float:
    return _total(composition, order, direction) + _conversion(order) - order * epsilon


def _conversion(order: float) -> float:
    return order * math.log(order) - (order + 1) * math.log1p(order)


def _total(composition: Composition, order: float, direction: str) -> float:
    scale = 2.0 if direction == "replace" else 1.0
    total = order * (order + 1) / 2 * (scale / composition.noise_multiplier) ** 2
    for part in composition.subsampled:
        moment = log_moment(part.noise_multiplier, part.sampling_prob, order, direction)
        total += part.count * moment * (1 + ROUNDING)
    return total


@functools.lru_cache(maxsize=4096)
def log_moment(noise: float, prob: float, order: float, direction: str) -> float:
    """log E_P[e^(order L)] of one subsampled Gaussian; infinite if the grid would be too long."""
    step = min(noise / 12, noise**2 / 3)
    low, high = -2.0 - 14 * noise, 2.0 + 14 * noise
    # The integrand is at most a mixture of Gaussians with means in [-order - 1, order + 1].
    if direction == "add":
        low -= order
    else:
        high += order
    if direction == "replace":
        low, high = low - order, high + order
    if (high - low) / step > _MOST_POINTS:
        return math.inf
    x = np.arange(low, high, step)
    log_rest = -(x**2) / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi))
    up = np.logaddexp(math.log1p(-prob), math.log(prob) + (2 * x - 1) / (2 * noise**2))
    if direction == "remove":
        log_p, losses = log_rest + up, up
    elif direction == "add":
        log_p, losses = log_rest, -up
    else:
        down = np.logaddexp(math.log1p(-prob), math.log(prob) + (-2 * x - 1) / (2 * noise**2))
        log_p, losses = log_rest + up, up - down
    exponents = log_p + order * losses
    peak = float(exponents.max())
    log_direct = peak + math.log(float(np.exp(exponents - peak).sum()) * step)
    if log_direct > 0.1:
        return log_direct
    excess = np.where(
        order * losses < 1,
        np.exp(log_p) * np.expm1(np.minimum(order * losses, 1.0)),
        np.exp(exponents) - np.exp(log_p),
    )
    return math.log1p(max(0.0, float(excess.sum()) * step))


def mixture_log_moment(weights: Array, sizes: Array, order: float, direction: str) -> float:
    """log E_P[e^(order L)] of a mixture of normals of variance 1 at `sizes` against the one at 0; infinite if too long.

    The grid is finer than the 1/12 of a standard deviation at which the trapezoid rule is exact to floats.
    """
    top = float(sizes.max())
    step = min(1 / 12, 1 / (3 * max(top, 1e-3)))
    low, high = -14.0 - (order * top if direction == "add" else 0.0), top + 14 + order * top
    if (high - low) / step * len(sizes) > 4 * _MOST_POINTS:
        return math.inf
    x = np.arange(low, high, step)
    log_rest = -(x**2) / 2 - math.log(math.sqrt(2 * math.pi))
    terms = np.log(weights)[:, None] + sizes[:, None] * (x[None, :] - sizes[:, None] / 2)
    losses = np.logaddexp.reduce(terms, axis=0)
    exponents = log_rest + ((order + 1) * losses if direction == "remove" else -order * losses)
    peak = float(exponents.max())
    log_direct = peak + math.log(float(np.exp(exponents - peak).sum()) * step)
    return max(0.0, log_direct) + 1e-13  # absolute, for the cancellation where the moment is close to 1
