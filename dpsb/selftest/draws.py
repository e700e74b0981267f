"""Checks of the sampling: each row on its own with probability q, in every step anew, empty draws kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dpsb.selftest.result import ERROR_RATE, Check, at_most, not_tested
from dpsb.selftest.step import Step

_ROWS, _STEPS = 400, 400
_NAMES = ("draw_rate", "draw_sizes", "draw_repeats", "draw_same", "draw_subsets", "draw_empty", "draw_rerun")


def check_draws(step: Step, rows: int = _ROWS, steps: int = _STEPS) -> Iterator[Check]:
    """The checks of ``draw``: each fails true Poisson sampling with probability at most about ``ERROR_RATE``.

    Args:
      step: What is tested.
      rows: Length of the data set that is drawn from.
      steps: Number of draws.
    """
    if step.draw is None or step.sampling_prob is None:
        for name in _NAMES:
            yield not_tested(name, "the step gives no draw")
        return
    q = step.sampling_prob
    drawn = [list(step.draw(rows)) for _ in range(steps)]
    odd = sum(len(set(one)) != len(one) or any(not 0 <= i < rows for i in one) for one in drawn)
    yield at_most("draw_subsets", odd, 0, "every draw holds each row at most once")
    table = np.zeros((steps, rows), dtype=bool)
    for number, one in enumerate(drawn):
        table[number, [i for i in one if 0 <= i < rows]] = True
    yield _rate(table, q)
    yield _dispersion("draw_sizes", table.sum(axis=1), rows, q, "sizes of draws vary as independent coins make them")
    yield _dispersion("draw_repeats", table.sum(axis=0), steps, q, "how often a row is drawn varies as in fresh coins")
    yield _same(drawn, rows, q)
    yield _empty(step.draw, q)
    if step.fresh_draw is None:
        yield not_tested("draw_rerun", "the step gives no way to make a new run")
    else:
        first, second = (
            {(t, i) for t in range(20) for i in draw(rows)} for draw in (step.fresh_draw(), step.fresh_draw())
        )
        expected, spread = 20 * rows * q * q, math.sqrt(20 * rows * q * q)
        limit = expected + 6 * spread + 6
        same = len(first & second)
        passed = same <= limit or q > 0.9
        yield Check(
            name="draw_rerun",
            passed=passed,
            figure=same,
            limit=f"<= {limit:.4g}",
            detail="two runs, or two processes of one run, draw different rows",
        )


def _rate(table: np.ndarray, q: float) -> Check:
    from scipy.stats import binom

    count, size = int(table.sum()), table.size
    low, high = binom.ppf(ERROR_RATE / 2, size, q) / size, binom.isf(ERROR_RATE / 2, size, q) / size
    return Check(
        name="draw_rate",
        passed=bool(low <= count / size <= high),
        figure=count / size,
        limit=f"{low:.4f} to {high:.4f}",
        detail="share of rows in a draw",
    )


def _dispersion(name: str, counts: np.ndarray, trials: int, q: float, detail: str) -> Check:
    """Variance of counts that should be Binomial(trials, q), divided by the binomial variance."""
    from scipy.stats import norm

    if q >= 1.0:
        return Check(name=name, passed=bool((counts == trials).all()), figure=None, limit="all", detail=detail)
    variance = trials * q * (1 - q)
    excess = (1 - 6 * q * (1 - q)) / variance  # kurtosis of a binomial, beyond a normal's
    spread = math.sqrt((2 + excess) / len(counts))
    ratio = float(np.mean((counts - trials * q) ** 2) / variance)
    reach = float(norm.isf(ERROR_RATE / 2)) + 1.5  # a sum of squares has a heavier upper tail than a normal
    low, high = max(0.0, 1 - reach * spread), 1 + reach * spread
    return Check(name=name, passed=low <= ratio <= high, figure=ratio, limit=f"{low:.3f} to {high:.3f}", detail=detail)


def _same(drawn: Sequence[Sequence[int]], rows: int, q: float) -> Check:
    """How often one whole draw equals another; by chance that does not happen where there are enough rows."""
    by_chance = len(drawn) ** 2 / 2 * (q**2 + (1 - q) ** 2) ** rows
    if by_chance > ERROR_RATE:
        return not_tested("draw_same", "with this q equal draws occur by chance")
    same = len(drawn) - len({tuple(sorted(one)) for one in drawn})
    return at_most("draw_same", same, 0, "no draw is that of another step over again")


def _empty(draw: Callable[[int], Sequence[int]], q: float) -> Check:
    from scipy.stats import binom

    detail = "draws of nobody occur as often as they should, and are not dropped or filled up"
    if q > 0.5:
        return not_tested("draw_empty", "with this q draws of nobody hardly occur")
    few = max(1, round(math.log(0.4) / math.log1p(-q)))
    expected, tries = (1 - q) ** few, 200
    empty = sum(len(list(draw(few))) == 0 for _ in range(tries))
    low, high = binom.ppf(ERROR_RATE / 2, tries, expected), binom.isf(ERROR_RATE / 2, tries, expected)
    return Check(
        name="draw_empty",
        passed=bool(low <= empty <= high),
        figure=empty / tries,
        limit=f"{low / tries:.3f} to {high / tries:.3f}",
        detail=detail,
    )
