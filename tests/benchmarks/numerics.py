"""What cutting a draw differently changes in the rows: nothing on purpose, rounding in fact.

same_rows          the same rows summed in different portions: largest difference of the float64 sums, over C.
other_budget       rows computed in one microbatch against rows computed in smaller ones: largest change of a clipped
                   row, over C.
neighbour_removed  rows of a microbatch after one of its examples was taken out: largest change of a clipped row of
                   those that stay, over C. The padded length is the same.

R is random and not zero: Gaussian numbers of the size --scatter, which a server that lies may make large. C is the
median norm of the rows, so that some are clipped and some are not.
"""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from typing import Any

import common
import torch
from common import Workload

from dpsb.adapter import Adapter
from dpsb.capture import per_example_gradients
from dpsb.data import Collator
from dpsb.mechanism import clip_and_sum

EXAMPLES = 16
PARTS = (1, 2, 3, 5, 8)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def rows_of(adapter: Adapter, workload: Workload, examples: list[Any]) -> torch.Tensor:
    """Per-example gradients of one microbatch."""
    batch = Collator(pad_token_id=0)(examples, workload.tokens)
    with per_example_gradients(adapter, len(examples)) as rows:
        workload.loss_fn(adapter.model, batch).sum().backward()
        return rows.get()


def in_parts(adapter: Adapter, workload: Workload, examples: list[Any], size: int) -> torch.Tensor:
    """The rows again, ``size`` examples at a time."""
    starts = range(0, len(examples), size)
    return torch.cat([rows_of(adapter, workload, examples[start : start + size]) for start in starts])


def clipped(rows: torch.Tensor, l2_clip_norm: float) -> torch.Tensor:
    """Each row clipped on its own."""
    return torch.stack([clip_and_sum(row[None], l2_clip_norm) for row in rows])


def largest_change(one: torch.Tensor, other: torch.Tensor, l2_clip_norm: float) -> float:
    """The largest distance between the clipped versions of a row, as a fraction of C."""
    moved = clipped(one, l2_clip_norm) - clipped(other, l2_clip_norm)
    return float(moved.norm(dim=1).max()) / l2_clip_norm


def same_rows(rows: torch.Tensor, l2_clip_norm: float) -> float:
    """How much the sum depends on the portions it is taken in, as a fraction of C."""
    whole = clip_and_sum(rows, l2_clip_norm)
    sums = [sum(clip_and_sum(part, l2_clip_norm) for part in rows.split(size)) for size in PARTS]
    return max(float((part - whole).norm()) for part in sums) / l2_clip_norm


def neighbour_removed(adapter: Adapter, workload: Workload, examples: list[Any], l2_clip_norm: float) -> float:
    """The largest change of a clipped row, over C, when the first, middle or last example is taken out."""
    rows, changes = rows_of(adapter, workload, examples), []
    for out in {0, len(examples) // 2, len(examples) - 1}:
        left = rows_of(adapter, workload, examples[:out] + examples[out + 1 :])
        changes.append(largest_change(torch.cat([rows[:out], rows[out + 1 :]]), left, l2_clip_norm))
    return max(changes)


def measure(workload: Workload, dtype: str, scatter: float) -> dict[str, Any]:
    """The three figures for one model in one precision, and what the clip norm is."""
    adapter = workload.adapter(DTYPES[dtype], scatter=scatter)
    lengths = [workload.tokens - index * (workload.tokens // 2) // EXAMPLES for index in range(EXAMPLES)]
    examples = workload.examples(EXAMPLES, lengths)
    rows = rows_of(adapter, workload, examples)
    clip = float(rows.norm(dim=1).median())
    others = {size: largest_change(rows, in_parts(adapter, workload, examples, size), clip) for size in PARTS}
    removed = {size: neighbour_removed(adapter, workload, examples[:size], clip) for size in (2, 3, 5, EXAMPLES)}
    return {
        "model": workload.name,
        "dtype": dtype,
        "scatter": scatter,
        "same_rows": same_rows(rows, clip),
        "other_budget": max(others.values()),
        "other_budget_by_examples_per_microbatch": {str(size): change for size, change in others.items()},
        "neighbour_removed": max(removed.values()),
        "neighbour_removed_by_examples_per_microbatch": {str(size): change for size, change in removed.items()},
        "clip_norm": clip,
        "row_norms": common.quartiles(rows.norm(dim=1).tolist()),
        "examples": EXAMPLES,
        "padded_length": workload.tokens,
        "threads": torch.get_num_threads(),
        "cpu": common.machine()["cpu"],
    }


def main() -> None:
    parser = common.arguments(__doc__, threads=2)
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.add_argument("--scatter", type=float, default=0.3, help="size of the numbers in R (default: 0.3)")
    options = parser.parse_args()
    common.quiet()
    torch.set_num_threads(options.threads)
    for workload in (common.MINILM, common.SMALL_LLAMA):
        for dtype in DTYPES:
            common.show(measure(workload, dtype, options.scatter), options.json)


if __name__ == "__main__":
    main()
