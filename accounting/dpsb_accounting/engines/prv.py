r"""A second opinion from prv-accountant: privacy random variables, discretized on one grid and convolved.

Its error bounds (Gopi, Lee and Wutschitz 2021, Theorem 5.5) hold if each discretized loss has exactly the mean of
the continuous one. The released wheel (0.2.0) computes that mean with an adaptive rule over a few fixed pieces, which
misses narrow peaks: then it raises, or worse, is off by less than half a cell *per release* and its lower bound lies
above the truth. So its discretizer, composer and bounds are used, but every mean comes from here, by the trapezoid
rule in the output domain, and what it cannot do is refused:

* it knows the remove direction only; the other one is put beside it, by its closed form, and the larger is taken;
* under replace_one it has nothing to say;
* its errors are absolute: `eps_error` is chosen relative to a first answer;
* its size is predicted before anything is allocated, and anything above the limit is refused;
* below delta = 1e-13 its floats no longer suffice.

References:
    Gopi, Lee and Wutschitz (2021), arXiv:2106.02848; https://github.com/microsoft/prv_accountant.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

from dpsb_accounting.composition import Composition
from dpsb_accounting.engines.answer import Answer, Unavailable

_RELATIVE_ERROR = 2e-3  # of epsilon
_FIRST_ERROR = 0.05  # of the Renyi bound, for the first answer
_SMALLEST_DELTA = 1e-13
MOST_CELLS = 2_500_000  # below 2 GB and about 25 s, measured
QUICK_CELLS = 300_000  # about two seconds


def epsilon(composition: Composition, delta: float, neighboring: str, most_cells: int = QUICK_CELLS) -> Answer:
    """Returns bounds on epsilon at `delta` of Poisson-subsampled Gaussians and Gaussians.

    Args:
        composition: What is composed.
        delta: At least 1e-13.
        neighboring: "add_or_remove_one" or "zero_out".
        most_cells: The longest grid that may be used, summed over the parts; `MOST_CELLS` takes half a minute.

    Raises:
        Unavailable: If prv-accountant is not installed, would need too long a grid, fails, or does not cover this.
    """
    _refuse(composition, delta, neighboring)
    lower, upper, error = 0.0, 0.0, 0.0
    for direction in ("remove", "add"):
        low, high, used = _direction(composition, delta, direction, most_cells)
        lower, upper, error = max(lower, low), max(upper, high), max(error, used)
    return Answer(
        engine="prv",
        lower=lower,
        upper=upper,
        rigorous=True,
        method=f"prv-accountant, both directions, error {error:.2g}",
    )


def _refuse(composition: Composition, delta: float, neighboring: str) -> None:
    try:
        import prv_accountant  # noqa: F401
    except ImportError:
        raise Unavailable("prv-accountant is not installed") from None
    if composition.non_private:
        raise Unavailable("something was released with no guarantee")
    if composition.others:
        raise Unavailable(f"prv-accountant does not know {type(composition.others[0][0]).__name__}")
    if not composition.subsampled:
        raise Unavailable("without subsampling there is one exact Gaussian, or nothing")
    if neighboring == "replace_one":
        raise Unavailable("prv-accountant does not know replace_one")
    if delta < _SMALLEST_DELTA:
        raise Unavailable(f"delta={delta!r} is below {_SMALLEST_DELTA:g}, where the floats of prv-accountant fail")


def _direction(composition: Composition, delta: float, direction: str, most_cells: int) -> tuple[float, float, float]:
    """Lower bound, upper bound and eps_error of one direction."""
    from prv_accountant.other_accountants import RDP

    releases = _releases(composition, direction)
    counts = [release.count for release in releases]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        renyi = float(RDP(prvs=[release.loss for release in releases]).compute_epsilon(delta, counts)[1])
        if not math.isfinite(renyi):
            raise Unavailable("prv-accountant finds no finite Renyi bound")
        first = max(_FIRST_ERROR * abs(renyi), 1e-6)
        low, middle, high = _compute(releases, delta, first, most_cells)
        error = _RELATIVE_ERROR * middle
        if not 0 < error < first:
            return max(0.0, low), high, first
        try:
            low, _, high = _compute(releases, delta, error, most_cells)
        except Unavailable:
            error = math.sqrt(first * error)  # half way, on a logarithmic scale
            low, _, high = _compute(releases, delta, error, most_cells)
    return max(0.0, low), high, error


@dataclass(frozen=True, slots=True)
class _Release:
    """One kind of release: its loss as prv-accountant describes it, the true mean of that loss, and the count."""

    loss: Any
    mean: float
    count: int


@dataclass(frozen=True, slots=True)
class _Truncated:
    """What prv-accountant's discretizer asks of a truncated loss, with the true mean."""

    truncated: Any
    true_mean: float

    def probability(self, low: Any, high: Any) -> Any:
        """Probability of each interval."""
        return self.truncated.probability(low, high)

    def mean(self) -> float:
        """The mean; what truncation takes away is below the error allowed for."""
        return self.true_mean

    @property
    def pm_inf(self) -> float:
        """Probability of an infinite loss."""
        return 0.0


