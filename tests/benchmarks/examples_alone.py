"""What it costs a silo to put one example through the model at a time, instead of as many as a token budget holds.

The clipped sum of one draw on MiniLM, adapters on every linear layer, all examples of one length. A silo works so
unless its policy says `examples_together` (docs/federated.md). Ratios are taken within each round.
"""

from __future__ import annotations

import common
import torch
from common import Workload

from dpsb.clipped_sums import clipped_sum
from dpsb.data import Collator
from dpsb.mechanism import Mechanism
from dpsb.sampling import length_buckets

EXAMPLES = 64
MECHANISM = Mechanism(l2_clip_norm=1.0, noise_multiplier=1.0, clipping="flat")


def measure(workload: Workload, tokens: int, repetitions: int) -> dict[str, object]:
    """Quartiles of the ratio of both times."""
    adapter, buckets = workload.adapter(), length_buckets(tokens)
    examples = workload.examples(EXAMPLES, [tokens] * EXAMPLES)

    def summed(token_budget: int) -> torch.Tensor:
        collate = Collator(pad_token_id=0, device=common.DEVICE)
        return clipped_sum(adapter, MECHANISM, workload.loss_fn, collate, examples, buckets, token_budget)

    arms = {"alone": lambda: summed(1), "together": lambda: summed(4096)}
    apart = float((arms["alone"]() - arms["together"]()).norm())
    with common.no_garbage_collection():
        rounds = list(common.interleaved(arms, repetitions))
    return {
        "model": workload.name,
        "tokens": tokens,
        "examples": EXAMPLES,
        "alone_over_together": common.paired_ratio(rounds, "alone", "together"),
        "alone_over_together_processor": common.paired_ratio(rounds, "alone", "together", "cpu"),
        "difference_of_the_sums_over_c": apart,
        "threads": torch.get_num_threads(),
        **common.machine(),
    }


def main() -> None:
    parser = common.arguments(__doc__, threads=2, repetitions=5)
    options = parser.parse_args()
    common.quiet()
    torch.set_num_threads(options.threads)
    for tokens in (32, 64, 128):
        common.show(measure(common.MINILM, tokens, options.repetitions), options.json)


if __name__ == "__main__":
    main()
