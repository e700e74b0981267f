"""The processes that share a run, and what they say to each other; over torch.distributed, started by torchrun.

Processes of a team trust each other as threads of one process do: what they exchange (theta, which examples were drawn,
sums of clipped rows) is as sensitive as what stays in memory. torch.distributed neither encrypts nor authenticates, so
the machines of a team belong on a network of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

_PATIENCE = timedelta(days=2)
"""How long a process waits for another that is alive; a dead one is noticed at once, torchrun stops the others."""


class TeamError(RuntimeError):
    """The processes of a team do not fit together; the message says what to do."""


@dataclass(frozen=True)
class Team:
    """One process' view of its team.

    Args:
      rank: Which process this is; 0 leads.
      size: How many there are.
      device: Where tensors must lie to be sent.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def say(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's tensor on every rank; all of them give one of its shape and dtype."""
        there = tensor.to(self.device).contiguous()
        dist.broadcast(there, src=0)
        return there.to(tensor.device)

    def say_bytes(self, content: bytes = b"") -> bytes:
        """Rank 0's bytes on every rank, whatever the others give."""
        size = int(self.say(torch.tensor([len(content)], dtype=torch.int64))[0])
        given = bytearray(content) if self.leads else bytearray(size)
        if not size:
            return b""
        return bytes(self.say(torch.frombuffer(given, dtype=torch.uint8)).numpy().tobytes())

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's tensor, on rank 0; elsewhere the result means nothing."""
        there = tensor.to(self.device).contiguous()
        dist.reduce(there, dst=0)
        return there.to(tensor.device)

    def all_equal(self, content: bytes) -> bool:
        """Whether every rank gave these bytes (of one length)."""
        mine = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(self.device)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine)
        return all(torch.equal(mine, other) for other in found)


def started_by_torchrun() -> bool:
    """Whether torchrun, or anything else that sets its variables, started this process as part of a team."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def running_team() -> Team | None:
    """The team of a process group that something else started (accelerate, say); None for a process alone."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    on_gpu = dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    return Team(dist.get_rank(), dist.get_world_size(), device)


@contextmanager
def team() -> Iterator[Team]:
    """Joins the team that torchrun started: NCCL where every process has a GPU of its own, gloo otherwise."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() > local
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    try:
        yield Team(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
