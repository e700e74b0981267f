"""The short self-test that a private run makes of itself before it reads its first private example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from dpsb.adapter import Adapter
from dpsb.losses import LossFn
from dpsb.probe import Collate, ProbeError
from dpsb.selftest.ours import own_step
from dpsb.selftest.run import run_selftest
from dpsb.selftest.sums import TOLERANCE

HALF_TOLERANCE = 5e-2


def check_before_run(
    adapter: Adapter,
    loss_fn: LossFn,
    collate: Collate,
    synthetic: Sequence[Mapping[str, Any]],
    max_length: int,
    token_budget: int,
) -> None:
    """Tests sums, noise and sampling of one step on synthetic examples; theta is left as it was.

    The checks of ``dpsb selftest`` less those that fork this process, and less those that the probe of ``fit`` makes
    anyway. A correct run is refused with a probability of about 10 times ``ERROR_RATE``.

    Raises:
      ProbeError: If a check fails; no training step has been charged (a private basis has).
    """
    few = list(synthetic[:4])
    with own_step(adapter, loss_fn, collate, few, max_length, token_budget=token_budget) as step:
        short = replace(step, unclipped=None, otherwise=None)
        found = run_selftest(short, few, tolerance=tolerance_for(adapter.model), forks=False)
    if not found.ok:
        first, names = found.failures[0], ", ".join(check.name for check in found.failures)
        raise ProbeError(
            f"The self-test of the private step failed before any training step was charged ({names}): it must hold "
            f"that {first.detail}, measured {first.figure}, limit {first.limit}. `dpsb selftest --full` tells more."
        )


def tolerance_for(model: torch.nn.Module) -> float:
    """What rounding may do to a row of length C: more where the model computes in half precision."""
    tensors = (*model.parameters(), *model.buffers())
    return HALF_TOLERANCE if any(t.dtype in (torch.bfloat16, torch.float16) for t in tensors) else TOLERANCE
