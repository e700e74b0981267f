"""A private Trainer as one of several processes, as ``accelerate launch`` starts them: rank 0 leads the others.

The leader opens the ledger, runs the callbacks, logs and saves; the others compute their part of each step and their
share of each evaluation, and come out of ``train()`` with the leader's theta.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from torch import nn

from dpsb.adapter import Adapter
from dpsb.distributed.follow import follow
from dpsb.distributed.lead import Leader, check_same_data, digest_of
from dpsb.distributed.team import Team
from dpsb.distributed.work import Work
from dpsb.mechanism import Mechanism
from dpsb.probe import Example
from dpsb.start import attach_again, start_of
from dpsb.trainer.preparing import data_withheld
from dpsb_accounting import Plan


def lead(team: Team, plan: Plan, work: Work, synthetic: Sequence[Example]) -> Leader:
    """Sends the others plan and start, and checks that all read the same rows.

    Raises:
      TeamError: If they do not.
    """
    team.say_bytes(json.dumps(plan.to_json()).encode())
    team.say_bytes(start_of(work.adapter))
    _check_same_data(team, work)
    return Leader(team, work, synthetic)


def assist(
    team: Team,
    model: nn.Module,
    work_of: Callable[[Adapter], Work],
    synthetic: Sequence[Example],
    on_evaluate: Callable[[], object],
) -> Plan:
    """The other side: takes part until the leader's training is over; theta is the leader's then.

    Args:
      team: The processes.
      model: With an adapter of the leader's shapes; the leader's basis takes the place of its own.
      work_of: What this process has, for that adapter.
      synthetic: To probe with.
      on_evaluate: Called whenever the leader evaluates.

    Returns:
      The run's plan.
    """
    plan = Plan.from_json(json.loads(team.say_bytes()))
    work = work_of(attach_again(model, team.say_bytes(), plan))
    _check_same_data(team, work)
    follow(team, work, Mechanism.from_plan(plan), synthetic, on_evaluate=on_evaluate)
    return plan


def _check_same_data(team: Team, work: Work) -> None:
    with data_withheld():
        digest = digest_of(work)
    check_same_data(team, digest)
