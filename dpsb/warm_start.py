"""A start from public rows: of a classification head, or of all that a method trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from dpsb.basis._common import public_generator
from dpsb.basis.sources import batches_of
from dpsb.data import DataError
from dpsb.losses import IGNORED
from dpsb.models import head_of
from dpsb.modes import evaluation_mode
from dpsb.probe import Batch, Collate, Example

_ROUNDS = 200
_BATCH_SIZE = 64


def warm_start(
    model: nn.Module, examples: Sequence[Example], collate: Collate, max_length: int, token_budget: int
) -> int:
    r"""Puts a logistic regression on public rows into the last linear layer of the head. Costs no epsilon.

    With frozen features :math:`x_i` (what that layer receives) it is the minimum of
    :math:`\frac1n\sum_i \mathrm{CE}(W x_i + b, y_i) + \frac{1}{2n}\|W\|_F^2`, found by L-BFGS: scikit-learn's default
    strength. A basis that is computed from gradients afterwards sees them through this head.

    Args:
      model: The base model, before any adapter. Changed in place.
      examples: Rows that are **public; the caller vouches for that**. Those without a label of the run count for
        nothing.
      collate: Examples to model inputs.
      max_length: Largest number of tokens.
      token_budget: Tokens per microbatch.

    Returns:
      How many rows were used. Public.

    Raises:
      DataError: If fewer than two labels of the run occur.
    """
    usable = [example for example in examples if example["labels"] != IGNORED]
    if len({example["labels"] for example in usable}) < 2:
        raise DataError(
            f"A warm start needs public rows with at least two of the run's labels; {len(usable)} of {len(examples)} "
            "rows have any."
        )
    head = head_of(model)
    features = _features(model, usable, collate, max_length, token_budget)
    labels = torch.tensor([example["labels"] for example in usable], device=features.device)
    solution = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, device=features.device)
    optimizer = torch.optim.LBFGS(solution.parameters(), max_iter=_ROUNDS, line_search_fn="strong_wolfe")
    with torch.no_grad():
        for parameter in solution.parameters():
            parameter.zero_()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        penalty = solution.weight.square().sum() / (2 * len(usable))
        loss = F.cross_entropy(solution(features), labels) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    with torch.no_grad():
        head.weight.copy_(solution.weight)
        if head.bias is not None:
            head.bias.copy_(solution.bias)
    return len(usable)


@torch.no_grad()
def _features(
    model: nn.Module, examples: Sequence[Example], collate: Collate, max_length: int, token_budget: int
) -> torch.Tensor:
    """What the last linear layer of the head receives for each example, pooled as the model pools; (n, f), fp32."""
    head, found = head_of(model), []
    passed_on = head.register_forward_hook(lambda _module, inputs, _output: inputs[0])
    try:
        with evaluation_mode(model):
            for batch in batches_of(examples, collate, max_length, token_budget):
                inputs = {key: value for key, value in batch.items() if key != "labels"}
                found.append(model(**inputs).logits.float())
    finally:
        passed_on.remove()
    return torch.cat(found)


def train_on_public(
    parameters: Sequence[nn.Parameter],
    losses: Callable[[Batch], torch.Tensor],
    examples: Sequence[Example],
    batches: Callable[[Sequence[Example]], Iterable[Batch]],
    *,
    source: str,
    epochs: int,
    learning_rate: float,
) -> None:
    """Trains tensors of a model on public rows without privacy: where private steps then begin. Costs no epsilon.

    Adam with linear decay, 64 rows a step, in an order from a fixed public generator. Rows without a label of the run,
    or without a token to learn, count for nothing.

    Args:
      parameters: What is trained, in place.
      losses: Per-example losses of a batch, shape ``(n,)``.
      examples: Rows that are **public; the caller vouches for that**.
      batches: Cuts the rows of a step into microbatches.
      source: What the rows are from, for a message.
      epochs: Passes over the rows.
      learning_rate: Of the first step.

    Raises:
      DataError: If no row is usable, or the loss of the first step's rows does not come out lower.
    """
    usable = [example for example in examples if _teaches(example["labels"])]
    if not usable:
        raise DataError(
            f"warm_start={source!r} teaches nothing: none of its {len(examples)} rows has a label of the run, or, for "
            "a language model, a token to learn within max_length."
        )
    generator = public_generator()
    orders = [torch.randperm(len(usable), generator=generator).tolist() for _ in range(epochs)]
    chosen = [order[start : start + _BATCH_SIZE] for order in orders for start in range(0, len(order), _BATCH_SIZE)]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(chosen))
    first = [usable[i] for i in chosen[0]]
    before = _mean(losses, batches(first))
    for indices in chosen:
        rows = [usable[i] for i in indices]
        for batch in batches(rows):
            (losses(batch).sum() / len(rows)).backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
    if not (after := _mean(losses, batches(first))) < before:
        raise DataError(
            f"Training on warm_start={source!r} brought the loss of its first rows from {before:.3g} to {after:.3g}; "
            f"lower warm_start_learning_rate={learning_rate!r}."
        )


def _teaches(labels: int | Sequence[int]) -> bool:
    """Whether a row has a class, or a token that is predicted from one before it."""
    return labels != IGNORED if isinstance(labels, int) else any(label != IGNORED for label in labels[1:])


@torch.no_grad()
def _mean(losses: Callable[[Batch], torch.Tensor], batches: Iterable[Batch]) -> float:
    return float(torch.cat([losses(batch) for batch in batches]).mean())
