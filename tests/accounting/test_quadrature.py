"""The contour integral against values found elsewhere, and what it refuses."""

import math

import pytest

from dpsb_accounting import Gaussian, Laplace, NonPrivate, PoissonGaussian
from dpsb_accounting.composition import Composition
from dpsb_accounting.engines import quadrature
from dpsb_accounting.engines.answer import Unavailable


def composed(noise, prob, steps, *further):
    return Composition.of([(PoissonGaussian(noise_multiplier=noise, sampling_prob=prob), steps), *further])


# Found with other programs: privacy random variables and finely meshed distributions of losses.
REFERENCES = [
    (1, 0.01, 1000, 1e-5, 1.828237),
    (1, 0.01, 100_000, 1e-5, 25.57311),
    (0.5, 0.01, 1000, 1e-5, 13.36082),
    (0.5, 0.1, 1000, 1e-5, 126.1666),
    (0.8, 1e-3, 10_000, 1e-5, 0.7823878),
    (2, 1e-3, 100_000, 1e-5, 0.6037715),
    (4, 1e-4, 100_000, 1e-5, 0.02133782),
    (4, 0.1, 10_000, 1e-5, 13.49836),
    (1, 0.01, 1, 1e-5, 0.1994504),
    (1, 0.01, 100_000, 1e-9, 33.04211),
    (2, 1e-3, 100_000, 1e-9, 0.927460),
]


@pytest.mark.parametrize("case", REFERENCES)
def test_references(case):
    noise, prob, steps, delta, expected = case
    answer = quadrature.epsilon(composed(noise, prob, steps), delta, "add_or_remove_one")
    assert answer.lower <= answer.upper <= answer.lower + 1e-5 * (1 + expected)
    assert answer.upper == pytest.approx(expected, rel=1e-6)
    assert not answer.rigorous


def test_replace_one_and_a_gaussian_before():
    step = composed(1, 0.01, 1000)
    assert quadrature.epsilon(step, 1e-5, "replace_one").upper == pytest.approx(2.8434, rel=1e-4)
    with_basis = composed(1, 0.01, 1000, (Gaussian(noise_multiplier=5), 1))
    assert quadrature.epsilon(with_basis, 1e-5, "zero_out").upper == pytest.approx(1.99248, rel=1e-5)
    two = composed(1, 0.01, 1000, (PoissonGaussian(noise_multiplier=2, sampling_prob=0.1), 1))
    assert quadrature.epsilon(two, 1e-5, "zero_out").upper == pytest.approx(1.84258, rel=1e-5)


@pytest.mark.parametrize(("neighboring", "scale"), [("add_or_remove_one", 1), ("replace_one", 2)])
def test_one_gaussian_has_a_closed_form(neighboring, scale):
    mpmath = pytest.importorskip("mpmath")
    for noise in (0.3, 1, 5, 40):
        for delta in (1e-3, 1e-10):
            composition = Composition.of([(Gaussian(noise_multiplier=noise), 3)])
            found = quadrature.epsilon(composition, delta, neighboring)
            with mpmath.workdps(30):
                sigma, at = noise / scale / mpmath.sqrt(3), (found.lower + found.upper) / 2
                half, shift = 1 / (2 * sigma), at * sigma
                value = mpmath.ncdf(half - shift) - mpmath.exp(at) * mpmath.ncdf(-half - shift)
            assert float(value) == pytest.approx(delta, rel=1e-6)


def test_it_works_at_tiny_delta():
    for delta, expected in ((1e-12, 3.91430), (1e-13, 4.2298)):
        found = quadrature.epsilon(composed(1, 0.01, 1000), delta, "zero_out")
        assert found.upper == pytest.approx(expected, rel=1e-5)


def test_nothing_is_found_where_epsilon_is_zero():
    assert quadrature.epsilon(composed(1, 1e-4, 1), 1e-3, "zero_out").upper == 0


@pytest.mark.parametrize(
    ("composition", "words"),
    [
        (composed(1, 1e-4, 3), "falls too slowly"),
        (composed(0.01, 0.1, 10), "noise multiplier"),
        (composed(1, 0.1, 10, (NonPrivate(reason="raw"), 1)), "no guarantee"),
        (composed(1, 0.1, 10, (Laplace(noise_multiplier=1), 1)), "Laplace"),
        (Composition.of([]), "nothing was released"),
    ],
)
def test_refusals_name_their_reason(composition, words):
    with pytest.raises(Unavailable, match=words):
        quadrature.epsilon(composition, 1e-9, "add_or_remove_one")


def test_it_notices_when_its_contours_differ(monkeypatch):
    found = iter((1.0, 1.001))
    monkeypatch.setattr(quadrature, "_invert", lambda *_: next(found))
    with pytest.raises(Unavailable, match="two contours differ"):
        quadrature.epsilon(composed(1, 0.01, 1000), 1e-5, "zero_out")


def test_more_noise_or_fewer_steps_never_cost_more():
    values = [quadrature.epsilon(composed(1, 0.01, steps), 1e-5, "zero_out").upper for steps in (100, 1000, 5000)]
    assert values == sorted(values)
    values = [quadrature.epsilon(composed(noise, 0.01, 1000), 1e-5, "zero_out").upper for noise in (0.7, 1, 3)]
    assert values == sorted(values, reverse=True)
    assert not any(math.isnan(value) for value in values)
