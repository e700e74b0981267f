"""A person with several examples: what each kind of release costs them, event by event."""

import math

import pytest

from dpsb_accounting import Gaussian, NonPrivate, PoissonGaussian, epsilon
from dpsb_accounting.events import (
    ApproximateDP,
    Composed,
    DiscreteLaplace,
    Laplace,
    MatrixMechanism,
    PureEpsilon,
    RandomSelection,
    Repeated,
    Zcdp,
)
from dpsb_accounting.group import for_unit, group_epsilon

K = 3


@pytest.mark.parametrize(
    ("event", "grouped"),
    [
        (Gaussian(noise_multiplier=6.0), Gaussian(noise_multiplier=2.0)),
        (Laplace(noise_multiplier=6.0), Laplace(noise_multiplier=2.0)),
        (PureEpsilon(epsilon=0.5), PureEpsilon(epsilon=1.5)),
        (
            MatrixMechanism(noise_multiplier=6.0, sensitivity=1.5),
            MatrixMechanism(noise_multiplier=6.0, sensitivity=4.5),
        ),
        (
            DiscreteLaplace(noise_parameter=2.0, sensitivity=2),
            DiscreteLaplace(noise_parameter=2.0, sensitivity=6),
        ),
        (Zcdp(rho=0.1, xi=0.2), Zcdp(rho=0.9, xi=0.2 * 3 * (1 + 1 / 2 + 1 / 3))),
        (NonPrivate(reason="raw"), NonPrivate(reason="raw")),
    ],
    ids=lambda event: type(event).__name__,
)
def test_three_examples_of_a_person(event, grouped):
    assert for_unit(event, K) == grouped
    assert for_unit(event, 1) == event
    assert for_unit(Repeated(event=event, count=4), K) in (Repeated(event=grouped, count=4), grouped)
    pair = for_unit(Composed(events=(event, Gaussian(noise_multiplier=9.0))), K)
    assert pair == Composed(events=(grouped, Gaussian(noise_multiplier=3.0)))


def test_a_selection_of_runs_is_one_of_grouped_runs():
    selection = RandomSelection(event=Gaussian(noise_multiplier=6.0), mean_runs=10.0, shape=1.0)
    grouped = for_unit(selection, K)
    assert grouped == RandomSelection(event=Gaussian(noise_multiplier=2.0), mean_runs=10.0, shape=1.0)


def test_approximate_dp_follows_the_chain_of_three_neighbours():
    """From D to D''' by three steps: delta (1 + e^eps + e^2eps)."""
    grouped = for_unit(ApproximateDP(epsilon=0.4, delta=1e-6), K)
    assert grouped.epsilon == pytest.approx(1.2)
    assert grouped.delta == pytest.approx(1e-6 * (1 + math.exp(0.4) + math.exp(0.8)))
    hopeless = for_unit(ApproximateDP(epsilon=5.0, delta=1e-3), 4)
    assert isinstance(hopeless, NonPrivate)
    assert "4 examples" in hopeless.reason


@pytest.mark.parametrize(
    "event", [Gaussian(noise_multiplier=20.0), PoissonGaussian(noise_multiplier=2.0, sampling_prob=0.01)]
)
def test_more_examples_never_cost_less(event):
    found = [group_epsilon(event, k, 1e-5) for k in (1, 2, 3)]
    uppers = [bound.upper for bound in found]
    assert uppers == sorted(uppers)
    assert uppers[0] == pytest.approx(epsilon([event], 1e-5).upper)
    assert all(bound.lower <= bound.upper for bound in found)
    assert all(bound.unit == "user" for bound in found)


@pytest.mark.parametrize("count", [0, -1, 1.5, "2"])
def test_a_number_of_examples_is_whole_and_positive(count):
    with pytest.raises(ValueError, match="examples_per_unit"):
        group_epsilon(Gaussian(noise_multiplier=2.0), count, 1e-5)
