r"""Clipped sums as whole numbers modulo 2^32, and exact Skellam noise for them.

C is ``clip_steps`` whole numbers long. A silo's clipped sum is scaled and each coordinate rounded to the nearest whole
number, so that one example moves it by at most ``clip_steps + sqrt(d)`` in L2 norm; then comes the silo's share of the
noise, and only then the modulus, which is post-processing.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from dpsb.federated.checks import FederatedError
from dpsb.federated.spec import RoundSpec
from dpsb.randomness import Randomness

Whole = npt.NDArray[np.int64]
Masked = npt.NDArray[np.uint32]

BITS = 32
_HALF = 1 << (BITS - 1)
_FINE, _COARSE = 1024, 8  # clip_steps over sqrt(d): rounding costs 0.1 % of sensitivity; more than an eighth is refused
_LEAST_MEAN, _MOST_MEAN = 1 << 10, 1 << 50
_TO_UNIT = 2.0**-64
_WIDEST = 8.0  # standard deviations of noise that must fit besides the sum


def clip_steps_for(dimension: int, batch: int, noise_multiplier: float) -> int:
    """How many whole numbers C is long: a power of two, as fine as the modulus allows and no finer than is of use.

    Args:
      dimension: d.
      batch: Examples that are drawn in all silos, expected. Public.
      noise_multiplier: Of all shares together, at most. Public.

    Raises:
      FederatedError: If no grid is fine enough: rounding would move the sum by more than an eighth of C.
    """
    finest = 2 ** math.ceil(math.log2(_FINE * math.sqrt(dimension)))
    coarsest = _COARSE * math.sqrt(dimension)
    steps = finest
    while steps * (2 * batch + _WIDEST * noise_multiplier) >= _HALF and steps >= coarsest:
        steps //= 2
    if steps < coarsest:
        raise FederatedError(
            f"A sum of {batch} examples in {dimension} coordinates does not fit into {BITS} bits in steps that are "
            "fine enough; use smaller batches or a smaller adapter."
        )
    return steps


def round_sum(total: torch.Tensor, l2_clip_norm: float, clip_steps: int, clients: int) -> Whole:
    """A clipped sum in whole numbers, each coordinate within the silo's part of the modulus. Sensitive.

    Bounding a coordinate moves no two sums apart. Nothing is raised or told of where a bound is met.

    Args:
      total: Shape ``(d,)``, float64, finite. Sensitive.
      l2_clip_norm: C.
      clip_steps: s.
      clients: K; the sum of K such vectors does not wrap.
    """
    bound = float(_HALF // clients - 1)
    scaled = total.detach().cpu().double().numpy() * (clip_steps / l2_clip_norm)
    return np.clip(np.floor(scaled + 0.5), -bound, bound).astype(np.int64)


def share_mean(spec: RoundSpec) -> int:
    r"""The mean of both Poisson variables in a share: half of :math:`(\sigma s)^2 / (K - t - k)`, rounded up.

    The K - t - k shares that are certainly in an opened sum and unknown add up to variance :math:`(\sigma s)^2`.

    Raises:
      FederatedError: If the noise is too small or too large to be drawn exactly.
    """
    mean = math.ceil((spec.noise_multiplier * spec.clip_steps) ** 2 / (2 * spec.honest))
    if not _LEAST_MEAN <= mean <= _MOST_MEAN:
        raise FederatedError(
            f"clip_steps={spec.clip_steps!r} with noise_multiplier={spec.noise_multiplier!r} gives a share of Skellam "
            f"noise of variance {2 * mean}, which must be between {2 * _LEAST_MEAN} and {2 * _MOST_MEAN}."
        )
    return mean


def skellam(count: int, mean: int, randomness: Randomness) -> Whole:
    """``count`` independent differences of two Poisson variables of the given mean. Secret.

    Args:
      count: d.
      mean: Whole, at least 1024; the variance is twice that.
      randomness: Source of uniform words.
    """
    return _centred_poisson(count, mean, randomness) - _centred_poisson(count, mean, randomness)


def _centred_poisson(count: int, mean: int, randomness: Randomness) -> Whole:
    """Poisson variables less their mean, by transformed rejection.

    The mean is whole, so that proposals are small numbers and the logarithm of their probability is a difference of
    small numbers: it is right to 1e-9 at any mean.

    References:
      Hörmann (1993), The transformed rejection method for generating Poisson random variables, algorithm PTRS. Loader
      (2000), Fast and accurate computation of binomial probabilities (the logarithm).
    """
    b = 0.931 + 2.53 * math.sqrt(mean)
    a = -0.059 + 0.02483 * b
    quick, inverse = 0.9277 - 3.6224 / (b - 2), 1.1239 + 1.1328 / (b - 3.4)
    found = np.empty(count, dtype=np.int64)
    left = np.arange(count)
    while len(left):
        uniform = (randomness.words(2 * len(left)).astype(np.float64) + 0.5) * _TO_UNIT
        u, v = uniform[: len(left)] - 0.5, uniform[len(left) :]
        edge = np.maximum(0.5 - np.abs(u), 1e-18)
        offset = np.floor((2 * a / edge + b) * u + 0.43)
        possible = (offset > 16 - mean) & (offset < 64 * mean) & ~((edge < 0.013) & (v > edge))
        offset = np.where(possible, offset, 0.0)
        likely = np.log(v) + math.log(inverse) - np.log(a / edge**2 + b) <= _log_probability(offset, mean)
        taken = possible & (((edge >= 0.07) & (v <= quick)) | likely)
        found[left[taken]] = offset[taken].astype(np.int64)
        left = left[~taken]
    return found


def _log_probability(offset: npt.NDArray[np.float64], mean: int) -> npt.NDArray[np.float64]:
    value, part = offset + mean, offset / mean
    stirling = (1 / 12 - (1 / 360 - 1 / (1260 * value**2)) / value**2) / value
    found: npt.NDArray[np.float64] = (
        -0.5 * np.log(2 * math.pi * value) - stirling - mean * ((1 + part) * np.log1p(part) - part)
    )
    return found


def modular(values: Whole) -> Masked:
    """Whole numbers modulo 2^32."""
    return (values & ((1 << BITS) - 1)).astype(np.uint32)


def to_real(opened: Masked, l2_clip_norm: float, clip_steps: int) -> torch.Tensor:
    """An opened sum in the units of C again, float64. Released."""
    return torch.from_numpy(opened.view(np.int32).astype(np.float64)) * (l2_clip_norm / clip_steps)
