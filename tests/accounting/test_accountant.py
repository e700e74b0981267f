import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import BASIS, STEP, make_plan, two_phases

from dpsb_accounting import (
    ApproximateDP,
    Gaussian,
    Laplace,
    Ledger,
    NonPrivate,
    Parallel,
    Phase,
    PoissonGaussian,
    RandomSelection,
    ResourceLimit,
    accountant,
    delta,
    engines,
    epsilon,
    gaussian,
)
from dpsb_accounting.composition import Composition
from dpsb_accounting.engines import binned, renyi

RELATIONS = ["add_or_remove_one", "zero_out", "replace_one"]


def poisson(noise, prob):
    return PoissonGaussian(noise_multiplier=noise, sampling_prob=prob)


def check_reference(bound, reference, up_to=0.01):
    assert bound.lower <= reference * (1 + 1e-6)
    assert reference * (1 - 1e-6) <= bound.upper <= reference * (1 + up_to)


# Computed by the Bromwich integral, which shares no code and no mesh with the engines here.
REFERENCE = [
    (1, 0.01, 1, 1e-5, 0.1994504),
    (1, 0.01, 1000, 1e-5, 1.828237),
    (1, 0.01, 100_000, 1e-5, 25.57311),
    (0.5, 0.01, 1000, 1e-5, 13.36082),
    (0.5, 0.1, 1000, 1e-5, 126.1666),
    (0.8, 1e-3, 10_000, 1e-5, 0.7823878),
    (2, 1e-3, 100_000, 1e-5, 0.6037715),
    (4, 1e-4, 100_000, 1e-5, 0.02133782),
    (4, 1e-4, 100_000, 1e-6, 0.026615),
    (4, 0.1, 10_000, 1e-5, 13.49836),
    (1, 1, 1, 1e-5, 4.377178),
    (0.5, 1e-4, 1000, 1e-9, 3.568762),
    (2, 1e-3, 100_000, 1e-9, 0.927460),
]


@pytest.mark.parametrize(("noise", "prob", "steps", "at", "reference"), REFERENCE)
def test_reference_values(noise, prob, steps, at, reference):
    bound = epsilon([(poisson(noise, prob), steps)], at)
    check_reference(bound, reference)
    assert bound.upper - bound.lower <= max(0.005, 0.01 * bound.upper)


def test_reference_replace_one():
    bound = epsilon([(STEP, 1000)], 1e-5, "replace_one")
    assert 2.8433 <= bound.upper <= 2.8434 * 1.01
    assert bound.upper - bound.lower < 0.01


@pytest.mark.parametrize(
    ("parts", "reference"),
    [
        ([(BASIS, 1), (STEP, 1000)], 1.99248),
        ([(poisson(2, 0.1), 1), (STEP, 1000)], 1.84258),
        ([(STEP, 1000)] * 10, 6.18775),
    ],
)
def test_reference_compositions(parts, reference):
    check_reference(epsilon(parts, 1e-5), reference, up_to=0.001)


def test_the_delta_guard_keeps_pld_above_the_truth():
    """dp-accounting's own pessimistic value, 33.0398, lies below the truth here."""
    bound = epsilon([(STEP, 100_000)], 1e-9)
    check_reference(bound, 33.04211)


