r"""A silo's side of one secure sum: what it tells whom, and that it helps to open one sum of one vector, or none.

The protocol is that of Bonawitz et al. with long-lived keys that silos know of each other from elsewhere, so that a
server cannot stand between them, and with the agreement of enough silos on what is opened. With K silos, of which k may
help the server, and the threshold T = K - t:

1. *share*: each silo draws a key pair and a seed for this sum alone, splits both secrets by Shamir's scheme (T of K)
   and seals the shares for the others.
2. *mask*: it gets the shares meant for it. Those that sent some are the members. To its vector it adds a mask from its
   seed and, for each other member, one from their agreed key, with opposite signs at the two. It proves to each member
   which members it masked for.
3. *agree*: told whose vectors arrived, it checks that all of these masked for the same members, and states, once, to
   each of them that just these vectors are to be added.
4. *open*: shown the statements of T silos, it gives its shares of the seeds of those that are added and of the keys of
   members that are not. It never gives both of one silo.

Since 2T > K + k, two sets of T silos share one that is honest and agrees once: no second sum is ever opened. An opened
sum holds at least T vectors, K - t - k of which have shares of the noise that the server does not know.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import sha256

from dpsb.federated.secure.masks import (
    KEY_BYTES,
    SecureSumError,
    agreed,
    mask,
    public_of,
    same,
    seal,
    split,
    tag,
    unseal,
)
from dpsb.federated.secure.whole_numbers import Masked, Whole, modular

Notes = Mapping[str, bytes]
"""What goes from or to each of the other silos, by name."""


class Party:
    """One silo in one secure sum. Its secrets are in memory only; a silo that is started again is not in the sum.

    Args:
      name: The silo's.
      key: Its long-lived secret key.
      peers: The others' long-lived public keys, known from elsewhere than the server.
      threshold: T, how many vectors an opened sum has at least.
      context: What the sum is of: run, round, session and the theta that all start from.
    """

    def __init__(self, name: str, key: bytes, peers: Notes, threshold: int, context: str) -> None:
        self._name, self._key, self._peers = name, key, dict(peers)
        self._threshold, self._context = threshold, context
        self._secret, self._seed = os.urandom(KEY_BYTES), os.urandom(KEY_BYTES)
        self._sealed: dict[str, bytes] | None = None
        self._own: tuple[bytes, bytes] = (b"", b"")
        self._members: dict[str, bytes] = {}
        self._shares: dict[str, tuple[bytes, bytes]] = {}
        self._masked = False
        self._added: tuple[str, ...] = ()

    def share(self) -> dict[str, bytes]:
        """The sealed shares for each of the others, and under the silo's own name its public key for this sum."""
        if self._sealed is None:
            names = sorted((*self._peers, self._name))
            keys = split(self._secret, self._threshold, len(names))
            seeds = split(self._seed, self._threshold, len(names))
            parts = {name: (keys[i], seeds[i]) for i, name in enumerate(names)}
            self._own = parts[self._name]
            public = public_of(self._secret)
            sealed = {name: self._seal(name, public + b"".join(_framed(*parts[name]))) for name in self._peers}
            self._sealed = {**sealed, self._name: public}
        return dict(self._sealed)

    def join(self, sealed: Notes) -> None:
        """Takes the shares that the other members sealed for this silo; only once.

        Raises:
          SecureSumError: If there are too few, one is not from whom it says, or members are settled already.
        """
        if self._sealed is None or self._members:
            raise SecureSumError("The members of this sum are settled already, or its shares were not asked for.")
        if not set(sealed) <= set(self._peers) or len(sealed) + 1 < self._threshold:
            raise SecureSumError(
                f"A secure sum needs {self._threshold} of the silos that the policy knows, not {len(sealed) + 1}."
            )
        found, shares = {self._name: public_of(self._secret)}, {self._name: self._own}
        for name, content in sealed.items():
            opened = unseal(self._pair(name, "share", name, self._name), content, self._context)
            found[name], shares[name] = opened[:KEY_BYTES], _unframed(opened[KEY_BYTES:])
        self._members, self._shares = found, shares

    def mask(self, vector: Whole) -> Masked:
        """The vector under all its masks; for one vector only, since a second one would show their difference.

        Raises:
          SecureSumError: If there are no members yet, or a vector was masked before.
        """
        if not self._members or self._masked:
            raise SecureSumError("A secure sum masks one vector of a silo, once its members are known.")
        self._masked = True
        total = modular(vector) + mask(self._seed, len(vector))
        for name, public in self._members.items():
            if name != self._name:
                shared = mask(agreed(self._secret, public, f"{self._context} mask"), len(vector))
                total = total + shared if self._name < name else total - shared
        return total

    def confirm(self) -> dict[str, bytes]:
        """To each other member, the proof of which members this silo masked for."""
        statement = f"members {self._digest()}"
        return {name: self._tag(name, statement) for name in self._members if name != self._name}

    def agree(self, confirmed: Notes) -> dict[str, bytes]:
        """To each silo whose vector is added, the statement that just these are; once.

        Args:
          confirmed: Of each other silo whose vector arrived, its proof for this silo.

        Raises:
          SecureSumError: If they are too few, masked for other members, or differ from those agreed to before.
        """
        added = tuple(sorted((*confirmed, self._name)))
        if not self._masked or not set(added) <= set(self._members) or len(added) < self._threshold:
            raise SecureSumError(f"A sum of {len(added)} silos is not opened; it takes {self._threshold} members.")
        statement = f"members {self._digest()}"
        for name, proof in confirmed.items():
            if not same(proof, self._expected(name, statement)):
                raise SecureSumError(f"Silo {name!r} did not mask for the members that this silo masked for.")
        if self._added not in ((), added):
            raise SecureSumError("This silo has agreed to another sum of the same vectors; no second one is opened.")
        self._added = added
        statement = self._statement()
        return {name: self._tag(name, statement) for name in added if name != self._name}

    def open(self, agreements: Notes) -> dict[str, bytes]:
        """The shares with which the agreed sum is unmasked: of seeds of whom it adds, of keys of the other members.

        Args:
          agreements: The statements of other silos for this one.

        Raises:
          SecureSumError: If fewer than T silos agree to the sum that this silo agreed to.
        """
        statement = self._statement()
        behind = {
            name
            for name, proof in agreements.items()
            if name in self._added and name != self._name and same(proof, self._expected(name, statement))
        }
        if not self._added or len(behind) + 1 < self._threshold:
            raise SecureSumError(f"Only {len(behind) + 1} silos agree to this sum; it takes {self._threshold}.")
        return {name: share[1 if name in self._added else 0] for name, share in self._shares.items()}

    def _digest(self) -> str:
        members = {name: public.hex() for name, public in self._members.items()}
        return sha256(json.dumps([self._context, members], sort_keys=True).encode()).hexdigest()

    def _statement(self) -> str:
        return f"added {self._digest()} {json.dumps(self._added)}"

    def _pair(self, peer: str, purpose: str, sender: str, receiver: str) -> bytes:
        return agreed(self._key, self._peers[peer], f"{self._context} {purpose} {sender} {receiver}")

    def _seal(self, peer: str, content: bytes) -> bytes:
        return seal(self._pair(peer, "share", self._name, peer), content, self._context)

    def _tag(self, peer: str, statement: str) -> bytes:
        return tag(self._pair(peer, "tag", self._name, peer), statement)

    def _expected(self, peer: str, statement: str) -> bytes:
        return tag(self._pair(peer, "tag", peer, self._name), statement)


def _framed(first: bytes, second: bytes) -> tuple[bytes, bytes, bytes]:
    return len(first).to_bytes(2, "big"), first, second


def _unframed(content: bytes) -> tuple[bytes, bytes]:
    size = int.from_bytes(content[:2], "big")
    return content[2 : 2 + size], content[2 + size :]
