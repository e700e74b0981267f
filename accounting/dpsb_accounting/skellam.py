r"""Skellam noise: the integer noise that goes through a secure sum, with its own Rényi bound.

A secure sum adds integers modulo a number, so vectors are scaled, rounded and given integer noise. A Skellam variable
of variance :math:`\mu` is the difference of two Poisson variables of mean :math:`\mu/2`; sums of independent ones are
Skellam again, so the shares of those who stayed add up to known noise. It is *not* Gaussian, and is accounted for as
what it is. The modulus is post-processing.

Sampling amplifies it by a bound of its own (`sampled_renyi`), which is proved for any noise that is symmetric; the one
for Gaussian noise does not carry over.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln

from dpsb_accounting import _checks

# The bound is proved for whole orders; beyond 64 a few per factor of two are enough.
_ORDERS = (*range(2, 65), *(math.ceil(64 * 2 ** (k / 8)) for k in range(1, 129)))
_ROUNDING = 1e-12  # far above what a few float operations lose
_LOG_GAMMA = 1e-9  # relative error of a binomial weight at the largest order, whose logarithm is a million


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """How far one unit can move an integer vector.

    Args:
        l1: L1 norm of the largest difference. Public.
        l2_squared: Squared L2 norm of it. Public.
    """

    l1: float
    l2_squared: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "l1", _checks.positive(l1=self.l1))
        object.__setattr__(self, "l2_squared", _checks.positive(l2_squared=self.l2_squared))


def sensitivity_after_rounding(
    *, l2_clip_norm: float, scale: float, dimension: int, neighboring: str = "add_or_remove_one"
) -> Sensitivity:
    r"""Returns how far one unit can move the rounded vector, which is further than before rounding.

    A coordinate of the scaled vector that moves by x moves by less than |x| + 1 when both ends are rounded by the same
    monotone rule (at random too, with the same random threshold on both sides), so
    :math:`\Delta_2 \le s C + \sqrt d`. Whole numbers have :math:`|z| \le z^2`, so
    :math:`\Delta_1 \le \min(\sqrt d\,\Delta_2, \Delta_2^2)`. This holds whether each unit's vector is rounded or a
    whole silo's sum, as long as each coordinate is rounded for itself (drawing again until the norm is small is
    another mechanism).

    Args:
        l2_clip_norm: C, before scaling. Public.
        scale: s, how many integer steps one unit of the vector is. Public.
        dimension: d, number of coordinates. Public.
        neighboring: Under "replace_one" both ends of the difference are doubled.

    Example:
        >>> sensitivity_after_rounding(l2_clip_norm=1, scale=100, dimension=16)
        Sensitivity(l1=416.0, l2_squared=10816.0)

    References:
        Kairouz, Liu and Steinke (2021), arXiv:2102.06387, Section 4 (the worst case of their bound).
    """
    scaled = _checks.positive(l2_clip_norm=l2_clip_norm) * _checks.positive(scale=scale)
    dimension = _checks.whole(at_least=1, dimension=dimension)
    _checks.one_of(choices=_checks.RELATIONS, neighboring=neighboring)
    l2 = (scaled + math.sqrt(dimension)) * (2.0 if neighboring == "replace_one" else 1.0)
    return Sensitivity(l1=min(math.sqrt(dimension) * l2, l2**2), l2_squared=l2**2)


def renyi(order: int, variance: float, sensitivity: Sensitivity) -> float:
    r"""Returns an upper bound on the Rényi divergence of one release at a whole order of at least 2.

    :math:`\frac{\alpha\Delta_2^2}{2\mu} + \min\left(\frac{(2\alpha-1)\Delta_2^2 + 6\Delta_1}{4\mu^2},
    \frac{3\Delta_1}{2\mu}\right)`.

    Args:
        order: :math:`\alpha`. The theorem is for whole ones only.
        variance: :math:`\mu`, of the total noise on each coordinate, in squared integer steps. Public.
        sensitivity: After rounding. Public.

    References:
        Agarwal, Kairouz and Liu (2021), arXiv:2110.04995, Corollary 3.6.

    Example:
        >>> renyi(8, 100, Sensitivity(l1=1, l2_squared=1))
        0.040525
    """
    order = _checks.whole(at_least=2, order=order)
    variance = _checks.positive(variance=variance)
    l1, l2_squared = sensitivity.l1, sensitivity.l2_squared
    extra = min(((2 * order - 1) * l2_squared + 6 * l1) / (4 * variance**2), 3 * l1 / (2 * variance))
    return order * l2_squared / (2 * variance) + extra


def sampled_renyi(order: int, variance: float, sensitivity: Sensitivity, sampling_prob: float) -> float:
    r"""Returns an upper bound on the Rényi divergence, both ways, where each unit is included with probability q.

    :math:`\frac{1}{\alpha-1}\log\sum_{l=0}^{\alpha} \binom{\alpha}{l}(1-q)^{\alpha-l}q^l e^{(l-1)\epsilon(l)}`, where
    :math:`\epsilon(l)` is :func:`renyi` at order l, and 0 at l = 0 and 1. With Q the noise around what the other units
    add up to and P the same moved by the unit, this is the binomial expansion of :math:`E_Q[((1-q) + qP/Q)^\alpha]`,
    each :math:`E_Q[(P/Q)^l]` bounded. That is removal; addition, :math:`D_\alpha(Q \| (1-q)Q + qP)`, is no larger,
    because Skellam noise is symmetric: reflection at the middle of the move swaps P and Q and keeps counting measure.
    Which of the other units are drawn is the same on both sides, and divergences are quasi-convex.

    Args:
        order: :math:`\alpha`, whole.
        variance: As for :func:`renyi`.
        sensitivity: Of adding or removing a unit (or setting it to zero), after rounding; not of replacing one. Public.
        sampling_prob: q. Public.

    References:
        Mironov, Talwar and Zhang (2019), arXiv:1908.10530, Theorem 5 (addition) and Section 3.3 (expansion); Zhu and
        Wang (2019), Poisson Subsampled Rényi Differential Privacy, ICML.

    Example:
        >>> found = sensitivity_after_rounding(l2_clip_norm=1, scale=10_000, dimension=256)
        >>> print(f"{sampled_renyi(8, 1e8, found, 1.0):.3f} {sampled_renyi(8, 1e8, found, 0.01):.6f}")
        4.013 0.000...
    """
    whole = renyi(order, variance, sensitivity)
    prob = _checks.probability(sampling_prob=sampling_prob)
    if prob == 1:
        return whole
    drawn = np.arange(2, order + 1, dtype=np.float64)
    l1, l2_squared = sensitivity.l1, sensitivity.l2_squared
    extra = np.minimum(((2 * drawn - 1) * l2_squared + 6 * l1) / (4 * variance**2), 3 * l1 / (2 * variance))
    grown = (drawn - 1) * (drawn * l2_squared / (2 * variance) + extra)
    chosen = gammaln(order + 1) - gammaln(drawn + 1) - gammaln(order - drawn + 1)
    weights = chosen + (order - drawn) * math.log1p(-prob) + drawn * math.log(prob)
    # The weights of l = 0 and 1 are those of a sum that is 1 without the noise, so only what is above 1 is added up.
    excess = float(np.logaddexp.reduce(weights + grown + np.log(-np.expm1(-grown))))
    found = float(np.logaddexp(0.0, excess + _LOG_GAMMA)) / (order - 1) * (1 + _ROUNDING) + _ROUNDING
    return min(whole, found)


def epsilon(
    *,
    variance: float,
    sensitivity: Sensitivity,
    count: int,
    delta: float,
    gaussians: Iterable[tuple[float, int]] = (),
) -> float:
    r"""Returns an upper bound on epsilon of `count` releases with Skellam noise, and of Gaussian ones beside them.

    Rényi divergences add up over releases; they are converted at the best whole order.

    Args:
        variance: :math:`\mu` of each release, counting only the noise that certainly is in the sum. Public.
        sensitivity: After rounding. Public.
        count: Number of releases, at least 1. Public.
        delta: In (0, 1). Public.
        gaussians: Pairs of noise standard deviation divided by sensitivity, and count. Public.

    References:
        Conversion: Canonne, Kamath and Steinke (2020), arXiv:2004.00010, Proposition 12.

    Example:
        >>> found = sensitivity_after_rounding(l2_clip_norm=1, scale=10_000, dimension=256)
        >>> print(f"{epsilon(variance=1e8, sensitivity=found, count=1, delta=1e-5):.3f}")
        4.761
    """
    count = _checks.whole(at_least=1, count=count)
    delta = _checks.probability(open_interval=True, delta=delta)
    precision = math.fsum(times / _checks.positive(noise=noise) ** 2 for noise, times in gaussians)
    found: list[float] = []
    for order in _ORDERS:
        divergence = count * renyi(order, variance, sensitivity) + order * precision / 2
        conversion = math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
        found.append(divergence * (1 + _ROUNDING) + conversion + _ROUNDING)
    return max(0.0, min(found))
