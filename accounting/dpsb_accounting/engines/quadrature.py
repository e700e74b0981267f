r"""An independent opinion: delta as one contour integral, without any grid of losses.

With :math:`L` the privacy loss of the whole composition under P and :math:`K(s) = \sum_k T_k \log
E_{P_k}[e^{s L_k}]`, for every :math:`\tau > 0`

.. math:: \delta(\epsilon) = E_P[(1 - e^{\epsilon - L})_+]
   = \frac{1}{2 \pi i} \int_{\tau - i \infty}^{\tau + i \infty} \frac{e^{K(s) - \epsilon s}}{s (s + 1)} ds.

The contour passes near the saddle point, where the integrand is a bump that dies out fast; both the contour and the
expectations inside K are summed by the trapezoid rule. Of the engines that can make a claim for sampled releases
nothing is used here: neither their grids of losses nor their code.

How it knows that it is right, and what it refuses:

* Steps along the contour of length h give :math:`\sum_m \delta(\epsilon + 2 \pi m / h) e^{2 \pi m \tau / h}`, so what a
  step can add is bounded before it is chosen.
* The sum stops where the integrand has fallen by `_NEGLIGIBLE`; where that takes too many points (very few releases,
  or very small sampling probabilities: the integrand falls too slowly), nothing is answered.
* Everything is computed twice, on two contours with different steps, ranges and inner grids. They must agree to
  `_AGREEMENT`; the interval returned is ten times their difference. This is evidence, not proof: never a claim.

References:
    Bromwich's inversion of the Laplace transform with the saddle point: Abate and Whitt (1992), Queueing Systems
    10:5-88; for delta: Alghamdi, Gomez, Asoodeh, Calmon, Kosut and Sankar (2023), arXiv:2302.01454. Trapezoid
    rule: Trefethen and Weideman (2014), SIAM Review 56.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from dpsb_accounting import gaussian
from dpsb_accounting.composition import Composition, Subsampled
from dpsb_accounting.engines.answer import Answer, Unavailable

Array = npt.NDArray[np.float64]

_NEGLIGIBLE = 1e-11  # share of the integral that may be left out
_AGREEMENT = 1e-6  # of epsilon (or absolutely, below 1), between the two contours
_MOST_WORK = 6e8  # points on the contour times points of the inner grids: about a second
_MOST_POINTS = 2_000_000
_SMALLEST_DELTA = 1e-100
_SMALLEST_NOISE = 0.04  # below it one release alone has an epsilon of dozens, and the inner grids grow long
_DEPTH = 45.0  # inner integrands are summed where they exceed e^-45 of their peak


@dataclass(frozen=True, slots=True)
class _Direction:
    """What the integral needs: the subsampled parts, the precision 1/sigma^2 of the Gaussian part, and which way."""

    parts: tuple[tuple[float, float, int], ...]  # noise multiplier, sampling probability, count
    precision: float
    name: str  # "remove", "add" or "replace"


@dataclass(frozen=True, slots=True)
class _Grid:
    """One release on an inner grid, tilted: probabilities summing to 1, losses minus their mean, and log of the sum."""

    weights: Array
    losses: Array
    mean: float
    log_sum: float


def epsilon(composition: Composition, delta: float, neighboring: str) -> Answer:
    """Returns an interval of estimates of epsilon at `delta` for Gaussians and Poisson-subsampled Gaussians.

    Guarantees: none; two contours agree on it to a millionth. Deterministic.

    Raises:
        Unavailable: If the integrand falls too slowly, the two contours disagree, or an event is of another kind.
    """
    _refuse(composition, delta)
    if composition.count == 1 and composition.subsampled and neighboring != "replace_one":
        return _single(composition.subsampled[0], delta)
    found, error = 0.0, 0.0
    for direction in _directions(composition, neighboring):
        value, doubt = _solve(direction, delta)
        if value + doubt > found + error:
            found, error = value, doubt
    if found <= 0:
        return _answer(0.0, max(0.0, found + error))
    return _answer(max(0.0, found - error), found + error)


def _answer(lower: float, upper: float) -> Answer:
    return Answer(
        engine="quadrature", lower=lower, upper=upper, rigorous=False, method="contour integral, two contours agree"
    )


def _single(part: Subsampled, delta: float) -> Answer:
    """One release, in closed form: amplification of one Gaussian, at which the other direction is checked."""
    prob, noise = part.sampling_prob, part.noise_multiplier
    if delta >= prob:
        return _answer(0.0, 0.0)
    low, high = gaussian.epsilon(noise, delta / prob)
    low, high = (value + math.log(prob - (prob - 1) * math.exp(-value)) for value in (low, high))
    # Adding: P(x < z) - e^epsilon Q(x < z) at the z where the two densities meet.
    if high < -math.log1p(-prob):
        rest = -math.expm1(high + math.log1p(-prob))
        z = noise**2 * (math.log(rest / prob) - high) + 0.5
        added = rest * ndtr(z / noise) - prob * math.exp(high) * ndtr((z - 1) / noise)
        if added > delta * (1 + 1e-6):
            raise Unavailable("adding costs more than removing")
    return Answer(engine="quadrature", lower=low, upper=high, rigorous=False, method="closed form of one release")


def _refuse(composition: Composition, delta: float) -> None:
    if composition.non_private:
        raise Unavailable("something was released with no guarantee")
    if composition.others:
        raise Unavailable(f"quadrature does not know {type(composition.others[0][0]).__name__}")
    if not composition.subsampled and math.isinf(composition.noise_multiplier):
        raise Unavailable("nothing was released")
    if delta < _SMALLEST_DELTA:
        raise Unavailable(f"delta={delta!r} is below {_SMALLEST_DELTA:g}")
    smallest = min((part.noise_multiplier for part in composition.subsampled), default=math.inf)
    if smallest < _SMALLEST_NOISE:
        raise Unavailable(f"noise multiplier {smallest:g} of a subsampled release is below {_SMALLEST_NOISE}")


def _directions(composition: Composition, neighboring: str) -> list[_Direction]:
    scale = 2 if neighboring == "replace_one" else 1
    precision = (scale / composition.noise_multiplier) ** 2
    parts = tuple((part.noise_multiplier, part.sampling_prob, part.count) for part in composition.subsampled)
    if neighboring == "replace_one" or not parts:
        return [_Direction(parts, precision, "replace")]
    return [_Direction(parts, precision, name) for name in ("remove", "add")]


def _solve(direction: _Direction, delta: float) -> tuple[float, float]:
    """Epsilon of one direction, and how far it may be off: ten times the difference of two contours."""
    tau = _saddle(direction, delta)
    first = _invert(direction, delta, 0.85 * tau, 1.0)
    second = _invert(direction, delta, 0.75 * tau, 1.31)
    difference = abs(first - second)
    if not difference <= _AGREEMENT * max(1.0, abs(first)):
        raise Unavailable(f"two contours differ: epsilon {first:.6g} and {second:.6g}")
    return first, 10 * difference + 1e-9 * (1 + abs(first))


def _loss(x: Array, noise: float, prob: float, direction: str) -> tuple[Array, Array]:
    """The loss of one release at output x, and the logarithm of the density of x under P."""
    rest, taken = math.log1p(-prob), math.log(prob)
    square = 2 * noise * noise
    forward = np.logaddexp(rest, taken + (2 * x - 1) / square)  # log of mixture at +1 over N(0, noise^2)
    log_normal = -x * x / square - math.log(noise * math.sqrt(2 * math.pi))
    if direction == "remove":
        return forward, log_normal + forward
    if direction == "add":
        return -forward, log_normal
    backward = np.logaddexp(rest, taken - (2 * x + 1) / square)
    return forward - backward, log_normal + forward


def _grid(noise: float, prob: float, direction: str, tau: float, top: float, finer: float) -> _Grid:
    """The inner grid at tau for frequencies up to `top`: fine enough for the Gaussian, the loss and e^(i top L)."""
    reach = 14 * noise + 2
    low = -reach - (tau if direction != "remove" else 0.0)
    high = reach + (tau + 1 if direction != "add" else 0.0)
    size = max(4001, math.ceil(8 * (high - low) / noise))
    if size > _MOST_POINTS:
        raise Unavailable("the inner grid would be too long")
    coarse = np.linspace(low, high, size)
    losses, log_p = _loss(coarse, noise, prob, direction)
    exponent = log_p + tau * losses
    inside = np.flatnonzero(exponent > exponent.max() - _DEPTH)
    low, high = float(coarse[max(inside[0] - 1, 0)]), float(coarse[min(inside[-1] + 1, size - 1)])
    part = losses[max(inside[0] - 1, 0) : inside[-1] + 2]
    slope = float(np.max(np.abs(np.diff(part)))) / float(coarse[1] - coarse[0])
    step = min(2 * math.pi / (1.05 * top * slope + 20 / noise), noise * noise / 2.5) / finer
    size = math.ceil((high - low) / step) + 1
    if size > _MOST_POINTS:
        raise Unavailable("the inner grid would be too long")
    x = np.linspace(low, high, size)
    losses, log_p = _loss(x, noise, prob, direction)
    exponent = log_p + tau * losses
    peak = float(exponent.max())
    weights = np.exp(exponent - peak)
    total = float(weights.sum())
    weights /= total
    mean = float((weights * losses).sum())
    return _Grid(weights, losses - mean, mean, peak + math.log(total * float(x[1] - x[0])))


def _cumulants(direction: _Direction, tau: float) -> tuple[float, float, float]:
    """K, K' and K'' of the composition at real tau."""
    value = direction.precision * tau * (tau + 1) / 2
    first = direction.precision * (2 * tau + 1) / 2
    second = direction.precision
    for noise, prob, count in direction.parts:
        grid = _grid(noise, prob, direction.name, tau, 0.0, 1.0)
        value += count * grid.log_sum
        first += count * grid.mean
        second += count * float((grid.weights * grid.losses**2).sum())
    return value, first, second


