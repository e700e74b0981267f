"""What a run on several processes takes of each: memory, work and traffic, from the model's config alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from dpsb.memory import MemoryPlan
from dpsb_accounting import Plan

_NUMBER = 8  # theta and sums are sent in float64
_PASSES = 2  # forward, and the backward pass of activations; there is none of frozen weights. Checkpointing adds one.


@dataclass(frozen=True, kw_only=True)
class ScalingPlan:
    """What each of several processes needs and does. Public: a function of shapes, plan and settings.

    Args:
      world_size: W, number of processes.
      sharded: Whether the frozen blocks are cut over them.
      weights_bytes: Frozen weights that stay on a process, and the one block that is whole while it computes.
      total_bytes: With adapter, optimizer and the microbatch's peak at ``token_budget``.
      token_budget: Tokens per microbatch on each process.
      examples_per_step: M / W, expected.
      tokens_per_step: Of one process, expected, all examples at full length.
      flops_per_step: Of one process: passes of 2 floating-point operations a parameter and token.
      sent_per_step: Bytes a process receives in a step: theta and the draw's sum, and with ``sharded`` every block's
        other parts in both passes of each microbatch.
      steps: T.
      seconds: Of the whole run at the given speed, traffic not counted; None if no speed was given.
    """

    world_size: int
    sharded: bool
    weights_bytes: int
    total_bytes: int
    token_budget: int
    examples_per_step: float
    tokens_per_step: float
    flops_per_step: float
    sent_per_step: float
    steps: int
    seconds: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def scaling_plan(
    plan: Plan,
    memory: MemoryPlan,
    *,
    world_size: int,
    sharded: bool = False,
    token_budget: int = 4096,
    teraflops: float | None = None,
    checkpointing: bool = False,
) -> ScalingPlan:
    """Simulates a run on paper.

    Args:
      plan: M and T.
      memory: Of one process that holds the whole model.
      world_size: W.
      sharded: Cut the frozen blocks over the processes.
      token_budget: One of those that ``memory`` was made for.
      checkpointing: Whether activations are computed again in the backward pass: a third pass.
      teraflops: What a process sustains on this model, in 10¹² operations a second; measure it on a short run.

    Raises:
      ValueError: If an argument is out of range.
    """
    if world_size < 1:
        raise ValueError(f"Expected world_size={world_size!r} of at least 1.")
    if teraflops is not None and not 0 < teraflops < math.inf:
        raise ValueError(f"Expected teraflops={teraflops!r} to be positive and finite.")
    row = next((row for row in memory.by_budget if row["token_budget"] == token_budget), None)
    if row is None:
        known = ", ".join(str(row["token_budget"]) for row in memory.by_budget)
        raise ValueError(f"Expected token_budget={token_budget!r} to be one of {known}.")
    weights = memory.base_bytes
    if sharded:
        whole = memory.base_bytes - memory.blocks_bytes
        weights = whole + math.ceil(memory.blocks_bytes / world_size) + memory.largest_block_bytes
    examples = plan.expected_batch_size / world_size
    tokens = examples * memory.max_length
    passes = _PASSES + checkpointing
    flops = passes * 2.0 * memory.parameters * tokens
    sent = 2.0 * _NUMBER * memory.dimension
    if sharded:
        microbatches = max(1.0, examples / row["examples"])
        sent += passes * microbatches * memory.blocks_bytes * (world_size - 1) / world_size
    return ScalingPlan(
        world_size=world_size,
        sharded=sharded,
        weights_bytes=weights,
        total_bytes=row["total"] - memory.base_bytes + weights,
        token_budget=token_budget,
        examples_per_step=examples,
        tokens_per_step=tokens,
        flops_per_step=flops,
        sent_per_step=sent,
        steps=plan.steps,
        seconds=None if teraflops is None else plan.steps * flops / (teraflops * 1e12),
    )
