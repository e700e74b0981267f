import math

import pytest
from plans import BASIS, STEP

from dpsb_accounting import (
    CalibrationInfeasible,
    NonPrivate,
    Phase,
    PoissonGaussian,
    epsilon,
    noise_multiplier_for,
)

CASES = [
    (1, 0.01, 1000, 1e-5, "add_or_remove_one"),
    (8, 0.01, 1000, 1e-5, "zero_out"),
    (3, 0.05, 500, 1e-6, "replace_one"),
    (3, 1, 100, 1e-5, "replace_one"),
    (0.01, 0.01, 1000, 1e-10, "add_or_remove_one"),
    (0.01, 0.5, 10_000, 1e-3, "add_or_remove_one"),
    (100, 0.5, 1000, 1e-3, "add_or_remove_one"),
    (0.01, 1e-4, 100_000, 1e-10, "add_or_remove_one"),
]
SLOW = [
    (100, 0.01, 1000, 1e-10, "add_or_remove_one"),
    (3, 0.001, 20_000, 1e-6, "add_or_remove_one"),
    (100, 0.001, 10, 1e-3, "replace_one"),
    (0.01, 0.001, 1, 1e-3, "add_or_remove_one"),
    (100, 0.1, 100_000, 1e-10, "add_or_remove_one"),
]


def check_round_trip(target, prob, steps, at, neighboring, before=()):
    noise = noise_multiplier_for(
        target_epsilon=target, delta=at, sampling_prob=prob, steps=steps, neighboring=neighboring, before=before
    )

    def upper(noise):
        event = PoissonGaussian(noise_multiplier=noise, sampling_prob=prob)
        return epsilon([*before, (event, steps)], at, neighboring).upper

    assert upper(noise) <= target
    assert upper(noise * (1 - 3e-3)) > target or upper(noise) >= target * (1 - 1e-3)
    return noise


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case):
    check_round_trip(*case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_round_trip_in_the_corners(case):
    check_round_trip(*case)


def test_what_was_spent_before_needs_more_noise():
    alone = check_round_trip(2, 0.01, 1000, 1e-5, "add_or_remove_one")
    after = check_round_trip(2, 0.01, 1000, 1e-5, "add_or_remove_one", (Phase("basis", BASIS, 1),))
    assert after > alone


def test_reference_noise():
    noise = noise_multiplier_for(target_epsilon=1.828237, delta=1e-5, sampling_prob=0.01, steps=1000)
    assert noise == pytest.approx(1.0, rel=2e-3)


def test_it_is_deterministic():
    first, second = (noise_multiplier_for(target_epsilon=2, delta=1e-5, sampling_prob=0.1, steps=50) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("before", [Phase("basis", STEP, 100_000), Phase("basis", NonPrivate(reason="raw"), 1)])
def test_an_unreachable_target_is_named_with_the_best(before):
    with pytest.raises(CalibrationInfeasible, match=r"target_epsilon=3.0 .* cost (25.57|inf)"):
        noise_multiplier_for(target_epsilon=3, delta=1e-5, sampling_prob=0.01, steps=10, before=(before,))


@pytest.mark.parametrize(
    "changes",
    [{"target_epsilon": 0}, {"target_epsilon": math.inf}, {"delta": 1}, {"sampling_prob": 0}, {"steps": 0}],
)
def test_bad_arguments_are_named(changes):
    arguments = {"target_epsilon": 1, "delta": 1e-5, "sampling_prob": 0.1, "steps": 10, **changes}
    with pytest.raises(ValueError, match=next(iter(changes))):
        noise_multiplier_for(**arguments)
    with pytest.raises(ValueError, match="neighboring"):
        noise_multiplier_for(target_epsilon=1, delta=1e-5, sampling_prob=0.1, steps=10, neighboring="x")
