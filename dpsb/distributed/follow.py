"""The side of every other rank: no ledger, no randomness, no optimizer; sums its part when asked to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch

from dpsb.capture import adapter_train_mode
from dpsb.distributed.lead import Order, say_theta
from dpsb.distributed.team import Team
from dpsb.distributed.work import Work, part_of_sum
from dpsb.mechanism import Mechanism
from dpsb.modes import modes_of, put_back, training_mode
from dpsb.probe import Example, without_dropout, without_gradients
from dpsb.randomness import SystemRandomness
from dpsb.train import probe_every_bucket, secret_dropout
from dpsb.withheld import messages_withheld


def follow(
    team: Team,
    work: Work,
    mechanism: Mechanism,
    synthetic: Sequence[Example],
    *,
    allow_dropout: bool = False,
    on_evaluate: Callable[[], object] = lambda: None,
) -> None:
    """Does what the leader asks for until it says stop; then theta is the trained one.

    Args:
      team: The processes.
      work: What all of them hold alike.
      mechanism: Of the run's plan; C comes with each step.
      synthetic: As the leader's: a sharded model is probed by all processes together.
      allow_dropout: Leave dropout on, with masks of this process' own.
      on_evaluate: Called when the leader evaluates, at its theta.

    Raises:
      StepError: If anything goes wrong while a step's data are in use; the leader's step is charged.
    """
    adapter = work.adapter
    with training_mode(adapter.model):
        adapter_train_mode(adapter)
        modes = modes_of(adapter.model)
        with without_dropout(adapter.model):
            batch = probe_every_bucket(adapter, work.loss_fn, work.collate, synthetic, work.buckets, work.token_budget)
        with nullcontext() if allow_dropout else without_dropout(adapter.model):
            while True:
                order, number, drawn = team.say(torch.zeros(3, dtype=torch.int64)).tolist()
                if order == Order.FORWARD:
                    for _ in range(number):
                        with without_gradients():
                            work.loss_fn(adapter.model, batch)
                    continue
                say_theta(team, adapter)
                if order == Order.STOP:
                    return
                if order == Order.EVALUATE:
                    on_evaluate()
                    put_back(adapter.model, modes)
                    continue
                clip_norm = float(team.say(torch.zeros(1, dtype=torch.float64))[0])
                draw = team.say(torch.zeros(drawn, dtype=torch.int64)).numpy()
                adapter.check_nothing_else_is_trained()
                with (
                    messages_withheld(f"Step {number}, on process {team.rank},"),
                    secret_dropout(SystemRandomness()) if allow_dropout else nullcontext(),
                ):
                    moved = replace(mechanism, l2_clip_norm=clip_norm)
                    team.add_up(part_of_sum(work, moved, draw, team.rank, team.size, batch))
