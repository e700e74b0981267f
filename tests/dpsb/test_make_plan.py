"""The plan: one object from a handful of numbers, and never more epsilon than asked for."""

import math

import pytest

from dpsb.plan import cost_table, make_plan, plan_summary
from dpsb_accounting import Gaussian, NonPrivate, Phase, PoissonGaussian, epsilon

USUAL = {"epsilon": 3.0, "delta": 1e-4, "num_examples": 1000, "expected_batch_size": 100, "steps": 20}


def test_one_object_says_the_same_everywhere():
    plan = make_plan(**USUAL)
    assert plan.sampling_prob == 0.1
    assert plan.train == Phase("train", PoissonGaussian(noise_multiplier=plan.noise_multiplier, sampling_prob=0.1), 20)
    assert (plan.neighboring, plan.clipping, plan.l2_clip_norm) == ("add_or_remove_one", "flat", 1.0)
    assert epsilon(plan).upper <= 3
    assert epsilon(plan).upper > 2.98, "no noise is wasted"
    assert type(plan).from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("epochs", "num_examples", "batch", "steps"),
    [(1, 1000, 100, 10), (0.95, 1000, 100, 10), (3, 93, 31, 9), (1, 7, 2, 4)],
)
def test_steps_of_epochs_are_rounded_up(epochs, num_examples, batch, steps):
    sizes = {"num_examples": num_examples, "expected_batch_size": batch, "steps": None, "epochs": epochs}
    assert make_plan(**{**USUAL, **sizes}, noise_multiplier=1.0).steps == steps


def test_an_undeclared_number_changes_the_relation():
    plan = make_plan(**USUAL, num_examples_declared=False)
    assert plan.neighboring == "zero_out"
    with pytest.raises(ValueError, match="needs num_examples_declared"):
        make_plan(**USUAL, num_examples_declared=False, neighboring="add_or_remove_one")


def test_replacing_costs_more_noise():
    assert make_plan(**USUAL, neighboring="replace_one").noise_multiplier > 1.1 * make_plan(**USUAL).noise_multiplier


def test_what_was_released_before_is_paid_for():
    before = (Phase("basis", Gaussian(noise_multiplier=4.0), 1),)
    plan = make_plan(**USUAL, released_before=before, basis={"kind": "private", "access": "released"})
    assert plan.noise_multiplier > make_plan(**USUAL).noise_multiplier
    assert epsilon(plan).upper <= 3


def test_epsilon_infinite_is_no_private_plan():
    plan = make_plan(**{**USUAL, "epsilon": math.inf})
    assert isinstance(plan.train.event, NonPrivate)
    assert (plan.is_private, plan.noise_multiplier, plan.clipping) == (False, 0.0, "none")
    summary = plan_summary(plan)
    assert (summary["epsilon"]["upper"], summary["target_epsilon"], summary["l2_clip_norm"]) == ("inf", "inf", "inf")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"steps": None}, "exactly one of steps=None and epochs=None"),
        ({"epochs": 2.0}, "exactly one of"),
        ({"steps": 0}, "steps=0"),
        ({"steps": None, "epochs": 0.0}, "epochs=0.0"),
        ({"expected_batch_size": 0}, "expected_batch_size=0"),
        ({"expected_batch_size": 1001}, "expected_batch_size=1001"),
        ({"delta": 1e-3}, "must be less than 1 / num_examples"),
        ({"delta": 0.0}, "delta"),
        ({"neighboring": "other"}, "neighboring"),
        ({"clipping": "none"}, "bounds nothing"),
        ({"l2_clip_norm": -1.0}, "l2_clip_norm"),
        ({"basis": {"kind": "x", "access": "non_private"}}, "needs a NonPrivate phase"),
    ],
)
def test_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        make_plan(**{**USUAL, "noise_multiplier": 1.0, **changes})


def test_the_cost_table_keeps_the_passes_over_the_data():
    plan = make_plan(**USUAL)
    rows = cost_table(plan)
    assert [row["expected_batch_size"] for row in rows] == [50, 100, 200, 400]
    assert [row["steps"] for row in rows] == [40, 20, 10, 5]
    assert rows[1]["noise_multiplier"] == plan.noise_multiplier
    noise = [row["noise_multiplier"] for row in rows]
    assert noise == sorted(noise)
    assert all(row["noise_per_step"] == row["noise_multiplier"] / row["expected_batch_size"] for row in rows)
