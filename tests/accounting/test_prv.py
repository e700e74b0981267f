"""prv-accountant as an engine: right where its released wheel is wrong, and silent where it cannot be right."""

import sys

import pytest

from dpsb_accounting import Gaussian, Laplace, NonPrivate, PoissonGaussian
from dpsb_accounting.composition import Composition
from dpsb_accounting.engines import prv
from dpsb_accounting.engines.answer import Unavailable


def composed(noise, prob, steps, *further):
    return Composition.of([(PoissonGaussian(noise_multiplier=noise, sampling_prob=prob), steps), *further])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise", "prob", "steps", "truth"),
    [
        (1, 0.01, 1000, 1.828237),
        (4, 0.1, 10, 0.3049959),
        (1, 0.01, 1, 0.1994504),
        (0.5, 0.1, 10, 12.2612394),  # the released wheel alone raises: "Discrete mean differs"
        (0.5, 0.1, 1000, 126.166564),  # its lower bound was above the truth
        (0.8, 0.1, 1000, 39.8800869),
    ],
)
def test_its_interval_holds_the_truth(noise, prob, steps, truth):
    answer = prv.epsilon(composed(noise, prob, steps), 1e-5, "add_or_remove_one", prv.MOST_CELLS)
    assert answer.lower <= truth <= answer.upper
    assert answer.upper - answer.lower <= 0.01 * truth


def test_a_short_composition_with_a_gaussian():
    answer = prv.epsilon(composed(2, 0.1, 20, (Gaussian(noise_multiplier=4), 1)), 1e-5, "zero_out", 300_000)
    from dpsb_accounting.engines import quadrature

    truth = quadrature.epsilon(composed(2, 0.1, 20, (Gaussian(noise_multiplier=4), 1)), 1e-5, "zero_out").upper
    assert answer.lower <= truth <= answer.upper


@pytest.mark.parametrize(
    ("composition", "neighboring", "delta", "words"),
    [
        (composed(1, 0.1, 10), "replace_one", 1e-5, "replace_one"),
        (composed(1, 1, 10), "zero_out", 1e-5, "without subsampling"),
        (composed(1, 0.1, 10), "zero_out", 1e-14, "below"),
        (composed(4, 1e-4, 100_000), "zero_out", 1e-5, "cells"),
        (composed(1, 0.1, 10, (NonPrivate(reason="raw"), 1)), "zero_out", 1e-5, "no guarantee"),
        (composed(1, 0.1, 10, (Laplace(noise_multiplier=1), 1)), "zero_out", 1e-5, "Laplace"),
    ],
)
def test_refusals_name_their_reason(composition, neighboring, delta, words):
    with pytest.raises(Unavailable, match=words):
        prv.epsilon(composition, delta, neighboring, 100_000)


def test_without_the_package_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "prv_accountant", None)
    with pytest.raises(Unavailable, match="not installed"):
        prv.epsilon(composed(1, 0.1, 10), 1e-5, "zero_out")
