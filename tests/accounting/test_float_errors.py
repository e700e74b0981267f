"""What floats can do to a bound: tails composed by FFT, tiny sampling probabilities, extreme parameters."""

import json
import math
import time

import numpy as np
import pytest
from mpmath import mp, mpf, ncdf
from scipy import fft

from dpsb_accounting import (
    ApproximateDP,
    Composed,
    DiscreteLaplace,
    Gaussian,
    Laplace,
    PoissonGaussian,
    PoissonLaplace,
    RandomizedResponse,
    ResourceLimit,
    SampledWithoutReplacementGaussian,
    UserMixture,
    Zcdp,
    cli,
    delta,
    epsilon,
)
from dpsb_accounting.composition import Composition
from dpsb_accounting.engines import binned


def exact_replaced_delta(noise, prob, at):
    """Delta of one Poisson-sampled sum under replace_one, with 50 digits."""
    with mp.workdps(50):
        sigma, q, growth = mpf(noise), mpf(prob), mp.exp(mpf(at))
        a, b = q * mp.exp(-1 / (2 * sigma**2)), (1 - q) * (1 - growth)
        x = sigma**2 * mp.log((-b + mp.sqrt(b * b + 4 * a * a * growth)) / (2 * a))  # where the densities meet
        p = (1 - q) * ncdf(-x / sigma) + q * ncdf((1 - x) / sigma)
        return float(p - growth * ((1 - q) * ncdf(-x / sigma) + q * ncdf((-1 - x) / sigma)))


@pytest.mark.parametrize(
    ("noise", "prob", "at"),
    [(0.25261092363282495, 1.5406538662487238e-09, 9.28429527590825), (0.3488, 1.676e-09, 0.00917), (1, 1e-3, 0.5)],
)
def test_deltas_near_the_precision_of_floats_are_enclosed(noise, prob, at):
    """The first one was bounded below by 2e-15 where it is 1e-17: the noise of the FFT, made positive and added up."""
    found = delta([(PoissonGaussian(noise_multiplier=noise, sampling_prob=prob), 1)], at, "replace_one")
    assert found.lower <= exact_replaced_delta(noise, prob, at) <= found.upper


def by_long_doubles(masses, count, size, low):
    factor, power = fft.rfft(masses.astype(np.longdouble), size), np.ones(1, dtype=np.clongdouble)
    while count:
        if count & 1:
            power = power * factor
        factor, count = factor * factor, count >> 1
    return np.roll(fft.irfft(power, size), -(low % size))


@pytest.mark.skipif(np.finfo(np.longdouble).eps > 1e-18, reason="long doubles are no finer than doubles here")
@pytest.mark.parametrize(
    ("noise", "prob", "count", "neighboring", "mesh"),
    [
        (0.602, 4.04e-7, 1_000, "zero_out", 6e-4),
        (0.2003, 5.8e-4, 100, "replace_one", 2.5e-3),
        (0.445, 2.7e-7, 100_000, "replace_one", 9.5e-4),
        (1.704, 1.85e-4, 100_000, "replace_one", 2.4e-4),
        (1, 0.01, 10, "zero_out", 1e-2),
    ],
)
@pytest.mark.parametrize("long", [False, True])
def test_the_float_guard_covers_the_errors_of_small_tails(monkeypatch, noise, prob, count, neighboring, mesh, long):
    if not long:
        monkeypatch.setattr(binned, "_MANY", math.inf)
    composition = Composition.of([(PoissonGaussian(noise_multiplier=noise, sampling_prob=prob), count)])
    (part,) = binned._cells(composition, neighboring, "replace" if neighboring == "replace_one" else "add", mesh)
    width = max(count * binned._variance(part.p), 1e-3)
    strengths = np.geomspace(1 / len(part.p), 16 / math.sqrt(width), 16)
    low, high = binned._window([part.p], [count], np.concatenate((-strengths, strengths)), 1e-17)
    size = fft.next_fast_len(max(high - low + 1, len(part.p)), real=True)
    tail = np.cumsum(binned._convolve([part.p], [count], size, low)[::-1], dtype=np.longdouble)
    longer = 2 * size if binned._long(count, size) else size  # so that the two do not err in the same way
    exact = np.cumsum(by_long_doubles(part.p, count, longer, low)[:size][::-1])
    error = np.abs(tail - exact)[exact < 0.01].max()
    assert error <= 0.6 * binned._guard(count, size)


def test_a_small_delta_after_many_steps_keeps_a_tight_lower_bound():
    """The row of the benchmark's grid where the float errors of doubles weigh most."""
    found = epsilon([(PoissonGaussian(noise_multiplier=0.8, sampling_prob=1e-4), 100_000)], 1e-9)
    assert found.upper - found.lower <= 0.005


