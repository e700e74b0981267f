"""The server's side of a secure sum: it passes sealed notes on, and takes the masks off what silos agreed to add."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from dpsb.federated.messages import Note, Refusal, RoundMessage, Summing, Transport, Update
from dpsb.federated.secure.masks import SecureSumError, agreed, join, mask, public_of
from dpsb.federated.secure.whole_numbers import Masked
from dpsb.federated.spec import RoundSpec

_TRIES = 100  # of choices of shares, where some silo's are wrong

Passed = dict[str, Mapping[str, str]]
"""What silos sent each other, by sender and receiver."""


class SecureSum:
    """One sum of one round.

    Args:
      specs: What is asked of each silo; one run, round and theta.
      transport: Brings messages to the silos.
      attempts: How often a silo is asked for each of its notes.
    """

    def __init__(self, specs: Mapping[str, RoundSpec], transport: Transport, attempts: int) -> None:
        self._specs, self._transport, self._attempts = dict(specs), transport, attempts
        first = next(iter(self._specs.values()))
        self._threshold = first.clients - first.dropouts
        self.session = secrets.token_hex(16)
        self._context = context_of(first, self.session)
        self.lost: dict[str, str] = {}
        self.bytes_up = self.bytes_down = 0
        self._sealed: Passed = {}

    def share(self, names: Sequence[str]) -> tuple[str, ...]:
        """Asks for the shares; returns whose came: the members, if there are enough of them."""
        self._sealed = self._ask("share", {name: {} for name in names})
        for name, notes in list(self._sealed.items()):
            if name not in notes:
                self.lost[name] = "its shares came without its key"
                del self._sealed[name]
        return tuple(sorted(self._sealed))

    def masking(self, name: str) -> Summing:
        """What a member is told with the round: the shares that the other members sealed for it."""
        notes = {other: sent[name] for other, sent in self._sealed.items() if other != name and name in sent}
        return Summing(session=self.session, phase="mask", notes=notes)

    def open(self, updates: Mapping[str, Update], vectors: Mapping[str, Masked]) -> Masked:
        """The sum of the vectors, modulo 2^32, unmasked with the help of enough silos.

        Args:
          updates: Of the silos that are added; their notes say for whom they masked.
          vectors: Their masked vectors.

        Raises:
          SecureSumError: If too few silos help: nothing is opened, and what was charged stays charged.
        """
        added = sorted(updates)
        confirmed = {name: dict(updates[name].notes) for name in added}
        agreements = self._ask("agree", _turned(confirmed, added))
        self._need(agreements, "agree to the sum")
        given = self._ask("open", _turned(agreements, sorted(agreements)))
        self._need(given, "help to open the sum")
        publics = {name: bytes.fromhex(sent[name]) for name, sent in self._sealed.items()}
        total = np.add.reduce([vectors[name] for name in added], dtype=np.uint32)
        dimension = len(total)
        for name in added:
            total = total - mask(self._secret(name, given), dimension)
        for gone in sorted(set(publics) - set(added)):
            secret = self._secret(gone, given, publics[gone])
            for name in added:
                shared = mask(agreed(secret, publics[name], f"{self._context} mask"), dimension)
                total = total - shared if name < gone else total + shared
        return total

    def _secret(self, name: str, given: Passed, public: bytes | None = None) -> bytes:
        """The secret of a silo, from any T of the shares that go together; a key's has to be that of ``public``."""
        shares = [bytes.fromhex(notes[name]) for _, notes in sorted(given.items()) if name in notes]
        for number, chosen in enumerate(combinations(shares, self._threshold)):
            if number == _TRIES:
                break
            try:
                found = join(chosen)
                if public is None or public_of(found) == public:
                    return found
            except SecureSumError:
                continue
        raise SecureSumError(f"The shares of silo {name!r} give no secret; nothing of the sum can be opened.")

    def _need(self, found: Passed, what: str) -> None:
        if len(found) < self._threshold:
            reasons = "; ".join(f"{name}: {why}" for name, why in sorted(self.lost.items()))
            raise SecureSumError(f"{len(found)} silos {what}, it takes {self._threshold} ({reasons or 'no reply'}).")

    def _ask(self, phase: str, notes: Mapping[str, Mapping[str, str]]) -> Passed:
        """The silos' notes to each other in a phase."""
        found: Passed = {}
        for _ in range(self._attempts):
            messages = [
                RoundMessage(
                    silo=name,
                    spec=self._specs[name],
                    theta={},
                    summing=Summing(session=self.session, phase=phase, notes=notes[name]),
                )
                for name in notes
                if name not in found
            ]
            if not messages:
                break
            self.bytes_down += sum(_size(message.summing.notes) for message in messages if message.summing)
            for reply in self._transport.send(messages):
                if isinstance(reply, Note) and (reply.session, reply.phase) == (self.session, phase):
                    if reply.silo in notes:
                        found.setdefault(reply.silo, dict(reply.notes))
                elif isinstance(reply, Refusal):
                    self.lost[reply.silo] = f"{reply.kind}: {reply.message}"
        self.bytes_up += sum(_size(sent) for sent in found.values())
        return found


def context_of(spec: RoundSpec, session: str) -> str:
    """What a secure sum is of; the same at all its silos, or they open no note of each other.

    With all that the size of a share of the noise depends on: each silo's epsilon counts on the shares of the others.
    """
    noise = (spec.noise_multiplier, spec.l2_clip_norm, spec.clip_steps, spec.clients, spec.dropouts, spec.colluders)
    return " ".join(map(str, (spec.run_id, spec.round, session, spec.theta_sha256, spec.basis_sha256, *noise)))


def _turned(sent: Mapping[str, Mapping[str, str]], names: Sequence[str]) -> dict[str, dict[str, str]]:
    """By receiver what was sent by sender."""
    return {
        name: {other: sent[other][name] for other in names if other != name and name in sent[other]} for name in names
    }


def _size(notes: Mapping[str, str]) -> int:
    return sum(len(note) // 2 for note in notes.values())
