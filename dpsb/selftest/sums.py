"""Checks of the clipped sum: replayed on neighbouring data, one example after the other, with equal state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from dpsb.selftest.result import Check, at_most, not_tested
from dpsb.selftest.step import ClippedSum, Step

TOLERANCE = 2e-3
"""Of C: the same row computed in another batch differs by less in fp32; coupling and missing clips by far more."""


def check_sums(step: Step, examples: Sequence[Any], tolerance: float = TOLERANCE) -> Iterator[Check]:
    """The checks of ``clipped_sum``; all figures are in units of C.

    Args:
      step: What is tested.
      examples: At least 4 synthetic or public examples, of different lengths where they have one, whose gradients are
        longer than C: otherwise a missing clip cannot show.
      tolerance: For rounding, in units of C; 5e-2 suits bf16.
    """
    if len(examples) < 4:
        raise ValueError(f"Expected at least 4 examples to test with, got {len(examples)}.")
    C = step.l2_clip_norm

    def total(chosen: Sequence[Any]) -> torch.Tensor:
        return step.clipped_sum(chosen).detach().double().flatten() / C

    batch, extra = list(examples[:-1]), examples[-1]
    whole, size = total(batch), len(batch)
    alone = [total([example]) for example in batch]
    without = [total(batch[:j] + batch[j + 1 :]) for j in range(size)]

    yield at_most(
        "deterministic", _norm(whole - total(batch)), tolerance / 20, "two passes over the same examples agree"
    )
    yield _tried("empty_step", lambda: _norm(total([])), 0.0, "a step that draws nobody sums to zero")
    largest = max(map(_norm, alone))
    yield at_most("row_bound", largest, 1 + tolerance, "no example alone contributes more than C")
    yield Check(
        name="clip_reached",
        passed=largest >= 0.9,
        figure=largest,
        limit=">= 0.9",
        detail="an example reaches C, so that a missing clip would show",
    )
    yield at_most("sum_bound", _norm(whole) / size, 1 + tolerance, "n examples together contribute at most n C")
    removed = max(_norm(whole - rest) for rest in without)
    yield at_most("remove_one", removed, 1 + tolerance, "removing one example moves the sum by at most C")
    yield at_most("add_one", _norm(total([*batch, extra]) - whole), 1 + tolerance, "adding one moves it by at most C")
    replaced = max(_norm(total([*batch[:j], extra, *batch[j + 1 :]]) - whole) for j in range(size))
    yield at_most("replace_one", replaced, 2 + tolerance, "replacing one example moves the sum by at most 2 C")
    coupled = max(_norm(whole - rest - row) for rest, row in zip(without, alone, strict=True))
    yield at_most("coupling", coupled, tolerance, "an example contributes the same alone and beside others")
    if step.unclipped is None:
        yield not_tested("coupling_unclipped", "the step gives no sum without clipping")
    else:
        yield _coupling_unclipped(step.unclipped, batch, tolerance)
    reversed_ = _norm(total(batch[::-1]) - whole)
    yield at_most("order", reversed_, tolerance, "the order of the examples does not matter")
    if step.otherwise is None:
        yield not_tested("microbatches", "the step gives no other memory settings")
    else:
        otherwise = step.otherwise
        yield _tried(
            "microbatches",
            lambda: _norm(otherwise(batch).detach().double().flatten() / C - whole),
            tolerance,
            "memory settings do not change the sum",
        )
    if step.poisoned is None:
        yield not_tested("nan_example", "the step cannot poison an example")
    else:
        poisoned = [*batch, step.poisoned(extra)]
        yield _tried(
            "nan_example",
            lambda: _norm(total(poisoned) - whole),
            1 + tolerance,
            "an example with a NaN moves the sum by at most C",
        )


def _coupling_unclipped(unclipped: ClippedSum, batch: list[Any], tolerance: float) -> Check:
    """As ``coupling``, where nothing hides a row's length; in units of the longest row."""
    whole, *rows = (unclipped(chosen).detach().double().flatten() for chosen in (batch, *([one] for one in batch)))
    without = [unclipped(batch[:j] + batch[j + 1 :]).detach().double().flatten() for j in range(len(batch))]
    moved = max(_norm(whole - rest - row) for rest, row in zip(without, rows, strict=True))
    figure = moved / (max(map(_norm, rows)) or math.nan)
    return at_most("coupling_unclipped", figure, tolerance, "nor does its length before clipping depend on others")


def _tried(name: str, measure: Callable[[], float], limit: float, detail: str) -> Check:
    """A check of something that a step may not even survive; then it has failed."""
    try:
        figure = measure()
    except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        figure, detail = math.nan, f"{detail}; it raised {type(error).__name__}"
    return at_most(name, figure, limit, detail)


def _norm(vector: torch.Tensor) -> float:
    return float(vector.norm()) if vector.numel() else 0.0
