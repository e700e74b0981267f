import json
import math

import pytest
from dp_accounting import dp_event as dp
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation

from dpsb_accounting import (
    Composed,
    MatrixMechanism,
    NonPrivate,
    Parallel,
    PoissonGaussian,
    PureEpsilon,
    epsilon,
    event_from_dp_json,
    event_to_dp_json,
    from_dp_event,
    to_dp_event,
)
from dpsb_accounting._dp_out import FIELDS

GAUSSIAN = {"type": "GaussianDpEvent", "noise_multiplier": 1}
STEP = dp.PoissonSampledDpEvent(0.01, dp.GaussianDpEvent(1.0))

# Every class of dp-accounting 0.6, one of each; those that come back as the very same object.
SAME = [
    dp.NonPrivateDpEvent(),
    dp.GaussianDpEvent(2.0),
    dp.LaplaceDpEvent(3.0),
    dp.DiscreteLaplaceDpEvent(0.3, 2),
    dp.RandomizedResponseDpEvent(0.5, 2),
    dp.SelfComposedDpEvent(STEP, 100),
    dp.ComposedDpEvent([dp.GaussianDpEvent(2.0), dp.LaplaceDpEvent(4.0)]),
    STEP,
    dp.PoissonSampledDpEvent(0.1, dp.LaplaceDpEvent(2.0)),
    dp.SampledWithoutReplacementDpEvent(10_000, 100, dp.GaussianDpEvent(1.0)),
    dp.RepeatAndSelectDpEvent(dp.GaussianDpEvent(2.0), 10.0, math.inf),
    dp.MixtureOfGaussiansDpEvent(1.0, [0.0, 1.0, 2.0], [0.8, 0.1, 0.1]),
    dp.ZCDpEvent(0.1, 0.01),
    dp.TruncatedSubsampledGaussianDpEvent(10_000, 0.01, 128, 1.0),
]


@pytest.mark.parametrize("event", SAME, ids=lambda event: type(event).__name__)
def test_objects_and_json_survive(event):
    ours = from_dp_event(event)
    assert to_dp_event(ours) == event
    data = json.loads(json.dumps(event_to_dp_json(ours), allow_nan=False))
    assert data["type"] == type(event).__name__
    assert event_from_dp_json(data) == ours


def test_every_class_of_dp_accounting_is_known():
    classes = {
        name
        for name, kind in vars(dp).items()
        if isinstance(kind, type) and issubclass(kind, dp.DpEvent) and kind is not dp.DpEvent
    }
    assert classes | {"ParallelComposition"} == set(FIELDS)


def test_events_that_are_another_one():
    assert from_dp_event(dp.NoOpDpEvent()) == Composed(events=())
    assert from_dp_event(dp.SelfComposedDpEvent(STEP, 0)) == Composed(events=())
    tree = from_dp_event(dp.SingleEpochTreeAggregationDpEvent(8.0, [5, 1024]))
    assert tree == MatrixMechanism(noise_multiplier=8, sensitivity=math.sqrt(11))
    assert from_dp_event(dp.GaussianDpEvent(0.0)) == NonPrivate(reason="a release without noise")
    assert from_dp_event(dp.PoissonSampledDpEvent(0.0, dp.GaussianDpEvent(1.0))) == Composed(events=())
    twice = dp.PoissonSampledDpEvent(0.5, STEP)
    assert from_dp_event(twice) == PoissonGaussian(noise_multiplier=1, sampling_prob=0.005)


@pytest.mark.parametrize("noise", [1, 1.0])
def test_gaussians_composed_on_one_sample_are_all_counted(noise):
    """dp-accounting counts one of the four where the noise is an integer."""
    event = dp.PoissonSampledDpEvent(0.01, dp.ComposedDpEvent([dp.GaussianDpEvent(noise)] * 4))
    assert from_dp_event(event) == PoissonGaussian(noise_multiplier=0.5, sampling_prob=0.01)
    repeated = dp.PoissonSampledDpEvent(0.01, dp.SelfComposedDpEvent(dp.GaussianDpEvent(noise), 4))
    assert from_dp_event(repeated) == PoissonGaussian(noise_multiplier=0.5, sampling_prob=0.01)


def test_randomized_response_is_counted_each_time():
    """dp-accounting's PLDAccountant forgets the count of these."""
    event = dp.SelfComposedDpEvent(dp.RandomizedResponseDpEvent(0.5, 2), 10)
    assert epsilon(from_dp_event(event), 1e-6, "replace_one").upper == pytest.approx(10.986, rel=1e-3)


RELATIONS = {
    "add_or_remove_one": NeighboringRelation.ADD_OR_REMOVE_ONE,
    "zero_out": NeighboringRelation.REPLACE_SPECIAL,
    "replace_one": NeighboringRelation.REPLACE_ONE,
}


