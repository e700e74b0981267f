"""Calibration: the one setting that is still open, solved for a target on the very upper bound that is claimed.

An estimate that takes milliseconds (the contour integral of `engines.quadrature`) finds the neighbourhood; from there
on only the accountant's upper bound counts. So a wrong estimate costs time and never privacy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from dpsb_accounting import _checks, engines, gaussian
from dpsb_accounting.accountant import epsilon, parts_of
from dpsb_accounting.bound import Bound
from dpsb_accounting.composition import alternatives
from dpsb_accounting.engines import ResourceLimit
from dpsb_accounting.engines.answer import Unavailable
from dpsb_accounting.events import Event, PoissonGaussian
from dpsb_accounting.plan import Phase

_Parts: TypeAlias = list[tuple[Event, int]]

_PRECISION = 1e-3  # of epsilon
_AIM = 1 - _PRECISION / 3  # where between the two ends of that precision to aim
_LARGEST_NOISE = 1e7
_SMALLEST_NOISE = 0.05
_SMALLEST_PROB = 1e-12
MOST_STEPS = 10_000_000
_LEAVE_OUT = (
    "leave out exactly one of target_epsilon, noise_multiplier, steps and sampling_prob (or expected_batch_size with "
    "num_examples)"
)


class CalibrationInfeasible(Exception):
    """No value of the open setting reaches the target; the message names the target and the best that was found."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What was solved for, and what it achieves.

    Args:
        parameter: "noise_multiplier", "steps", "sampling_prob", "expected_batch_size" or "epsilon". Public.
        value: Its value; a whole number for steps and expected_batch_size. Public.
        bound: The accountant's bounds on epsilon with that value; `upper` never exceeds the target. Public.
        noise_multiplier: Of every step. Public.
        sampling_prob: Of every step. Public.
        steps: How many. Public.
    """

    parameter: str
    value: float
    bound: Bound
    noise_multiplier: float
    sampling_prob: float
    steps: int


@dataclass(frozen=True, slots=True)
class _Problem:
    """Everything that is fixed: epsilon as a function of the three numbers of a training phase."""

    before: _Parts
    delta: float
    neighboring: str

    def parts(self, noise: float, prob: float, steps: int) -> _Parts:
        return [*self.before, (PoissonGaussian(noise_multiplier=noise, sampling_prob=prob), steps)]

    def upper(self, noise: float, prob: float, steps: int) -> float:
        """The upper end that `epsilon` reports; infinite where it cannot be computed."""
        try:
            return _upper(self.parts(noise, prob, steps), self.delta, self.neighboring)
        except ResourceLimit:
            return math.inf

    def estimate(self, noise: float, prob: float, steps: int) -> float:
        """About the same in milliseconds; NaN where there is no such estimate."""
        from dpsb_accounting.engines import quadrature

        try:
            found = max(
                quadrature.epsilon(choice, self.delta, self.neighboring).upper
                for choice in alternatives(self.parts(noise, prob, steps))
            )
        except (Unavailable, ArithmeticError):
            return math.nan
        return found


def calibrate(
    *,
    delta: float,
    target_epsilon: float | None = None,
    noise_multiplier: float | None = None,
    steps: int | None = None,
    sampling_prob: float | None = None,
    expected_batch_size: float | None = None,
    num_examples: int | None = None,
    neighboring: str = "add_or_remove_one",
    before: Sequence[Phase] = (),
) -> Calibration:
    r"""Solves for the one setting of a private training run that is left out.

    The run is :math:`\mathrm{before} + T \times \mathrm{PoissonGaussian}(\sigma, q)`. Left out may be one of

    * `noise_multiplier`: the smallest that keeps the target;
    * `steps`: the most, up to ten million;
    * `sampling_prob`: the largest; or, where `num_examples` is given, `expected_batch_size`, the largest whole one;
    * `target_epsilon`: the epsilon that the run has.

    Guarantees: the `upper` that `epsilon` returns for the resulting run is at most `target_epsilon`, and within 0.1 %
        of it unless the value is whole or at its limit; deterministic.

    Args:
        delta: In (0, 1). Public.
        target_epsilon: Greater than 0, finite. Public.
        noise_multiplier: Noise standard deviation of a step divided by the clip norm. Public.
        steps: T, at least 1. Public.
        sampling_prob: q in (0, 1]. Public.
        expected_batch_size: q times `num_examples`, in place of `sampling_prob`. Public.
        num_examples: The declared number of examples; needed for `expected_batch_size` alone. Public.
        neighboring: "add_or_remove_one", "zero_out" or "replace_one".
        before: Phases that are fixed already, such as a private basis.

    Returns:
        The value found, with what it achieves. Public.

    Raises:
        CalibrationInfeasible: If no value reaches the target.
        ValueError: If an argument is out of range, or not exactly one is left out.

    Example:
        >>> found = calibrate(target_epsilon=2, delta=1e-5, noise_multiplier=1, sampling_prob=0.01)
        >>> found.parameter, found.value > 1100, found.bound.upper <= 2
        ('steps', True, True)
    """
    delta = _checks.probability(open_interval=True, delta=delta)
    _checks.one_of(choices=_checks.RELATIONS, neighboring=neighboring)
    problem = _Problem(parts_of(before), delta, neighboring)
    noise = None if noise_multiplier is None else _checks.scale(noise_multiplier=noise_multiplier)
    times = None if steps is None else _checks.whole(at_least=1, steps=steps)
    examples = None if num_examples is None else _checks.whole(at_least=1, num_examples=num_examples)
    prob = _sampling(sampling_prob, expected_batch_size, examples)
    if target_epsilon is None:
        if noise is None or times is None or prob is None:
            raise ValueError(_LEAVE_OUT)
        bound = epsilon(problem.parts(noise, prob, times), delta, neighboring)
        return Calibration(
            parameter="epsilon",
            value=bound.upper,
            bound=bound,
            noise_multiplier=noise,
            sampling_prob=prob,
            steps=times,
        )
    target = _checks.positive(target_epsilon=target_epsilon)
    search = _search(problem, target, noise, prob, times, examples)
    best = _upper(problem.before, delta, neighboring) if problem.before else 0.0
    if best > target:
        raise CalibrationInfeasible(
            f"target_epsilon={target!r} cannot be reached at delta={delta!r}: the phases before training alone cost "
            f"{best:.4g}, the best that any {search.name} can reach"
        )
    return search.solution()


def noise_multiplier_for(
    *,
    target_epsilon: float,
    delta: float,
    sampling_prob: float,
    steps: int,
    neighboring: str = "add_or_remove_one",
    before: Sequence[Phase] = (),
) -> float:
    r"""Returns the smallest noise multiplier, to about 0.1 % of epsilon, that keeps a run within its target.

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
        >>> print(f"{sigma:.1f}")
        1.4
    """
    return calibrate(
        target_epsilon=_checks.positive(target_epsilon=target_epsilon),
        delta=delta,
        sampling_prob=_checks.probability(sampling_prob=sampling_prob),
        steps=_checks.whole(at_least=1, steps=steps),
        neighboring=neighboring,
        before=before,
    ).noise_multiplier


def _sampling(prob: float | None, batch: float | None, examples: int | None) -> float | None:
    """The sampling probability that was given in one way or the other; None if it is open."""
    if prob is not None and batch is not None:
        raise ValueError(f"give sampling_prob={prob!r} or expected_batch_size={batch!r}, not both")
    if prob is not None:
        return _checks.probability(sampling_prob=prob)
    if batch is None:
        return None
    batch = _checks.positive(expected_batch_size=batch)
    if examples is None:
        raise ValueError(f"expected_batch_size={batch!r} needs num_examples")
    if batch > examples:
        raise ValueError(f"expected_batch_size={batch!r} must not exceed num_examples={examples!r}")
    return batch / examples


def _search(
    problem: _Problem, target: float, noise: float | None, prob: float | None, steps: int | None, examples: int | None
) -> _Search:
    """The one setting that is open, written as a number x in which epsilon never falls."""
    if noise is None and prob is not None and steps is not None:
        q, times = prob, steps
        limits = (1 / _LARGEST_NOISE, 1 / _SMALLEST_NOISE)
        guess = _guess_of_precision(problem, target, q, times)
        return _Search(problem, target, "noise_multiplier", lambda x: (1 / x, q, times), limits, False, guess)
    if noise is not None and prob is not None and steps is None:
        sigma, q = noise, prob
        guess = (_guess_of_rate(problem, target, sigma, q) / q) ** 2
        return _Search(problem, target, "steps", lambda x: (sigma, q, int(x)), (1, MOST_STEPS), True, guess)
    if noise is not None and prob is None and steps is not None:
        sigma, times = noise, steps
        guess = _guess_of_rate(problem, target, sigma, 0.5) / math.sqrt(times)
        if examples is None:
            limits = (_SMALLEST_PROB, 1.0)
            return _Search(problem, target, "sampling_prob", lambda x: (sigma, x, times), limits, False, guess)
        limits, most = (1.0, float(examples)), examples
        name = "expected_batch_size"
        return _Search(problem, target, name, lambda x: (sigma, x / most, times), limits, True, guess * examples)
    raise ValueError(_LEAVE_OUT)


def _guess_of_precision(problem: _Problem, target: float, prob: float, steps: int) -> float:
    """1 / noise from the central limit theorem, in closed form: a place to start, never a result."""
    scale = 2.0 if problem.neighboring == "replace_one" else 1.0
    mu = 1 / gaussian.noise_multiplier(target, problem.delta)
    if prob == 1:
        return mu / math.sqrt(steps) / scale
    return min(math.sqrt(math.log1p((mu / prob) ** 2 / steps)), 1 / 0.3) / scale


def _guess_of_rate(problem: _Problem, target: float, noise: float, prob: float) -> float:
    """Sampling probability times the root of the number of steps, likewise."""
    scale = 2.0 if problem.neighboring == "replace_one" else 1.0
    mu = 1 / gaussian.noise_multiplier(target, problem.delta)
    square = (scale / noise) ** 2
    return mu / math.sqrt(square if prob == 1 else math.expm1(min(square, 600.0)))


@dataclass(frozen=True, slots=True)
class _Search:
    """The largest x within limits whose run has upper <= target; epsilon never falls in x."""

    problem: _Problem
    target: float
    name: str
    setting: Callable[[float], tuple[float, float, int]]
    limits: tuple[float, float]
    whole: bool
    guess: float

    def solution(self) -> Calibration:
        """Checks with the very function that will state the claim; steps back where a float accident demands it."""
        x = self._largest()
        while True:
            noise, prob, steps = self.setting(x)
            bound = epsilon(self.problem.parts(noise, prob, steps), self.problem.delta, self.problem.neighboring)
            if bound.upper <= self.target:
                return Calibration(
                    parameter=self.name,
                    value=1 / x if self.name == "noise_multiplier" else (int(x) if self.whole else x),
                    bound=bound,
                    noise_multiplier=noise,
                    sampling_prob=prob,
                    steps=steps,
                )
            if x <= self.limits[0]:
                raise self._infeasible(x, bound.upper)
            x = self._inside(x - 1 if self.whole else x / (1 + _PRECISION / 10))

    def _largest(self) -> float:
        """Starts where the estimate points, then follows the upper bound itself."""
        x, slope = self._near(self._inside(self.guess))
        points: list[tuple[float, float]] = []
        safe, unsafe = 0.0, math.inf
        while True:
            value = self.problem.upper(*self.setting(x))
            points.append((x, value))
            if value <= self.target:
                safe = max(safe, x)
            else:
                unsafe = min(unsafe, x)
            if unsafe <= self.limits[0]:
                raise self._infeasible(unsafe, value)
            if safe and self._good_enough(value, safe, unsafe):
                return safe
            x = self._inside(self._next(points, slope, safe, unsafe))

    def _good_enough(self, value: float, safe: float, unsafe: float) -> bool:
        close = self.target * (1 - _PRECISION) <= value <= self.target
        finest = unsafe - safe <= 1 if self.whole else unsafe <= safe * (1 + _PRECISION / 3)
        return safe >= self.limits[1] or finest or (close and not self.whole) or (close and safe > 1000)

    def _next(self, points: list[tuple[float, float]], slope: float, safe: float, unsafe: float) -> float:
        """A step along the slope on a log-log scale, kept inside the bracket; every fourth one halves the bracket."""
        x, value = points[-1]
        if len(points) > 1 and all(math.isfinite(point[1]) and point[1] > 0 for point in points[-2:]):
            (x0, y0), (x1, y1) = points[-2:]
            if x0 != x1 and y0 != y1:
                slope = min(max(math.log(y1 / y0) / math.log(x1 / x0), 0.2), 1e4)
        if math.isfinite(value) and value > 0 and len(points) % 4:
            change = (math.log(self.target * _AIM) - math.log(value)) / slope
            found = x * math.exp(min(max(change, -2.0), 2.0))
            if self.whole:  # the neighbours of the bracket's ends, where the step falls on them
                found = min(max(math.floor(found), safe + 1), unsafe - 1)
            if safe < found < unsafe:
                return found
        if safe and math.isfinite(unsafe):
            if self.whole:
                return (int(safe) + int(unsafe)) // 2
            return math.sqrt(safe * unsafe)
        return unsafe / 2 if math.isfinite(unsafe) else safe * 2

    def _near(self, guess: float) -> tuple[float, float]:
        """Where the estimate meets the target, with d log epsilon / d log x there; the guess where it fails."""
        from scipy.optimize import brentq

        goal = math.log(self.target * _AIM)

        def off(log_x: float) -> float:
            found = self.problem.estimate(*self.setting(self._inside(math.exp(log_x))))
            if math.isnan(found):
                raise Unavailable("no estimate")
            return math.log(max(found, 1e-9)) - goal

        least, most = map(math.log, self.limits)
        low = high = math.log(guess)
        try:
            here = off(low)
            while here > 0 and low > least:
                high, low = low, max(least, low - min(max(here, 0.05), 1.0))
                here = off(low)
            if low == high:
                while here < 0 and high < most:
                    low, high = high, min(most, high + min(max(-here, 0.05), 1.0))
                    here = off(high)
            if off(low) * off(high) >= 0:
                return self._inside(math.exp(low if here > 0 else high)), 1.0
            root = float(brentq(off, low, high, xtol=2e-5))
            slope = (off(root + 0.02) - off(root - 0.02)) / 0.04
        except Unavailable:
            return guess, 1.0
        return self._inside(math.exp(root)), min(max(slope, 0.2), 1e4)

    def _inside(self, x: float) -> float:
        x = min(max(x, self.limits[0]), self.limits[1])
        return float(math.floor(x + 1e-9)) if self.whole else x

    def _infeasible(self, x: float, cost: float) -> CalibrationInfeasible:
        value = 1 / x if self.name == "noise_multiplier" else x
        return CalibrationInfeasible(
            f"target_epsilon={self.target!r} cannot be reached at delta={self.problem.delta!r}: even "
            f"{self.name}={value:.3g} costs {cost:.4g}"
        )


def _upper(parts: _Parts, delta: float, neighboring: str) -> float:
    """The same upper end that `epsilon` reports, without the lower one."""
    return max(engines.upper_epsilon(choice, delta, neighboring)[0] for choice in alternatives(parts))
