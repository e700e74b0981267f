"""Events that are not Gaussian sums: Laplace noise, randomized response, and releases known by their guarantee.

Laplace noise follows the rule of the sums: `noise_multiplier` is its scale divided by the L1 clip norm for every
relation, and replace_one doubles the sensitivity. A guarantee that is *stated* (PureEpsilon, ApproximateDP, Zcdp) is
taken to hold for one unit added, removed or zeroed; replace_one then pays for two steps, one unit out and another in.
"""

from __future__ import annotations

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