@dataclass(frozen=True, slots=True)
class _Added:
    """The loss when one example is added: -log(1 - q + q e^((2x - 1) / (2 sigma^2))) with x from N(0, sigma^2)."""

    noise: float
    prob: float
    removed: Any

    @property
    def pm_inf(self) -> float:
        """Probability of an infinite loss."""
        return 0.0

    def cdf(self, losses: Any) -> Any:
        """P(loss <= t): the loss falls in x, so it is P(x >= x(t)); at most -log(1 - q)."""
        import numpy as np
        from scipy.special import ndtr

        t = np.asarray(losses, dtype=np.float64)
        with np.errstate(all="ignore"):
            x = self.noise**2 * np.log1p(np.expm1(-t) / self.prob) + 0.5
            return np.where(np.isnan(x), 1.0, ndtr(-x / self.noise)).astype(np.longdouble)

    def probability(self, low: Any, high: Any) -> Any:
        """Probability of each interval."""
        return self.cdf(high) - self.cdf(low)

    def rdp(self, order: float) -> float:
        """At most that of removing (Mironov, Talwar and Zhang 2019, arXiv:1908.10530); it only sizes the grid."""
        return float(self.removed.rdp(order))


def _releases(composition: Composition, direction: str) -> list[_Release]:
    from prv_accountant.privacy_random_variables import GaussianMechanism, PoissonSubsampledGaussianMechanism

    found = []
    for part in composition.subsampled:
        noise, prob = part.noise_multiplier, part.sampling_prob
        loss: Any = PoissonSubsampledGaussianMechanism(sampling_probability=prob, noise_multiplier=noise)
        if direction == "add":
            loss = _Added(noise, prob, loss)
        found.append(_Release(loss, _mean(noise, prob, direction), part.count))
    if math.isfinite(composition.noise_multiplier):
        noise = composition.noise_multiplier
        found.append(_Release(GaussianMechanism(noise), 1 / (2 * noise**2), 1))
    return found


def _mean(noise: float, prob: float, direction: str) -> float:
    """The mean of one loss (a Kullback-Leibler divergence), by the trapezoid rule over the output x."""
    import numpy as np

    step = min(noise / 16, noise**2 / 6)
    x = np.arange(-14 * noise - 1, 14 * noise + 2, step)
    log_normal = -(x**2) / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi))
    exponent = (2 * x - 1) / (2 * noise**2)
    loss = np.logaddexp(math.log1p(-prob), math.log(prob) + exponent)
    # log1p of the small excess, and P - Q in place of P where that avoids cancellation: E_Q[e^L - 1] = 0.
    small = np.log1p(np.minimum(prob * np.expm1(np.minimum(exponent, 30.0)), 1e9))
    loss = np.where(exponent < 30, small, loss)
    if direction == "add":
        terms = np.exp(log_normal) * (np.expm1(np.minimum(loss, 50.0)) - loss)
        terms = np.where(loss < 50, terms, np.exp(log_normal + loss))
    else:
        terms = np.exp(log_normal + loss) * (loss + np.expm1(-loss))
    return float(terms.sum()) * step


def _compute(releases: list[_Release], delta: float, eps_error: float, most_cells: int) -> tuple[float, float, float]:
    """Lower bound, estimate and upper bound at this error: the steps of `PRVAccountant`, with the true means."""
    import numpy as np
    from prv_accountant import composers, discretisers
    from prv_accountant.accountant import compute_safe_domain_size
    from prv_accountant.domain import Domain
    from prv_accountant.privacy_random_variables import PrivacyRandomVariableTruncated

    delta_error = delta / 1000
    counts = [release.count for release in releases]
    losses = [release.loss for release in releases]
    try:
        reach = float(compute_safe_domain_size(losses, counts, eps_error=eps_error, delta_error=delta_error))
        mesh = eps_error / math.sqrt(sum(counts) / 2 * math.log(12 / delta_error))
        cells = 2 * reach / mesh * len(releases)
        if not cells <= most_cells:
            raise Unavailable(f"prv-accountant would need {cells:.2g} cells")
        domain = Domain.create_aligned(-reach, reach, mesh)
        parts = [
            discretisers.CellCentred().discretise(
                _Truncated(PrivacyRandomVariableTruncated(release.loss, domain.t_min(), domain.t_max()), release.mean),
                domain,
            )
            for release in releases
        ]
        composed = composers.Heterogeneous(parts).compute_composition(counts)
        low, middle, high = composed.compute_epsilon(delta, delta_error, eps_error)
    except (RuntimeError, ValueError, ArithmeticError, AssertionError, IndexError) as error:
        raise Unavailable(f"prv-accountant fails: {error or type(error).__name__}") from None
    if not (np.isfinite([low, middle, high]).all() and low <= middle <= high):
        raise Unavailable("prv-accountant returns no number")
    return low, middle, high
