"""Forty fixed questions of the benchmark's grid: all engines overlap, the bounds are tight, full batches are exact."""

import importlib.util
import itertools
import math
from pathlib import Path

import pytest

from dpsb_accounting.engines.answer import Unavailable

FILE = Path(__file__).parents[1] / "benchmarks" / "accountant_grid.py"
spec = importlib.util.spec_from_file_location("accountant_grid", FILE)
accountant_grid = importlib.util.module_from_spec(spec)
spec.loader.exec_module(accountant_grid)

SUBSET = accountant_grid.grid()[:40]
FAST = 8
CASES = [pytest.param(row, marks=[pytest.mark.slow] if place >= FAST else []) for place, row in enumerate(SUBSET)]


def answered(row, names):
    found = {}
    for name in names:
        try:
            low, high, *_ = accountant_grid.ask(row, name)
        except Unavailable:
            continue
        found[name] = (low, high)
    return found


def check_overlap(found):
    for (one, (low, high)), (other, (low2, high2)) in itertools.combinations(found.items(), 2):
        slack = 1e-9 + accountant_grid.TOLERANCE * min(high, high2)
        assert low <= high2 + slack, (one, other)
        assert low2 <= high + slack, (one, other)


def test_the_subset_covers_the_grid():
    assert len(set(SUBSET)) == 40
    for values, wanted in zip(
        zip(*SUBSET, strict=True),
        (accountant_grid.NOISE, accountant_grid.PROBS, accountant_grid.STEPS, accountant_grid.DELTAS),
        strict=True,
    ):
        assert set(values) == set(wanted)


@pytest.mark.parametrize("row", CASES)
def test_engines_overlap_and_the_bounds_are_tight(row):
    found = answered(row, ("dpsb", "quadrature", "rdp"))
    check_overlap(found)
    low, high = found["dpsb"]
    assert 0 <= low <= high
    assert math.isfinite(high)
    if 0.05 <= high <= 20:
        assert high - low <= max(0.01 * high, 0.005)


@pytest.mark.parametrize("row", [row for row in SUBSET if row.sampling_prob == 1])
def test_full_batches_are_one_exact_gaussian(row):
    exact = accountant_grid.exact_gaussian(row.noise_multiplier / math.sqrt(row.steps), row.delta)
    low, high = answered(row, ("dpsb",))["dpsb"]
    assert low <= exact <= high
    assert high - exact <= 1e-6 * exact


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in SUBSET if row.sampling_prob < 1][:12])
def test_prv_accountant_overlaps_too(row):
    check_overlap(answered(row, ("dpsb", "quadrature", "prv")))


def test_the_central_limit_fails_this_test():
    """The check itself must notice an engine that is no bound."""
    row = accountant_grid.Row(0.5, 1e-4, 1000, 1e-9)
    with pytest.raises(AssertionError):
        check_overlap(answered(row, ("dpsb", "gdp_clt")))