def _saddle(direction: _Direction, delta: float) -> float:
    """The order of the tightest Renyi bound, which lies near the saddle point: where the contour should pass."""

    def bound(log_tau: float) -> float:
        tau = math.exp(log_tau)
        try:
            value = _cumulants(direction, tau)[0]
        except Unavailable:
            return math.inf
        return (value - math.log(delta) + tau * math.log(tau) - (tau + 1) * math.log1p(tau)) / tau

    # K is convex and 0 at 0, so the bound falls and then rises.
    low, middle, high = -9.0, -8.0, -7.0
    lowest, right = bound(middle), bound(high)
    while right < lowest:
        low, middle, lowest, high = middle, high, right, high + 1
        right = bound(high)
    if not math.isfinite(lowest) or middle == -8:
        raise Unavailable("no saddle point was found")
    for _ in range(5):
        candidates = (low + middle) / 2, (middle + high) / 2
        found = bound(candidates[0]), bound(candidates[1])
        if min(found) >= lowest:
            low, high = candidates
        elif found[0] < found[1]:
            middle, high, lowest = candidates[0], middle, found[0]
        else:
            low, middle, lowest = middle, candidates[1], found[1]
    return math.exp(middle)


def _invert(direction: _Direction, delta: float, tau: float, finer: float) -> float:
    """Epsilon at which the integral along Re s = tau equals delta."""
    value, mean, variance = _cumulants(direction, tau)
    guess = mean - 1 / tau - 1 / (tau + 1)
    width = math.sqrt(variance)
    step = _step(direction, delta, tau, guess, width) / finer
    top = 9.0 * finer / math.sqrt(variance + 1 / tau**2)
    while True:
        heights: Array = step * np.arange(math.ceil(top / step) + 1, dtype=np.float64)
        shape = _tilted_transform(direction, tau, heights, step, finer)
        found, left_out = _root(shape, heights, tau, value, mean, math.log(delta), guess, step)
        if left_out < _NEGLIGIBLE:
            return found
        top *= 2 if left_out < 1e-3 else 4


