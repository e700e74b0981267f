"""Compositions that users run, against reference values; and seeded faults that must be noticed."""

import math

import pytest

from dpsb_accounting import (
    Gaussian,
    MatrixMechanism,
    NonPrivate,
    Parallel,
    PoissonGaussian,
    RandomSelection,
    Repeated,
    SampledWithoutReplacementGaussian,
    TruncatedPoissonGaussian,
    UserMixture,
    Zcdp,
    engines,
    epsilon,
    group_epsilon,
    square_root_coefficients,
    toeplitz_sensitivity,
    tree_sensitivity,
    user_mixture,
)
from dpsb_accounting.composition import Composition
from dpsb_accounting.engines import Answer, binned, pld, rdp
from dpsb_accounting.group import for_unit

STEP = PoissonGaussian(noise_multiplier=1, sampling_prob=0.01)
RUN = Repeated(event=STEP, count=1000)
FIXED = SampledWithoutReplacementGaussian(noise_multiplier=1, batch_size=100, num_examples=10_000)


def poisson(noise, prob):
    return PoissonGaussian(noise_multiplier=noise, sampling_prob=prob)


def truncated(most):
    return TruncatedPoissonGaussian(noise_multiplier=1, sampling_prob=0.01, max_batch_size=most, num_examples=10_000)


@pytest.mark.parametrize(
    ("name", "schedule", "neighboring", "reference"),
    [
        ("clients R17", [(poisson(1, 0.05), 200)], "add_or_remove_one", 3.99931),
        ("clients, adaptive clipping R18", [(poisson((1 + 0.1**2) ** -0.5, 0.05), 200)], "add_or_remove_one", 4.03943),
        ("amplified banded R24", [(poisson(1, 0.008), 250)], "add_or_remove_one", 0.787146),
        ("replace one", [RUN], "replace_one", 2.8434),
        ("Gaussians, replace one", [(Gaussian(noise_multiplier=4), 10)], "replace_one", 7.511),
        ("fixed batches", [(FIXED, 1000)], "replace_one", 20.987),
        ("truncated 128", [(truncated(128), 1000)], "zero_out", 4.013),
        ("truncated 150", [(truncated(150), 1000)], "zero_out", 1.8305),
        ("truncated 110", [(truncated(110), 1000)], "zero_out", 7.682),
        (
            "users with 4 examples R23",
            [(user_mixture(noise_multiplier=1, sampling_prob=0.01, examples_per_unit=4), 1000)],
            "add_or_remove_one",
            8.89919,
        ),
        (
            "micro-batches",
            [(user_mixture(noise_multiplier=0.7, sampling_prob=0.01, examples_per_unit=4), 300)],
            "add_or_remove_one",
            12.306,
        ),
        (
            "tree",
            [MatrixMechanism(noise_multiplier=8, sensitivity=tree_sensitivity(1024))],
            "zero_out",
            1.61796,
        ),
    ],
)
def test_reference_recipes(name, schedule, neighboring, reference):
    bound = epsilon(schedule, 1e-4 if name.startswith("clients") else 1e-5, neighboring)
    assert bound.lower <= reference * (1 + 1e-4)
    assert reference * (1 - 1e-4) <= bound.upper <= reference * 1.005


@pytest.mark.parametrize(
    ("mean", "shape", "reference"),
    [
        (10, 1, 4.10327),
        (10, 0, 3.52263),
        (10, math.inf, 4.32950),
        (100, 1, 5.27002),
        (100, 0, 4.30117),
        (100, math.inf, 16.39676),
    ],
)
def test_the_best_of_a_random_number_of_runs(mean, shape, reference):
    """The references take dp-accounting's divergences, which at fractional orders are slightly larger."""
    bound = epsilon(RandomSelection(event=RUN, mean_runs=mean, shape=shape), 1e-5)
    assert bound.upper == pytest.approx(reference, rel=3e-5)
    assert "RandomSelection has only a bound by Rényi divergences" in bound.method


