"""The rule of adaptive clipping and the scaled rows, number by number: every sign, bound and unit in them."""

import math
from dataclasses import replace

import pytest
import torch

from dpsb import mechanism as core
from dpsb.mechanism import AdaptiveClip, Mechanism, centred_count

RULE = AdaptiveClip(quantile=0.3, learning_rate=0.2, count_noise_std=4.0, expected_batch_size=10)
NUMBERS = {"l2_clip_norm": 2.0, "noise_multiplier": 3.0}


def adaptive(**changes):
    return Mechanism(**{**NUMBERS, "clipping": "adaptive", "adaptive": RULE, **changes})


@pytest.mark.parametrize("effective", [0.5, 1.0, 3.0, 7.9])
def test_noise_of_gradient_and_count_together_is_the_plans(effective):
    z = RULE.gradient_noise_multiplier(effective)
    assert z**-2 + (2 * 4.0) ** -2 == pytest.approx(effective**-2, rel=1e-12)
    assert z > effective


@pytest.mark.parametrize("effective", [8.0, 9.0, 100.0])
def test_a_count_with_too_little_noise_leaves_none_for_the_gradient(effective):
    with pytest.raises(ValueError, match=r"count_noise_std=4\.0 to exceed half the noise multiplier"):
        RULE.gradient_noise_multiplier(effective)


@pytest.mark.parametrize(
    ("count", "share"), [(0.0, 0.5), (2.0, 0.7), (-2.0, 0.3), (5.0, 1.0), (-5.0, 0.0), (80.0, 1.0), (-80.0, 0.0)]
)
def test_where_c_goes(count, share):
    assert RULE.next_clip_norm(2.0, count) == pytest.approx(2.0 * math.exp(-0.2 * (share - 0.3)), rel=1e-12)


def test_c_stays_an_ordinary_number():
    largest = core._LARGEST_CLIP_NORM
    wild = replace(RULE, learning_rate=1e3)
    assert wild.next_clip_norm(1.0, -50.0) == largest
    assert wild.next_clip_norm(1.0, 50.0) == 1 / largest


def test_the_count_of_rows_within_c():
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [math.nan, 0.0], [math.inf, 0.0]])
    assert centred_count(rows, 2.0).tolist() == [0.5], "two within, one beyond, two that do not count"
    assert centred_count(rows[:2], 2.0).tolist() == [1.0], "a row of length C is within"
    assert centred_count(rows[:0], 2.0).tolist() == [0.0]
    assert centred_count(rows, 2.0).dtype == torch.float64


@pytest.mark.parametrize("index", range(4))
def test_a_row_that_is_zeroed_out_moves_sum_and_count_as_one_that_is_removed(index):
    """zero_out and add_or_remove_one are charged alike; with a half for a row of zeros the count would move by one."""
    mechanism, rows = adaptive(), torch.tensor([[9.0, 0.0], [0.0, 1e-3], [3.0, -4.0], [0.0, 0.0]])
    zeroed, removed = rows.clone(), torch.cat([rows[:index], rows[index + 1 :]])
    zeroed[index] = 0.0
    torch.testing.assert_close(mechanism.clip_and_sum(zeroed), mechanism.clip_and_sum(removed), rtol=0, atol=0)
    moved = mechanism.clip_and_sum(rows) - mechanism.clip_and_sum(zeroed)
    assert float(moved.norm()) <= mechanism.noise_std * math.hypot(1 / 3.0, 1 / (2 * 4.0)) * (1 + 1e-6)


def test_the_count_does_not_depend_on_how_rows_are_cut(monkeypatch):
    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    whole = centred_count(rows, 1.5)
    for numbers in (1, 2, 7):
        monkeypatch.setattr(core, "_CHUNK_NUMBERS", numbers)
        assert torch.equal(centred_count(rows, 1.5), whole)


def test_sum_and_count_stand_side_by_side_and_come_apart_again():
    mechanism = adaptive()
    rows = torch.tensor([[1.0, 0.0], [0.0, 4.0], [0.5, 0.5]])
    total = mechanism.clip_and_sum(rows)
    unit = mechanism.noise_std / 4.0
    assert mechanism.zeros(2).shape == total.shape == (3,)
    assert mechanism.zeros(3).shape == (4,)
    torch.testing.assert_close(total, torch.tensor([1.5, 2.5, 0.5 * unit], dtype=torch.float64))
    vector, moved = mechanism.read(total)
    assert vector.tolist() == pytest.approx([1.5, 2.5])
    assert moved.l2_clip_norm == pytest.approx(RULE.next_clip_norm(2.0, 0.5))
    assert (moved.noise_multiplier, moved.adaptive) == (3.0, RULE)
    assert mechanism.moving_clip_norm == 2.0


def test_a_fixed_c_neither_counts_nor_moves():
    flat = Mechanism(**NUMBERS, clipping="flat")
    assert flat.zeros(2).shape == (2,)
    total = flat.clip_and_sum(torch.tensor([[1.0, 0.0]]))
    assert flat.read(total) == (total, flat)
    assert flat.moving_clip_norm is None


def test_scale_is_the_factor_of_flat_clipping():
    norms = torch.tensor([1.0, 4.0, math.inf, math.nan], dtype=torch.float64)
    for mechanism in (adaptive(), Mechanism(**NUMBERS, clipping="flat")):
        assert mechanism.scale(norms).tolist() == [1.0, 0.5, 0.0, 0.0]
    automatic = Mechanism(**NUMBERS, clipping="automatic").scale(norms)
    assert automatic.tolist() == pytest.approx([2.0 / 1.01, 2.0 / 4.01, 0.0, 0.0], rel=1e-6)


@pytest.mark.parametrize(("rule", "clipping"), [(None, "adaptive"), (RULE, "flat")])
def test_the_rule_is_there_exactly_for_adaptive(rule, clipping):
    with pytest.raises(ValueError, match="exactly for clipping 'adaptive'"):
        Mechanism(**NUMBERS, clipping=clipping, adaptive=rule)


# --- rows in another scale


def test_rows_are_scaled_before_they_are_clipped():
    scale = torch.tensor([2.0, 0.5], dtype=torch.float64)
    mechanism = Mechanism(l2_clip_norm=5.0, noise_multiplier=1.0, clipping="flat", row_scale=scale)
    rows = torch.tensor([[1.5, 8.0], [30.0, 0.0]])
    assert mechanism.clip_and_sum(rows).tolist() == pytest.approx([8.0, 4.0]), "(3, 4) whole, (60, 0) cut to (5, 0)"


@pytest.mark.parametrize("odd", [0.0, -1.0, math.nan, math.inf])
def test_scales_are_positive_and_finite(odd):
    scale = torch.tensor([1.0, odd], dtype=torch.float64)
    with pytest.raises(ValueError, match="row_scale to be positive and finite"):
        Mechanism(**NUMBERS, clipping="flat", row_scale=scale)


@pytest.mark.parametrize(("noise", "norm"), [(1e-300, 1.0), (1e300, 1e20), (0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0)])
def test_noise_is_of_ordinary_size(noise, norm):
    with pytest.raises(ValueError, match="positive and of ordinary size"):
        Mechanism(l2_clip_norm=norm, noise_multiplier=noise, clipping="flat")
