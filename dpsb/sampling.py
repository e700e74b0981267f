"""Poisson sampling, and how a draw is cut into microbatches.

The draw is what the accounting is about: every example is in a step with probability ``sampling_prob``, on its own.
The cut is a matter of speed and memory only: the same examples give the same sum however they are cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dpsb.randomness import Randomness

DEFAULT_BUCKETS = (
    16,
    24,
    32,
    48,
    64,
    96,
    128,
    192,
    256,
    384,
    512,
    768,
    1024,
    1536,
    2048,
    3072,
    4096,
    6144,
    8192,
)


def poisson_draw(num_rows: int, sampling_prob: float, randomness: Randomness) -> np.ndarray:
    """The examples of one step.

    Guarantees:
      * Each of the ``num_rows`` examples is included independently with probability ``sampling_prob`` (short of it by
        less than ``2**-64``), and at most once. The draw may be empty; an empty draw is a step like any other.

    Args:
      num_rows: Length of the data set. Sensitive unless the plan says that it is public.
      sampling_prob: Inclusion probability q in (0, 1]. Public.
      randomness: Source of the coins.

    Returns:
      Row indices in ascending order, shape ``(m,)``, int64; ``m`` is random. Sensitive.
    """
    return np.flatnonzero(randomness.bernoulli(num_rows, sampling_prob))


def choose(count: int, most: int, randomness: Randomness) -> np.ndarray:
    """At most ``most`` of ``count`` positions, uniformly at random without replacement, ascending. Sensitive."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.argsort(randomness.words(count), kind="stable")[:most])


def length_buckets(max_length: int) -> tuple[int, ...]:
    """The public padded lengths for examples of at most ``max_length`` tokens, ascending, ``max_length`` last.

    >>> length_buckets(100)
    (16, 24, 32, 48, 64, 96, 100)
    """
    if max_length < 1:
        raise ValueError(f"Expected max_length={max_length!r} of at least 1 token.")
    return (*(b for b in DEFAULT_BUCKETS if b < max_length), max_length)


def bucket_of(length: int, buckets: Sequence[int]) -> int:
    """The padded length of an example: the smallest bucket that holds it. A function of that example alone.

    >>> bucket_of(17, (16, 24, 32))
    24
    """
    for bucket in buckets:
        if length <= bucket:
            return bucket
    raise ValueError("An example is longer than the largest bucket; truncate it to max_length first.")


def own_length(example: Mapping[str, Any]) -> int:
    """How many tokens an example has: those of ``input_ids``, or ``num_tokens`` where there are none (images).

    >>> own_length({"input_ids": [5, 6, 7]}), own_length({"pixel_values": ..., "num_tokens": 197})
    (3, 197)
    """
    return len(example["input_ids"]) if "input_ids" in example else int(example["num_tokens"])


def padded_lengths(examples: Sequence[Mapping[str, Any]], buckets: Sequence[int]) -> np.ndarray:
    """The bucket of each example's own length, shape ``(n,)``, int64. Sensitive where the examples are."""
    return np.array([bucket_of(own_length(example), buckets) for example in examples], dtype=np.int64)


def microbatches(draw: np.ndarray, padded_lengths: np.ndarray, token_budget: int) -> Iterator[tuple[np.ndarray, int]]:
    """Cuts a draw into microbatches of equal padded length that hold at most ``token_budget`` tokens.

    Guarantees:
      * Every index of ``draw`` occurs in exactly one microbatch, so the sum over microbatches of clipped rows is the
        same for every ``token_budget`` up to rounding.
      * An example is padded to its own bucket; its shape never depends on the others in the draw.

    Args:
      draw: Row indices, shape ``(m,)``; ``m`` may be 0, then nothing is yielded. Sensitive.
      padded_lengths: Bucket of *every* row of the data set, shape ``(n,)``, int64. Sensitive.
      token_budget: Tokens per microbatch, padding included. One example is always let through. Public.

    Yields:
      ``(indices, padded_length)``: longest first, so that memory runs out early or not at all.

    Raises:
      ValueError: If ``token_budget`` is below 1.
    """
    if token_budget < 1:
        raise ValueError(f"Expected token_budget={token_budget!r} of at least 1 token.")
    lengths = padded_lengths[draw]
    for padded_length in np.unique(lengths)[::-1]:
        members = draw[lengths == padded_length]
        size = max(1, token_budget // int(padded_length))
        for start in range(0, len(members), size):
            yield members[start : start + size], int(padded_length)
