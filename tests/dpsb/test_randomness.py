"""The random source: uniform, normal, never repeated, never saved, blind to every global generator."""

import copy
import os
import pickle
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy import stats

from dpsb.randomness import SeededRandomness, SystemRandomness

SOURCES = (SystemRandomness, lambda: SeededRandomness(1))


def test_seeded_repeats_and_taints():
    assert SeededRandomness(3).tainted
    assert np.array_equal(SeededRandomness(3).words(10), SeededRandomness(3).words(10))
    assert not np.array_equal(SeededRandomness(3).words(10), SeededRandomness(4).words(10))
    source = SeededRandomness(3)
    assert not np.array_equal(source.words(10), source.words(10))


def test_system_never_repeats():
    assert not SystemRandomness.tainted
    one, other = SystemRandomness(), SystemRandomness()
    draws = np.concatenate([one.words(500), one.words(500), other.words(500)])
    assert len(np.unique(draws)) == 1500


def test_threads_that_share_a_source_draw_different_words():
    source, begin = SystemRandomness(), threading.Barrier(4)

    def draw(_number):
        begin.wait()
        return [int(source.words(1)[0]) for _ in range(2000)]

    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            drawn = [word for words in pool.map(draw, range(4)) for word in words]
    finally:
        sys.setswitchinterval(usual)
    assert len(set(drawn)) == 8000


def test_global_seeds_change_nothing():
    """Peers' fault: noise drawn from a global generator that some library seeds with 42."""
    seen = []
    for _ in range(2):
        torch.manual_seed(42)
        np.random.seed(42)  # noqa: NPY002 - that is the point
        random.seed(42)
        seen.append(SystemRandomness().normal(100))
    assert not torch.equal(*seen)
    torch.manual_seed(42)
    expected = torch.randn(3)
    torch.manual_seed(42)
    SystemRandomness().normal(1000)
    SeededRandomness(0).normal(1000)
    assert torch.equal(torch.randn(3), expected)


def in_child(function):
    """What ``function`` prints as bytes in a forked process."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - another process
        try:
            answer = function()
        except BaseException as error:  # noqa: BLE001
            answer = f"{type(error).__name__}: {error}".encode()
        os.write(write_end, answer)
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as stream:
        answer = stream.read()
    os.waitpid(child, 0)
    return answer


def test_forked_processes_draw_different_words():
    source = SystemRandomness()
    source.words(1)
    first, second = (in_child(lambda: source.words(8).tobytes()) for _ in range(2))
    own = source.words(8).tobytes()
    assert len(first) == 64
    assert len({first, second, own}) == 3


def test_seeded_source_refuses_to_be_forked():
    source = SeededRandomness(1)
    assert b"RuntimeError: SeededRandomness was carried into a forked process" in in_child(
        lambda: source.words(1).tobytes()
    )


@pytest.mark.parametrize("make", SOURCES)
@pytest.mark.parametrize("leak", [pickle.dumps, copy.copy, copy.deepcopy])
def test_cannot_be_saved_or_copied(make, leak):
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        leak(make())


def test_key_is_erased_after_every_read():
    source = SeededRandomness(9)
    keys, words = [source._stream._key], []
    for _ in range(5):
        words.append(source.words(4).tobytes())
        keys.append(source._stream._key)
    assert len(set(keys)) == 6
    assert len(set(words)) == 5
    assert not any(key in word or word in key for key in keys for word in words)


def test_large_reads():
    """One read spans several blocks of 1 MiB."""
    words = SeededRandomness(2).words((3 << 20) // 8 + 5)
    assert len(words) == (3 << 20) // 8 + 5
    assert len(np.unique(words)) == len(words)
    assert np.array_equal(words[:1000], SeededRandomness(2).words(1000))
    assert len(SeededRandomness(2).words(0)) == 0


def test_words_are_uniform():
    words = SeededRandomness(5).words(100_000)
    assert stats.kstest(words.astype(np.float64) / 2.0**64, "uniform").pvalue > 1e-3
    for bit in range(64):
        ones = int(((words >> np.uint64(bit)) & np.uint64(1)).sum())
        assert abs(ones - 50_000) < 5 * np.sqrt(25_000)


def test_normals():
    values = SeededRandomness(6).normal(400_000).numpy()
    assert values.dtype == np.float64
    assert stats.kstest(values, "norm").pvalue > 1e-3
    assert stats.kstest(values * 1.02, "norm").pvalue < 1e-6  # the test has power
    for edge in (2.0, 3.0, 4.0):
        expected = 2 * stats.norm.sf(edge) * len(values)
        assert abs((np.abs(values) > edge).sum() - expected) < 5 * np.sqrt(expected)
    assert np.isfinite(values).all()
    assert len(np.unique(values)) == len(values)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_normals_of_any_count(count):
    assert SystemRandomness().normal(count).shape == (count,)


def test_halves_of_a_box_muller_pair_and_successive_calls_are_independent():
    source = SeededRandomness(8)
    one, other = source.normal(200_000).numpy(), source.normal(200_000).numpy()
    half = len(one) // 2
    for a, b in (
        (one, other),
        (one[:half], one[half:]),
        (one[:half] ** 2, one[half:] ** 2),
        (one[:-1], one[1:]),
    ):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(len(a))


def test_extreme_words_give_finite_normals():
    source = SeededRandomness(0)
    for word in (0, 2**64 - 1):
        source.words = lambda count, word=word: np.full(count, word, dtype=np.uint64)
        values = source.normal(4)
        assert bool(torch.isfinite(values).all())
        assert float(values.abs().max()) < 9.6


def test_bernoulli():
    source = SeededRandomness(4)
    assert source.bernoulli(1000, 1.0).all()
    assert not source.bernoulli(1000, 0.0).any()
    assert source.bernoulli(0, 0.3).shape == (0,)
    assert source.bernoulli(10, 0.5).dtype == bool
    assert abs(source.bernoulli(200_000, 0.3).mean() - 0.3) < 5 * np.sqrt(0.21 / 200_000)
    assert not source.bernoulli(1000, 2.0**-80).any()
    assert source.bernoulli(1000, 1 - 2.0**-53).all()
    assert source.bernoulli(10, np.float64(0.5)).shape == (10,)


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_bernoulli_refuses(probability):
    with pytest.raises(ValueError, match="probability="):
        SystemRandomness().bernoulli(1, probability)


def test_bernoulli_threshold_is_exact():
    """A coin is true when its word is below floor(p * 2**64): never more likely than stated."""
    source = SeededRandomness(0)
    numerator, denominator = (0.3).as_integer_ratio()
    limit = (numerator << 64) // denominator
    words = np.array([limit - 1, limit, limit + 1], dtype=np.uint64)
    source.words = lambda count: words[:count]
    assert source.bernoulli(3, 0.3).tolist() == [True, False, False]
