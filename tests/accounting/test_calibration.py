import json
import math
import random
import time

import pytest
from plans import BASIS, STEP

from dpsb_accounting import (
    Calibration,
    CalibrationInfeasible,
    NonPrivate,
    Phase,
    PoissonGaussian,
    calibrate,
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


RUN = {"noise_multiplier": 1.0, "sampling_prob": 0.01, "steps": 1000}


def checked(found, target):
    """The bound is the accountant's own for the very settings returned, and within the target."""
    event = PoissonGaussian(noise_multiplier=found.noise_multiplier, sampling_prob=found.sampling_prob)
    assert isinstance(found, Calibration)
    assert found.bound == epsilon([(event, found.steps)], found.bound.delta, found.bound.neighboring)
    assert found.bound.upper <= target
    return found


@pytest.mark.parametrize("name", ["noise_multiplier", "steps", "sampling_prob"])
def test_each_setting_is_solved_for(name):
    target = epsilon([(STEP, 1000)], 1e-5).upper * (1 + 1e-3)
    given = {key: value for key, value in RUN.items() if key != name}
    found = checked(calibrate(target_epsilon=target, delta=1e-5, **given), target)
    assert found.parameter == name
    assert found.value == getattr(found, name) == pytest.approx(RUN[name], rel=3e-3)
    assert found.bound.upper >= target * (1 - 2e-3)


def test_steps_are_whole_and_the_next_one_is_too_many():
    event = PoissonGaussian(noise_multiplier=2, sampling_prob=0.1)
    found = checked(calibrate(target_epsilon=1, delta=1e-5, noise_multiplier=2, sampling_prob=0.1), 1)
    assert isinstance(found.value, int)
    assert epsilon([(event, found.steps + 1)], 1e-5).upper > 1


def test_an_expected_batch_size_is_whole_and_the_next_one_is_too_large():
    found = checked(calibrate(target_epsilon=2, delta=1e-5, noise_multiplier=1, steps=1000, num_examples=4000), 2)
    assert found.parameter == "expected_batch_size"
    assert isinstance(found.value, int)
    assert found.sampling_prob == found.value / 4000
    larger = PoissonGaussian(noise_multiplier=1, sampling_prob=(found.value + 1) / 4000)
    assert epsilon([(larger, 1000)], 1e-5).upper > 2


def test_a_batch_size_in_place_of_a_probability():
    given = {"target_epsilon": 2, "delta": 1e-5, "steps": 1000}
    by_batch = calibrate(**given, expected_batch_size=40, num_examples=4000)
    assert by_batch == calibrate(**given, sampling_prob=0.01)


def test_epsilon_at_given_noise():
    found = calibrate(delta=1e-5, **RUN)
    assert (found.parameter, found.value) == ("epsilon", found.bound.upper)
    assert found.bound == epsilon([(STEP, 1000)], 1e-5)


def test_limits_are_answers_where_they_keep_the_target():
    every = calibrate(target_epsilon=50, delta=1e-5, noise_multiplier=10, steps=3)
    assert (every.parameter, every.value) == ("sampling_prob", 1.0)
    batch = calibrate(target_epsilon=50, delta=1e-5, noise_multiplier=10, steps=3, num_examples=500)
    assert (batch.parameter, batch.value) == ("expected_batch_size", 500)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"noise_multiplier": 0.5, "sampling_prob": 1}, "even steps=1 costs"),
        ({"noise_multiplier": 0.5, "steps": 1000, "num_examples": 20}, "even expected_batch_size=1 costs"),
    ],
)
def test_what_cannot_be_reached_is_said_with_the_least(given, words):
    with pytest.raises(CalibrationInfeasible, match=words):
        calibrate(target_epsilon=1, delta=1e-5, **given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({**RUN, "target_epsilon": 1}, "leave out exactly one"),
        ({"target_epsilon": 1, "steps": 10}, "leave out exactly one"),
        ({"steps": 10, "noise_multiplier": 1}, "leave out exactly one"),
        ({**RUN, "expected_batch_size": 3}, "not both"),
        ({"noise_multiplier": 1, "steps": 10, "expected_batch_size": 3}, "needs num_examples"),
        ({"noise_multiplier": 1, "steps": 10, "expected_batch_size": 30, "num_examples": 20}, "must not exceed"),
        ({**RUN, "noise_multiplier": -1}, "noise_multiplier must be greater than 0, not -1"),
        ({**RUN, "steps": 1.5}, "steps must be a whole number, not 1.5"),
        ({**RUN, "neighboring": "x"}, "neighboring"),
    ],
)
def test_what_does_not_fit_together_is_named(given, words):
    with pytest.raises(ValueError, match=words):
        calibrate(delta=1e-5, **given)


@pytest.mark.slow
def test_a_wrong_estimate_costs_time_and_never_privacy(monkeypatch):
    """The neighbourhood comes from an estimate: seeded with a bug, the certified bound must still decide."""
    from dpsb_accounting.engines import quadrature
    from dpsb_accounting.engines.answer import Answer

    def third(*_):
        return Answer(engine="quadrature", lower=0.0, upper=0.7, rigorous=False, method="bug")

    monkeypatch.setattr(quadrature, "epsilon", third)
    for missing in RUN:
        given = {key: value for key, value in RUN.items() if key != missing}
        checked(calibrate(target_epsilon=2, delta=1e-5, **given), 2)


def _random_cases(count):
    source = random.Random(7)
    for _ in range(count):
        yield {
            "target_epsilon": 10 ** source.uniform(-2, 2),
            "delta": 10 ** source.uniform(-10, -3),
            "sampling_prob": 10 ** source.uniform(-4, 0),
            "steps": round(10 ** source.uniform(0, 5)),
            "neighboring": source.choice(("add_or_remove_one", "zero_out", "replace_one")),
        }


@pytest.mark.slow
@pytest.mark.parametrize("case", _random_cases(30), ids=lambda case: f"{case['target_epsilon']:.3g}")
def test_any_target_calibrates(case):
    started = time.process_time()
    found = checked(calibrate(**case), case["target_epsilon"])
    print(json.dumps({**case, "noise": found.value, "seconds": time.process_time() - started}))
    event = PoissonGaussian(noise_multiplier=found.value * (1 - 3e-3), sampling_prob=case["sampling_prob"])
    tight = found.bound.upper >= case["target_epsilon"] * (1 - 1e-3)
    assert tight or epsilon([(event, case["steps"])], case["delta"], case["neighboring"]).upper > case["target_epsilon"]
