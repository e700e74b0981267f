"""Whole numbers modulo 2^32 and the Skellam noise in them: rounding, bounds, and the law that is accounted for."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from dpsb.federated.checks import FederatedError
from dpsb.federated.secure.whole_numbers import clip_steps_for, modular, round_sum, share_mean, skellam, to_real
from dpsb.federated.spec import RoundSpec
from dpsb.randomness import SeededRandomness, SystemRandomness


def spec(**changes):
    usual = {"run_id": "a" * 32, "round": 0, "rounds": 3, "theta_sha256": "b" * 64, "basis_sha256": "c" * 64}
    asked = {"model": "secagg", "sampling_prob": 0.1, "noise_multiplier": 1.0, "clip_steps": 2**15}
    return RoundSpec(**{**usual, **asked, "clients": 5, "dropouts": 1, "colluders": 1, **changes})


def test_rounding_moves_no_further_than_it_is_accounted_for():
    source = np.random.default_rng(0)
    for _ in range(200):
        rest, row = source.normal(size=50) * 3, source.normal(size=50)
        row /= np.linalg.norm(row)
        one = round_sum(torch.from_numpy(rest), 1.0, 64, 3)
        two = round_sum(torch.from_numpy(rest + row), 1.0, 64, 3)
        assert float(np.linalg.norm(two - one)) <= 64 + math.sqrt(50)


def test_coordinates_are_bounded_so_that_a_sum_does_not_wrap():
    huge = torch.tensor([1e300, -1e300, 0.5])
    vectors = [round_sum(huge, 1.0, 2**15, 3)] * 3
    found = to_real(modular(sum(vectors)), 1.0, 2**15)
    assert float(found[0]) > 0
    assert float(found[1]) < 0
    assert float(found[2]) == 1.5


def test_real_and_whole_are_inverses():
    total = torch.linspace(-40, 40, 1001, dtype=torch.float64)
    back = to_real(modular(round_sum(total, 0.5, 2**20, 3)), 0.5, 2**20)
    torch.testing.assert_close(back, total, rtol=0, atol=0.5 * 0.5 / 2**20 * 1.001)


@pytest.mark.parametrize("mean", [1024, 20_000, 10**9, 10**13])
def test_noise_has_the_law_of_skellam_and_no_other(mean):
    found = skellam(200_000, mean, SystemRandomness())
    wide = math.sqrt(2 * mean)
    if mean > 1024:  # where whole numbers are fine enough for a law of real ones
        assert stats.kstest(found / wide, "norm").pvalue > 1e-6
    assert stats.kstest(found / wide * 1.05, "norm").pvalue < 1e-6, "five per cent more noise would be seen"
    assert float(found.var()) == pytest.approx(2 * mean, rel=0.03)
    assert abs(float(found.mean())) < 5 * wide / math.sqrt(len(found))


def test_noise_point_by_point():
    """Chi-squared against the exact probabilities, which a wrong variance fails."""
    mean, count = 1024, 200_000
    found = skellam(count, mean, SystemRandomness())
    edges = np.arange(-150, 151)
    seen = np.array([(found == edge).sum() for edge in edges])
    for variance, right in ((2 * mean, True), (2 * mean * 0.95, False)):
        wanted = stats.skellam.pmf(edges, variance / 2, variance / 2) * count
        rest = count - wanted.sum()
        statistic = float(((seen - wanted) ** 2 / wanted).sum() + (count - seen.sum() - rest) ** 2 / rest)
        assert (stats.chi2.sf(statistic, len(edges)) > 1e-6) == right


def test_shares_that_are_certainly_there_make_up_the_stated_variance():
    asked = spec(clients=5, dropouts=1, colluders=1)
    wanted = (asked.noise_multiplier * asked.clip_steps) ** 2
    assert wanted <= asked.honest * 2 * share_mean(asked) <= wanted + 2 * asked.honest
    total = sum(skellam(40_000, share_mean(asked), SeededRandomness(i)) for i in range(asked.honest))
    assert float(total.var()) == pytest.approx(wanted, rel=0.03)
    with pytest.raises(FederatedError, match="must be between 2048"):
        share_mean(spec(clip_steps=8))


def test_whole_numbers_are_fine_enough_or_refused():
    for dimension, batch in ((100, 64), (10_000, 1000), (1_000_000, 300)):
        steps = clip_steps_for(dimension, batch, 4.0)
        assert steps >= 8 * math.sqrt(dimension)
        assert steps * (2 * batch + 32) < 2**31
    assert clip_steps_for(10_000, 64, 1.0) == 2**17
    with pytest.raises(FederatedError, match="does not fit into 32 bits"):
        clip_steps_for(10_000_000, 100_000, 1.0)