EXTREME = [
    PoissonGaussian(noise_multiplier=1e-9, sampling_prob=0.01),
    PoissonGaussian(noise_multiplier=1e-50, sampling_prob=1e-300),
    PoissonGaussian(noise_multiplier=1e50, sampling_prob=0.01),
    PoissonLaplace(noise_multiplier=1e-4, sampling_prob=1e-300),
    Laplace(noise_multiplier=1e-50),
    DiscreteLaplace(noise_parameter=1e-4, sensitivity=10**12),
    DiscreteLaplace(noise_parameter=1000, sensitivity=1),
    RandomizedResponse(noise_parameter=1e-300, num_buckets=10),
    ApproximateDP(epsilon=1000, delta=1e-7),
    Zcdp(rho=1e300, xi=0),
    SampledWithoutReplacementGaussian(noise_multiplier=1e9, batch_size=10, num_examples=1000),
    UserMixture(noise_multiplier=0.04, sensitivities=(0, 1, 2), probabilities=(0.9, 0.05, 0.05)),
    UserMixture(noise_multiplier=1, sensitivities=(0, 1e-50, 1e50), probabilities=(0.9, 0.05, 0.05)),
]


@pytest.mark.parametrize("event", EXTREME, ids=lambda event: type(event).__name__)
@pytest.mark.parametrize("neighboring", ["zero_out", "replace_one"])
def test_extreme_parameters_get_a_bound_or_a_reason(event, neighboring):
    for count in (1, 10**6):
        found = bound_or_reason(event, count, neighboring)
        if isinstance(found, str):
            assert "no finite bound" in found or "costs too much" in found
        else:
            assert 0 <= found.lower <= found.upper < math.inf


def bound_or_reason(event, count, neighboring):
    try:
        return epsilon([(event, count)], 1e-5, neighboring)
    except ResourceLimit as refusal:
        return str(refusal)


def test_noise_beyond_what_floats_can_square_is_refused_by_name():
    for noise in (1e-300, 1e300):
        with pytest.raises(ValueError, match="noise_multiplier must be between 1e-50 and 1e50, not 1e"):
            Gaussian(noise_multiplier=noise)
    with pytest.raises(ValueError, match="sensitivities must be between"):
        UserMixture(noise_multiplier=1, sensitivities=(0, 1e-300), probabilities=(0.5, 0.5))


def test_a_delta_that_underflows_is_not_said_to_be_zero():
    for prob in (0.5, 1):
        found = delta([(PoissonGaussian(noise_multiplier=5, sampling_prob=prob), 1)], 900)
        assert found.lower == 0 < found.upper < 1e-300


def test_many_different_events_are_counted_in_linear_time():
    events = tuple(Gaussian(noise_multiplier=1 + i / 1e5) for i in range(9_000))
    started = time.process_time()
    assert epsilon(Composed(events=events), 1e-5).upper > 0
    with pytest.raises(ValueError, match="at most 10000 different events"):
        epsilon(Composed(events=(*events, *(Laplace(noise_multiplier=1 + i) for i in range(9_000)))), 1e-5)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("noise", "words"),
    [
        ('{"type": "GaussianDpEvent", "noise_multiplier": %s}' % ("9" * 5000), "has 5000 digits"),
        ('{"type": "GaussianDpEvent", "noise_multiplier": 1e300}', "between 1e-50 and 1e50"),
        ('{"type": "GaussianDpEvent", "noise_multiplier": -Infinity}', "-Infinity is not a finite number"),
    ],
)
def test_a_number_in_a_file_that_means_nothing(tmp_path, capsys, noise, words):
    path = tmp_path / "event.json"
    path.write_text(noise)
    with pytest.raises(SystemExit) as stop:
        cli.main(["epsilon", "--event", str(path), "--delta", "1e-5", "--json"])
    printed = capsys.readouterr()
    assert (stop.value.code, printed.out) == (1, "")
    assert printed.err.startswith(f"error: {path}: ")
    assert printed.err.count("\n") == 1
    assert words in printed.err


def test_flags_with_absurd_noise(capsys):
    for noise, code in (("1e300", 1), ("1e-9", 0)):
        arguments = ["epsilon", "--noise-multiplier", noise, "--sampling-prob", "0.01", "--steps", "1000"]
        with pytest.raises(SystemExit) as stop:
            cli.main([*arguments, "--delta", "1e-5", "--json"])
        printed = capsys.readouterr()
        assert stop.value.code == code
        assert printed.err.startswith("error: noise_multiplier must be between") if code else not printed.err
        if not code:
            assert json.loads(printed.out)["epsilon"]["upper"] > 1e10
