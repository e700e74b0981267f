r"""Bounds for training on shuffled, fixed or fixed-size batches: what such batches certainly leak, and what holds.

**Upper bound.** Under zero_out the order of the records does not depend on what they hold. Given the order, each
record is in one batch an epoch, so an epoch is one Gaussian of sensitivity C, and E epochs, each chosen knowing
those before, are one Gaussian of noise multiplier :math:`\sigma / \sqrt E`. For an order that is fixed or known this
is exact.

**Lower bound.** Let every other record contribute -C. The batch of the record in question then stands out by 2C with
the record and by C without it; all other batches are equal. With shuffling the position is uniform, so an epoch of T
batches shows :math:`P = \frac1T \sum_t N(2 e_t, \sigma^2 I)` against :math:`Q = \frac1T \sum_t N(e_t, \sigma^2 I)`,
and the largest coordinate alone already tells them apart (`tails`).

References:
    Chua et al. (2024), arXiv:2403.17673 and arXiv:2411.04205.
"""

from __future__ import annotations

import functools
import math

from dpsb_accounting import _checks
from dpsb_accounting.claims import tails

_TEST_MEANS = {"zero_out": ((2.0, 1.0),), "replace_one": ((2.0, 1.0), (2.0, 0.0))}


@functools.lru_cache(maxsize=128)
def lower_epsilon(
    *,
    noise_multiplier: float,
    steps: int,
    batches_per_epoch: float,
    delta: float,
    neighboring: str = "zero_out",
    reshuffled: bool = True,
    runs: int = 1,
) -> float:
    """Returns an epsilon that training on shuffled batches certainly exceeds.

    Args:
        noise_multiplier: Noise standard deviation divided by the clip norm, of the sum of a batch.
        steps: How many batches were used.
        batches_per_epoch: Records divided by the batch size; a last batch that was dropped makes it a fraction.
        delta: In (0, 1).
        neighboring: "zero_out" or "replace_one"; shuffled batches have no meaning under "add_or_remove_one".
        reshuffled: Whether each epoch has a new order; otherwise the first one is kept.
        runs: How many such runs on the same records are seen.

    Example:
        >>> print(f"{lower_epsilon(noise_multiplier=1, steps=1000, batches_per_epoch=1000, delta=1e-5):.2f}")
        2.88
    """
    _checks.one_of(choices=tuple(_TEST_MEANS), neighboring=neighboring)
    whole, most = max(1, math.floor(batches_per_epoch)), max(1, math.ceil(batches_per_epoch))
    # An epoch has `whole` full batches; whether a smaller last one follows is left open, so only epochs that are
    # complete either way are counted, and a rest only where it is not in doubt where it begins.
    epochs, rest = divmod(steps, most)
    if epochs and whole != most:
        rest = 0
    rest = min(rest, whole)
    best = 0.0
    for with_record, without in _TEST_MEANS[neighboring]:
        seen = []
        if not reshuffled and epochs:  # the same batch stands out in every epoch: average over the epochs
            noise = noise_multiplier / math.sqrt(epochs)
            seen.append(_epoch(noise, whole, batches_per_epoch, with_record, without, runs))
        elif epochs:
            seen.append(_epoch(noise_multiplier, whole, batches_per_epoch, with_record, without, epochs * runs))
        if rest and (reshuffled or not epochs):
            seen.append(_epoch(noise_multiplier, rest, batches_per_epoch, with_record, without, runs))
        best = max(best, tails.lower_epsilon(tuple(seen), delta) if seen else 0.0)
    return best


def _epoch(noise: float, batches: int, per_epoch: float, mean: float, other: float, count: int) -> tails.Observation:
    """The largest of `batches` sums, where the record is in one of them with probability batches / per_epoch."""
    inside = min(1.0, batches / per_epoch)

    def mixture(at: float) -> tails.Mixture:
        return ((inside, at),) if inside == 1 else ((inside, at), (1 - inside, 0.0))

    return tails.Observation(p=mixture(mean), q=mixture(other), others=batches - 1, noise=noise, count=count)


def participations(steps: int, epoch_steps: int) -> int:
    """Returns in how many steps a record takes part at most, with `epoch_steps` steps in an epoch."""
    return max(1, -(-steps // epoch_steps))


@functools.lru_cache(maxsize=128)
def fixed_size_lower_epsilon(
    *, noise_multiplier: float, sampling_prob: float, steps: int, delta: float, neighboring: str
) -> float:
    """Returns an epsilon that batches of a fixed size, drawn anew without replacement, certainly exceed."""
    _checks.one_of(choices=tuple(_TEST_MEANS), neighboring=neighboring)
    best = 0.0
    for mean, other in _TEST_MEANS[neighboring]:
        rest = (1 - sampling_prob, 0.0)
        p, q = ((sampling_prob, mean), rest), ((sampling_prob, other), rest)
        seen = tails.Observation(p=p, q=q, others=0, noise=noise_multiplier, count=steps)
        best = max(best, tails.lower_epsilon((seen,), delta))
    return best
