"""Events that are not Gaussian sums: Laplace and Skellam noise, randomized response, and stated guarantees.

Laplace noise follows the rule of the sums: `noise_multiplier` is its scale divided by the L1 clip norm for every
relation, and replace_one doubles the sensitivity. A guarantee that is *stated* (PureEpsilon, ApproximateDP, Zcdp) is
taken to hold for one unit added, removed or zeroed; replace_one then pays for two steps, one unit out and another in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dpsb_accounting import _checks


@dataclass(frozen=True, kw_only=True, slots=True)
class Laplace:
    r"""A sum of vectors of L1 norm at most C is released with Laplace noise on each coordinate.

    Args:
        noise_multiplier: Scale of the noise divided by C. Public.

    References:
        Dwork et al. (2006). One coordinate is the worst case: the affinity of a log-concave density with its shift is
        log-concave in the shift (Prékopa), so over the L1 ball it is least at a corner.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_multiplier", _checks.scale(noise_multiplier=self.noise_multiplier))


@dataclass(frozen=True, kw_only=True, slots=True)
class PoissonLaplace:
    """As `Laplace`, over units that are each included independently with probability q.

    For add_or_remove_one and zero_out; replace_one is bounded by group privacy of size 2.

    Args:
        noise_multiplier: Scale of the noise divided by the L1 clip norm. Public.
        sampling_prob: q in (0, 1]. Public.
    """

    noise_multiplier: float
    sampling_prob: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_multiplier", _checks.scale(noise_multiplier=self.noise_multiplier))
        object.__setattr__(self, "sampling_prob", _checks.probability(sampling_prob=self.sampling_prob))


@dataclass(frozen=True, kw_only=True, slots=True)
class DiscreteLaplace:
    r"""An integer sum is released with noise of probabilities proportional to :math:`e^{-a|x|}`.

    Args:
        noise_parameter: a > 0. Public.
        sensitivity: The most by which adding or removing one unit moves the sum in L1, a whole number; replace_one
            doubles it. Public.

    References:
        Ghosh, Roughgarden and Sundararajan (2012), arXiv:0811.2841.
    """

    noise_parameter: float
    sensitivity: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_parameter", _checks.scale(noise_parameter=self.noise_parameter))
        object.__setattr__(self, "sensitivity", _checks.whole(at_least=1, sensitivity=self.sensitivity))


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomizedResponse:
    """Each unit reports its bucket, or with probability `noise_parameter` one of all buckets at random.

    For replace_one and zero_out (where a zeroed unit reports a bucket at random); a unit that is added or removed
    would change the number of reports, which no noise hides.

    Args:
        noise_parameter: In (0, 1]. Public.
        num_buckets: At least 2. Public.
    """

    noise_parameter: float
    num_buckets: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_parameter", _checks.probability(noise_parameter=self.noise_parameter))
        object.__setattr__(self, "num_buckets", _checks.whole(at_least=2, num_buckets=self.num_buckets))


@dataclass(frozen=True, kw_only=True, slots=True)
class PureEpsilon:
    """Something that is epsilon-DP for one unit added, removed or zeroed; replace_one counts it twice.

    Args:
        epsilon: At least 0. Public.
    """

    epsilon: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", _checks.nonnegative(epsilon=self.epsilon))


@dataclass(frozen=True, kw_only=True, slots=True)
class ApproximateDP:
    """Something that is (epsilon, delta)-DP for one unit added, removed or zeroed; replace_one counts it twice.

    Args:
        epsilon: At least 0. Public.
        delta: In [0, 1). Public.
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", _checks.nonnegative(epsilon=self.epsilon))
        object.__setattr__(self, "delta", _checks.nonnegative(delta=self.delta))
        if self.delta >= 1:
            raise ValueError(f"delta must be in [0, 1), not {self.delta!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Zcdp:
    r"""Something with Rényi divergence at most :math:`\xi + \rho\alpha` at every order :math:`\alpha > 1`.

    Stated for one unit added, removed or zeroed; replace_one costs :math:`(3\xi, 4\rho)`.

    Args:
        rho: At least 0. Public.
        xi: At least 0; 0 for rho-zCDP. Public.

    References:
        Bun and Steinke (2016), arXiv:1605.02065, Definition 1.1 and Proposition 1.9.
    """

    rho: float
    xi: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "rho", _checks.nonnegative(rho=self.rho))
        object.__setattr__(self, "xi", _checks.nonnegative(xi=self.xi))


@dataclass(frozen=True, kw_only=True, slots=True)
class PoissonSkellam:
    r"""Each unit is included with probability q; the sum, in whole numbers, gets Skellam noise. Not a Gaussian.

    :math:`M(x) = \mathrm{round}(\tfrac{s}{C}\sum_i b_i x_i) + \mathrm{Skellam}(\mu)` in each of d coordinates, with
    :math:`\|x_i\| \le C`, :math:`b_i \sim \mathrm{Bernoulli}(q)` independent, and :math:`\mu = (\sigma s)^2` the
    variance of the noise. Each coordinate z is rounded to :math:`\lfloor z + u \rfloor`, with u in [0, 1) that does not
    depend on the data. A sum modulo a number is post-processing of it. Only Rényi divergences are used; under
    replace_one sampling amplifies each of two steps.

    Args:
        noise_multiplier: :math:`\sigma > 0`, noise standard deviation divided by C. Public.
        sampling_prob: :math:`q \in (0, 1]`, per unit and per release. Public.
        clip_steps: s, how many whole numbers the clip norm C is long. Public.
        dimension: d, of the sum. Public.

    References:
        Agarwal, Kairouz and Liu (2021), arXiv:2110.04995, Corollary 3.6; see the module `skellam`.
    """

    noise_multiplier: float
    sampling_prob: float
    clip_steps: float
    dimension: int

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "noise_multiplier", _checks.scale(noise_multiplier=self.noise_multiplier))
        put(self, "sampling_prob", _checks.probability(sampling_prob=self.sampling_prob))
        put(self, "clip_steps", _checks.scale(clip_steps=self.clip_steps))
        put(self, "dimension", _checks.whole(at_least=1, dimension=self.dimension))

    @property
    def variance(self) -> float:
        r""":math:`\mu`, of the noise on each coordinate, in squared whole numbers."""
        return math.pow(self.noise_multiplier * self.clip_steps, 2)
