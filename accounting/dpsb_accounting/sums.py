"""Events that release a sum of bounded vectors, one per unit, with Gaussian noise; see `events` for the rules.

Everywhere `noise_multiplier` is the standard deviation of the noise on each coordinate divided by the clip norm C,
for every neighbouring relation: an engine doubles the sensitivity where a unit is replaced by another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dpsb_accounting import _checks

_SUM_OF_PROBABILITIES = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class Gaussian:
    r"""The sum over *all* units is released with Gaussian noise.

    :math:`M(x) = \sum_i x_i + N(0, (\sigma C)^2 I)` with :math:`\|x_i\| \le C`.

    Args:
        noise_multiplier: :math:`\sigma > 0`, noise standard deviation divided by C. Public.

    References:
        Balle and Wang (2018), arXiv:1805.06530.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_multiplier", _checks.scale(noise_multiplier=self.noise_multiplier))


@dataclass(frozen=True, kw_only=True, slots=True)
class PoissonGaussian:
    r"""Each unit is included independently with probability q; the sum of the included gets Gaussian noise.

    :math:`M(x) = \sum_{i} b_i x_i + N(0, (\sigma C)^2 I)`, :math:`b_i \sim \mathrm{Bernoulli}(q)`
    independent, :math:`\|x_i\| \le C`. An empty draw is a release like any other. The observer sees the sum,
    not the :math:`b_i` and not how many were drawn.

    Args:
        noise_multiplier: :math:`\sigma > 0`, noise standard deviation divided by C. Public.
        sampling_prob: :math:`q \in (0, 1]`, per unit and per release. Public.

    References:
        Abadi et al. (2016), arXiv:1607.00133; Zhu, Dong and Wang (2022), arXiv:2106.08567.
    """

    noise_multiplier: float
    sampling_prob: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_multiplier", _checks.scale(noise_multiplier=self.noise_multiplier))
        object.__setattr__(self, "sampling_prob", _checks.probability(sampling_prob=self.sampling_prob))


@dataclass(frozen=True, kw_only=True, slots=True)
class TruncatedPoissonGaussian:
    r"""Poisson sampling, but of more than `max_batch_size` drawn units a uniform choice of that many is kept.

    The number of units N is public, so the relation must keep it fixed: zero_out or replace_one. Truncation
    makes units compete for a place, which costs privacy that plain Poisson accounting does not see.

    Args:
        noise_multiplier: :math:`\sigma > 0`, noise standard deviation divided by C. Public.
        sampling_prob: :math:`q \in (0, 1]`. Public.
        max_batch_size: At least 1. Public.
        num_examples: N, the number of units, at least 1. Public.

    References:
        Ganesh (2025), arXiv:2508.15089.
    """

    noise_multiplier: float
    sampling_prob: float
    max_batch_size: int
    num_examples: int

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "noise_multiplier", _checks.scale(noise_multiplier=self.noise_multiplier))
        put(self, "sampling_prob", _checks.probability(sampling_prob=self.sampling_prob))
        put(self, "max_batch_size", _checks.whole(at_least=1, max_batch_size=self.max_batch_size))
        put(self, "num_examples", _checks.whole(at_least=1, num_examples=self.num_examples))


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledWithoutReplacementGaussian:
    r"""A uniform batch of exactly `batch_size` of the `num_examples` units is summed with Gaussian noise.

    Defined for replace_one, where the sum moves by up to 2C. Under zero_out the same bound holds, since a zero
    is one of the values by which a unit may be replaced; under add_or_remove_one it is refused.

    Args:
        noise_multiplier: :math:`\sigma > 0`, noise standard deviation divided by C (not by 2C). Public.
        batch_size: From 1 to `num_examples`. Public.
        num_examples: Number of units. Public.

    References:
        Balle, Barthe and Gaboardi (2018), arXiv:1807.01647, Theorem 9; Wang, Balle and Kasiviswanathan (2019),
        arXiv:1808.00087, Theorem 27.
    """

    noise_multiplier: float
    batch_size: int
    num_examples: int

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "noise_multiplier", _checks.scale(noise_multiplier=self.noise_multiplier))
        put(self, "num_examples", _checks.whole(at_least=1, num_examples=self.num_examples))
        put(self, "batch_size", _checks.whole(at_least=1, batch_size=self.batch_size))
        if self.batch_size > self.num_examples:
            raise ValueError(f"batch_size={self.batch_size!r} must not exceed num_examples={self.num_examples!r}")

    @property
    def fraction(self) -> float:
        """The share of the units in a batch."""
        return self.batch_size / self.num_examples


