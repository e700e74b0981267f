"""The private core: sensitivity for any rows whatever, noise of exactly the right size, one way out."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpsb import mechanism as core
from dpsb.mechanism import AUTOMATIC_GAMMA, Mechanism, clip_and_sum
from dpsb.randomness import SeededRandomness, SystemRandomness

ANY_NUMBER = st.one_of(
    st.floats(width=32),  # NaN, infinities, subnormals, huge values
    st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45, 1e-30]),
    st.floats(-10, 10, width=32),
)
ROWS = st.integers(1, 5).flatmap(
    lambda d: st.lists(st.lists(ANY_NUMBER, min_size=d, max_size=d), min_size=1, max_size=7)
)


@given(
    rows=ROWS,
    which=st.integers(0, 6),
    norm=st.sampled_from([1e-3, 1.0, 7.0]),
    rule=st.sampled_from(["flat", "automatic"]),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_removing_one_row_moves_the_sum_by_at_most_the_clip_norm(rows, which, norm, rule):
    rows = torch.tensor(rows, dtype=torch.float32)
    which %= len(rows)
    neighbour = torch.cat([rows[:which], rows[which + 1 :]])
    moved = clip_and_sum(rows, norm, rule) - clip_and_sum(neighbour, norm, rule)
    assert float(moved.norm()) <= norm * (1 + 1e-12)


@given(rows=ROWS, rule=st.sampled_from(["flat", "automatic", "none"]))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_rows_that_are_not_finite_contribute_exactly_zero(rows, rule):
    """Peers' fault: one example with a NaN or infinite loss destroys all weights."""
    rows = torch.tensor(rows, dtype=torch.float32)
    usable = rows[torch.isfinite(rows).all(dim=1)]
    got = clip_and_sum(rows, 1.0, rule)
    assert bool(torch.isfinite(got).all())
    torch.testing.assert_close(got, clip_and_sum(usable, 1.0, rule), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", ["flat", "automatic"])
def test_nan_rows_alone_give_zero(rule):
    rows = torch.tensor([[math.nan, 1.0], [math.inf, -math.inf], [1.0, math.inf]])
    assert torch.equal(clip_and_sum(rows, 1.0, rule), torch.zeros(2, dtype=torch.float64))


def test_float64_rows_whose_norm_overflows():
    rows = torch.tensor([[1e300, 1e300], [1e-300, 0.0]], dtype=torch.float64)
    for rule in ("flat", "automatic"):
        assert float(clip_and_sum(rows, 1.0, rule).norm()) <= 1 + 1e-12


def test_flat_clipping_is_its_formula():
    rows = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).double()
    norms = rows.norm(dim=1)
    expected = sum(g * min(1.0, 2.5 / float(n)) for g, n in zip(rows, norms, strict=True))
    assert 0 < int((norms < 2.5).sum()) < 50
    torch.testing.assert_close(clip_and_sum(rows, 2.5), expected, rtol=1e-13, atol=1e-13)


def test_automatic_clipping_is_its_formula():
    """AUTO-S: g C / (|g| + 0.01)."""
    rows = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).double() * torch.logspace(-5, 2, 50)[:, None]
    expected = sum(g * 2.5 / (float(g.norm()) + 0.01) for g in rows)
    assert AUTOMATIC_GAMMA == 0.01
    torch.testing.assert_close(clip_and_sum(rows, 2.5, "automatic"), expected, rtol=1e-13, atol=1e-13)


def test_no_clipping_is_the_plain_sum():
    rows = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) * 100
    torch.testing.assert_close(clip_and_sum(rows, math.inf, "none"), rows.double().sum(dim=0))


