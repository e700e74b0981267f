"""The side of rank 0: tells the others what to compute, and adds up what they found."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch

from dpsb.adapter import Adapter
from dpsb.distributed.team import Team, TeamError
from dpsb.distributed.work import Work, part_of_sum
from dpsb.fingerprint import fingerprint
from dpsb.mechanism import Mechanism
from dpsb.probe import Example
from dpsb.sampling import bucket_of, own_length


class Order(IntEnum):
    """What the leader asks for."""

    STEP = 0
    FORWARD = 1
    STOP = 2
    EVALUATE = 3


class Leader:
    """What :func:`dpsb.train.fit` needs of a team; see :class:`dpsb.clipped_sums.Sharing`.

    Args:
      team: The processes.
      work: What all of them hold alike.
      synthetic: The shortest is passed through a sharded model while others work.
    """

    def __init__(self, team: Team, work: Work, synthetic: Sequence[Example]) -> None:
        self._team, self._work = team, work
        shortest = min(synthetic, key=own_length)
        self._idle = work.collate([shortest], bucket_of(own_length(shortest), work.buckets))

    def clipped_sum(self, number: int, mechanism: Mechanism, draw: np.ndarray) -> torch.Tensor:
        """The clipped sum over a draw: every process its part, at the leader's theta and C."""
        team, work = self._team, self._work
        team.say(torch.tensor([Order.STEP, number, len(draw)], dtype=torch.int64))
        say_theta(team, work.adapter)
        team.say(torch.tensor([mechanism.l2_clip_norm], dtype=torch.float64))
        team.say(torch.from_numpy(draw.astype(np.int64)))
        return team.add_up(part_of_sum(work, mechanism, draw, team.rank, team.size, self._idle))

    def forward_passes(self, count: int) -> None:
        """Lets the others take part in ``count`` passes of the probe batch, where the base is cut over all of them."""
        if self._work.sharded:
            self._team.say(torch.tensor([Order.FORWARD, count, 0], dtype=torch.int64))

    def evaluate(self) -> None:
        """Lets the others evaluate at the leader's theta, each its share, as a Trainer's evaluation divides it."""
        self._team.say(torch.tensor([Order.EVALUATE, 0, 0], dtype=torch.int64))
        say_theta(self._team, self._work.adapter)

    def stop(self) -> None:
        """Lets the others go, with the trained theta."""
        self._team.say(torch.tensor([Order.STOP, 0, 0], dtype=torch.int64))
        say_theta(self._team, self._work.adapter)


def say_theta(team: Team, adapter: Adapter) -> None:
    """The leader's theta, on every rank."""
    mine = torch.cat([value.detach().double().flatten() for value in adapter.parameters()])
    theirs = team.say(mine)
    if not team.leads:
        sizes = [parameter.numel() for parameter in adapter.parameters()]
        with torch.no_grad():
            for parameter, part in zip(adapter.parameters(), theirs.split(sizes), strict=True):
                parameter.copy_(part.view_as(parameter))


def digest_of(work: Work) -> bytes:
    """SHA-256 of all examples in their order, the frozen tensors and how a draw is cut: what all must have alike.

    With another token budget or other buckets a process would cut a draw into other microbatches, and an example could
    be in those of two processes. As sensitive as the examples.
    """
    dataset, cut = work.dataset, (work.token_budget, tuple(work.buckets), work.sharded)
    found = hashlib.sha256(repr((cut, sorted(fingerprint(work.adapter).items()))).encode())
    for i in range(len(dataset)):
        example = dataset[i]
        for name in sorted(example):
            value = example[name]
            found.update(repr((name, value.tolist() if hasattr(value, "tolist") else value)).encode())
    return found.digest()


def check_same_data(team: Team, digest: bytes) -> None:
    """Raises TeamError on every rank unless all of them read the same rows in the same order.

    Rows are named by their place, and every process cuts the draw for itself. With another order on one machine a row
    could be read by two processes in one step, or by none: the sum would then not be that of the draw.

    Args:
      team: The processes.
      digest: This one's :func:`digest_of`.
    """
    if not team.all_equal(digest):
        raise TeamError(
            "The processes of this run read different training rows, or the same in another order, or have another "
            "base model, max_length or token_budget: give all of them the same. No training step was charged."
        )
