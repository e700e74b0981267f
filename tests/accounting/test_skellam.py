"""The Skellam bound: against the exact divergence in one dimension, and sensitivity after rounding."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpsb_accounting import Gaussian, PoissonGaussian, PoissonSkellam, delta, epsilon, gaussian, skellam
from dpsb_accounting.skellam import Sensitivity, renyi, sampled_renyi, sensitivity_after_rounding


def log_pmf(variance):
    """Exact log probabilities of a Skellam variable by convolving two Poisson ones; and its support."""
    from scipy.special import gammaln, logsumexp

    most = int(variance / 2 + 40 * math.sqrt(variance / 2) + 40)
    counts = np.arange(most + 1)
    poisson = counts * math.log(variance / 2) - variance / 2 - gammaln(counts + 1)
    reach = int(12 * math.sqrt(variance)) + 25
    values = np.arange(-reach, reach + 1)
    return values, np.array(
        [
            logsumexp(poisson[max(0, k) :][: most + 1 - abs(k)] + poisson[max(0, -k) :][: most + 1 - abs(k)])
            for k in values
        ]
    )


def exact_divergence(order, variance, shift):
    """Renyi divergence of the Skellam variable moved by `shift` from itself, summed term by term."""
    from scipy.special import logsumexp

    _, log_p = log_pmf(variance)
    moved, still = log_p[:-shift], log_p[shift:]
    return float(logsumexp(order * moved - (order - 1) * still)) / (order - 1)


@pytest.mark.parametrize("variance", [4, 10, 100, 400])
@pytest.mark.parametrize("order", [2, 3, 8, 16])
@pytest.mark.parametrize("shift", [1, 2, 5])
def test_the_bound_holds_in_one_dimension(variance, order, shift):
    exact = exact_divergence(order, variance, shift)
    bound = renyi(order, variance, Sensitivity(l1=shift, l2_squared=shift**2))
    assert 0 < exact <= bound
    if variance >= 100:
        assert bound <= 1.15 * exact, "and it is not loose where the noise is large"


def test_reference_number():
    assert exact_divergence(8, 100, 1) == pytest.approx(0.03995, abs=2e-5)
    assert renyi(8, 100, Sensitivity(l1=1, l2_squared=1)) == pytest.approx(0.04053, abs=1e-5)


def test_the_bound_holds_for_draws_in_several_dimensions():
    """Monte Carlo: E_Q[(P/Q)^a] of independent coordinates, moved by a mixed vector."""
    variance, order, move = 60, 3, np.array([3, -2, 1, 0, 1])
    values, log_p = log_pmf(variance)
    rng = np.random.default_rng(3)
    draws = rng.choice(len(values), size=(400_000, len(move)), p=np.exp(log_p) / np.exp(log_p).sum())
    inside = np.clip(draws - move, 0, len(values) - 1)
    ratio = (log_p[inside] - log_p[draws]).sum(axis=1)
    measured = math.log(float(np.mean(np.exp(order * ratio)))) / (order - 1)
    bound = renyi(order, variance, Sensitivity(l1=float(abs(move).sum()), l2_squared=float((move**2).sum())))
    assert measured <= bound * 1.01
    assert measured >= bound * 0.9


def test_fine_integers_come_close_to_the_gaussian_and_never_below():
    for noise_multiplier in (1.0, 3.0):
        _, exact = gaussian.epsilon(noise_multiplier / math.sqrt(20), 1e-5)
        found = sensitivity_after_rounding(l2_clip_norm=0.5, scale=1e6, dimension=64)
        upper = skellam.epsilon(variance=(noise_multiplier * 0.5e6) ** 2, sensitivity=found, count=20, delta=1e-5)
        assert exact < upper < 1.12 * exact


def test_gaussian_releases_beside_it_are_counted():
    one = {"variance": 1e6, "sensitivity": Sensitivity(l1=1000, l2_squared=1e6), "count": 1, "delta": 1e-5}
    both = skellam.epsilon(**one, gaussians=[(1.0, 1)])
    assert both == pytest.approx(skellam.epsilon(**{**one, "count": 2}), rel=5e-3)


@pytest.mark.parametrize("neighboring", ["add_or_remove_one", "replace_one"])
@pytest.mark.parametrize("whole_sum", [True, False])
def test_no_rounded_vector_moves_further(neighboring, whole_sum):
    """Each unit's vector rounded, or a silo's sum; with the same thresholds on both sides, as the coupling has it."""
    rng = np.random.default_rng(11)
    clip, scale, dimension = 1.0, 3.0, 6
    found = sensitivity_after_rounding(l2_clip_norm=clip, scale=scale, dimension=dimension, neighboring=neighboring)

    def clipped():
        vector = rng.normal(size=dimension)
        return scale * clip * vector / np.linalg.norm(vector)

    for _ in range(3000):
        rest, one, other = rng.normal(size=dimension) * 10, clipped(), clipped()
        other = other if neighboring == "replace_one" else np.zeros(dimension)
        thresholds = rng.random((2, dimension))
        if whole_sum:
            moved = np.floor(rest + one + thresholds[0]) - np.floor(rest + other + thresholds[0])
        elif neighboring == "replace_one":
            moved = np.floor(one + thresholds[0]) - np.floor(other + thresholds[1])
        else:
            moved = np.floor(one + thresholds[0])
        assert float((moved**2).sum()) <= found.l2_squared
        assert float(abs(moved).sum()) <= found.l1


@settings(max_examples=100, deadline=None)
@given(st.floats(1.0, 1e8), st.floats(0.5, 1e3), st.integers(1, 10**6), st.integers(1, 500), st.floats(1e-9, 0.5))
def test_laws(variance, scale, dimension, count, delta):
    found = sensitivity_after_rounding(l2_clip_norm=1, scale=scale, dimension=dimension)
    upper = skellam.epsilon(variance=variance, sensitivity=found, count=count, delta=delta)
    more_noise = skellam.epsilon(variance=2 * variance, sensitivity=found, count=count, delta=delta)
    more_steps = skellam.epsilon(variance=variance, sensitivity=found, count=count + 1, delta=delta)
    assert 0 <= more_noise <= upper <= more_steps
    assert found.l2_squared >= scale**2
    assert found.l1 <= math.sqrt(dimension) * math.sqrt(found.l2_squared) * (1 + 1e-9)


def test_only_whole_orders():
    with pytest.raises(ValueError, match="order must be a whole number"):
        renyi(2.5, 1.0, Sensitivity(l1=1, l2_squared=1))
    with pytest.raises(ValueError, match="order must be at least 2"):
        renyi(1, 1.0, Sensitivity(l1=1, l2_squared=1))


# --- sampled


def exact_sampled(order, variance, shift, prob):
    """Both divergences between the Skellam variable and its mixture with the moved one, summed term by term."""
    from scipy.special import logsumexp

    _, log_p = log_pmf(variance)
    moved, still = log_p[:-shift], log_p[shift:]
    mixed = np.logaddexp(math.log1p(-prob) + still, math.log(prob) + moved)
    removed, added = order * mixed - (order - 1) * still, order * still - (order - 1) * mixed
    return [float(logsumexp(terms)) / (order - 1) for terms in (removed, added)]


@pytest.mark.parametrize("variance", [4, 100, 400])
@pytest.mark.parametrize("order", [2, 3, 8, 16])
@pytest.mark.parametrize("prob", [0.01, 0.2, 0.9])
def test_the_sampled_bound_holds_both_ways_in_one_dimension(variance, order, prob):
    for shift in (1, 5):
        removed, added = exact_sampled(order, variance, shift, prob)
        bound = sampled_renyi(order, variance, Sensitivity(l1=shift, l2_squared=shift**2), prob)
        assert added <= removed * (1 + 1e-9) + 1e-12, "reflection: adding costs no more than removing"
        assert 0 < removed <= bound
        if variance >= 100 and shift**2 * order <= variance:
            assert bound <= 1.25 * removed, "and it is not loose where the noise is large"


def test_sampling_with_certainty_or_hardly_ever():
    found = Sensitivity(l1=100, l2_squared=1e4)
    assert sampled_renyi(8, 1e4, found, 1.0) == renyi(8, 1e4, found)
    assert sampled_renyi(8, 1e4, found, 1 - 1e-12) == pytest.approx(renyi(8, 1e4, found), rel=1e-9)
    assert sampled_renyi(2, 1e4, found, 1e-4) == pytest.approx(1e-8 * math.expm1(renyi(2, 1e4, found)), rel=1e-3)
    assert 0 <= sampled_renyi(8, 1e4, found, 1e-300) < 1e-10


@pytest.mark.parametrize(
    ("noise", "prob", "steps"), [(1.0, 0.02, 500), (2.0, 0.25, 30), (5.0, 1.0, 10), (0.5, 0.01, 3)]
)
@pytest.mark.parametrize("clip_steps", [2.0**17, 500.0])
def test_epsilon_is_never_the_gaussian_one(noise, prob, steps, clip_steps):
    """Against our own bounds for Gaussian noise, and dp-accounting's Rényi divergences of it."""
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    event = PoissonSkellam(noise_multiplier=noise, sampling_prob=prob, clip_steps=clip_steps, dimension=10_000)
    found = epsilon([(event, steps)], 1e-6).upper
    exact = epsilon([(PoissonGaussian(noise_multiplier=noise, sampling_prob=prob), steps)], 1e-6)
    assert found > exact.upper
    accountant = RdpAccountant(list(range(2, 64)))
    step = dp_accounting.PoissonSampledDpEvent(prob, dp_accounting.GaussianDpEvent(noise))
    by_renyi = accountant.compose(step, steps).get_epsilon(1e-6)
    assert found > by_renyi * (1 - 1e-9)
    if clip_steps == 2.0**17:
        assert found < by_renyi * 1.02, "fine whole numbers cost a per cent, no more"


