"""A silo's replies, kept beside its ledger and bound to it by their hash: a retry costs nothing and draws no noise.

Ledgers are public, and some replies are sums without noise (``trusted_server``, ``client_level``). So each file holds
32 fresh random bytes that never leave the silo: without them its hash would let whoever has the ledger test a guess of
the data.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from dpsb.federated.messages import State
from dpsb.federated.spec import RoundSpec, SpecRefused
from dpsb_accounting import Ledger, LedgerError
from dpsb_accounting.files import write_whole
from dpsb_accounting.positions import metadata

_PATTERN = "reply-*.safetensors"


class ReplyLost(RuntimeError):
    """The reply of a round was paid for and bound to the ledger, and its file is gone or is another one."""


def reply_name(spec: RoundSpec, suffix: str = "") -> str:
    """The file of a reply: one for each round and theta, for the basis, and for each secure sum."""
    return f"reply-{spec.round:06d}-{spec.theta_sha256}{suffix and '-'}{suffix}.safetensors"


def settle(home: Path, ledger: Ledger) -> None:
    """Binds replies that a crash left unbound: their steps were charged, and their noise must not be drawn again.

    Raises:
      LedgerError: If a reply has seen more of the ledger than there is: an old ledger was put back.
    """
    bound = ledger.files
    for path in sorted(home.glob(_PATTERN)):
        if path.name in bound:
            continue
        content = path.read_bytes()
        seen = _metadata(path, content)
        if seen.get("run_id") != ledger.run_id:
            raise LedgerError(f"{path.name} belongs to another ledger than the one beside it.")
        length = seen.get("ledger_length", "")
        if not (length.isascii() and length.isdigit()):
            raise LedgerError(f"{path.name} names no state of the ledger.")
        ledger.check_not_behind(int(length), seen.get("ledger_head", ""))
        ledger.bind_file(path.name, sha256(content).hexdigest())


def last_round(ledger: Ledger) -> int:
    """The latest round that the ledger binds a reply of; -1 if there is none."""
    return max((int(name.split("-")[1]) for name in ledger.files if name.startswith("reply-")), default=-1)


def find(home: Path, ledger: Ledger, spec: RoundSpec, suffix: str = "") -> dict[str, torch.Tensor] | None:
    """The reply of this round to this theta, if there was one.

    Raises:
      ReplyLost: If the ledger binds a reply that is gone or changed.
      SpecRefused: If the reply is to another specification of this round.
    """
    name = reply_name(spec, suffix)
    if name not in ledger.files:
        return None
    try:
        content = (home / name).read_bytes()
    except OSError:
        raise ReplyLost(f"The reply of round {spec.round} was paid for and its file is gone.") from None
    if sha256(content).hexdigest() != ledger.files[name]:
        raise ReplyLost(f"The reply of round {spec.round} is not the one that the ledger binds.")
    if _header(content).get("spec_sha256") != spec.digest:
        raise SpecRefused(f"Round {spec.round} was answered from this theta under another specification.")
    return load(content)


def was_answered(home: Path, session: str) -> bool:
    """Whether a masked vector was put down for this secure sum, in any life of the silo."""
    return any(home.glob(f"reply-*-{session}.safetensors"))


def store(home: Path, ledger: Ledger, spec: RoundSpec, tensors: State, suffix: str = "") -> None:
    """Puts a reply down whole, readable by the silo alone, then binds it to the ledger."""
    facts = {
        **metadata(ledger),
        **{"format": "dpsb-reply/2", "federation": spec.run_id, "round": str(spec.round), "spec_sha256": spec.digest},
        "salt": secrets.token_hex(32),
    }
    content = bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=facts))
    path = home / reply_name(spec, suffix)
    write_whole(path, content, mode=0o600)
    ledger.bind_file(path.name, sha256(content).hexdigest())


def _metadata(path: Path, content: bytes) -> Mapping[str, str]:
    try:
        load(content)
        return _header(content)
    except (SafetensorError, ValueError):
        raise LedgerError(f"{path.name} cannot be read; it was damaged.") from None


def _header(content: bytes) -> Mapping[str, str]:
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return dict(header.get("__metadata__", {}))
