"""How a draw is divided between processes, and what each of them does with its part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dpsb.adapter import Adapter
from dpsb.clipped_sums import reduced
from dpsb.losses import LossFn
from dpsb.mechanism import Mechanism
from dpsb.probe import Batch, Collate
from dpsb.sampling import microbatches, padded_lengths


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every process of a team holds alike.

    Args:
      adapter: What is trained.
      dataset: All examples, in the same order everywhere. Sensitive.
      loss_fn: Per-example loss.
      collate: Examples to model inputs.
      buckets: Padded lengths.
      token_budget: Tokens per microbatch.
      sharded: Whether the frozen base is cut over the processes: all of them must then pass through the model equally
        often, and none may halve a microbatch on its own.
    """

    adapter: Adapter
    dataset: Sequence[Any]
    loss_fn: LossFn
    collate: Collate
    buckets: Sequence[int]
    token_budget: int
    sharded: bool


def part_of_sum(
    work: Work, mechanism: Mechanism, draw: np.ndarray, rank: int, size: int, idle_batch: Batch
) -> torch.Tensor:
    """The clipped sum over one process' part of a draw; the parts' sums add up to that of one process alone.

    The draw is cut into microbatches as one process would cut it (smaller ones where there would be fewer than
    processes) and these are dealt out in turn. Every process thus has an example in exactly one microbatch, in the
    padding it has in every run.

    Args:
      work: What every process holds alike.
      mechanism: Clips.
      draw: Rows of the data set, the same on every rank. Sensitive.
      rank: Whose part.
      size: Number of processes.
      idle_batch: Passed through the model where others of a sharded team still work; its rows are thrown away.

    Returns:
      Shape ``(d,)``, float64. Sensitive.
    """
    adapter, examples = work.adapter, [work.dataset[int(i)] for i in draw]
    total = mechanism.zeros(adapter.dimension, adapter.parameters()[0].device)
    lengths = padded_lengths(examples, work.buckets)
    budget = max(1, min(work.token_budget, -(-int(lengths.sum()) // size)))
    cut = list(microbatches(np.arange(len(examples)), lengths, budget))
    for positions, length in cut[rank::size]:
        total += reduced(
            adapter,
            work.loss_fn,
            work.collate,
            examples,
            positions,
            length,
            lambda rows, _: mechanism.clip_and_sum(rows),
            halve=not work.sharded,
        )
    if work.sharded and cut and rank >= len(cut) % size > 0:
        work.loss_fn(adapter.model, idle_batch).sum().backward()
        for parameter in adapter.parameters():
            parameter.grad = None
    return total