def test_matrix_mechanisms_with_published_sensitivities():
    column = square_root_coefficients(1024)
    once = toeplitz_sensitivity(column, steps=1024)
    assert once == pytest.approx(1.80902, rel=1e-5)
    four = toeplitz_sensitivity(column, steps=1024, participations=4, min_separation=256)
    assert four == pytest.approx(4.38783, rel=1e-5)
    for sensitivity, reference in ((once, 0.829853), (four, 2.210474)):
        event = MatrixMechanism(noise_multiplier=8, sensitivity=sensitivity)
        assert epsilon(event, 1e-5, "zero_out").upper == pytest.approx(reference, rel=1e-5)
    banded = toeplitz_sensitivity(column[:256], steps=1024, participations=4, min_separation=256)
    assert banded == pytest.approx(2 * toeplitz_sensitivity(column[:256], steps=256), rel=1e-9)


@pytest.mark.parametrize(
    "arguments",
    [
        {"coefficients": [1, 2], "steps": 5},
        {"coefficients": [], "steps": 5},
        {"coefficients": [1, -1], "steps": 5},
        {"coefficients": [1], "steps": 5, "participations": 2},
        {"coefficients": [1], "steps": 0},
    ],
)
def test_patterns_that_are_not_covered_are_refused(arguments):
    with pytest.raises(ValueError):
        toeplitz_sensitivity(arguments.pop("coefficients"), **arguments)


def test_selection_composes_with_training_and_stated_releases():
    parts = [RandomSelection(event=RUN, mean_runs=10, shape=1), Gaussian(noise_multiplier=10)]
    bound = epsilon(parts, 1e-5)
    assert 4.10325 < bound.upper < 4.10325 + 0.6
    assert epsilon([*parts, Zcdp(rho=0.01)], 1e-5).upper > bound.upper


def test_users_are_bounded_by_what_they_contribute_at_once_and_at_least_by_one_example():
    one = epsilon([RUN], 1e-5)
    users = group_epsilon([RUN], 4, 1e-5)
    assert users.unit == "user"
    assert one.upper < users.lower
    assert users.upper == pytest.approx(8.8992, rel=1e-3)
    assert group_epsilon([RUN], 1, 1e-5).upper == one.upper
    assert group_epsilon(Gaussian(noise_multiplier=4), 2, 1e-5).upper == pytest.approx(
        epsilon(Gaussian(noise_multiplier=4), 1e-5, "replace_one").upper
    )


def test_group_privacy_where_the_person_is_not_in_the_event():
    loose = group_epsilon([truncated(150)], 2, 1e-5, "zero_out")
    one = epsilon([truncated(150)], 1e-5, "zero_out")
    assert loose.upper > 2 * one.upper
    assert "group privacy, 2 steps" in loose.method
    assert for_unit(Parallel(events=(STEP, STEP)), 2) is None  # the examples may lie in different parts
    assert isinstance(for_unit(NonPrivate(reason="x"), 3), NonPrivate)


def test_replace_one_by_two_steps_is_no_less_than_the_exact_pair():
    """A mixture that is a plain Poisson sample, once by its own pair and once by two steps of zero_out."""
    mixture = UserMixture(noise_multiplier=2, sensitivities=(0, 1), probabilities=(0.9, 0.1))
    exact = epsilon([(poisson(2, 0.1), 10)], 1e-5, "replace_one")
    steps = epsilon([(mixture, 10)], 1e-5, "replace_one")
    assert "two steps of zero_out" in steps.method
    assert steps.lower <= exact.upper <= steps.upper


@pytest.mark.parametrize("at", [1e-3, 1e-5, 1e-10])
@pytest.mark.parametrize("noise", [0.1, 0.6, 5, 1000])
def test_there_is_always_a_bound(noise, at):
    for prob, steps in ((1e-9, 10), (1e-3, 3_000), (0.3, 1)):
        bound = epsilon([(poisson(noise, prob), steps)], at)
        assert 0 <= bound.lower <= bound.upper < math.inf


def test_beyond_the_floats_of_pld_another_engine_answers_with_the_reason():
    bound = epsilon([(poisson(0.5, 0.1), 10_000)], 1e-5)
    assert bound.lower <= 782.35 <= bound.upper <= 815
    assert "above 700" in bound.method


