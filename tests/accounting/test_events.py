import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpsb_accounting import Bound, Gaussian, NonPrivate, PoissonGaussian, _checks, event_from_json, event_to_json

noises = st.floats(min_value=1e-3, max_value=1e6)
events = st.one_of(
    st.builds(Gaussian, noise_multiplier=noises),
    st.builds(PoissonGaussian, noise_multiplier=noises, sampling_prob=st.floats(min_value=1e-9, max_value=1)),
    st.builds(NonPrivate, reason=st.text(min_size=1).filter(str.strip)),
)


@given(events)
@settings(derandomize=True)
def test_events_survive_json_exactly(event):
    assert event_from_json(json.loads(json.dumps(event_to_json(event)))) == event


def test_int_and_float_state_the_same_event():
    assert Gaussian(noise_multiplier=1) == Gaussian(noise_multiplier=1.0)
    assert repr(Gaussian(noise_multiplier=1)) == repr(Gaussian(noise_multiplier=1.0))
    assert hash(PoissonGaussian(noise_multiplier=2, sampling_prob=1)) == hash(
        PoissonGaussian(noise_multiplier=2.0, sampling_prob=1.0)
    )


def test_events_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Gaussian(noise_multiplier=1).noise_multiplier = 2


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "1", None, 10**400])
def test_a_bad_noise_multiplier_is_named_and_shown(value):
    with pytest.raises(ValueError, match="noise_multiplier"):
        Gaussian(noise_multiplier=value)
    with pytest.raises(ValueError, match="noise_multiplier"):
        PoissonGaussian(noise_multiplier=value, sampling_prob=0.1)


@pytest.mark.parametrize("value", [0, -0.1, 1.0001, float("nan"), True, "0.1"])
def test_a_bad_sampling_prob_is_named_and_shown(value):
    with pytest.raises(ValueError, match="sampling_prob"):
        PoissonGaussian(noise_multiplier=1, sampling_prob=value)


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"type": "os.system", "noise_multiplier": 1},
        {"type": ["gaussian"], "noise_multiplier": 1},
        {"type": "gaussian"},
        {"type": "gaussian", "noise_multiplier": 1, "module": "os"},
        {"type": "gaussian", "noise_multiplier": "1"},
        {"type": "poisson_gaussian", "noise_multiplier": 1, "sampling_prob": 7},
    ],
)
def test_unknown_or_wrong_json_is_refused(data):
    with pytest.raises(ValueError):
        event_from_json(data)


def test_only_events_become_json():
    with pytest.raises(ValueError, match="must be one of"):
        event_to_json("gaussian")


@pytest.mark.parametrize(("value", "result"), [(3, 3), (3.0, 3)])
def test_whole_numbers(value, result):
    assert _checks.whole(at_least=1, steps=value) == result


@pytest.mark.parametrize("value", [0, 2.5, True, "3", None, float("nan")])
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(ValueError, match="steps"):
        _checks.whole(at_least=1, steps=value)


def test_bound_keeps_its_ends_in_order():
    fields = {"delta": 1e-5, "neighboring": "zero_out", "unit": "example", "method": "m"}
    bound = Bound(lower=1, upper=2, **fields)
    assert str(bound) == "epsilon in [1, 2] at delta 1e-05 (zero_out, unit example; m)"
    with pytest.raises(ValueError, match="lower"):
        Bound(lower=2, upper=1, **fields)
    with pytest.raises(ValueError, match="upper"):
        Bound(lower=0, upper=float("nan"), **fields)
    with pytest.raises(ValueError, match="neighboring"):
        Bound(lower=1, upper=2, **{**fields, "neighboring": "one"})
    with pytest.raises(ValueError, match="epsilon"):
        Bound(lower=0, upper=1, epsilon=1.0, **fields)