def _step(direction: _Direction, delta: float, tau: float, guess: float, width: float) -> float:
    """A step along the contour whose aliases, delta(epsilon + 2 pi m / h) e^(2 pi m tau / h), are negligible."""
    floor = math.log(delta) + math.log(_NEGLIGIBLE)
    period = max(8 * width, -floor / tau)  # those with m < 0 are at most e^(-tau period)
    further = [(order, _cumulants(direction, order)[0]) for order in (1.05 * tau, 1.15 * tau, 1.5 * tau, 3 * tau)]
    for _ in range(60):
        # Those with m > 0 by Chernoff's bound at some larger order.
        alias = min(value - order * (guess + period) for order, value in further) + tau * period
        if alias < floor:
            return 2 * math.pi / period
        period *= 1.5
    raise Unavailable("no step along the contour is fine enough")


def _tilted_transform(
    direction: _Direction, tau: float, heights: Array, step: float, finer: float
) -> npt.NDArray[np.complex128]:
    """E[e^(iy (L - E L))] of the whole composition under the tilted P, at every height y."""
    top = float(heights[-1])
    result: npt.NDArray[np.complex128] = np.exp(-direction.precision * heights**2 / 2).astype(np.complex128)
    for noise, prob, count in direction.parts:
        grid = _grid(noise, prob, direction.name, tau, top, finer)
        work = len(grid.losses) * len(heights)
        if work > _MOST_WORK or len(heights) > _MOST_POINTS:
            raise Unavailable("the integrand falls too slowly, as with few releases or rare sampling")
        result = result * _transform(grid, step, len(heights)) ** count
    return result


