"""A classification head that starts from public rows instead of at random."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from dpsb.basis.sources import batches_of
from dpsb.data import DataError
from dpsb.losses import IGNORED
from dpsb.models import head_of
from dpsb.probe import Collate, Example

_ROUNDS = 200


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
    was_training = model.training
    model.eval()
    try:
        for batch in batches_of(examples, collate, max_length, token_budget):
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            found.append(model(**inputs).logits.float())
    finally:
        passed_on.remove()
        model.train(was_training)
    return torch.cat(found)