@dataclass(frozen=True, kw_only=True, slots=True)
class UserMixture:
    r"""One unit's contribution has a random norm: :math:`N(0, \sigma^2)` against
    :math:`\sum_j p_j N(c_j, \sigma^2)`.

    For a user with at most k examples, each drawn by Poisson sampling with probability q, the number drawn is
    Binomial(k, q) and :math:`c_j = j`; `user_mixture` makes that event. Valid for add_or_remove_one and zero_out;
    replace_one is bounded by group privacy of size 2.

    Args:
        noise_multiplier: :math:`\sigma > 0`, noise standard deviation divided by C. Public.
        sensitivities: :math:`c_j \ge 0`, in units of C. Public.
        probabilities: :math:`p_j \ge 0`, which sum to 1. Public.

    References:
        Choquette-Choo et al. (2023), arXiv:2310.15526.
    """

    noise_multiplier: float
    sensitivities: tuple[float, ...]
    probabilities: tuple[float, ...]

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "noise_multiplier", _checks.scale(noise_multiplier=self.noise_multiplier))
        put(self, "sensitivities", _checks_numbers("sensitivities", self.sensitivities))
        for size in self.sensitivities:
            if size:
                _checks.scale(sensitivities=size)
        put(self, "probabilities", _checks_numbers("probabilities", self.probabilities))
        if len(self.sensitivities) != len(self.probabilities):
            raise ValueError(
                f"sensitivities and probabilities must be equally many, not {len(self.sensitivities)} and "
                f"{len(self.probabilities)}"
            )
        total = math.fsum(self.probabilities)
        if not abs(total - 1) <= _SUM_OF_PROBABILITIES:
            raise ValueError(f"probabilities must sum to 1, not to {total!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixMechanism:
    r"""Correlated noise over a fixed order of the data: DP-FTRL, tree aggregation, banded matrices.

    What is released is a function of :math:`C_s x + N(0, (\sigma C)^2 I)`, where :math:`C_s` is the public strategy
    matrix and each unit takes part in a public pattern of rows of x with norm at most C each. One Gaussian of
    sensitivity `sensitivity` times C, adaptive choices included. The order is public, so zero_out or replace_one.

    Args:
        noise_multiplier: :math:`\sigma > 0`, noise standard deviation divided by C. Public.
        sensitivity: :math:`\max_u \|C_s u\|` over the participation patterns, in units of C; see the module
            `participation`. Public.

    References:
        Denisov et al. (2022), arXiv:2202.08312, Theorem 2.1; Choquette-Choo et al. (2023), arXiv:2306.08153.
    """

    noise_multiplier: float
    sensitivity: float

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "noise_multiplier", _checks.scale(noise_multiplier=self.noise_multiplier))
        put(self, "sensitivity", _checks.scale(sensitivity=self.sensitivity))


def user_mixture(*, noise_multiplier: float, sampling_prob: float, examples_per_unit: int) -> UserMixture:
    r"""Returns the event of Poisson-sampled examples seen per user, who has at most k of them.

    Args:
        noise_multiplier: Noise standard deviation divided by the clip norm of one example. Public.
        sampling_prob: q, with which each example is drawn. Public.
        examples_per_unit: k, the most examples of one user, at least 1. Public.

    Example:
        >>> user_mixture(noise_multiplier=1, sampling_prob=0.5, examples_per_unit=2).probabilities
        (0.25, 0.5, 0.25)
    """
    prob = _checks.probability(sampling_prob=sampling_prob)
    most = _checks.whole(at_least=1, examples_per_unit=examples_per_unit)
    if most > 10_000:
        raise ValueError(f"examples_per_unit must be at most 10000, not {examples_per_unit!r}")
    below = math.log1p(-prob) if prob < 1 else -math.inf
    chances = [
        math.exp(
            math.lgamma(most + 1)
            - math.lgamma(drawn + 1)
            - math.lgamma(most - drawn + 1)
            + drawn * math.log(prob)
            + (0.0 if drawn == most else (most - drawn) * below)
        )
        for drawn in range(most + 1)
    ]
    total = math.fsum(chances)
    return UserMixture(
        noise_multiplier=noise_multiplier,
        sensitivities=tuple(float(drawn) for drawn in range(most + 1)),
        probabilities=tuple(chance / total for chance in chances),
    )


def _checks_numbers(name: str, values: object) -> tuple[float, ...]:
    if not isinstance(values, (tuple, list)) or not values:
        raise ValueError(f"{name} must be a list of numbers that is not empty, not {values!r}")
    if len(values) > 20_000:
        raise ValueError(f"{name} must be at most 20000 numbers, not {len(values)}")
    return tuple(_checks.nonnegative(**{name: value}) for value in values)
