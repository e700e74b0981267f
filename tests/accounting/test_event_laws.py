"""Laws that hold for every event class."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpsb_accounting import (
    ApproximateDP,
    Composed,
    DiscreteLaplace,
    Gaussian,
    Laplace,
    MatrixMechanism,
    NonPrivate,
    Parallel,
    PoissonGaussian,
    PoissonLaplace,
    PoissonSkellam,
    PureEpsilon,
    RandomizedResponse,
    RandomSelection,
    Repeated,
    SampledWithoutReplacementGaussian,
    TruncatedPoissonGaussian,
    UserMixture,
    Zcdp,
    delta,
    epsilon,
    event_from_json,
    event_to_json,
    gaussian,
    user_mixture,
)
from dpsb_accounting.composition import alternatives
from dpsb_accounting.events import EVENT_CLASSES

noises = st.floats(min_value=0.5, max_value=20)
probs = st.floats(min_value=1e-3, max_value=1)
small = st.floats(min_value=0, max_value=2)
singles = st.one_of(
    st.builds(Gaussian, noise_multiplier=noises),
    st.builds(PoissonGaussian, noise_multiplier=noises, sampling_prob=probs),
    st.builds(
        TruncatedPoissonGaussian,
        noise_multiplier=noises,
        sampling_prob=probs,
        max_batch_size=st.integers(1, 200),
        num_examples=st.integers(1, 1000),
    ),
    st.builds(
        SampledWithoutReplacementGaussian,
        noise_multiplier=noises,
        batch_size=st.integers(1, 100),
        num_examples=st.integers(100, 1000),
    ),
    st.builds(user_mixture, noise_multiplier=noises, sampling_prob=probs, examples_per_unit=st.integers(1, 5)),
    st.builds(MatrixMechanism, noise_multiplier=noises, sensitivity=st.floats(0.5, 4)),
    st.builds(Laplace, noise_multiplier=noises),
    st.builds(PoissonLaplace, noise_multiplier=noises, sampling_prob=probs),
    st.builds(
        PoissonSkellam,
        noise_multiplier=noises,
        sampling_prob=probs,
        clip_steps=st.floats(50, 1e6),
        dimension=st.integers(1, 1000),
    ),
    st.builds(DiscreteLaplace, noise_parameter=st.floats(0.05, 1), sensitivity=st.integers(1, 4)),
    st.builds(RandomizedResponse, noise_parameter=st.floats(0.1, 1), num_buckets=st.integers(2, 5)),
    st.builds(PureEpsilon, epsilon=small),
    st.builds(ApproximateDP, epsilon=small, delta=st.floats(0, 1e-8)),
    st.builds(Zcdp, rho=small, xi=small),
    st.builds(NonPrivate, reason=st.just("telemetry")),
)
nested = st.recursive(
    singles,
    lambda inner: st.one_of(
        st.builds(Repeated, event=inner, count=st.integers(1, 4)),
        st.builds(Composed, events=st.lists(inner, max_size=3).map(tuple)),
        st.builds(Parallel, events=st.lists(inner, min_size=1, max_size=2).map(tuple)),
        st.builds(
            RandomSelection, event=inner, mean_runs=st.floats(1, 20), shape=st.sampled_from([0, 1, 0.5, math.inf])
        ),
    ),
    max_leaves=4,
)

STEP = PoissonGaussian(noise_multiplier=1.5, sampling_prob=0.05)
ONE_OF_EACH = [
    Gaussian(noise_multiplier=3),
    STEP,
    TruncatedPoissonGaussian(noise_multiplier=2, sampling_prob=0.05, max_batch_size=70, num_examples=1000),
    SampledWithoutReplacementGaussian(noise_multiplier=4, batch_size=50, num_examples=1000),
    UserMixture(noise_multiplier=2, sensitivities=(0, 1, 2), probabilities=(0.9, 0.09, 0.01)),
    MatrixMechanism(noise_multiplier=8, sensitivity=2),
    Laplace(noise_multiplier=5),
    PoissonLaplace(noise_multiplier=2, sampling_prob=0.1),
    PoissonSkellam(noise_multiplier=2, sampling_prob=0.1, clip_steps=1000, dimension=64),
    DiscreteLaplace(noise_parameter=0.2, sensitivity=2),
    RandomizedResponse(noise_parameter=0.8, num_buckets=3),
    PureEpsilon(epsilon=0.1),
    ApproximateDP(epsilon=0.1, delta=1e-8),
    Zcdp(rho=0.01, xi=0.001),
    NonPrivate(reason="x"),
    Repeated(event=STEP, count=3),
    Composed(events=(STEP, Gaussian(noise_multiplier=4))),
    Parallel(events=(STEP, Laplace(noise_multiplier=5))),
    RandomSelection(event=Repeated(event=STEP, count=5), mean_runs=5, shape=1),
]


def test_there_is_one_of_each():
    assert {type(event) for event in ONE_OF_EACH} == set(EVENT_CLASSES)


@given(nested)
@settings(derandomize=True, deadline=None, max_examples=150)
def test_every_event_survives_json_exactly(event):
    text = json.dumps(event_to_json(event), allow_nan=False)
    assert event_from_json(json.loads(text)) == event
    assert hash(event_from_json(json.loads(text))) == hash(event)


@given(st.lists(nested, min_size=1, max_size=3), st.integers(1, 3), st.randoms(use_true_random=False))
@settings(derandomize=True, deadline=None, max_examples=100)
def test_count_order_and_grouping_make_no_difference(events, count, random):
    together = alternatives([(event, count) for event in events])
    shuffled = [(event, 1) for event in events for _ in range(count)]
    random.shuffle(shuffled)
    assert alternatives(shuffled) == together
    assert alternatives([(Repeated(event=event, count=count), 1) for event in events]) == together
    assert alternatives([(Composed(events=tuple(event for event, _ in shuffled)), 1)]) == together


@pytest.mark.parametrize("event", ONE_OF_EACH, ids=lambda event: type(event).__name__)
@pytest.mark.parametrize("neighboring", ["zero_out", "replace_one"])
def test_numbers_of_every_event(event, neighboring):
    one = epsilon(event, 1e-5, neighboring)
    three = epsilon([(event, 3)], 1e-5, neighboring)
    assert epsilon([event] * 3, 1e-5, neighboring) == three
    assert one.lower <= one.upper <= three.upper
    assert epsilon(event, 1e-6, neighboring).upper >= one.upper * 0.999
    if math.isfinite(three.upper):
        back = delta([(event, 3)], three.upper, neighboring)
        assert back.lower <= 1e-5 * (1 + 1e-6)
        if "rdp" not in three.method and "two steps" not in three.method:
            assert back.upper <= 1.1e-5
    if neighboring == "replace_one":
        assert epsilon([(event, 3)], 1e-5, "zero_out").lower <= three.upper


WEAKER = [
    (Laplace, {"noise_multiplier": (5, 4)}, {}),
    (PoissonLaplace, {"noise_multiplier": (3, 2), "sampling_prob": (0.1, 0.2)}, {}),
    (
        PoissonSkellam,
        {"noise_multiplier": (3, 2), "sampling_prob": (0.1, 0.2), "clip_steps": (1e5, 1e2), "dimension": (10, 1000)},
        {},
    ),
    (DiscreteLaplace, {"noise_parameter": (0.2, 0.3), "sensitivity": (2, 3)}, {}),
    (RandomizedResponse, {"noise_parameter": (0.8, 0.6), "num_buckets": (2, 3)}, {}),
    (PureEpsilon, {"epsilon": (0.1, 0.2)}, {}),
    (ApproximateDP, {"epsilon": (0.1, 0.2), "delta": (1e-8, 1e-7)}, {}),
    (Zcdp, {"rho": (0.01, 0.02), "xi": (0.0, 0.1)}, {}),
    (MatrixMechanism, {"noise_multiplier": (8, 6), "sensitivity": (1, 2)}, {}),
    (
        TruncatedPoissonGaussian,
        {"noise_multiplier": (3, 2), "sampling_prob": (0.04, 0.05), "max_batch_size": (80, 60)},
        {"num_examples": 1000},
    ),
    (SampledWithoutReplacementGaussian, {"noise_multiplier": (5, 4), "batch_size": (20, 50)}, {"num_examples": 1000}),
    (RandomSelection, {"mean_runs": (5, 10)}, {"event": STEP, "shape": 1}),
]


@pytest.mark.parametrize(("kind", "changes", "fixed"), WEAKER, ids=lambda value: getattr(value, "__name__", ""))
def test_more_noise_and_less_sampling_never_raise_epsilon(kind, changes, fixed):
    better = {name: pair[0] for name, pair in changes.items()}
    base = epsilon([(kind(**better, **fixed), 4)], 1e-5, "zero_out").upper
    for name, (_, worse) in changes.items():
        assert epsilon([(kind(**{**better, name: worse}, **fixed), 4)], 1e-5, "zero_out").upper >= base * 0.998


@pytest.mark.parametrize("noise", [0.8, 2.0, 10.0])
def test_what_is_a_gaussian_encloses_the_exact_one(noise):
    """Mixtures, truncation and divergences that should be one Gaussian, against its closed form."""
    low, high = gaussian.epsilon(noise / 2, 1e-6)
    almost = UserMixture(noise_multiplier=noise, sensitivities=(1.0, 1.0 - 1e-9), probabilities=(0.5, 0.5))
    for event, tightness in (
        (MatrixMechanism(noise_multiplier=noise, sensitivity=1), 1 + 1e-6),
        (almost, 1.01),
        (TruncatedPoissonGaussian(noise_multiplier=noise, sampling_prob=1, max_batch_size=9, num_examples=9), 1 + 1e-6),
        (Zcdp(rho=1 / (2 * noise**2)), 1.35),
    ):
        bound = epsilon([(event, 4)], 1e-6, "zero_out")
        assert bound.lower <= high
        assert low * (1 - 1e-9) <= bound.upper <= high * tightness + 1e-3
    whole = SampledWithoutReplacementGaussian(noise_multiplier=2 * noise, batch_size=5, num_examples=5)
    bound = epsilon([(whole, 4)], 1e-6, "replace_one")
    assert bound.upper == pytest.approx(high, rel=1e-6)


def test_int_is_float_in_every_event():
    assert Zcdp(rho=1, xi=0) == Zcdp(rho=1.0)
    assert UserMixture(noise_multiplier=1, sensitivities=[0, 1], probabilities=[0, 1]) == UserMixture(
        noise_multiplier=1.0, sensitivities=(0.0, 1.0), probabilities=(0.0, 1.0)
    )
    assert RandomSelection(event=STEP, mean_runs=3, shape=1) == RandomSelection(event=STEP, mean_runs=3.0, shape=1.0)
    assert Repeated(event=STEP, count=3.0) == Repeated(event=STEP, count=3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: UserMixture(noise_multiplier=1, sensitivities=(1,), probabilities=(0.5,)), "sum to 1"),
        (lambda: UserMixture(noise_multiplier=1, sensitivities=(1, 2), probabilities=(1,)), "equally many"),
        (lambda: UserMixture(noise_multiplier=1, sensitivities=(-1,), probabilities=(1,)), "sensitivities"),
        (
            lambda: SampledWithoutReplacementGaussian(noise_multiplier=1, batch_size=3, num_examples=2),
            "must not exceed",
        ),
        (lambda: ApproximateDP(epsilon=1, delta=1), r"delta must be in \[0, 1\)"),
        (lambda: RandomSelection(event=STEP, mean_runs=0.5, shape=1), "mean_runs must be at least 1"),
        (lambda: RandomSelection(event=STEP, mean_runs=2, shape=-1), "shape"),
        (lambda: Repeated(event=STEP, count=0), "count"),
        (lambda: Repeated(event=STEP, count=10**16), "count must be at most"),
        (lambda: Repeated(event="step", count=1), "event must be an event"),
        (lambda: Composed(events=(STEP, 3)), "events must be an event"),
        (lambda: Parallel(events=()), "must not be empty"),
        (lambda: user_mixture(noise_multiplier=1, sampling_prob=0.1, examples_per_unit=10**6), "at most 10000"),
    ],
)
def test_bad_events_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_events_nested_too_deep_are_refused():
    event = STEP
    for _ in range(49):
        event = Repeated(event=event, count=1)
    with pytest.raises(ValueError, match="nested"):
        Repeated(event=event, count=1)
    data = {"type": "gaussian", "noise_multiplier": 1}
    for _ in range(100):
        data = {"type": "composed", "events": [data]}
    with pytest.raises(ValueError, match="nested"):
        event_from_json(data)


def test_counts_that_multiply_beyond_reason_are_refused():
    with pytest.raises(ValueError, match="counts must multiply"):
        epsilon(Repeated(event=Repeated(event=STEP, count=10**10), count=10**10), 1e-5)


def test_parallel_is_the_worst_choice_also_inside_a_composition():
    small_one, large = Repeated(event=STEP, count=5), Repeated(event=STEP, count=50)
    other = Gaussian(noise_multiplier=4)
    worst = epsilon([large, other], 1e-5)
    assert epsilon([Parallel(events=(small_one, large)), other], 1e-5).upper == worst.upper
    two = Parallel(events=(STEP, Laplace(noise_multiplier=5)))
    found = epsilon([two, two, other], 1e-5)
    choices = [[STEP, STEP], [STEP, Laplace(noise_multiplier=5)], [Laplace(noise_multiplier=5)] * 2]
    assert found.upper == max(epsilon([*choice, other], 1e-5).upper for choice in choices)
    assert epsilon(Parallel(events=(STEP, NonPrivate(reason="x"))), 1e-5).upper == math.inf


def test_too_many_parallel_choices_are_refused_by_name():
    unlike = Parallel(events=(STEP, Laplace(noise_multiplier=5)))
    with pytest.raises(ValueError, match="parallel compositions"):
        epsilon([(unlike, 1000)], 1e-5)
    alike = Parallel(events=tuple(PoissonGaussian(noise_multiplier=2, sampling_prob=q / 1e4) for q in range(1, 200)))
    assert len(alternatives([(alike, 1000)])) == 1  # the one with the largest sampling probability dominates
