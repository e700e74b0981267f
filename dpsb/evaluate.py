"""Metrics on held-out people. They lie outside the guarantee and stay out of ledger and model card."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from dpsb.losses import IGNORED, causal_lm_loss
from dpsb.modes import evaluation_mode
from dpsb.probe import Collate
from dpsb.sampling import length_buckets, microbatches, padded_lengths
from dpsb.withheld import messages_withheld


@torch.no_grad()
def evaluate(
    model: nn.Module, examples: Sequence[Any], task: str, collate: Collate, max_length: int, token_budget: int
) -> dict[str, float]:
    """Accuracy and mean cross-entropy (classification), or loss per token and perplexity (causal LM).

    Rows with an undeclared label or without labelled tokens are left out.

    Raises:
      StepError, StepMemoryError: In the place of any error, which may quote a row.
    """
    padded = padded_lengths(examples, length_buckets(max_length))
    right, nll, count = 0, 0.0, 0
    with evaluation_mode(model), messages_withheld("The evaluation on held-out rows", "Training is not affected."):
        for indices, length in microbatches(np.arange(len(examples)), padded, token_budget):
            batch = collate([examples[int(i)] for i in indices], length)
            if task == "classification":
                logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.float()
                known = batch["labels"] != IGNORED
                losses = nn.functional.cross_entropy(logits[known], batch["labels"][known], reduction="sum")
                right += int((logits.argmax(dim=1) == batch["labels"])[known].sum())
                nll, count = nll + float(losses), count + int(known.sum())
            else:
                nll += float(causal_lm_loss(model, batch, tokens_per_example=1).sum())
                count += int((batch["labels"][:, 1:] != IGNORED).sum())
    if count == 0:
        return {}
    if task == "classification":
        return {"accuracy": right / count, "cross_entropy": nll / count, "examples": count}
    loss = nll / count
    return {"loss_per_token": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf, "tokens": count}
