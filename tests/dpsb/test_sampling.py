"""Draws are real Poisson sampling; microbatches change memory and speed, never the sum."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpsb.data import Collator
from dpsb.mechanism import clip_and_sum
from dpsb.randomness import SeededRandomness, SystemRandomness
from dpsb.sampling import DEFAULT_BUCKETS, bucket_of, length_buckets, microbatches, poisson_draw


def draws(count, num_rows, q, seed=0):
    source = SeededRandomness(seed)
    return [poisson_draw(num_rows, q, source) for _ in range(count)]


def looks_independent(samples, num_rows, q):
    """Sizes are binomial (chi-square) and pairs are drawn together as often as q*q says (z test)."""
    sizes = np.bincount([len(s) for s in samples], minlength=num_rows + 1)
    expected = stats.binom.pmf(np.arange(num_rows + 1), num_rows, q) * len(samples)
    use = expected >= 5
    observed = np.append(sizes[use], sizes[~use].sum())
    expected = np.append(expected[use], expected[~use].sum())
    p_sizes = stats.chisquare(observed, expected).pvalue
    per_draw = np.array([len(s) * (len(s) - 1) / 2 for s in samples])
    mean = q * q * num_rows * (num_rows - 1) / 2
    z = (per_draw.mean() - mean) / max(per_draw.std(ddof=1) / np.sqrt(len(samples)), 1e-9)
    return p_sizes > 1e-4 and abs(z) < 4


def test_inclusion_rate_of_every_row():
    samples = draws(4000, 50, 0.2)
    counts = np.bincount(np.concatenate(samples), minlength=50)
    assert stats.chisquare(counts, np.full(50, counts.sum() / 50)).pvalue > 1e-4
    assert abs(counts.sum() - 4000 * 50 * 0.2) < 5 * np.sqrt(4000 * 50 * 0.16)


def test_rows_are_included_independently():
    assert looks_independent(draws(4000, 40, 0.1), 40, 0.1)


def test_shuffled_batches_of_fixed_size_are_told_apart():
    """Peers' fault: shuffled batches accounted as Poisson. The test above has the power to see it."""
    generator = np.random.default_rng(0)
    shuffled = [batch for _ in range(400) for batch in generator.permutation(40).reshape(10, 4)]
    assert not looks_independent(shuffled, 40, 0.1)


def test_dropped_empty_draws_are_told_apart():
    """Peers' fault: empty draws dropped or replaced, so that the number of steps depends on the data."""
    kept = [s for s in draws(4000, 40, 0.1) if len(s)]
    assert not looks_independent(kept, 40, 0.1)


def test_empty_draws_occur_at_their_rate():
    samples = draws(5000, 10, 0.1)
    empty = sum(len(s) == 0 for s in samples)
    expected = 5000 * 0.9**10
    assert abs(empty - expected) < 5 * np.sqrt(expected)
    assert all(s.dtype == np.int64 for s in samples)


def test_size_is_binomial_for_a_large_data_set():
    sizes = np.array([len(s) for s in draws(400, 20_000, 0.01)])
    assert abs(sizes.mean() - 200) < 5 * np.sqrt(198 / 400)
    assert 0.8 < sizes.var(ddof=1) / 198 < 1.25


def test_successive_draws_are_independent():
    samples = draws(3000, 30, 0.3)
    drawn = np.zeros((3000, 30))
    for i, sample in enumerate(samples):
        drawn[i, sample] = 1
    assert abs(np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]) < 5 / np.sqrt(drawn[1:].size)


def test_ends_of_the_range():
    source = SystemRandomness()
    assert poisson_draw(7, 1.0, source).tolist() == list(range(7))
    assert poisson_draw(0, 0.5, source).tolist() == []
    assert poisson_draw(7, 0.0, source).tolist() == []
    with pytest.raises(ValueError, match="probability"):
        poisson_draw(7, 1.5, source)


def test_draws_ascend_without_repeats_and_differ():
    source = SystemRandomness()
    one, other = poisson_draw(1000, 0.3, source), poisson_draw(1000, 0.3, source)
    assert (np.diff(one) > 0).all()
    assert not np.array_equal(one, other)


BUCKETS = (16, 24, 32, 48, 64)


