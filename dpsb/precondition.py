"""Public second moments, by which every row is scaled before it is clipped."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dpsb.adapter import Adapter
from dpsb.basis.sources import EXAMPLES, batches_of, public_sample
from dpsb.capture import adapter_train_mode, per_example_gradients
from dpsb.data import DataError
from dpsb.losses import LossFn, check_losses
from dpsb.modes import training_mode
from dpsb.probe import Collate, Example, without_dropout

_FLOOR = 0.1


def public_row_scale(
    adapter: Adapter,
    loss_fn: LossFn,
    examples: Sequence[Example],
    collate: Collate,
    max_length: int,
    token_budget: int,
) -> torch.Tensor:
    r"""What to multiply every row with before it is clipped, from public examples at the start of training.

    With public rows :math:`g_i`, each divided by its norm, and :math:`v_j` the mean of their squared j-th numbers,
    :math:`s_j = 1/(\sqrt{v_j} + f\,\sqrt{\bar v})`, f = 0.1. Noise of equal size on every number of the scaled sum then
    meets a signal of about equal size. The s are scaled such that a public row keeps its squared norm on average, so
    that C keeps its meaning. They are public constants: a row is clipped *after* it, so sensitivity and noise are what
    they were.

    Args:
      adapter: What is trained, where training starts.
      loss_fn: Per-example loss.
      examples: Rows that are **public; the caller vouches for that**. At most 512 are used, see
        :func:`dpsb.basis.sources.public_sample`.
      collate: Examples to model inputs.
      max_length: Largest number of tokens.
      token_budget: Tokens per microbatch.

    Returns:
      Shape ``(d,)``, float64, positive. Public.

    Raises:
      DataError: If no public row has a gradient.

    References:
      Li, Zaheer, Reddi and Smith (2022), arXiv:2202.05963 (AdaDPS), Algorithm 1 with public side information.
    """
    device = adapter.parameters()[0].device
    squares, raw = torch.zeros(2, adapter.dimension, dtype=torch.float64, device=device)
    count = 0
    with training_mode(adapter.model), without_dropout(adapter.model):
        adapter_train_mode(adapter)
        for batch in batches_of(public_sample(examples, EXAMPLES), collate, max_length, token_budget):
            size = len(next(iter(batch.values())))
            with per_example_gradients(adapter, size) as rows:
                check_losses(loss_fn(adapter.model, batch), size).sum().backward()
                square = rows.get().to(torch.float64).square()
            norms = square.sum(dim=1)
            good = torch.isfinite(norms) & (norms > 0)
            squares += (square[good] / norms[good, None]).sum(dim=0)
            raw += square[good].sum(dim=0)
            count += int(good.sum())
    if not count:
        raise DataError("Second moments need public rows that have a gradient: no row has a usable label.")
    mean = squares / count
    scale = 1.0 / (mean.sqrt() + _FLOOR * mean.mean().sqrt())
    return scale * (raw.sum() / (scale.square() * raw).sum()).sqrt()