@pytest.mark.parametrize("shift_of_a_unit", [1.0, 0.5, -1.0])
def test_epsilon_holds_for_the_exact_sampled_sum(shift_of_a_unit):
    """The true delta of one release in one dimension, both ways, lies below what is claimed."""
    noise, prob, clip_steps = 1.5, 0.3, 8.0
    event = PoissonSkellam(noise_multiplier=noise, sampling_prob=prob, clip_steps=clip_steps, dimension=1)
    _, log_p = log_pmf((noise * clip_steps) ** 2)
    for rest in (0.0, 0.49, 0.51):
        shift = abs(round(rest + shift_of_a_unit * clip_steps) - round(rest))
        moved, still = np.exp(log_p[:-shift]), np.exp(log_p[shift:])
        mixed = (1 - prob) * still + prob * moved
        for at in (0.1, 0.5, 1.0):
            claimed = delta([event], at).upper
            for one, other in ((mixed, still), (still, mixed)):
                assert float(np.maximum(one - math.exp(at) * other, 0).sum()) <= claimed


def test_replacing_is_two_steps_or_twice_as_far():
    sampled = PoissonSkellam(noise_multiplier=4, sampling_prob=0.1, clip_steps=1e5, dimension=100)
    whole = PoissonSkellam(noise_multiplier=4, sampling_prob=1, clip_steps=1e5, dimension=100)
    for event in (sampled, whole):
        assert epsilon([event], 1e-5, "replace_one").upper > epsilon([event], 1e-5, "zero_out").upper
    assert "two steps" in epsilon([sampled], 1e-5, "replace_one").method
    _, twice = gaussian.epsilon(2.0, 1e-5)
    assert twice < epsilon([whole], 1e-5, "replace_one").upper < 1.3 * twice


def test_it_composes_with_other_releases():
    event = PoissonSkellam(noise_multiplier=2, sampling_prob=0.1, clip_steps=1e5, dimension=100)
    both = epsilon([(event, 10), (Gaussian(noise_multiplier=5), 1)], 1e-5).upper
    assert both > max(epsilon([(event, 10)], 1e-5).upper, epsilon(Gaussian(noise_multiplier=5), 1e-5).upper)