@given(
    lengths=st.lists(st.integers(1, 64), max_size=60),
    budget=st.integers(1, 500),
    q=st.sampled_from([0.0, 0.3, 1.0]),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_microbatches_partition_the_draw(lengths, budget, q):
    padded = np.array([bucket_of(n, BUCKETS) for n in lengths], dtype=np.int64)
    draw = poisson_draw(len(lengths), q, SeededRandomness(len(lengths)))
    parts = list(microbatches(draw, padded, budget))
    members = np.concatenate([indices for indices, _ in parts]) if parts else np.array([], dtype=np.int64)
    assert sorted(members) == draw.tolist()
    for indices, length in parts:
        assert len(indices) >= 1
        assert len(indices) == 1 or len(indices) * length <= budget
        assert all(length == bucket_of(lengths[i], BUCKETS) for i in indices)
    assert [length for _, length in parts] == sorted((length for _, length in parts), reverse=True)


@given(length=st.integers(1, 64), others=st.lists(st.integers(1, 64), max_size=20), budget=st.integers(1, 300))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_padded_length_depends_on_the_own_length_only(length, others, budget):
    def padded_to(neighbours):
        padded = np.array([bucket_of(n, BUCKETS) for n in [length, *neighbours]], dtype=np.int64)
        draw = np.arange(len(padded))
        return next(size for indices, size in microbatches(draw, padded, budget) if 0 in indices)

    assert padded_to(others) == padded_to([])


def test_empty_draw_has_no_microbatch():
    assert list(microbatches(np.array([], dtype=np.int64), np.array([16, 16]), 100)) == []


def test_refusals():
    with pytest.raises(ValueError, match="token_budget=0"):
        list(microbatches(np.array([0]), np.array([16]), 0))
    with pytest.raises(ValueError, match="max_length=0"):
        length_buckets(0)
    with pytest.raises(ValueError, match="truncate"):
        bucket_of(65, BUCKETS)


@given(max_length=st.integers(1, 10_000))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_buckets_ascend_to_max_length(max_length):
    buckets = length_buckets(max_length)
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] == max_length
    assert bucket_of(max_length, buckets) == max_length


def clipped_sums(tiny, budgets, recompute):
    """The clipped sum of one draw under several token budgets, from the same or from recomputed rows."""
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 15, 17, 9, 30, 28, 5, 22, 16, 31, 2, 12]
    examples = [
        {"input_ids": torch.randint(3, tiny.vocab, (n,), generator=generator).tolist(), "labels": i % 3}
        for i, n in enumerate(lengths)
    ]
    padded = np.array([bucket_of(n, BUCKETS) for n in lengths], dtype=np.int64)
    adapter, collate, loss_fn = tiny.adapter(tiny.base("bert")), Collator(0), tiny.loss["bert"]

    def rows(indices):
        by_length = [(i, int(padded[i])) for i in indices]
        assert len({length for _, length in by_length}) == 1
        return tiny.rows(adapter, loss_fn, collate([examples[i] for i in indices], by_length[0][1]))

    fixed = {i: rows([i])[0] for i in range(len(examples))}
    norm = float(torch.stack(list(fixed.values())).norm(dim=1).median())
    sums = []
    for budget in budgets:
        total = torch.zeros(adapter.dimension, dtype=torch.float64)
        for indices, _ in microbatches(np.arange(len(examples)), padded, budget):
            part = rows(indices) if recompute else torch.stack([fixed[int(i)] for i in indices])
            total += clip_and_sum(part, norm)
        sums.append(total)
    return sums, norm


def test_token_budget_does_not_change_the_sum(tiny):
    """Memory knob: the same rows give the same sum to float64 rounding."""
    (one, *others), _ = clipped_sums(tiny, (1, 64, 100, 10_000), recompute=False)
    for other in others:
        assert tiny.distance(one, other) <= 1e-14


def test_token_budget_does_not_change_recomputed_rows(tiny):
    """Recomputed rows agree to 1e-5 C in fp32."""
    (one, *others), norm = clipped_sums(tiny, (1, 64, 100, 10_000), recompute=True)
    for other in others:
        assert float((one - other).norm()) <= 1e-5 * norm


def test_the_buckets_are_powers_of_two_and_halfway_between():
    """Public constants, in every plan's details: a changed one makes another plan."""
    wanted = sorted({2**k for k in range(4, 14)} | {3 * 2**k for k in range(3, 12)})
    assert list(DEFAULT_BUCKETS) == wanted


@pytest.mark.parametrize("length", [0, -3])
def test_there_is_no_bucket_for_no_token(length):
    with pytest.raises(ValueError, match="of at least 1 token"):
        length_buckets(length)
    assert length_buckets(1) == (1,)
