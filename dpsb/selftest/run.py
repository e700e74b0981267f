"""All checks that a step allows, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpsb.selftest.draws import check_draws
from dpsb.selftest.noise import check_noise
from dpsb.selftest.result import SelfTest
from dpsb.selftest.step import Step
from dpsb.selftest.sums import TOLERANCE, check_sums


def run_selftest(step: Step, examples: Sequence[Any], *, tolerance: float = TOLERANCE, forks: bool = True) -> SelfTest:
    """Tests a private training step: its clipped sum, its noise and its sampling.

    Works on any implementation; see :class:`Step` for what it must give. Nothing is written anywhere.

    Args:
      step: What is tested.
      examples: At least 4 synthetic or public examples.
      tolerance: For rounding of the sums, in units of C.
      forks: Whether this process may be forked, to look at the noise of a forked one.

    Example:
      >>> import torch
      >>> rows = list(torch.tensor([[3.0, 4.0], [0.0, 2.0], [-5.0, 1.0], [1.0, 7.0]]))
      >>> def without_clipping(chosen):
      ...     return sum(chosen, torch.zeros(2))
      >>> found = run_selftest(Step(name="mine", l2_clip_norm=1.0, clipped_sum=without_clipping), rows)
      >>> [check.name for check in found.failures]
      ['row_bound', 'sum_bound', 'remove_one', 'add_one', 'replace_one']
    """
    checks = [*check_sums(step, examples, tolerance), *check_noise(step, forks=forks), *check_draws(step)]
    return SelfTest(step.name, tuple(checks))
