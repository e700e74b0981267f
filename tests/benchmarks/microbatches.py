"""Examples per second of private gradients on the mail data: token-budget microbatches against random ones.

budget N  dpsb's microbatches: an example is padded to its own length bucket, N tokens to a microbatch.
random    microbatches of 32 examples in random order, each padded to its longest example.

Both do the same work on the same random sample of mails: collate, forward, backward with per-example gradients,
clip and sum, with MiniLM and rank 16. The arms are interleaved; a speed-up is the median over rounds of the ratio
within the round.
"""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

import dpsb
from dpsb.adapter import Adapter
from dpsb.capture import per_example_gradients
from dpsb.data import Collator, Columns, read_table, tokenize_classification
from dpsb.losses import classification_loss
from dpsb.mechanism import clip_and_sum
from dpsb.models import load_base
from dpsb.sampling import bucket_of, length_buckets, microbatches
from dpsb.train import Knobs

MAIL = Path(dpsb.__file__).parent / "mail" / "train.parquet"
RANDOM_SIZE = 32
BUDGETS = (2048, 4096, 8192, 16384)
TARGETS = {512: 1.5, 256: 1.1}

Cut = Iterable[tuple[Sequence[int], int]]


def mails(count: int, max_length: int) -> list[dict[str, Any]]:
    """A random sample of the mail train split, tokenized."""
    table = read_table(MAIL)
    tokenizer = load_base("minilm", "classification", common.LABELS)[1]
    examples = tokenize_classification(table, Columns(), tokenizer, common.LABELS, max_length)
    return [examples[i] for i in np.random.default_rng(0).permutation(len(examples))[:count]]


def budget_cut(lengths: Sequence[int], max_length: int, budget: int) -> Iterator[tuple[Sequence[int], int]]:
    """dpsb's microbatches of all examples."""
    buckets = length_buckets(max_length)
    padded = np.array([bucket_of(length, buckets) for length in lengths])
    yield from microbatches(np.arange(len(lengths)), padded, budget)


def random_cut(lengths: Sequence[int]) -> Iterator[tuple[Sequence[int], int]]:
    """Consecutive microbatches (the sample is in random order), padded to their longest."""
    for start in range(0, len(lengths), RANDOM_SIZE):
        members = range(start, min(start + RANDOM_SIZE, len(lengths)))
        yield members, max(lengths[i] for i in members)


def gradients(adapter: Adapter, collate: Collator, examples: Sequence[Any], cut: Cut) -> torch.Tensor:
    """The clipped sum over all microbatches of a cut."""
    total = torch.zeros(adapter.dimension, dtype=torch.float64)
    for indices, length in cut:
        batch = collate([examples[int(i)] for i in indices], length)
        with per_example_gradients(adapter, len(indices)) as rows:
            classification_loss(adapter.model, batch).sum().backward()
            total += clip_and_sum(rows.get(), 1.0)
    return total


def arms(adapter: Adapter, examples: Sequence[Any], max_length: int, budgets: Sequence[int]) -> dict[str, Any]:
    """What is timed, and the number of tokens (padding included) that each computes."""
    collate = Collator(pad_token_id=0)
    lengths = [len(example["input_ids"]) for example in examples]
    cuts = {f"budget {budget}": list(budget_cut(lengths, max_length, budget)) for budget in budgets}
    cuts["random"] = list(random_cut(lengths))

    def arm(cut: Cut) -> Callable[[], torch.Tensor]:
        return lambda: gradients(adapter, collate, examples, cut)

    return {
        "run": {name: arm(cut) for name, cut in cuts.items()},
        "tokens": {name: sum(len(members) * length for members, length in cut) for name, cut in cuts.items()},
    }


def measure(max_length: int, count: int, repetitions: int, budgets: Sequence[int]) -> dict[str, Any]:
    """Throughput and speed-up of every token budget at one maximum length."""
    adapter = common.MINILM.adapter()
    examples = mails(count, max_length)
    contest = arms(adapter, examples, max_length, budgets)
    gradients(adapter, Collator(0), examples, [(range(4), max_length)])  # warm-up
    with common.no_garbage_collection():
        rounds = list(common.interleaved(contest["run"], repetitions))
    speedups = {f"budget {b}": common.paired_ratio(rounds, "random", f"budget {b}")[1] for b in budgets}
    return {
        "max_length": max_length,
        "target": TARGETS.get(max_length),
        "default_budget": Knobs().token_budget,
        "speedup_of_default": speedups.get(f"budget {Knobs().token_budget}"),
        "fastest": max(speedups, key=speedups.__getitem__),
        "speedup": speedups,
        "speedup_by_processor_time": {
            f"budget {b}": common.paired_ratio(rounds, "random", f"budget {b}", "cpu")[1] for b in budgets
        },
        "examples_per_second": {
            name: round(count / common.quartiles([r[name].wall for r in rounds])[1], 2) for name in contest["run"]
        },
        "tokens_computed": contest["tokens"],
        "tokens_of_text": sum(len(example["input_ids"]) for example in examples),
        "examples": count,
        "repetitions": repetitions,
        "machine": common.machine(),
    }


def main() -> None:
    parser = common.arguments(__doc__, repetitions=2, threads=2, examples=256)
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.add_argument("--max-length", type=int, nargs="+", default=[512, 256])
    parser.add_argument("--budget", type=int, nargs="+", default=list(BUDGETS))
    options = parser.parse_args()
    common.quiet()
    torch.set_num_threads(options.threads)
    for max_length in options.max_length:
        common.show(measure(max_length, options.examples, options.repetitions, options.budget), options.json)


if __name__ == "__main__":
    main()
