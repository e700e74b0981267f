r"""Lower bounds on epsilon that an attack certainly reaches, for observations that are mixtures of Gaussians.

An attacker reduces each observation to one number x, whose distributions under the two neighbouring data sets
have the cumulative distribution functions

.. math:: F(x) = \Phi(x / \sigma)^{k} \sum_i w_i \Phi((x - \mu_i) / \sigma),

the largest of k + 1 independent Gaussians of which one has a random mean. x is rounded to cells of its privacy
loss, the cells of several observations are added up, and the sum is compared with a threshold. All of that is
post-processing, so any choice of grid gives a valid bound: :math:`\delta(\epsilon) \ge P(S \ge t) - e^\epsilon
Q(S \ge t)` for every t.

References:
    Data processing and composition of dominating pairs: Zhu, Dong and Wang (2022), arXiv:2106.08567. The largest
    coordinate as a statistic against shuffled batches: Chua et al. (2024), arXiv:2403.17673.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

Mixture: TypeAlias = tuple[tuple[float, float], ...]  # pairs of a weight and a mean

_POINTS = 40_001
_REACH = 10.0  # standard deviations that the grid reaches beyond the outermost means
_TAIL = 1e-17
_LEAST_MASS = 1e-300
_ROUNDING = 1e-9  # relative error of each mass is below 1e-10
_MOST_CELLS = 1 << 21
_MOST_SINGLE = 40_000
_MESH = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """One number seen `count` times, each time afresh.

    Args:
        p: The mixture under the data set with the record: (weight, mean) pairs; weights sum to 1.
        q: The same under the neighbouring data set.
        others: k, how many further Gaussians of mean 0 the largest is taken over.
        noise: Standard deviation of every Gaussian.
        count: How often it is seen, at least 1.
    """

    p: Mixture
    q: Mixture
    others: int
    noise: float
    count: int

    def reversed(self) -> Observation:
        """Returns the observation with the two data sets exchanged."""
        return Observation(p=self.q, q=self.p, others=self.others, noise=self.noise, count=self.count)


def lower_epsilon(observations: tuple[Observation, ...], delta: float) -> float:
    """Returns an epsilon that the observations certainly exceed at `delta`, in the better of both directions.

    Guarantees: never above the true epsilon of any mechanism that yields these observations; an allowance for float
        errors is taken off. 0 where nothing can be shown.

    Args:
        observations: What is seen, independently.
        delta: In (0, 1).

    Example:
        >>> once = Observation(p=((1.0, 1.0),), q=((1.0, 0.0),), others=0, noise=1.0, count=1)
        >>> print(f"{lower_epsilon((once,), 1e-5):.3f}")  # exactly 4.377178
        4.377
    """
    turned = tuple(observation.reversed() for observation in observations)
    found = max(_one_direction(observations, delta), _one_direction(turned, delta))
    rounding = _ROUNDING * (1 + found + sum(observation.count for observation in observations))
    return max(0.0, found - rounding)


def _one_direction(observations: tuple[Observation, ...], delta: float) -> float:
    import numpy as np
    from scipy import fft

    losses = [_losses(observation) for observation in observations]
    counts = [observation.count for observation in observations]
    spread = max(float(loss.max() - loss.min()) for _, _, loss in losses)
    mesh = max(_MESH, spread / _MOST_SINGLE)
    while True:
        cells = [_cells(p, q, loss, mesh) for p, q, loss in losses]
        low, high = _window(cells, counts)
        if high - low < _MOST_CELLS:
            break
        mesh *= max(2.0, (high - low) / _MOST_CELLS)
    size = fft.next_fast_len(max(high - low + 1, *(len(p) for _, p, _ in cells)), real=True)
    p_hat, q_hat = np.ones(size // 2 + 1, dtype=complex), np.ones(size // 2 + 1, dtype=complex)
    first, log_scale = low, 0.0
    for (start, p, tilted), count in zip(cells, counts, strict=True):
        scale = float(tilted.sum())
        p_hat *= fft.rfft(p, size) ** count
        q_hat *= fft.rfft(tilted / scale, size) ** count
        first += start * count
        log_scale += count * math.log(scale)
    p_sum = np.maximum(np.roll(fft.irfft(p_hat, size), -(low % size)), 0.0)
    q_sum = np.maximum(np.roll(fft.irfft(q_hat, size), -(low % size)), 0.0)
    # What float errors and the mass outside the window may change, with room to spare.
    guard = 4e-14 + 1e-15 * sum(counts)
    at = (first + np.arange(size)) * mesh
    p_tail = np.cumsum(p_sum[::-1])[::-1] - guard
    useful = p_tail > delta
    if not useful.any():
        return 0.0
    top = float(at[useful].max())
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        weights = np.exp(top - at)
        q_tail = np.cumsum((q_sum * weights)[::-1])[::-1] + guard * weights
        found = np.log(p_tail[useful] - delta) - np.log(q_tail[useful]) + top - log_scale
    return max(0.0, float(found[np.isfinite(found)].max(initial=0.0)))


def _losses(observation: Observation):  # type: ignore[no-untyped-def]
    """The masses under P and Q of narrow intervals of x, and their log ratios."""
    import numpy as np

    means = [mean for _, mean in (*observation.p, *observation.q)]
    reach = _REACH * observation.noise
    edges = np.linspace(min(0.0, *means) - reach, max(0.0, *means) + reach, _POINTS)
    edges = np.concatenate(([-np.inf], edges, [np.inf]))
    p, q = (_masses(edges, mixture, observation) for mixture in (observation.p, observation.q))
    kept = p > _LEAST_MASS  # what is left out is seen by nobody: still post-processing, of less
    p, q = p[kept], np.maximum(q[kept], _LEAST_MASS)  # and more mass under Q can only lower the bound
    return p, q, np.log(p) - np.log(q)


def _masses(edges, mixture: Mixture, observation: Observation):  # type: ignore[no-untyped-def]
    """Masses of the intervals, to a small relative error also where F is near 0 or near 1."""
    import numpy as np
    from scipy.special import log_ndtr, logsumexp, ndtr

    with np.errstate(divide="ignore", invalid="ignore"):
        weights = np.array([weight for weight, _ in mixture])[:, None]
        z = (edges[None, :] - np.array([mean for _, mean in mixture])[:, None]) / observation.noise
        above = (weights * ndtr(-z)).sum(axis=0)
        log_cdf = np.where(above < 0.5, np.log1p(-above), logsumexp(log_ndtr(z), b=weights, axis=0))
        if observation.others:
            log_cdf = log_cdf + observation.others * log_ndtr(edges / observation.noise)
        log_cdf[0], log_cdf[-1] = -np.inf, 0.0
        return np.exp(log_cdf[1:]) * -np.expm1(np.minimum(log_cdf[:-1] - log_cdf[1:], 0.0))


def _cells(p, q, losses, mesh: float):  # type: ignore[no-untyped-def]
    """The masses gathered into cells of the loss: number of the first cell, P, and Q times e^loss."""
    import numpy as np

    index = np.rint(losses / mesh).astype(np.int64)
    first = int(index.min())
    length = int(index.max()) - first + 1
    mass = np.bincount(index - first, weights=p, minlength=length)
    tilted = np.bincount(index - first, weights=q * np.exp(index * mesh), minlength=length)
    return first, mass, tilted


def _window(cells, counts: list[int]) -> tuple[int, int]:  # type: ignore[no-untyped-def]
    """Where the sum of the cell numbers, each from 0, lies but for `_TAIL`, under P and under the tilted Q."""
    import numpy as np

    lows, highs = [], []
    for which in (1, 2):
        parts = [(entry[which] / entry[which].sum(), count) for entry, count in zip(cells, counts, strict=True)]
        least, most = 0.0, float(sum(count * (len(mass) - 1) for mass, count in parts))
        longest = max(len(mass) for mass, _ in parts)
        for strength in np.geomspace(0.1 / longest, 4.0, 40):
            for order in (strength, -strength):
                exponent = -math.log(_TAIL)
                for mass, count in parts:
                    scaled = order * np.arange(len(mass))
                    peak = float(scaled.max())
                    exponent += count * (peak + math.log(float((np.exp(scaled - peak) * mass).sum())))
                if order > 0:
                    most = min(most, exponent / order)
                else:
                    least = max(least, exponent / order)
        lows.append(least)
        highs.append(most)
    return math.floor(min(lows)), math.ceil(max(highs))
