"""A whole run as the processes that do not lead it see it; and what the leader sends them first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch

from dpsb.adapter import Adapter
from dpsb.config import RunConfig, make_config
from dpsb.distributed.follow import follow
from dpsb.distributed.lead import Leader, check_same_data, digest_of
from dpsb.distributed.sharding import shard_base
from dpsb.distributed.team import Team
from dpsb.distributed.work import Work
from dpsb.frozen_prefix import remember_frozen_prefix
from dpsb.inputs import Inputs, read_inputs
from dpsb.mechanism import Mechanism
from dpsb.probe import Example
from dpsb.sampling import length_buckets
from dpsb.start import attach_again, start_of
from dpsb_accounting import Plan


def lead(
    team: Team,
    config: RunConfig,
    plan: Plan,
    adapter: Adapter,
    inputs: Inputs,
    synthetic: Sequence[Example],
    row_scale: torch.Tensor | None,
) -> Leader:
    """Sends the others what they need to take part in the steps of a run, and cuts the base if that is asked for.

    Raises:
      TeamError: If they read other data.
    """
    facts = {"config": config.to_json(), "plan": plan.to_json(), "scaled": row_scale is not None}
    team.say_bytes(json.dumps(facts).encode())
    team.say_bytes(start_of(adapter))
    if row_scale is not None:
        team.say(row_scale)
    work = _work(config, inputs, adapter)
    check_same_data(team, digest_of(work))
    if work.sharded:
        shard_base(adapter, team)
    return Leader(team, work, synthetic)


def assist(team: Team) -> None:
    """Takes part in a run until the leader says that it is over. Writes nothing.

    Raises:
      TeamError: If this process reads other data than the leader.
      DataError, ModelError, ProbeError, StepError: As for the leader.
    """
    facts = json.loads(team.say_bytes())
    start = team.say_bytes()
    config, plan = make_config(facts["config"]), Plan.from_json(facts["plan"])
    inputs = read_inputs(config, warm=False)
    adapter = attach_again(inputs.model, start, plan)
    mechanism = Mechanism.from_plan(plan)
    if facts["scaled"]:
        device = adapter.parameters()[0].device
        scale = team.say(torch.empty(adapter.dimension, dtype=torch.float64, device=device))
        mechanism = replace(mechanism, row_scale=scale)
    work = _work(config, inputs, adapter)
    remembered = remember_frozen_prefix(inputs.model) if config.remember_frozen_blocks else nullcontext()
    with remembered:
        check_same_data(team, digest_of(work))
        if work.sharded:
            shard_base(adapter, team)
        follow(team, work, mechanism, inputs.synthetic(), allow_dropout=config.allow_dropout)
    if work.sharded:
        inputs.metrics()  # the leader's passes are everybody's


def _work(config: RunConfig, inputs: Inputs, adapter: Adapter) -> Work:
    return Work(
        adapter=adapter,
        dataset=inputs.prepared.examples,
        loss_fn=inputs.loss_fn,
        collate=inputs.collate,
        buckets=length_buckets(inputs.prepared.max_length),
        token_budget=config.token_budget,
        sharded=config.shard_base,
    )