@pytest.mark.parametrize("noise", [0.5, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("count", [1, 50])
def test_sampling_probability_one_is_the_exact_gaussian(noise, count):
    composed = noise / math.sqrt(count)
    low, high = gaussian.epsilon(composed, 1e-6)
    for event in (Gaussian(noise_multiplier=noise), poisson(noise, 1)):
        bound = epsilon([(event, count)], 1e-6)
        assert bound.lower == pytest.approx(low, rel=1e-12)
        assert bound.upper == pytest.approx(high, rel=1e-12)
        assert bound.upper - bound.lower <= 1e-6 * bound.upper + 1e-8


@pytest.mark.parametrize("noise", [0.7, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("at", [1e-3, 1e-6, 1e-9])
def test_sandwich_around_the_exact_gaussian(noise, at):
    """Both engines for subsampled events, given a sampling probability of almost 1, enclose the closed form."""
    low, high = gaussian.epsilon(noise / math.sqrt(20), at)
    bound = epsilon([(poisson(noise, 1 - 1e-13), 20)], at)
    assert bound.lower <= high
    assert bound.upper >= low
    assert bound.upper <= high * 1.01 + 1e-4
    assert bound.lower >= low * 0.99 - 1e-4
    assert renyi.epsilon(Composition.of([(poisson(noise, 1 - 1e-13), 20)]), at, "zero_out") >= low


def test_gaussian_is_the_inverse_of_its_delta():
    for noise in (0.3, 1.0, 10.0):
        for at in (1e-3, 1e-9):
            low, high = gaussian.epsilon(noise, at)
            assert gaussian.delta(noise, high)[0] <= at <= gaussian.delta(noise, low)[1]
            assert gaussian.noise_multiplier(high, at) == pytest.approx(noise, rel=1e-6)


def test_replace_one_at_twice_the_noise_is_add_or_remove_one_without_sampling():
    one = epsilon([(Gaussian(noise_multiplier=2), 3)], 1e-5, "replace_one")
    other = epsilon([(Gaussian(noise_multiplier=1), 3)], 1e-5)
    assert one.upper == pytest.approx(other.upper, rel=1e-9)


@pytest.mark.parametrize("neighboring", RELATIONS)
@pytest.mark.parametrize("event", [Gaussian(noise_multiplier=3), poisson(1.5, 0.05), NonPrivate(reason="x")])
class TestLaws:
    def test_count_times_one_is_count_at_once(self, event, neighboring):
        together = epsilon([(event, 7)], 1e-5, neighboring)
        assert epsilon([event] * 7, 1e-5, neighboring) == together
        assert epsilon([(event, 3), (event, 4)], 1e-5, neighboring) == together
        assert epsilon([Phase("a", event, 2), Phase("b", event, 5)], 1e-5, neighboring) == together

    def test_order_makes_no_difference(self, event, neighboring):
        parts = [(event, 2), (poisson(2, 0.02), 5), (Gaussian(noise_multiplier=4), 1)]
        assert epsilon(parts, 1e-5, neighboring) == epsilon(parts[::-1], 1e-5, neighboring)

    def test_more_of_it_never_lowers_epsilon(self, event, neighboring):
        few, many = (epsilon([(event, count)], 1e-5, neighboring) for count in (3, 30))
        assert few.upper <= many.upper
        assert few.lower <= many.lower

    def test_nothing_is_free(self, event, neighboring):
        assert epsilon([(event, 0)], 1e-5, neighboring).upper == 0
        assert epsilon([], 1e-5, neighboring).upper == 0


@pytest.mark.parametrize("neighboring", RELATIONS)
@given(
    noise=st.floats(min_value=0.6, max_value=8),
    prob=st.floats(min_value=1e-3, max_value=0.5),
    steps=st.integers(min_value=1, max_value=300),
    factor=st.floats(min_value=1.05, max_value=2),
)
@settings(derandomize=True, max_examples=4, deadline=None)
def test_more_noise_fewer_steps_smaller_q_larger_delta_never_raise_epsilon(neighboring, noise, prob, steps, factor):
    slack = 1 + 2e-3  # the mesh may differ

    def upper(noise, prob, steps, at=1e-5):
        bound = epsilon([(poisson(noise, prob), steps)], at, neighboring)
        assert bound.lower <= bound.upper
        return bound.upper * slack + 2e-5

    base = epsilon([(poisson(noise, prob), steps)], 1e-5, neighboring)
    assert base.lower <= epsilon([(poisson(noise, prob), steps)], 1e-6, neighboring).upper
    assert epsilon([(poisson(noise * factor, prob), steps)], 1e-5, neighboring).upper <= upper(noise, prob, steps)
    assert epsilon([(poisson(noise, prob / factor), steps)], 1e-5, neighboring).upper <= upper(noise, prob, steps)
    assert base.upper <= upper(noise, prob, 2 * steps)


@given(
    noise=st.floats(min_value=0.5, max_value=10),
    prob=st.floats(min_value=1e-3, max_value=0.9),
    steps=st.integers(min_value=1, max_value=200),
)
@settings(derandomize=True, max_examples=6, deadline=None)
def test_three_engines_that_share_no_code_agree(noise, prob, steps):
    """lower (post-processing) <= upper (PLD) and lower <= Rényi, for both kinds of relation."""
    composition = Composition.of([(poisson(noise, prob), steps)])
    for neighboring in ("zero_out", "replace_one"):
        low, high, _ = engines.epsilon(composition, 1e-6, neighboring)
        assert low <= high
        assert low <= renyi.epsilon(composition, 1e-6, neighboring)
        assert high - low <= max(0.005, 0.01 * high)


def test_zero_out_is_add_or_remove_one_for_sums():
    assert epsilon([(STEP, 100)], 1e-5, "zero_out").upper == epsilon([(STEP, 100)], 1e-5).upper


def test_a_single_step_against_its_own_integral():
    """delta at epsilon of one subsampled Gaussian, by direct summation of (p - e^eps q)+ over outputs."""
    noise, prob = 1.3, 0.2
    x = np.linspace(-20, 20, 2_000_001)
    rest = np.exp(-((x / noise) ** 2) / 2)
    mixture = (1 - prob) * rest + prob * np.exp(-(((x - 1) / noise) ** 2) / 2)
    scale = (x[1] - x[0]) / (noise * math.sqrt(2 * math.pi))
    for at in (0.05, 0.3, 0.8):
        exact = max(
            float(np.maximum(mixture - math.exp(at) * rest, 0).sum()) * scale,
            float(np.maximum(rest - math.exp(at) * mixture, 0).sum()) * scale,
        )
        bound = delta([poisson(noise, prob)], at)
        assert bound.lower <= exact * (1 + 1e-6)
        assert exact * (1 - 1e-6) <= bound.upper <= exact * 1.01
        found = epsilon([poisson(noise, prob)], exact)
        assert found.lower <= at + 1e-9
        assert found.upper >= at - 1e-6


def test_delta_is_the_inverse_of_epsilon():
    schedule = [(BASIS, 1), (STEP, 50)]
    for neighboring in RELATIONS[1:]:
        bound = epsilon(schedule, 1e-6, neighboring)
        assert delta(schedule, bound.lower, neighboring).upper >= 1e-6 * (1 - 1e-9)
        assert delta(schedule, bound.upper, neighboring).lower <= 1e-6 * (1 + 1e-9)
        assert delta(schedule, bound.upper, neighboring).upper == pytest.approx(1e-6, rel=0.05)


def test_delta_of_nothing_and_of_non_private():
    assert delta([], 1.0).upper == 0
    assert delta([NonPrivate(reason="x")], 1.0).upper == 1
    assert delta([Gaussian(noise_multiplier=1)], 4.377178).upper == pytest.approx(1e-5, rel=1e-4)


def test_a_plan_brings_its_own_delta_relation_and_unit():
    plan = two_phases(neighboring="replace_one", unit="user")
    bound = epsilon(plan)
    assert (bound.delta, bound.neighboring, bound.unit) == (1e-5, "replace_one", "user")
    assert bound.upper == epsilon([(BASIS, 1), (STEP, 10)], 1e-5, "replace_one").upper
    assert epsilon(plan, 1e-6).delta == 1e-6


def test_a_plan_with_an_undeclared_number_refuses_add_or_remove_one():
    with pytest.raises(ValueError, match="not declared"):
        epsilon(make_plan(num_examples_declared=False, neighboring="zero_out"), neighboring="add_or_remove_one")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([STEP],), "delta must be given"),
        (([STEP], 0), "delta"),
        (([STEP], 1), "delta"),
        (([STEP], 1e-5, "shuffle"), "neighboring"),
        ((["step"], 1e-5), "schedule"),
        (([(STEP, -1)], 1e-5), "count"),
        (([(STEP, 1.5)], 1e-5), "count"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        epsilon(*arguments)


def test_a_delta_below_float_precision_gets_a_looser_valid_bound():
    bound = epsilon([(poisson(20, 0.02), 100_000)], 1e-10)
    assert "rdp" in bound.method
    assert bound.lower <= 1.91140 <= bound.upper <= 2.1
    tiny = epsilon([(poisson(2e5, 1e-4), 100_000)], 1e-10)
    assert tiny.upper > 0  # dp-accounting's Rényi accountant says 0 for such events


def test_what_is_too_large_to_compute_gets_a_loose_bound_with_the_reason():
    bound = epsilon([(poisson(0.06, 0.9), 1_000_000_000)], 1e-5)
    assert bound.upper > 1e11
    assert "too much for pld" in bound.method


def test_what_cannot_be_computed_says_why():
    run = RandomSelection(event=ApproximateDP(epsilon=1, delta=1e-3), mean_runs=100, shape=1)
    with pytest.raises(ResourceLimit, match="RandomSelection"):
        epsilon([run], 1e-5)


def test_a_missed_count_is_noticed():
    """Seeded fault: an engine that composes one release where there are many."""
    whole = Composition.of([(STEP, 1000)])
    forgotten = Composition.of([(STEP, 1)])
    low = max(tail.epsilon(1e-5) for tail in binned.tails(whole, "zero_out", 1e-3, 1 << 22))
    assert engines.upper_epsilon(forgotten, 1e-5, "zero_out")[0] < low


def test_what_was_spent_is_asked_at_the_plans_delta_or_another(tmp_path):
    """Left out, delta is the plan's; given, it is the one given; the ends of its interval are none."""
    path = tmp_path / "ledger.jsonl"
    with Ledger.create(path, make_plan()) as ledger:
        ledger.charge("train")
        ledger.charge("train")
    record = Ledger.read(path)
    assert accountant.spent(record).delta == make_plan().delta == 1e-5
    other = accountant.spent(record, delta=1e-3)
    assert other.delta == 1e-3
    assert other.upper == epsilon([(make_plan().train.event, 2)], 1e-3).upper < accountant.spent(record).upper
    for end in (0.0, 1.0):
        with pytest.raises(ValueError, match="delta"):
            accountant.spent(record, delta=end)
        with pytest.raises(ValueError, match="delta"):
            epsilon(make_plan(), delta=end)


@pytest.mark.parametrize("entry", [[STEP, 2], (STEP,), (STEP, 2, 3), "ab"], ids=["list", "one", "three", "text"])
def test_an_entry_of_a_schedule_is_a_pair(entry):
    with pytest.raises(ValueError, match=r"schedule must hold phases, events or \(event, count\) pairs"):
        epsilon([entry], 1e-5)


@pytest.mark.parametrize("noises", [(5.0, 2.0), (2.0, 5.0), (5.0, 2.0, 9.0)])
def test_of_parallel_events_the_worst_counts_wherever_it_stands(noises):
    together = Parallel(events=tuple(Gaussian(noise_multiplier=noise) for noise in noises))
    found, worst = epsilon([together], 1e-5), epsilon([Gaussian(noise_multiplier=2.0)], 1e-5)
    assert found.upper == pytest.approx(worst.upper, rel=1e-6)
    assert found.lower <= worst.upper <= found.upper * (1 + 1e-6)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("noise", [1.0, 40.0])
def test_of_parallel_events_that_none_dominates_the_worst_counts_too(noise, turned):
    """With each of the two noises another of the two parts is the worst."""
    parts = (STEP, Laplace(noise_multiplier=noise))
    alone = [epsilon([part], 1e-5) for part in parts]
    found = epsilon([Parallel(events=parts[::-1] if turned else parts)], 1e-5)
    assert found.upper == pytest.approx(max(bound.upper for bound in alone), rel=1e-9)
    assert found.lower == pytest.approx(max(bound.lower for bound in alone), rel=1e-9)
    assert found.method.startswith("worst of 2 parallel alternatives: ")
    assert found.method.endswith(max(alone, key=lambda bound: bound.upper).method)
