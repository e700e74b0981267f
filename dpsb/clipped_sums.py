"""From a charge to the clipped sum of a draw: everything of a private step that comes before its noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from dpsb.adapter import Adapter
from dpsb.capture import per_example_gradients
from dpsb.losses import LossFn, check_losses
from dpsb.mechanism import Mechanism
from dpsb.probe import Collate, Example
from dpsb.randomness import Randomness
from dpsb.sampling import choose, microbatches, padded_lengths, poisson_draw
from dpsb.withheld import StepMemoryError, is_out_of_memory, messages_withheld
from dpsb_accounting import Ledger, Plan

_NUMBERS_IN_FLIGHT = 1 << 22


class Sharing(Protocol):
    """Other processes that take a part of each step, seen from the one that leads (:mod:`dpsb.distributed`)."""

    def clipped_sum(self, number: int, mechanism: Mechanism, draw: np.ndarray) -> torch.Tensor:
        """The clipped sum over rows of the data set, made together. Sensitive in, sensitive out."""

    def forward_passes(self, count: int) -> None:
        """Tells the others that the probe batch is about to pass through the model so many times."""


def charged_sum(
    adapter: Adapter,
    dataset: Sequence[Any],
    ledger: Ledger,
    mechanism: Mechanism,
    loss_fn: LossFn,
    collate: Collate,
    buckets: Sequence[int],
    token_budget: int,
    randomness: Randomness,
    *,
    others: int = 0,
    team: Sharing | None = None,
) -> tuple[int, torch.Tensor, np.ndarray]:
    """Charges a step of the ledger's plan, then draws it and sums its clipped rows: all that comes before the noise.

    Returns:
      The number of the charge (public); the sum, shape ``(d,)``, float64, and which of ``others`` rows that stand for
      no example were drawn besides. Both sensitive: hand the sum to :meth:`Mechanism.release`.

    Raises:
      ValueError: If a tensor besides theta has become trainable: it would get raw gradients. Nothing is charged then.
    """
    plan = ledger.plan
    most = examples_per_unit(plan)
    adapter.check_nothing_else_is_trained()  # between two steps somebody may have thawed a weight
    number = ledger.charge("train")
    with messages_withheld(f"Step {number}"):
        num_rows = len(dataset)
        draw = poisson_draw(num_rows + others, plan.sampling_prob, randomness)
        planted = draw[draw >= num_rows] - num_rows
        draw = draw[draw < num_rows]
        if team is not None:
            return number, team.clipped_sum(number, mechanism, draw), planted
        drawn: Any = [dataset[int(i)] for i in draw]
        if most is not None:
            drawn = [[unit[j] for j in choose(len(unit), most, randomness)] for unit in drawn]
        summed = clipped_sum if most is None else clipped_sum_of_units
        return number, summed(adapter, mechanism, loss_fn, collate, drawn, buckets, token_budget), planted


def examples_per_unit(plan: Plan) -> int | None:
    """How many examples of a unit are read in a step; None where each example is a unit of its own."""
    if plan.unit == "example":
        return None
    most = plan.details.get("examples_per_unit")
    if plan.unit != "user" or not isinstance(most, int) or most < 1:
        raise ValueError(
            f"Expected a plan whose unit is 'example', or 'user' with details['examples_per_unit'] of at least 1, got "
            f"unit {plan.unit!r} and {most!r}."
        )
    return most


def clipped_sum(
    adapter: Adapter,
    mechanism: Mechanism,
    loss_fn: LossFn,
    collate: Collate,
    examples: Sequence[Example],
    buckets: Sequence[int],
    token_budget: int,
) -> torch.Tensor:
    """The clipped sum over a draw of examples, each example's gradient a row; float64. Sensitive."""
    total = mechanism.zeros(adapter.dimension, _device(adapter))
    lengths = padded_lengths(examples, buckets)
    for positions, length in microbatches(np.arange(len(examples)), lengths, token_budget):
        total += reduced(
            adapter, loss_fn, collate, examples, positions, length, lambda rows, _: mechanism.clip_and_sum(rows)
        )
    return total


def clipped_sum_of_units(
    adapter: Adapter,
    mechanism: Mechanism,
    loss_fn: LossFn,
    collate: Collate,
    units: Sequence[Sequence[Example]],
    buckets: Sequence[int],
    token_budget: int,
) -> torch.Tensor:
    """The clipped sum over a draw of units, the *mean* gradient of each unit's examples a row; float64. Sensitive.

    Rows of a unit meet before anything is clipped, whatever microbatches its examples fell into. One that is not
    finite spoils its own unit's row only. Some units at a time, d numbers for each of them.
    """
    total = mechanism.zeros(adapter.dimension, _device(adapter))
    size = max(1, _NUMBERS_IN_FLIGHT // adapter.dimension)
    for start in range(0, len(units), size):
        group = units[start : start + size]
        owners = torch.tensor([i for i, unit in enumerate(group) for _ in unit], dtype=torch.long)
        examples = [example for unit in group for example in unit]
        means = torch.zeros(len(group), adapter.dimension, dtype=torch.float64, device=total.device)
        add = partial(_summed_by_unit, owners.to(total.device), len(group))
        for positions, length in microbatches(
            np.arange(len(examples)), padded_lengths(examples, buckets), token_budget
        ):
            means += reduced(adapter, loss_fn, collate, examples, positions, length, add)
        means /= torch.bincount(owners, minlength=len(group)).clamp(min=1).to(total.device)[:, None]
        total += mechanism.clip_and_sum(means)
    return total


def _summed_by_unit(owners: torch.Tensor, num_units: int, rows: torch.Tensor, positions: np.ndarray) -> torch.Tensor:
    sums = torch.zeros(num_units, rows.shape[1], dtype=torch.float64, device=rows.device)
    return sums.index_add_(0, owners[torch.from_numpy(positions).to(owners.device)], rows.to(torch.float64))


def reduced(
    adapter: Adapter,
    loss_fn: LossFn,
    collate: Collate,
    examples: Sequence[Example],
    positions: np.ndarray,
    padded_length: int,
    reduce: Callable[[torch.Tensor, np.ndarray], torch.Tensor],
    *,
    halve: bool = True,
) -> torch.Tensor:
    """``reduce(rows, positions)`` of one microbatch; halves it, and adds both, while memory runs out.

    Without ``halve`` running out is an error at once, as where other processes count on this one's passes.
    """
    try:
        with per_example_gradients(adapter, len(positions)) as rows:
            batch = collate([examples[int(i)] for i in positions], padded_length)
            check_losses(loss_fn(adapter.model, batch), len(positions)).sum().backward()
            return reduce(rows.get(), positions)
    except (RuntimeError, MemoryError) as error:
        if not halve or not is_out_of_memory(error):
            raise
        if len(positions) == 1:
            raise StepMemoryError(
                "Out of memory on a single example. The step is charged. Lower max_length, or resume on a machine "
                "with more memory."
            ) from None
    half = len(positions) // 2
    first = reduced(adapter, loss_fn, collate, examples, positions[:half], padded_length, reduce)
    return first + reduced(adapter, loss_fn, collate, examples, positions[half:], padded_length, reduce)


def _device(adapter: Adapter) -> torch.device:
    return adapter.parameters()[0].device
