"""Private logistic regression on the frozen model's features: the cheapest thing that could work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from dpsb.losses import IGNORED
from dpsb.mechanism import Mechanism
from dpsb.probe import Collate
from dpsb.randomness import SEEDED, Randomness, SystemRandomness
from dpsb.sampling import length_buckets, microbatches, padded_lengths, poisson_draw
from dpsb_accounting import Ledger


@torch.no_grad()
def mean_pooled_features(
    encoder: nn.Module, examples: Sequence[Any], collate: Collate, max_length: int, token_budget: int
) -> torch.Tensor:
    """Mean over an example's own tokens of the encoder's last hidden states, shape ``(n, f)``, fp32. Sensitive."""
    padded = padded_lengths(examples, length_buckets(max_length))
    encoder.eval()
    features: torch.Tensor | None = None
    for indices, length in microbatches(np.arange(len(examples)), padded, token_budget):
        batch = collate([examples[int(i)] for i in indices], length)
        hidden = encoder(**{k: v for k, v in batch.items() if k != "labels"}).last_hidden_state.float()
        mask = batch["attention_mask"][..., None]
        pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        if features is None:
            features = torch.zeros(len(examples), pooled.shape[1])
        features[torch.from_numpy(indices)] = pooled.cpu()
    if features is None:
        raise ValueError("Expected at least one example, got none.")
    return features


def fit_logistic_regression(
    features: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    *,
    ledger: Ledger,
    learning_rate: float,
    randomness: Randomness | None = None,
) -> torch.Tensor:
    r"""Multinomial logistic regression under the ledger's plan, with Adam.

    The row of example i is :math:`(p_i - y_i)\,[x_i, 1]^\top`, clipped, summed and noised like any other.

    Args:
      features: Shape ``(n, f)``. Sensitive.
      labels: Class indices, shape ``(n,)``; ``IGNORED`` contributes zero. Sensitive.
      num_classes: K. Public.
      ledger: Open for writing; holds the plan. Every step is charged before its draw.
      learning_rate: Adam's, decayed linearly to zero over the plan's steps.
      randomness: Source of draws and noise.

    Returns:
      Weights with the bias as last column, shape ``(K, f + 1)``. Released.

    Raises:
      ValueError: If the plan protects something else than examples, or its C moves; nothing has been charged.
    """
    plan, randomness = ledger.plan, randomness or SystemRandomness()
    if plan.unit != "example" or plan.clipping == "adaptive":
        raise ValueError(
            f"Expected a plan whose unit is 'example' and whose C is fixed, got unit {plan.unit!r} and clipping "
            f"{plan.clipping!r}."
        )
    mechanism = Mechanism.from_plan(plan)
    if randomness.tainted:
        ledger.taint(*SEEDED)
    inputs = F.pad(features, (0, 1), value=1.0)
    weights = torch.zeros(num_classes, inputs.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=learning_rate)
    for _ in range(ledger.remaining("train")):
        number = ledger.charge("train")
        draw = torch.from_numpy(poisson_draw(len(inputs), plan.sampling_prob, randomness))
        x, y = inputs[draw], labels[draw]
        error = torch.softmax(x @ weights.detach().T, dim=1)
        known = y != IGNORED
        error = torch.where(known[:, None], error - F.one_hot(y.clamp(min=0), num_classes), 0.0)
        rows = (error[:, :, None] * x[:, None, :]).flatten(1)
        released = mechanism.release(mechanism.clip_and_sum(rows), randomness)
        weights.grad = (released / plan.expected_batch_size).view_as(weights).float()
        optimizer.param_groups[0]["lr"] = learning_rate * (1.0 - number / plan.steps)
        optimizer.step()
    return weights.detach()


def accuracy(weights: torch.Tensor, features: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of rows whose largest score is their label's."""
    scores = F.pad(features, (0, 1), value=1.0) @ weights.T
    return float((scores.argmax(dim=1) == labels).float().mean())
