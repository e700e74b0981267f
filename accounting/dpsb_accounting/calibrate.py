"""Calibration: the least noise that keeps a run within a target, on the very upper bound that is claimed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

from dpsb_accounting import _checks, engines, gaussian
from dpsb_accounting.accountant import epsilon, parts_of
from dpsb_accounting.composition import Composition
from dpsb_accounting.engines import ResourceLimit
from dpsb_accounting.events import PoissonGaussian
from dpsb_accounting.plan import Phase

_Curve: TypeAlias = Callable[[float], float]

_PRECISION = 1e-3
_LARGEST_NOISE = 1e7


class CalibrationInfeasible(Exception):
    """No noise multiplier reaches the target; the message names the target and the best that can be reached."""


def noise_multiplier_for(
    *,
    target_epsilon: float,
    delta: float,
    sampling_prob: float,
    steps: int,
    neighboring: str = "add_or_remove_one",
    before: Sequence[Phase] = (),
) -> float:
    r"""Returns the smallest noise multiplier, to about 0.1 %, that keeps a run within its target.

    :math:`\min \{\sigma : \overline\epsilon(\mathrm{before} + T \times \mathrm{PoissonGaussian}(\sigma, q))
    \le \epsilon\}`, with :math:`\overline\epsilon` the upper bound that `epsilon` returns.

    Guarantees: `epsilon` of the resulting schedule has `upper` ≤ `target_epsilon`; deterministic.

    Args:
        target_epsilon: Greater than 0, finite. Public.
        delta: In (0, 1). Public.
        sampling_prob: q in (0, 1]. Public.
        steps: T, at least 1. Public.
        neighboring: "add_or_remove_one", "zero_out" or "replace_one".
        before: Phases whose noise is fixed already, such as a private basis.

    Returns:
        The noise standard deviation of a step divided by the clip norm. Public.

    Raises:
        CalibrationInfeasible: If no noise reaches the target.
        ValueError: If an argument is out of range.

    Example:
        >>> sigma = noise_multiplier_for(target_epsilon=1, delta=1e-5, sampling_prob=0.01, steps=1000)
        >>> print(f"{sigma:.2f}")
        1.42
    """
    target = _checks.positive(target_epsilon=target_epsilon)
    delta = _checks.probability(open_interval=True, delta=delta)
    prob = _checks.probability(sampling_prob=sampling_prob)
    steps = _checks.whole(at_least=1, steps=steps)
    _checks.one_of(choices=_checks.RELATIONS, neighboring=neighboring)
    fixed = parts_of(before)
    best = _upper(Composition.of(fixed), delta, neighboring) if fixed else 0.0
    if best > target:
        raise CalibrationInfeasible(
            f"target_epsilon={target!r} cannot be reached at delta={delta!r}: the phases before training alone cost "
            f"{best:.4g}, the best that any noise can reach"
        )

    def upper(noise: float) -> float:
        event = PoissonGaussian(noise_multiplier=noise, sampling_prob=prob)
        try:
            return _upper(Composition.of([*fixed, (event, steps)]), delta, neighboring)
        except ResourceLimit:
            return math.inf

    noise = _smallest(upper, target, _first_guess(target, delta, prob, steps, neighboring), delta)
    while True:  # checked with the very function that will state the claim; once, but for float accidents
        event = PoissonGaussian(noise_multiplier=noise, sampling_prob=prob)
        if epsilon([*fixed, (event, steps)], delta, neighboring).upper <= target:
            return noise
        noise *= 1 + _PRECISION / 10


def _smallest(upper: _Curve, target: float, guess: float, delta: float) -> float:
    """Bisects, by secants on a log-log scale where they help, for the smallest noise with upper(noise) <= target."""
    noise, low, high = guess, 0.0, math.inf
    points: list[tuple[float, float]] = []
    for attempt in range(200):
        value = upper(noise)
        points.append((math.log(noise), math.log(max(value, 1e-300)) if math.isfinite(value) else math.inf))
        if value <= target:
            high = noise
        else:
            low = noise
        if high <= low * (1 + _PRECISION) or target * (1 - _PRECISION / 2) <= value <= target:
            return high
        if low > _LARGEST_NOISE:
            raise CalibrationInfeasible(
                f"target_epsilon={target!r} cannot be reached at delta={delta!r}: even noise_multiplier={low:.3g} "
                f"costs {value:.4g}"
            )
        noise = _next(points, math.log(target * (1 - _PRECISION / 4)), low, high, attempt)
    return high


def _next(points: list[tuple[float, float]], goal: float, low: float, high: float, attempt: int) -> float:
    """The next noise to try: a secant step kept inside the bracket, else the middle of the bracket."""
    middle = math.sqrt(low * high) if low and math.isfinite(high) else (low * 2 if low else high / 2)
    if len(points) < 2 or attempt % 5 == 4:
        # The first step: epsilon falls at least like 1 / noise.
        if len(points) == 1 and math.isfinite(points[0][1]):
            factor = math.exp(min(max(points[0][1] - goal, -0.7), 0.7))
            return math.exp(points[0][0]) * factor
        return middle
    (x0, y0), (x1, y1) = points[-2:]
    if not (math.isfinite(y0) and math.isfinite(y1)) or x0 == x1 or (y1 - y0) / (x1 - x0) > -0.1:
        return middle
    step = x1 + (goal - y1) * (x1 - x0) / (y1 - y0)
    step = min(max(step, x1 - 1.5), x1 + 1.5)
    noise = math.exp(step)
    if not low < noise < high:
        return middle
    return noise


def _first_guess(target: float, delta: float, prob: float, steps: int, neighboring: str) -> float:
    """From the central limit theorem, inverted in closed form: a place to start, never a result."""
    mu = 1 / gaussian.noise_multiplier(target, delta)
    guess = 1 / math.sqrt(math.log1p((mu / prob) ** 2 / steps))
    factor = 2.0 if neighboring == "replace_one" else 1.0
    return min(max(guess, 0.3 if prob < 1 else 1e-3) * factor, _LARGEST_NOISE / 2)


def _upper(composition: Composition, delta: float, neighboring: str) -> float:
    """The same upper end that `epsilon` reports, without the lower one."""
    if composition.subsampled and not composition.non_private:
        return engines.upper_epsilon(composition, delta, neighboring)[0]
    return engines.epsilon(composition, delta, neighboring)[1]
