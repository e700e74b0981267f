"""The secure sum that a silo is in: one at a time, for one specification, answered again with the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from dpsb.federated.messages import SUM, Note, State, Summing
from dpsb.federated.secure.keys import known_key
from dpsb.federated.secure.masks import SecureSumError, public_of
from dpsb.federated.secure.opening import context_of
from dpsb.federated.secure.party import Party
from dpsb.federated.spec import RoundSpec, SiloPolicy


class Session:
    """One secure sum as a silo sees it; in memory only.

    Args:
      folder: The silo's, with its long-lived key.
      policy: With the public keys of the other silos.
      spec: Of the round; every message of the sum must bring the same.
      session: Of the sum.

    Raises:
      SecureSumError: If the policy's keys do not go with the silo's own.
    """

    def __init__(self, folder: Path, policy: SiloPolicy, spec: RoundSpec, session: str) -> None:
        self.spec, self.session, self._name = spec, session, policy.silo
        key = known_key(folder)
        peers = {name: bytes.fromhex(public) for name, public in policy.peers.items()}
        if peers.pop(policy.silo, public_of(key)) != public_of(key):
            raise SecureSumError(f"The policy of silo {policy.silo!r} names another public key than its own.")
        if len({*peers.values(), public_of(key)}) != spec.clients:
            raise SecureSumError(f"The policy of silo {policy.silo!r} has the same public key twice.")
        self._party = Party(policy.silo, key, peers, spec.clients - spec.dropouts, context_of(spec, session))
        self._answers: dict[str, tuple[Mapping[str, str], Mapping[str, str]]] = {}
        self._vector: torch.Tensor | None = None

    def is_of(self, spec: RoundSpec, summing: Summing) -> bool:
        """Whether a message belongs to this sum."""
        return (self.spec, self.session) == (spec, summing.session)

    def note(self, summing: Summing) -> Note:
        """What the silo says in the phases without a vector; asked again, the same.

        Raises:
          SecureSumError: If it cannot be said, or something else was asked in this phase before.
        """
        if summing.phase not in self._answers:
            answer = {"share": self._share, "agree": self._party.agree, "open": self._party.open}[summing.phase]
            self._keep(summing, answer(_bytes(summing.notes)))
        return Note(
            silo=self._name,
            run_id=self.spec.run_id,
            round=self.spec.round,
            session=self.session,
            phase=summing.phase,
            notes=self._said(summing),
        )

    def begin(self, summing: Summing) -> None:
        """Takes the members of the sum, before anything is charged for it.

        Raises:
          SecureSumError: If these are too few, or not who they say.
        """
        self._party.join(_bytes(summing.notes))

    def masked(self, tensors: State, summing: Summing) -> dict[str, torch.Tensor]:
        """The silo's whole-numbered vector under its masks. Nothing of it can be seen without T silos' help."""
        vector = self._party.mask(tensors[SUM].numpy())
        self._keep(summing, self._party.confirm())
        self._vector = torch.from_numpy(vector.view("int32"))
        return {SUM: self._vector}

    def sent(self, summing: Summing) -> dict[str, torch.Tensor] | None:
        """The masked vector that was sent before for the same members; None if there was none.

        Raises:
          SecureSumError: If it was for others.
        """
        if self._vector is None:
            return None
        self._said(summing)
        return {SUM: self._vector}

    def confirmations(self) -> Mapping[str, str]:
        """What goes with the masked vector."""
        return self._answers["mask"][1]

    def _share(self, _notes: Mapping[str, bytes]) -> dict[str, bytes]:
        return self._party.share()

    def _keep(self, summing: Summing, answer: Mapping[str, bytes]) -> None:
        said = {name: note.hex() for name, note in answer.items()}
        self._answers[summing.phase] = (dict(summing.notes), said)

    def _said(self, summing: Summing) -> Mapping[str, str]:
        asked, said = self._answers[summing.phase]
        if asked != dict(summing.notes):
            raise SecureSumError(f"This silo was asked something else in phase {summing.phase!r} of this sum before.")
        return said


def _bytes(notes: Mapping[str, str]) -> dict[str, bytes]:
    return {name: bytes.fromhex(note) for name, note in notes.items()}
