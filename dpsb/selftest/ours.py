"""``dpsb``'s own step, taken apart for the self-test: the same functions that ``fit`` calls, at one state of theta."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from dpsb.adapter import Adapter
from dpsb.capture import adapter_train_mode, per_example_gradients
from dpsb.clipped_sums import clipped_sum
from dpsb.losses import LossFn
from dpsb.mechanism import Mechanism
from dpsb.modes import training_mode
from dpsb.probe import Collate, without_dropout
from dpsb.randomness import SystemRandomness
from dpsb.sampling import bucket_of, length_buckets, own_length, poisson_draw
from dpsb.selftest.step import Step

POISON = "dpsb_selftest_poison"
_SCATTER = 0.05
_WIDE = 1e6


@contextmanager
def own_step(
    adapter: Adapter,
    loss_fn: LossFn,
    collate: Collate,
    examples: Sequence[Mapping[str, Any]],
    max_length: int,
    *,
    token_budget: int = 4096,
    noise_multiplier: float = 1.3,
    sampling_prob: float = 0.1,
) -> Iterator[Step]:
    """The step of ``fit`` for a user's model, collator and loss; theta is moved at random inside and put back after.

    The clip norm is a tenth of the shortest gradient among ``examples``, so that every example is clipped.

    Args:
      adapter: What will be trained.
      loss_fn: Per-example loss.
      collate: Examples to model inputs.
      examples: Synthetic or public ones.
      max_length: Largest number of tokens.
      token_budget: Tokens per microbatch.
      noise_multiplier: Of the mechanism that is tested.
      sampling_prob: q of the sampling that is tested.
    """
    saved = adapter.state()
    generator = torch.Generator().manual_seed(0)
    planted = _Poison(loss_fn, collate)
    buckets = length_buckets(max_length)
    with training_mode(adapter.model), without_dropout(adapter.model):
        adapter_train_mode(adapter)
        try:
            with torch.no_grad():
                for parameter in adapter.parameters():
                    noise = _SCATTER * torch.randn(parameter.shape, generator=generator)
                    parameter.add_(noise.to(parameter.device, parameter.dtype))
            norms = _norms(adapter, loss_fn, collate, examples, buckets)
            clip = 0.1 * min((norm for norm in norms if norm > 0), default=10.0)
            mechanism = Mechanism(l2_clip_norm=clip, noise_multiplier=noise_multiplier, clipping="flat", adaptive=None)
            randomness = SystemRandomness()

            wide = replace(mechanism, l2_clip_norm=_WIDE * mechanism.l2_clip_norm)

            def summed(budget: int, by: Mechanism = mechanism) -> Callable[[Sequence[Any]], torch.Tensor]:
                return lambda chosen: clipped_sum(
                    adapter, by, planted.loss, planted.collate, list(chosen), buckets, budget
                )

            yield Step(
                name=f"dpsb.fit on {type(adapter.model).__name__}",
                l2_clip_norm=mechanism.l2_clip_norm,
                clipped_sum=summed(token_budget),
                unclipped=summed(token_budget, wide),
                otherwise=summed(1),
                poisoned=lambda example: {**example, POISON: True},
                noise_multiplier=noise_multiplier,
                release=lambda total: mechanism.release(total, randomness),
                fresh_release=lambda: _fresh_release(mechanism),
                sampling_prob=sampling_prob,
                draw=lambda rows: poisson_draw(rows, sampling_prob, randomness).tolist(),
                fresh_draw=lambda: _fresh_draw(sampling_prob),
            )
        finally:
            adapter.load_state(saved)


def _fresh_release(mechanism: Mechanism) -> Callable[[torch.Tensor], torch.Tensor]:
    randomness = SystemRandomness()
    return lambda total: mechanism.release(total, randomness)


def _fresh_draw(sampling_prob: float) -> Callable[[int], Sequence[int]]:
    randomness = SystemRandomness()
    return lambda rows: poisson_draw(rows, sampling_prob, randomness).tolist()


def _norms(
    adapter: Adapter, loss_fn: LossFn, collate: Collate, examples: Sequence[Any], buckets: Sequence[int]
) -> list[float]:
    found = []
    for example in examples:
        with per_example_gradients(adapter, 1) as rows:
            loss_fn(adapter.model, collate([example], bucket_of(own_length(example), buckets))).sum().backward()
            found.append(float(rows.get().norm()))
    return found


class _Poison:
    """Makes the loss of marked examples NaN; collate and loss are always called in turn."""

    def __init__(self, loss_fn: LossFn, collate: Collate) -> None:
        self._loss, self._collate = loss_fn, collate
        self._marks: list[float] = []

    def collate(self, examples: Sequence[Mapping[str, Any]], padded_length: int) -> Any:
        self._marks = [math.nan if POISON in example else 1.0 for example in examples]
        return self._collate([{k: v for k, v in e.items() if k != POISON} for e in examples], padded_length)

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        losses = self._loss(model, batch)
        marks = torch.tensor(self._marks, device=losses.device)
        return losses * marks if marks.isnan().any() and losses.shape == marks.shape else losses