@pytest.mark.parametrize("rule", ["flat", "automatic", "none"])
def test_no_rows_give_zero(rule):
    got = clip_and_sum(torch.zeros(0, 6), 1.0, rule)
    assert torch.equal(got, torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize("rule", ["flat", "automatic"])
def test_chunks_and_calls_do_not_change_the_sum(rule, monkeypatch):
    rows = torch.randn(101, 13, generator=torch.Generator().manual_seed(0)) * 3
    whole = clip_and_sum(rows, 1.0, rule)
    in_calls = sum(clip_and_sum(part, 1.0, rule) for part in rows.split(17))
    monkeypatch.setattr(core, "_CHUNK_NUMBERS", 30)
    in_chunks = clip_and_sum(rows, 1.0, rule)
    for other in (in_calls, in_chunks):
        torch.testing.assert_close(other, whole, rtol=0, atol=1e-13)


def test_sums_are_kept_in_float64():
    """Peers' fault: a bf16 running sum of 1000 x 0.5 gives 128, and clipped norms exceed C."""
    rows = torch.full((1000, 1), 0.5, dtype=torch.bfloat16)
    assert clip_and_sum(rows, 1.0).tolist() == [500.0]
    row = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert float(clip_and_sum(row, 1.0).norm()) <= 1 + 1e-12


@pytest.mark.parametrize("norm", [0.0, -1.0, math.inf, math.nan])
def test_refuses_a_clip_norm(norm):
    with pytest.raises(ValueError, match="l2_clip_norm="):
        clip_and_sum(torch.zeros(1, 1), norm)


def test_refuses_an_unknown_rule():
    with pytest.raises(ValueError, match="clipping='per_layer'"):
        clip_and_sum(torch.zeros(1, 1), 1.0, "per_layer")


# --- release


def gaussian(noise_multiplier=2.0, l2_clip_norm=0.5, clipping="flat"):
    return Mechanism(l2_clip_norm=l2_clip_norm, noise_multiplier=noise_multiplier, clipping=clipping)


def noise(mechanism, count, randomness):
    return mechanism.release(torch.zeros(count, dtype=torch.float64), randomness)


def fits(values, std):
    return stats.kstest(values.numpy() / std, "norm").pvalue > 1e-4


def test_noise_has_the_stated_size_and_no_other():
    """The test also rejects noise that is 10 % too small or too large."""
    mechanism = gaussian(noise_multiplier=3.0, l2_clip_norm=0.25)
    assert mechanism.noise_std == 0.75
    values = noise(mechanism, 60_000, SeededRandomness(1))
    assert fits(values, 0.75)
    for wrong in (0.9, 1.1):
        assert not fits(values, wrong * 0.75)
        assert not fits(noise(gaussian(3.0 * wrong, 0.25), 60_000, SeededRandomness(2)), 0.75)


def test_noise_is_added_to_the_sum():
    total = torch.linspace(-3, 3, 40_000, dtype=torch.float64)
    released = gaussian(1.0, 1.0).release(total, SeededRandomness(3))
    assert released.dtype == torch.float64
    assert fits(released - total, 1.0)


def test_noise_of_two_releases_differs():
    mechanism, source = gaussian(), SystemRandomness()
    one, two = noise(mechanism, 1000, source), noise(mechanism, 1000, source)
    assert not torch.equal(one, two)
    assert abs(float(np.corrcoef(one.numpy(), two.numpy())[0, 1])) < 0.2


def test_noise_of_two_default_sources_differs():
    """Peers' fault: two default runs have bit-identical noise."""
    one, two = (noise(gaussian(), 1000, SystemRandomness()) for _ in range(2))
    assert abs(float(np.corrcoef(one.numpy(), two.numpy())[0, 1])) < 0.2


def test_global_seeds_do_not_reach_the_noise():
    """Peers' fault: the initializer seeds torch with 42 right before training: the noise is public."""
    seen = []
    for _ in range(2):
        torch.manual_seed(42)
        np.random.seed(42)  # noqa: NPY002 - that is the point
        random.seed(42)
        seen.append(noise(gaussian(), 100, SystemRandomness()))
    assert not torch.equal(*seen)


@pytest.mark.parametrize("noise_std", [1e-6, 0.75, 1.0, 3e5])
def test_released_values_lie_on_the_grid(noise_std):
    """opacus#616: a secure mode that says nothing of floats; here noise is float64 and its sum is rounded to a grid."""
    mechanism = gaussian(noise_std, 1.0)
    total = torch.randn(5000, generator=torch.Generator().manual_seed(0)).double() * 10 * noise_std
    released = mechanism.release(total, SeededRandomness(5))
    grid = 2.0 ** (math.floor(math.log2(noise_std)) - 20)
    assert torch.equal(released / grid, torch.round(released / grid))
    assert float(((released / grid) % 2).mean()) == pytest.approx(0.5, abs=0.05)  # no coarser grid


def test_rounding_is_small_beside_the_noise():
    mechanism, total = gaussian(1.0, 1.0), torch.zeros(1000, dtype=torch.float64)
    exact = SeededRandomness(6).normal(1000)
    assert float((mechanism.release(total, SeededRandomness(6)) - exact).abs().max()) <= 2.0**-21


@pytest.mark.parametrize(
    "total", [torch.zeros(3), torch.zeros(3, 1, dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
)
def test_release_refuses_other_shapes_and_types(total):
    with pytest.raises(ValueError, match="float64"):
        gaussian().release(total, SystemRandomness())


def test_without_noise_the_sum_is_copied():
    total = torch.ones(3, dtype=torch.float64)
    released = Mechanism(l2_clip_norm=math.inf, noise_multiplier=0.0, clipping="none").release(
        total, SystemRandomness()
    )
    assert torch.equal(released, total)
    assert released is not total


def test_numbers_come_from_the_plan():
    from dpsb_accounting import Phase, Plan, PoissonGaussian

    plan = Plan(
        phases=(Phase("train", PoissonGaussian(noise_multiplier=1.5, sampling_prob=0.1), 10),),
        delta=1e-5,
        target_epsilon=3.0,
        neighboring="add_or_remove_one",
        num_examples=100,
        num_examples_declared=True,
        expected_batch_size=10,
        sampling_prob=0.1,
        l2_clip_norm=0.5,
        clipping="automatic",
        basis={"kind": "random", "access": "data_free"},
    )
    mechanism = Mechanism.from_plan(plan)
    assert (mechanism.l2_clip_norm, mechanism.noise_multiplier, mechanism.clipping) == (0.5, 1.5, "automatic")
    assert mechanism.noise_std == plan.noise_std == 0.75
    rows = torch.tensor([[3.0, 4.0]])
    assert torch.equal(mechanism.clip_and_sum(rows), clip_and_sum(rows, 0.5, "automatic"))


def test_an_autocast_around_it_changes_nothing():
    """Because it is float64, which no autocast touches: bf16 in this product would move the sum by more than C."""
    rows = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    exact = clip_and_sum(rows, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(clip_and_sum(rows, 0.5), exact)
