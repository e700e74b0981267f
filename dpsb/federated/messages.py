"""What travels between coordinator and silos, and the digests that bind it together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any, Protocol

import torch

from dpsb.adapter import Adapter
from dpsb.federated.spec import SHA256, RoundSpec, check_match, check_whole, checked_fields

State = Mapping[str, torch.Tensor]
"""Tensors by name: theta, or in a summed model the one vector under :data:`SUM`."""

SUM = "sum"

REFUSALS = ("spec", "budget", "ledger", "state", "busy", "reply_lost", "failed")
"""Why a silo did not do its round; ``failed`` tells nothing more, because what failed may depend on private data."""


def theta_digest(theta: State) -> str:
    """SHA-256 of names, shapes, types and bytes, in order of the names. Of released tensors only."""
    digest = sha256()
    for name in sorted(theta):
        tensor = theta[name].detach().cpu().contiguous()
        head = f"{len(name)}:{name}|{tensor.dtype}|{'x'.join(map(str, tensor.shape))}|"
        digest.update(head.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def basis_digest(adapter: Adapter) -> str:
    """SHA-256 of the frozen factors A and B: averages of R mean nothing between silos with different ones. Public."""
    tensors: dict[str, torch.Tensor] = {}
    for name, (A, B, _) in adapter.factors().items():
        tensors |= {f"{name}.A": A, f"{name}.B": B}
    return theta_digest(tensors)


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """How far a silo's ledger was when it replied; the coordinator keeps the last one. Public.

    A round's reply is bound to the ledger by its hash, so the head depends on noise that was drawn once: a ledger that
    was put back to an older state cannot come to the same head again, however often it is charged.

    Args:
      ledger_id: The run id of the silo's ledger.
      length: Its number of lines.
      head: The hash of its last line.
      round: The round that the reply was for.
    """

    ledger_id: str
    length: int
    head: str
    round: int

    def __post_init__(self) -> None:
        check_whole(1, length=self.length)
        check_whole(0, round=self.round)
        check_match(SHA256, head=self.head)

    def to_json(self) -> dict[str, Any]:
        """The receipt as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Receipt:
        """The inverse of :meth:`to_json`."""
        return cls(**checked_fields(cls, content, "a receipt"))


@dataclass(frozen=True, kw_only=True)
class RoundMessage:
    """The coordinator's request to one silo.

    Args:
      silo: Whom it is for.
      spec: What to do.
      theta: Where to start.
      receipt: The last receipt that the coordinator holds of this silo; the silo refuses if its ledger is behind.
    """

    silo: str
    spec: RoundSpec
    theta: State
    receipt: Receipt | None = None


@dataclass(frozen=True, kw_only=True)
class Update:
    """What a silo sends after its steps.

    Args:
      silo: Who sends it.
      run_id: Of the round's specification.
      round: Likewise.
      theta_sha256: Of the theta it started from.
      tensors: Theta after the local steps; in a summed model the clipped sum. Released in ``silo_local``; sensitive in
        ``trusted_server`` and ``client_level``.
      receipt: The ledger after the round.
      follows: The hash of the ledger's line at which the coordinator's own receipt ended; None without one.
    """

    silo: str
    run_id: str
    round: int
    theta_sha256: str
    tensors: State
    receipt: Receipt
    follows: str | None = None


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a silo sends no update.

    Args:
      silo: Who refuses.
      run_id: Of the message.
      round: Of the message.
      kind: One of :data:`REFUSALS`.
      message: One sentence that quotes no data.
    """

    silo: str
    run_id: str
    round: int
    kind: str
    message: str


Reply = Update | Refusal


class Transport(Protocol):
    """Brings messages to silos and replies back; any of them may be lost, doubled or late."""

    def send(self, messages: Sequence[RoundMessage]) -> Iterable[Reply]:
        """Sends all the messages and returns the replies that came in time, in any order."""
        ...


def bytes_of(tensors: State) -> int:
    """The payload of a message: the bytes of its numbers, without framing."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
