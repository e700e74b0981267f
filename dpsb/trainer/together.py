"""A private Trainer as one of several processes, as ``accelerate launch`` starts them: rank 0 leads the others.

The leader opens the ledger, runs the callbacks, logs and saves; the others compute their part of each step and their
share of each evaluation, and come out of ``train()`` with the leader's theta.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from dpsb.adapter import Adapter
from dpsb.distributed.follow import follow
from dpsb.distributed.lead import Leader, check_same_data, digest_of
from dpsb.distributed.team import Team
from dpsb.distributed.work import Work
from dpsb.losses import LossFn
from dpsb.mechanism import Mechanism
from dpsb.probe import Collate
from dpsb.sampling import bucket_of, length_buckets
from dpsb.start import attach_again, start_of
from dpsb.trainer.examples import Form, TokenExamples
from dpsb.trainer.preparing import data_withheld
from dpsb_accounting import Plan


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a Trainer's processes all have, each its own copy.

    Args:
      dataset: The training rows, as ``fit`` wants them. Sensitive.
      form: What examples look like.
      loss_fn: Per-example loss.
      collate: Examples to model inputs.
      token_budget: Tokens per microbatch.
    """

    dataset: TokenExamples
    form: Form
    loss_fn: LossFn
    collate: Collate
    token_budget: int

    def work(self, adapter: Adapter) -> Work:
        return Work(
            adapter=adapter,
            dataset=self.dataset,
            loss_fn=self.loss_fn,
            collate=self.collate,
            buckets=length_buckets(self.form.max_length),
            token_budget=self.token_budget,
            sharded=False,
        )


def lead(team: Team, plan: Plan, adapter: Adapter, parts: Parts) -> Leader:
    """Sends the others plan and start, and checks that all read the same rows.

    Raises:
      TeamError: If they do not.
    """
    team.say_bytes(json.dumps(plan.to_json()).encode())
    team.say_bytes(start_of(adapter))
    work, synthetic = parts.work(adapter), parts.form.synthetic()
    with data_withheld():
        digest = digest_of(work.dataset)
    check_same_data(team, digest)
    idle = work.collate(synthetic[:1], bucket_of(len(synthetic[0]["input_ids"]), work.buckets))
    return Leader(team, work, idle)


def assist(
    team: Team, model: nn.Module, parts: Callable[[Adapter], Parts], on_evaluate: Callable[[], object]
) -> tuple[Adapter, Plan]:
    """The other side: takes part until the leader's training is over; theta is the leader's then.

    Args:
      team: The processes.
      model: With an adapter of the leader's shapes; the leader's basis takes the place of its own.
      parts: What this process has, for that adapter.
      on_evaluate: Called whenever the leader evaluates.

    Returns:
      The adapter, trained, and the run's plan.
    """
    plan = Plan.from_json(json.loads(team.say_bytes()))
    adapter = attach_again(model, team.say_bytes(), plan)
    mine = parts(adapter)
    work = mine.work(adapter)
    with data_withheld():
        digest = digest_of(work.dataset)
    check_same_data(team, digest)
    follow(team, work, Mechanism.from_plan(plan), mine.form.synthetic(), on_evaluate=on_evaluate)
    return adapter, plan