def _transform(grid: _Grid, step: float, count: int) -> npt.NDArray[np.complex128]:
    """Sum of weights times e^(i k step loss) for k = 0 ... count - 1, block by block.

    Not by `@`: its threads wait for each other, on a busy machine for longer than all of this takes without them.
    """
    block = max(4, min(128, count, 4_000_000 // len(grid.losses)))
    waves = np.exp(1j * step * np.outer(np.arange(block), grid.losses))
    blocks = math.ceil(count / block)
    result = np.empty(blocks * block, dtype=np.complex128)
    for index in range(blocks):
        start = grid.weights * np.exp(1j * (step * block * index) * grid.losses)
        result[index * block : (index + 1) * block] = np.einsum("j,kj->k", start, waves)
    return result[:count]


def _root(
    shape: npt.NDArray[np.complex128],
    heights: Array,
    tau: float,
    value: float,
    mean: float,
    goal: float,
    guess: float,
    step: float,
) -> tuple[float, float]:
    """Newton's method for log delta(epsilon) = goal; also the share of the integral beyond the last height."""
    s = tau + 1j * heights
    kernel = shape / (s * (s + 1))
    kernel[0] /= 2
    last = max(1, len(heights) // 20)
    epsilon = guess
    for _ in range(60):
        terms = kernel * np.exp(1j * heights * (mean - epsilon))
        total = float(terms.real.sum())
        falling = float((s * terms).real.sum())
        if not (total > 0 and falling > 0):
            return epsilon, math.inf
        log_delta = value - epsilon * tau + math.log(total * step / math.pi)
        change = (log_delta - goal) * total / falling
        epsilon += change
        if abs(change) <= 1e-12 * max(1.0, abs(epsilon)):
            break
    # The end of the sum, as if it went on at its present size for as long as it has lasted.
    left_out = float(np.abs(terms[-last:]).max()) * len(heights) / total
    return epsilon, left_out
