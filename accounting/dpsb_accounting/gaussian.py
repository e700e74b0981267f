"""The Gaussian mechanism exactly, from its closed form; composed Gaussians are one Gaussian."""

from __future__ import annotations

import math
from collections.abc import Iterable

from dpsb_accounting import _checks

_SMALLEST = 5e-324  # the smallest float: the delta of a Gaussian is never 0
_ROUNDING = 1e-9  # far above the 1e-12 to which the roots are found


def composed(noise_multipliers: Iterable[tuple[float, int]]) -> float:
    r"""Returns the one noise multiplier to which several Gaussians compose.

    :math:`\sigma = (\sum_k n_k \sigma_k^{-2})^{-1/2}`; infinite for none at all.

    Args:
        noise_multipliers: Pairs of a noise multiplier and how often it is used.

    References:
        Dong, Roth and Su (2022), arXiv:1905.02383, Corollary 3.3.

    Example:
        >>> composed([(2.0, 4)])
        1.0
    """
    precision = math.fsum(count / noise**2 for noise, count in noise_multipliers)
    return 1 / math.sqrt(precision) if precision else math.inf


def epsilon(noise_multiplier: float, delta: float) -> tuple[float, float]:
    r"""Returns (lower, upper) around the exact epsilon of one Gaussian of sensitivity 1.

    The root of :math:`\delta = \Phi(\frac{1}{2\sigma} - \epsilon\sigma) - e^\epsilon \Phi(-\frac{1}{2\sigma}
    - \epsilon\sigma)`.

    Args:
        noise_multiplier: :math:`\sigma`, noise standard deviation divided by the sensitivity.
        delta: In (0, 1).

    References:
        Balle and Wang (2018), arXiv:1805.06530, Theorem 8.
    """
    import numpy
    from dp_accounting import get_epsilon_gaussian

    _checks.positive(infinite=True, noise_multiplier=noise_multiplier)
    _checks.probability(open_interval=True, delta=delta)
    with numpy.errstate(all="ignore"):
        exact = float(get_epsilon_gaussian(noise_multiplier, delta))
    slack = _ROUNDING * (1 + exact) if exact else 0.0
    return max(0.0, exact - slack), exact + slack


def delta(noise_multiplier: float, epsilon: float) -> tuple[float, float]:
    """Returns (lower, upper) around the exact delta of one Gaussian of sensitivity 1 at `epsilon`."""
    from scipy.special import log_ndtr

    if math.isinf(noise_multiplier):
        return 0.0, 0.0
    half, shift = 1 / (2 * noise_multiplier), epsilon * noise_multiplier
    first, second = float(log_ndtr(half - shift)), epsilon + float(log_ndtr(-half - shift))
    if second >= first:
        return 0.0, math.exp(first) * _ROUNDING + _SMALLEST
    exact = math.exp(first) * -math.expm1(second - first)
    slack = math.exp(first) * _ROUNDING
    return max(0.0, exact - slack), min(1.0, exact + slack + _SMALLEST)


def noise_multiplier(target_epsilon: float, delta: float) -> float:
    """Returns the smallest noise multiplier of one Gaussian of sensitivity 1 that is (epsilon, delta)-private."""
    import numpy
    from dp_accounting import get_sigma_gaussian

    with numpy.errstate(all="ignore"):
        return float(get_sigma_gaussian(target_epsilon, delta))