def test_every_engine_answers_or_says_why():
    found = engines.answers(Composition.of([(STEP, 1000)]), 1e-5, "zero_out")
    rigorous = [answer for answer in found if isinstance(answer, Answer) and answer.rigorous]
    assert {"pld", "binned", "rdp"} <= {answer.engine for answer in rigorous}
    assert max(answer.lower for answer in rigorous) <= min(answer.upper for answer in rigorous)
    for answer in found:
        if not isinstance(answer, Answer):
            assert all(isinstance(text, str) and text for text in answer)
    mixed = engines.answers(Composition.of([(STEP, 10), (FIXED, 10)]), 1e-5, "replace_one")
    unable = dict(entry for entry in mixed if not isinstance(entry, Answer))
    assert "SampledWithoutReplacementGaussian" in unable["prv"]
    assert all(
        isinstance(entry, tuple)
        for entry in engines.answers(Composition.of([(NonPrivate(reason="x"), 1)]), 1e-5, "zero_out")
    )


def lower_of(schedule, neighboring="zero_out"):
    """The certain lower bound, which a faulty upper bound must fall below to be noticed."""
    return max(tail.epsilon(1e-5) for tail in binned.tails(Composition.of(schedule), neighboring, 1e-3, 1 << 22))


class TestSeededFaults:
    """Each fault gives an upper bound below what the independent lower bound certainly shows."""

    def test_a_forgotten_count(self):
        assert engines.upper_epsilon(Composition.of([(STEP, 999)]), 1e-5, "zero_out")[0] > 1
        assert engines.upper_epsilon(Composition.of([(STEP, 1)]), 1e-5, "zero_out")[0] < lower_of([(STEP, 1000)])

    def test_a_count_forgotten_in_a_nest(self):
        nest = Repeated(event=Repeated(event=STEP, count=100), count=10)
        assert epsilon(nest, 1e-5).lower == epsilon([(STEP, 1000)], 1e-5).lower
        assert epsilon(Repeated(event=STEP, count=100), 1e-5).upper < epsilon(nest, 1e-5).lower

    def test_an_estimate_used_as_a_bound(self):
        clt = 1.6177  # the central limit theorem for the same run
        assert clt < lower_of([(STEP, 1000)])
        for answer in engines.answers(Composition.of([(STEP, 1000)]), 1e-5, "zero_out"):
            if isinstance(answer, Answer) and answer.engine in ("gdp_clt", "quadrature"):
                assert not answer.rigorous

    def test_q_off_by_a_dropped_batch(self):
        """10 batches of 100 from 1090 examples: the sampler's rate is 1/10, not 100/1090."""
        true, wrong = poisson(1, 1 / 10), poisson(1, 100 / 1090)
        assert engines.upper_epsilon(Composition.of([(wrong, 1000)]), 1e-5, "zero_out")[0] < lower_of([(true, 1000)])

    def test_sensitivity_c_where_a_unit_is_replaced(self):
        wrong = engines.upper_epsilon(Composition.of([(STEP, 1000)]), 1e-5, "zero_out")[0]
        assert wrong < lower_of([(STEP, 1000)], "replace_one")
        assert lower_of([(FIXED, 1000)], "replace_one") > 3.576  # dp-accounting's own value without the halving

    def test_a_composition_never_loses_an_event_that_an_engine_does_not_know(self):
        parts = [(STEP, 10), (FIXED, 10)]
        assert Composition.of(parts).count == 20
        alone = epsilon([(STEP, 10)], 1e-5, "replace_one")
        assert epsilon(parts, 1e-5, "replace_one").lower > alone.upper


def test_divergences_bound_the_losses_of_every_event_that_has_both():
    for event in (STEP, user_mixture(noise_multiplier=1, sampling_prob=0.05, examples_per_unit=3), truncated(120)):
        parts = Composition.of([(event, 20)])
        assert rdp.epsilon(parts, 1e-5, "zero_out") >= pld.epsilon(parts, 1e-5, "zero_out")[0] * (1 - 2e-3)
