"""Settings at which users of other accountants were stuck, each named by the thread that it answers."""

import tracemalloc

import pytest
from federations import silo, step

from dpsb_accounting import PoissonGaussian, epsilon, noise_multiplier_for
from dpsb_accounting.federated import client_level, silo_local

DELTA = 1e-5


@pytest.mark.parametrize(
    ("noise_multiplier", "sampling_prob", "steps"),
    [(1.0, 0.2, 10), (1.0, 0.2, 500), (0.4, 0.02, 3000)],
    ids=["prv_accountant-42", "prv_accountant-36", "opacus-604"],
)
def test_large_epsilons_have_an_answer(noise_multiplier, sampling_prob, steps):
    """prv_accountant#36, #42; opacus#601, #604, #591: 'Discrete mean differs significantly' at ordinary settings."""
    event = PoissonGaussian(noise_multiplier=noise_multiplier, sampling_prob=sampling_prob)
    bound = epsilon([(event, steps)], DELTA)
    assert 0 < bound.lower <= bound.upper < 1.05 * bound.lower


@pytest.mark.parametrize("target", [0.5, 8.0, 50.0])
def test_calibration_never_exceeds_its_target_and_wastes_little(target):
    """opacus#346, #566; private-transformers#8: 10 to 11 for a target of 8, or far too much noise."""
    run = {"sampling_prob": 0.01, "steps": 1000}
    noise = noise_multiplier_for(target_epsilon=target, delta=DELTA, **run)

    def spent(noise_multiplier):
        event = PoissonGaussian(noise_multiplier=noise_multiplier, sampling_prob=run["sampling_prob"])
        return epsilon([(event, run["steps"])], DELTA)

    assert spent(noise).upper <= target
    assert spent(0.99 * noise).upper > target


def test_calibration_needs_little_memory():
    """opacus#602: make_private_with_epsilon ran out of memory for a very small data set."""
    tracemalloc.start()
    try:
        noise = noise_multiplier_for(target_epsilon=1.0, delta=1e-4, sampling_prob=0.5, steps=2000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert noise > 1
    assert peak < 256 * 2**20


def test_a_clients_rate_is_not_multiplied_into_its_sampling():
    """opacus#669: a plan for examples whose q was B/N times the share of clients in a round.

    A silo pays for what it drew itself. Whole clients are another unit, with another plan.
    """
    steps, inside, clients_a_round = 200, 0.05, 0.1
    own = silo("a", step(1.0, inside), steps)
    wrong = epsilon([(PoissonGaussian(noise_multiplier=1.0, sampling_prob=inside * clients_a_round), steps)], DELTA)
    report = silo_local([own, silo("b", step(1.0, inside), steps)])
    assert report.epsilon.lower > 2 * wrong.upper
    with pytest.raises(ValueError, match="unit"):
        client_level([own], participation="poisson")
