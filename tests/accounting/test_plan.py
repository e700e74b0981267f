import json
import math
import re

import pytest
from plans import STEP, make_plan, two_phases

from dpsb_accounting import Gaussian, NonPrivate, Phase, Plan, PoissonGaussian


def non_private_plan(**changes):
    fields = {
        "phases": (Phase("train", NonPrivate(reason="no noise"), 10),),
        "target_epsilon": math.inf,
        "l2_clip_norm": math.inf,
        "clipping": "none",
        "delta": 0.5,
    }
    return make_plan(**{**fields, **changes})


@pytest.mark.parametrize("plan", [make_plan(), two_phases(), non_private_plan(), make_plan(l2_clip_norm=0.1 + 0.2)])
def test_plan_survives_json_exactly(plan):
    data = json.loads(json.dumps(plan.to_json(), allow_nan=False))
    assert Plan.from_json(data) == plan


def test_properties():
    plan = two_phases()
    assert plan.train.count == plan.steps == 10
    assert plan.noise_multiplier == 1.0
    assert plan.noise_std == 0.5
    assert plan.is_private
    assert non_private_plan().noise_std == 0.0
    assert not non_private_plan().is_private
    assert make_plan(phases=(Phase("train", Gaussian(noise_multiplier=2), 1),), sampling_prob=1).sampling_prob == 1.0


def test_the_plan_keeps_its_own_copy_of_mappings():
    details = {"labels": ["ham"]}
    plan = make_plan(details=details)
    details["labels"].append("spam")
    plan.to_json()["details"]["labels"].append("eggs")
    assert plan.details == {"labels": ["ham"]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"delta": 1 / 20_000}, "delta=5e-05 must be less than 1 / num_examples"),
        ({"delta": 0}, "delta"),
        ({"num_examples_declared": False}, "zero_out"),
        ({"num_examples_declared": 1}, "num_examples_declared"),
        ({"neighboring": "swap"}, "neighboring"),
        ({"unit": "silo"}, "unit"),
        ({"sampling_prob": 0.02}, "sampling_prob=0.02 must equal"),
        ({"l2_clip_norm": math.inf}, "l2_clip_norm=inf"),
        ({"l2_clip_norm": -1}, "l2_clip_norm"),
        ({"clipping": "none"}, "clipping='none'"),
        ({"clipping": "ghost"}, "clipping"),
        ({"target_epsilon": 0}, "target_epsilon"),
        ({"expected_batch_size": 0.5}, "expected_batch_size"),
        ({"num_examples": 0}, "num_examples"),
        ({"phases": ()}, "'train'"),
        ({"phases": (Phase("train", STEP, 1), Phase("train", STEP, 1))}, "different names"),
        ({"phases": [STEP]}, "phases must be a tuple of Phase"),
        ({"basis": {"kind": "raw", "access": "non_private"}}, "NonPrivate phase"),
        ({"basis": {"kind": "raw", "access": "released"}}, "pays for it"),
        ({"basis": {"kind": "raw", "access": "secret"}}, "access"),
        ({"basis": {"access": "public"}}, "kind"),
        ({"details": {"x": {1, 2}}}, "details"),
        ({"details": {"x": math.nan}}, "details"),
        ({"details": {1: 2}}, "details"),
    ],
)
def test_contradictions_are_refused_with_the_reason(changes, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        make_plan(**changes)


@pytest.mark.parametrize("norm", [5e-324, 9e-101, 1.1e100, 1e308])
@pytest.mark.parametrize("make", [make_plan, two_phases])
def test_noise_that_floats_cannot_hold_is_refused(make, norm):
    with pytest.raises(ValueError, match=re.escape(f"l2_clip_norm={norm!r}") + ".*between 1e-100 and 1e\\+100"):
        make(l2_clip_norm=norm)


def test_the_noise_counts_and_not_the_norm_alone():
    assert make_plan(l2_clip_norm=1e-100).noise_std == 1e-100
    assert make_plan(l2_clip_norm=1e100).noise_std == 1e100
    for noise, norm in ((1e-45, 1e-60), (1e45, 1e60), (1e45, 1e300)):
        phases = (Phase("train", Gaussian(noise_multiplier=noise), 1),)
        with pytest.raises(ValueError, match="l2_clip_norm"):
            make_plan(phases=phases, sampling_prob=1, l2_clip_norm=norm)
    assert non_private_plan(l2_clip_norm=1e-300).l2_clip_norm == 1e-300


def test_delta_is_free_where_nothing_is_private():
    assert non_private_plan(delta=0.9).delta == 0.9


def test_undeclared_numbers_keep_the_size_fixed():
    for neighboring in ("zero_out", "replace_one"):
        assert not make_plan(num_examples_declared=False, neighboring=neighboring).num_examples_declared


def test_a_gaussian_train_event_needs_sampling_prob_one():
    with pytest.raises(ValueError, match="must be 1"):
        make_plan(phases=(Phase("train", Gaussian(noise_multiplier=1), 10),))


@pytest.mark.parametrize("name", ["phases", "delta", "basis"])
def test_json_lacking_a_field_is_refused(name):
    data = make_plan().to_json()
    del data[name]
    with pytest.raises(ValueError, match=f"lacks fields: '{name}'"):
        Plan.from_json(data)


def test_json_with_an_unknown_field_is_refused():
    for data in ({**make_plan().to_json(), "extra": 1}, [], None):
        with pytest.raises(ValueError):
            Plan.from_json(data)


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "3"])
def test_a_phase_needs_a_count(count):
    with pytest.raises(ValueError, match="count"):
        Phase("train", PoissonGaussian(noise_multiplier=1, sampling_prob=0.1), count)
