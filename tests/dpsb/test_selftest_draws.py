"""Checks of sampling and of traces: correct ones pass, each seeded fault is found by the check that is named."""

import os

import numpy as np
import pytest
import torch

from dpsb.randomness import SystemRandomness
from dpsb.sampling import poisson_draw
from dpsb.selftest import Step
from dpsb.selftest.draws import check_draws
from dpsb.selftest.files import PLANTED, check_no_trace

Q = 0.1


def system_draw():
    randomness = SystemRandomness()
    return lambda n: poisson_draw(n, Q, randomness).tolist()


def checks(make, q=Q):
    step = Step(
        name="sampler",
        l2_clip_norm=1.0,
        clipped_sum=lambda _: torch.zeros(1),
        sampling_prob=q,
        draw=make(),
        fresh_draw=make,
    )
    return list(check_draws(step))


def test_correct_sampling_passes():
    found = checks(system_draw)
    assert all(check.passed for check in found), found


# --- the sampling


def no_empty_draws():
    draw = system_draw()

    def until_somebody(n):
        while not (found := draw(n)):
            pass
        return found

    return until_somebody


def shuffled():
    """Slices of a shuffled data set, as ordinary loaders make them."""
    source, left = np.random.default_rng(), {}

    def draw(n):
        size = max(1, round(Q * n))
        if len(left.get(n, ())) < size:
            left[n] = source.permutation(n).tolist()
        found, left[n] = left[n][:size], left[n][size:]
        return found

    return draw


def fixed_size():
    source = np.random.default_rng()
    return lambda n: source.choice(n, max(1, round(Q * n)), replace=False).tolist()


def with_replacement():
    source = np.random.default_rng()
    return lambda n: source.choice(n, source.binomial(n, Q)).tolist()


def more_often():
    randomness = SystemRandomness()
    return lambda n: poisson_draw(n, 1.1 * Q, randomness).tolist()


def in_blocks():
    """One coin for ten neighbours."""
    randomness = SystemRandomness()

    def draw(n):
        coins = np.repeat(randomness.bernoulli(-(-n // 10), Q), 10)[:n]
        return np.flatnonzero(coins).tolist()

    return draw


def favourites():
    """Some rows always, the others less often."""
    randomness = SystemRandomness()

    def draw(n):
        coins = randomness.bernoulli(n, Q / 2)
        coins[: round(n * Q / 2)] = True
        return np.flatnonzero(coins).tolist()

    return draw


def now_and_then_again():
    """Every twentieth draw is the one before."""
    honest, seen = system_draw(), []

    def draw(n):
        seen.append(seen[-1] if len(seen) % 20 == 19 and max(seen[-1], default=0) < n else honest(n))
        return seen[-1]

    return draw


def ranks_alike():
    source = np.random.default_rng(0)
    return lambda n: np.flatnonzero(source.random(n) < Q).tolist()


DRAWS = {
    "empty draws dropped": (no_empty_draws, "draw_empty"),
    "shuffled instead of Poisson": (shuffled, "draw_sizes"),
    "batches of a fixed size": (fixed_size, "draw_sizes"),
    "with replacement": (with_replacement, "draw_subsets"),
    "q times 1.1": (more_often, "draw_rate"),
    "one coin for ten rows": (in_blocks, "draw_sizes"),
    "some rows always": (favourites, "draw_repeats"),
    "now and then the same draw again": (now_and_then_again, "draw_same"),
    "ranks draw alike": (ranks_alike, "draw_rerun"),
}


@pytest.mark.parametrize("fault", DRAWS)
def test_faults_of_the_sampling_are_found(fault):
    make, named = DRAWS[fault]
    assert named in {check.name for check in checks(make) if check.passed is False}


def test_full_batches_pass():
    assert not [check for check in checks(lambda: range, q=1.0) if check.passed is False]


# --- traces of the data


def leaves_nothing(data, out):
    out.mkdir()
    (out / "adapter.bin").write_bytes(b"numbers")


def keeps_a_copy(data, out):
    out.mkdir()
    (out / "cache").mkdir()
    (out / "cache" / "rows.jsonl").write_bytes(data.read_bytes())


def prints_a_row(data, out):
    out.mkdir()
    os.write(2, data.read_bytes()[:4000])  # as a library in another language would


@pytest.mark.parametrize("labels", [("no", "yes"), ()])
def test_a_planted_string_is_found_wherever_it_is(labels):
    assert [check.passed for check in check_no_trace(leaves_nothing, labels)] == [True]
    for fault in (keeps_a_copy, prints_a_row):
        assert [check.name for check in check_no_trace(fault, labels) if check.passed is False] == ["no_trace"]
    assert PLANTED not in str([check for check in check_no_trace(leaves_nothing, labels)])
