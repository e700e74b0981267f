"""What travels between coordinator and silos, and the digests that bind it together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from dpsb.federated.checks import check_choice, check_match, check_whole, checked_fields
from dpsb.federated.spec import RUN_ID, SHA256, RoundSpec
from dpsb.fingerprint import tensors_digest

if TYPE_CHECKING:
    from dpsb.adapter import Adapter

_NOTE = re.compile(r"([0-9a-f]{2})*")

State = Mapping[str, torch.Tensor]
"""Tensors by name: theta, or in a summed model the one vector under :data:`SUM`."""

SUM = "sum"

PHASES = ("share", "mask", "agree", "open")
"""Of a secure sum; see :mod:`dpsb.federated.secure.party`. A vector goes with ``mask``, notes alone with the others."""

REFUSALS = ("spec", "budget", "ledger", "state", "busy", "reply_lost", "failed")
"""Why a silo did not do its round; ``failed`` tells nothing more, because what failed may depend on private data."""


def theta_digest(theta: State) -> str:
    """SHA-256 of names, shapes, types and bytes, in order of the names. Of released tensors only."""
    return tensors_digest(theta)


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
class Summing:
    """The part of a message that belongs to a secure sum.

    Args:
      session: Of the sum, 32 hexadecimal digits, drawn by the server.
      phase: One of :data:`PHASES`.
      notes: From each other silo to this one, by name, hexadecimal. The server passes them on and cannot read shares.
    """

    session: str
    phase: str
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_match(RUN_ID, session=self.session)
        check_choice(PHASES, phase=self.phase)
        check_notes(self.notes)


@dataclass(frozen=True, kw_only=True)
class RoundMessage:
    """The coordinator's request to one silo.

    Args:
      silo: Whom it is for.
      spec: What to do.
      theta: Where to start; empty in the phases of a secure sum that need none.
      receipt: The last receipt that the coordinator holds of this silo; the silo refuses if its ledger is behind.
      summing: Where in a secure sum the message belongs; None without one.
      basis: A and B of a basis that the silos paid for, where the silo may not have it yet; empty otherwise.
    """

    silo: str
    spec: RoundSpec
    theta: State
    receipt: Receipt | None = None
    summing: Summing | None = None
    basis: State = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Update:
    """What a silo sends after its steps.

    Args:
      silo: Who sends it.
      run_id: Of the round's specification.
      round: Likewise.
      theta_sha256: Of the theta it started from.
      tensors: Theta after the local steps; in a summed model the clipped sum. Released in ``silo_local``; sensitive in
        ``trusted_server`` and ``client_level``; under masks in a secure sum.
      receipt: The ledger after the round.
      follows: The hash of the ledger's line at which the coordinator's own receipt ended; None without one.
      notes: In a secure sum, to each other member, hexadecimal.
    """

    silo: str
    run_id: str
    round: int
    theta_sha256: str
    tensors: State
    receipt: Receipt
    follows: str | None = None
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_notes(self.notes)


@dataclass(frozen=True, kw_only=True)
class Note:
    """What a silo says in a phase of a secure sum that needs no vector.

    Args:
      silo: Who says it.
      run_id: Of the message.
      round: Of the message.
      session: Of the sum.
      phase: Which.
      notes: To each other silo, by name, hexadecimal; in ``open``, for the server, shares by whose secret they are of.
    """

    silo: str
    run_id: str
    round: int
    session: str
    phase: str
    notes: Mapping[str, str]

    def __post_init__(self) -> None:
        check_notes(self.notes)


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


Reply = Update | Note | Refusal


class Transport(Protocol):
    """Brings messages to silos and replies back; any of them may be lost, doubled or late."""

    def send(self, messages: Sequence[RoundMessage]) -> Iterable[Reply]:
        """Sends all the messages and returns the replies that came in time, in any order."""
        ...


def check_notes(notes: Mapping[str, str]) -> None:
    """Refuses notes that are no hexadecimal texts by name."""
    for name, note in dict(notes).items():
        check_match(_NOTE, **{f"the note of {name!r}": note})


def bytes_of(tensors: State) -> int:
    """The payload of a message: the bytes of its numbers, without framing."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