@pytest.mark.parametrize("neighboring", RELATIONS)
@pytest.mark.parametrize(
    "event",
    [
        dp.SelfComposedDpEvent(dp.GaussianDpEvent(4.0), 10),
        dp.SelfComposedDpEvent(STEP, 100),
        dp.SelfComposedDpEvent(dp.LaplaceDpEvent(5.0), 10),
        dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(0.1, dp.LaplaceDpEvent(2.0)), 10),
        dp.SelfComposedDpEvent(dp.DiscreteLaplaceDpEvent(0.2, 2), 5),
        dp.RandomizedResponseDpEvent(0.5, 3),
        dp.MixtureOfGaussiansDpEvent(2.0, [0.0, 1.0, 2.0], [0.8, 0.15, 0.05]),
        dp.SelfComposedDpEvent(dp.TruncatedSubsampledGaussianDpEvent(1000, 0.05, 60, 2.0), 20),
    ],
    ids=lambda event: type(getattr(event, "event", event)).__name__,
)
def test_agreement_with_dp_accounting_where_it_has_the_relation(event, neighboring):
    accountant = PLDAccountant(RELATIONS[neighboring], value_discretization_interval=1e-3)
    kind = type(getattr(event, "event", event))
    if not accountant.supports(event) or (
        kind is dp.TruncatedSubsampledGaussianDpEvent and neighboring == "add_or_remove_one"
    ):
        if neighboring == "add_or_remove_one":
            with pytest.raises(ValueError, match="add_or_remove_one"):
                epsilon(from_dp_event(event), 1e-5, neighboring)
        return
    theirs = accountant.compose(event).get_epsilon(1e-5)
    ours = epsilon(from_dp_event(event), 1e-5, neighboring)
    assert ours.lower <= theirs * (1 + 1e-6)
    assert ours.upper == pytest.approx(theirs, rel=0.01, abs=2e-3)


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (dp.UnsupportedDpEvent(), "UnsupportedDpEvent cannot be accounted for"),
        (dp.SampledWithReplacementDpEvent(100, 10, dp.GaussianDpEvent(1.0)), "SampledWithReplacementDpEvent"),
        (dp.PoissonSampledDpEvent(0.1, dp.ZCDpEvent(1.0)), "PoissonSampledDpEvent cannot be accounted for around Zcdp"),
        (dp.SampledWithoutReplacementDpEvent(10, 2, dp.LaplaceDpEvent(1.0)), "SampledWithoutReplacementDpEvent"),
        (dp.ComposedDpEvent([dp.UnsupportedDpEvent()]), "UnsupportedDpEvent"),
        (dp.SampledWithoutReplacementDpEvent(10, 20, dp.GaussianDpEvent(1.0)), "sample_size=20"),
        (dp.RandomizedResponseDpEvent(1.5, 2), "noise_parameter"),
        ("GaussianDpEvent", "not str"),
    ],
)
def test_what_no_engine_computes_is_refused_by_name(event, words):
    with pytest.raises(ValueError, match=words):
        from_dp_event(event)


def test_a_class_that_only_bears_the_name_is_refused():
    class GaussianDpEvent:
        noise_multiplier = 1.0

    with pytest.raises(ValueError, match="DpEvent of dp-accounting"):
        from_dp_event(GaussianDpEvent())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "JSON object"),
        ({}, "event type must be one of"),
        ({"type": "os.system", "command": "true"}, "'os.system'"),
        ({"type": "dp_accounting.GaussianDpEvent", "noise_multiplier": 1}, "event type"),
        ({"type": ["GaussianDpEvent"]}, "event type"),
        ({**GAUSSIAN, "module_name": "os"}, "unknown fields: 'module_name'"),
        ({"type": "GaussianDpEvent"}, "lacks fields: 'noise_multiplier'"),
        ({"type": "GaussianDpEvent", "noise_multiplier": True}, "noise_multiplier must be a number, not True"),
        ({"type": "GaussianDpEvent", "noise_multiplier": math.nan}, "noise_multiplier"),
        ({"type": "GaussianDpEvent", "noise_multiplier": math.inf}, "noise_multiplier"),
        ({"type": "GaussianDpEvent", "noise_multiplier": -1}, "noise_multiplier"),
        ({"type": "GaussianDpEvent", "noise_multiplier": "1"}, "noise_multiplier"),
        ({"type": "PoissonSampledDpEvent", "sampling_probability": 1.1, "event": GAUSSIAN}, "sampling_probability"),
        ({"type": "SelfComposedDpEvent", "event": GAUSSIAN, "count": 1.5}, "count"),
        ({"type": "SelfComposedDpEvent", "event": GAUSSIAN, "count": 10**18}, "count"),
        ({"type": "ComposedDpEvent", "events": GAUSSIAN}, "events must be a JSON array"),
        ({"type": "ComposedDpEvent", "events": [1]}, "JSON object"),
        ({"type": "ParallelComposition", "events": []}, "must not be empty"),
        (
            {"type": "MixtureOfGaussiansDpEvent", "standard_deviation": 1, "sensitivities": 1, "sampling_probs": 2},
            "sum",
        ),
        ({"type": "SingleEpochTreeAggregationDpEvent", "noise_multiplier": 1, "step_counts": []}, "step_counts"),
        ({"type": "RepeatAndSelectDpEvent", "event": GAUSSIAN, "mean": math.inf, "shape": 1}, "mean_runs"),
    ],
)
def test_hostile_json_is_refused_and_named(data, words):
    with pytest.raises(ValueError, match=words):
        event_from_dp_json(data)


def test_deep_json_is_refused():
    data = GAUSSIAN
    for _ in range(2000):
        data = {"type": "SelfComposedDpEvent", "event": data, "count": 1}
    with pytest.raises(ValueError, match="nested"):
        event_from_dp_json(data)


def test_parallel_has_json_but_no_object():
    event = Parallel(events=(PoissonGaussian(noise_multiplier=1, sampling_prob=0.1),))
    assert event_from_dp_json(event_to_dp_json(event)) == event
    with pytest.raises(ValueError, match="no event for Parallel"):
        to_dp_event(event)
    with pytest.raises(ValueError, match="PureEpsilon"):
        to_dp_event(PureEpsilon(epsilon=1))


def test_a_tree_under_add_or_remove_is_refused():
    with pytest.raises(ValueError, match="MatrixMechanism"):
        epsilon(from_dp_event(dp.SingleEpochTreeAggregationDpEvent(8.0, 1024)), 1e-5)
