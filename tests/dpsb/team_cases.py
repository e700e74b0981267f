"""Run by torchrun in ``test_distributed``: clipped sums of several draws, by a team and by one process alone."""

import json
from dataclasses import replace

import conftest
import numpy as np
import torch
import workbench

from dpsb.basis import random
from dpsb.clipped_sums import clipped_sum
from dpsb.data import Collator
from dpsb.distributed.follow import follow
from dpsb.distributed.lead import Leader
from dpsb.distributed.sharding import shard_base
from dpsb.distributed.team import team
from dpsb.distributed.work import Work
from dpsb.losses import causal_lm_loss
from dpsb.mechanism import Mechanism
from dpsb.modes import training_mode
from dpsb.sampling import length_buckets
from dpsb.train import probe_every_bucket

CLIP = Mechanism(l2_clip_norm=0.5, noise_multiplier=1.0, clipping="flat")
DRAWS = ([], [3], [0, 5], [1, 2, 4, 7, 8, 11, 12])


def main() -> None:
    torch.set_num_threads(1)
    with team() as processes:
        for sharded in (False, True):
            compare(processes, sharded)


def compare(processes, sharded):
    examples, synthetic = workbench.examples(kind="llama"), workbench.examples(seed=5, kind="llama")
    torch.manual_seed(1)
    adapter = conftest.build_adapter(conftest.build_base("llama"), basis=random)
    work = Work(
        adapter=adapter,
        dataset=examples,
        loss_fn=causal_lm_loss,
        collate=Collator(0),
        buckets=length_buckets(16),
        token_budget=32,
        sharded=sharded,
    )
    with training_mode(adapter.model):
        expected = []
        for draw in DRAWS:
            drawn = [examples[i] for i in draw]
            expected.append(clipped_sum(adapter, CLIP, causal_lm_loss, work.collate, drawn, work.buckets, 32))
    if sharded:
        assert shard_base(adapter, processes) > 0
    if not processes.leads:
        start = [p.detach().clone() for p in adapter.parameters()]
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.zero_()  # the leader's theta must arrive with every step
        follow(processes, work, replace(CLIP, l2_clip_norm=99.0), synthetic)
        equal = all(torch.equal(p, q) for p, q in zip(adapter.parameters(), start, strict=True))
        processes.add_up(torch.tensor([float(equal)]))
        return
    with training_mode(adapter.model):
        probe_every_bucket(adapter, causal_lm_loss, work.collate, synthetic, work.buckets, 32)
        leader = Leader(processes, work, synthetic)
        leader.forward_passes(0)
        found = [leader.clipped_sum(i, CLIP, np.array(draw, dtype=np.int64)) for i, draw in enumerate(DRAWS)]
    leader.stop()
    theirs = processes.add_up(torch.tensor([0.0]))
    for draw, whole, sums in zip(DRAWS, expected, found, strict=True):
        facts = {
            "sharded": sharded,
            "drawn": len(draw),
            "norm": float(whole.norm()),
            "moved": float((sums - whole).norm()),
            "theta_equal": bool(theirs[0] == 1.0),
        }
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
