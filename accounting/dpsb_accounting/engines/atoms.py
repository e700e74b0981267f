"""Lower-bound material for events that are no plain Gaussian sum: one attainable pair of distributions each, in cells.

The pair is one that the event allows: for a stated guarantee the worst mechanism that has it, for a sampled sum a data
set whose other units contribute zero (or, with fixed batches, the opposite). What is not here is left out, which only
lowers a lower bound.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from dpsb_accounting.events import (
    ApproximateDP,
    DiscreteLaplace,
    Event,
    Laplace,
    PoissonLaplace,
    PureEpsilon,
    RandomizedResponse,
    SampledWithoutReplacementGaussian,
    TruncatedPoissonGaussian,
    UserMixture,
    Zcdp,
)

Array = npt.NDArray[np.float64]
_MARGIN = 10.0
_MOST_COMPONENTS = 500
_MOST_CELLS = 2_000_000
_GRID = 20_001


def as_sum(event: Event, neighboring: str) -> tuple[float, float, bool] | None:
    """(noise multiplier, sampling probability, one-sided) of a Gaussian sum that the event may be, if there is one.

    One-sided means that even under replace_one only one of the two data sets contributes.
    """
    replaced = neighboring == "replace_one"
    if isinstance(event, SampledWithoutReplacementGaussian):
        # All others contribute -C, the unit +C or -C: the sum moves by 2C when it is drawn, else not at all.
        return event.noise_multiplier / (2 if replaced else 1), event.fraction, replaced
    if isinstance(event, TruncatedPoissonGaussian):
        from scipy.stats import binom

        size, most, prob = event.num_examples, event.max_batch_size, event.sampling_prob
        truncated = most * float(binom.sf(most, size, prob))
        below = size * prob * float(binom.cdf(most - 1, size - 1, prob)) if size > 1 else 0.0
        kept = min((truncated + below) / size, 1.0) * (1 - 1e-9)  # E[min(B, most)] / N
        return (event.noise_multiplier, kept, False) if kept > 0 else None
    if isinstance(event, Zcdp) and event.rho > 0:
        return 1 / math.sqrt(2 * event.rho), 1.0, False
    return None


def cells(event: Event, neighboring: str, direction: str, mesh: float) -> tuple[int, Array, Array] | None:
    """Returns (first cell, P of each cell, Q of each cell) of one release; None for an event that is not here."""
    steps = 2 if neighboring == "replace_one" else 1
    p: list[float] | Array
    if isinstance(event, (PureEpsilon, ApproximateDP)):
        return _stated(steps * event.epsilon, event.delta if isinstance(event, ApproximateDP) else 0.0, mesh)
    if isinstance(event, RandomizedResponse):
        buckets, rate = event.num_buckets, event.noise_parameter
        kept, other = 1 - rate * (buckets - 1) / buckets, rate / buckets
        if neighboring == "replace_one":
            p, q = [kept, other, (buckets - 2) * other], [other, kept, (buckets - 2) * other]
        else:
            p, q = [kept, (buckets - 1) * other], [1 / buckets, 1 - 1 / buckets]
        return _from_atoms(p, q, direction, mesh)
    if isinstance(event, DiscreteLaplace):
        return _discrete_laplace(event.noise_parameter, steps * event.sensitivity, mesh)
    if isinstance(event, Laplace) or (isinstance(event, PoissonLaplace) and steps == 1):
        prob = event.sampling_prob if isinstance(event, PoissonLaplace) else 1.0
        return _laplace(event.noise_multiplier / steps, prob, direction, mesh)
    if isinstance(event, UserMixture) and steps == 1 and len(event.sensitivities) <= _MOST_COMPONENTS:
        return _mixture(event, direction, mesh)
    return None


def _stated(epsilon: float, delta: float, mesh: float) -> tuple[int, Array, Array] | None:
    high = (1 - delta) / (1 + math.exp(-epsilon)) + delta
    low = (1 - delta) / (1 + math.exp(min(epsilon, 700.0)))
    return _from_atoms([high, low], [low, high], "remove", mesh)


def _from_atoms(p: list[float], q: list[float], direction: str, mesh: float) -> tuple[int, Array, Array] | None:
    if direction == "add":
        p, q = q, p
    pairs = [(a, b) for a, b in zip(p, q, strict=True) if a > 0 and b > 0]
    if not pairs:  # the probabilities underflow
        return None
    numbers = [round(math.log(a / b) / mesh) for a, b in pairs]
    first, last = min(numbers), max(numbers)
    if last - first > _MOST_CELLS:
        return None
    p_cells, q_cells = np.zeros(last - first + 1), np.zeros(last - first + 1)
    for number, (a, b) in zip(numbers, pairs, strict=True):
        p_cells[number - first] += a
        q_cells[number - first] += b
    return first, p_cells, q_cells


def _discrete_laplace(rate: float, sensitivity: int, mesh: float) -> tuple[int, Array, Array] | None:
    if sensitivity > 10_000:
        return None
    inner = np.arange(1, sensitivity)
    outer = 1 / (1 + math.exp(-rate))  # all mass on one side, the centre included
    weight = math.tanh(rate / 2)
    p = [outer * math.exp(-rate * sensitivity), *(weight * np.exp(-rate * (sensitivity - inner))), outer]
    q = p[::-1]
    return _from_atoms([float(a) for a in p], [float(b) for b in q], "remove", mesh)


def _laplace(scale: float, prob: float, direction: str, mesh: float) -> tuple[int, Array, Array] | None:
    grid = np.linspace(0.0, 1.0, _GRID)
    losses = _mixed((2 * grid - 1) / scale, prob)
    edges = _edges(grid, losses, mesh)
    if edges is None:
        return None
    first, inner = edges
    still, moved = _laplace_masses(inner / scale), _laplace_masses((inner - 1) / scale)
    return _oriented(first, (1 - prob) * still + prob * moved, still, direction)


def _laplace_masses(inner: Array) -> Array:
    """Probability of each cell between the given standardized edges, and of the two ends, under a Laplace law."""
    below = np.where(inner < 0, 0.5 * np.exp(np.minimum(inner, 0.0)), 1 - 0.5 * np.exp(-np.maximum(inner, 0.0)))
    masses: Array = np.diff(np.concatenate(([0.0], below, [1.0])))
    return np.maximum(masses, 0.0)


def _mixture(event: UserMixture, direction: str, mesh: float) -> tuple[int, Array, Array] | None:
    pairs = [(w, s) for w, s in zip(event.probabilities, event.sensitivities, strict=True) if w > 0]
    weights, sizes = np.array([w for w, _ in pairs]), np.array([s for _, s in pairs]) / event.noise_multiplier
    grid = np.linspace(-_MARGIN, float(sizes.max()) + _MARGIN, _GRID)
    exponents = np.log(weights)[:, None] + sizes[:, None] * (grid[None, :] - sizes[:, None] / 2)
    edges = _edges(grid, np.logaddexp.reduce(exponents, axis=0), mesh)
    if edges is None:
        return None
    first, inner = edges
    still = _normal_masses(inner)
    moved = np.zeros_like(still)
    for weight, size in zip(weights, sizes, strict=True):
        moved += weight * _normal_masses(inner - size)
    return _oriented(first, moved, still, direction)


def _normal_masses(inner: Array) -> Array:
    edges = np.concatenate(([-np.inf], inner, [np.inf]))
    below, above = ndtr(edges), ndtr(-edges)
    masses: Array = np.where(edges[:-1] > 0, above[:-1] - above[1:], below[1:] - below[:-1])
    return masses


def _mixed(exponent: Array, prob: float) -> Array:
    if prob == 1:
        return exponent
    found: Array = np.logaddexp(math.log1p(-prob), math.log(prob) + exponent)
    return found


def _edges(grid: Array, losses: Array, mesh: float) -> tuple[int, Array] | None:
    first, last = round(float(losses[0]) / mesh), round(float(losses[-1]) / mesh)
    if last - first > _MOST_CELLS:
        return None
    return first, np.interp((np.arange(first, last) + 0.5) * mesh, losses, grid)


def _oriented(first: int, moved: Array, still: Array, direction: str) -> tuple[int, Array, Array]:
    if direction == "add":
        return -(first + len(moved) - 1), still[::-1], moved[::-1]
    return first, moved, still
