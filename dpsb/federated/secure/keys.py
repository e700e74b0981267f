"""Who has which key in a secure sum: each silo makes its own, and has the others' public halves from these themselves.

The server is told none of it. A server that could choose a public key that a silo masks for would read its vector.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dpsb.federated.checks import FederatedError, check_match, checked_fields
from dpsb.federated.secure.masks import KEY_BYTES, KEY_NAME, SecureSumError, new_key, public_of
from dpsb.federated.spec import POLICY_NAME, SHA256, SILO_NAME, SiloPolicy, read_policy
from dpsb_accounting.files import write_whole

PUBLIC_NAME = "sum.pub"
"""A silo's public key, to be given to the other silos: one line ``NAME = "64 hexadecimal digits"``."""

_TO_OTHERS = "# Public key of a silo for secure sums. It goes from silo to silo, never by way of the server.\n"
_MOST_BYTES = 4096


def known_key(folder: Path) -> bytes:
    """The silo's long-lived secret key, which has to be there.

    Raises:
      SecureSumError: If it is missing, or no key.
    """
    try:
        key = (folder / KEY_NAME).read_bytes()
    except OSError:
        raise SecureSumError(
            f"{folder.name} holds no {KEY_NAME}; make it on the silo's own machine with `dpsb federate key FOLDER`."
        ) from None
    if len(key) != KEY_BYTES:
        raise SecureSumError(f"{KEY_NAME} has {len(key)} bytes instead of {KEY_BYTES}; it is not a key.")
    return key


def make_key(folder: Path) -> Path:
    """Makes the silo's key, with its public half in a file for the other silos.

    Keys that are there already did not come from here, and a server that made them could read what the silo masks: a
    secret key, or others' public keys in a policy whose silo has had no key to exchange them for, are refused.

    Returns:
      The file with the public key.

    Raises:
      FederatedError: If there is a key already, or a policy that has others' keys, or no policy.
    """
    policy = read_policy(folder / POLICY_NAME)
    there = FederatedError(
        f"{folder / KEY_NAME} is there already; its public half is in {PUBLIC_NAME}. If it was not made on this "
        "machine, delete both and make the key again: whoever made it can read what this silo masks."
    )
    if os.path.lexists(folder / KEY_NAME):
        raise there
    if policy.peers:
        raise FederatedError(
            f"{folder / POLICY_NAME} has public keys of {', '.join(policy.peers)} before this silo has a key of its "
            "own: they came with the folder. Delete [peers] and add the keys that these silos give you, with --peer."
        )
    try:
        public = public_of(new_key(folder))
    except FileExistsError:
        raise there from None
    path = folder / PUBLIC_NAME
    write_whole(path, f'{_TO_OTHERS}{policy.silo} = "{public.hex()}"\n'.encode())
    return path


def read_public(path: Path) -> tuple[str, str]:
    """A silo's name and public key, from the file that :func:`make_key` made there.

    Raises:
      FederatedError: If it is no such file.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("it is too long")
        ((name, key),) = tomllib.loads(path.read_text()).items()
    except (OSError, ValueError, RecursionError) as error:
        raise FederatedError(f"{path} cannot be read as a silo's public key: {error}") from None
    check_match(SILO_NAME, silo=name)
    check_match(SHA256, **{f"the public key of {name!r}": key})
    return name, key


def add_peers(folder: Path, files: Sequence[Path], silos: Collection[str]) -> SiloPolicy:
    """Puts public keys into the silo's policy: only new ones, and none that it has otherwise.

    Args:
      folder: The silo's.
      files: Each from another silo, got from it.
      silos: Names of all silos of the federation.

    Returns:
      The policy as it is now on disk.

    Raises:
      FederatedError: If a file is no public key, of no silo of the federation, or differs from what the policy has.
    """
    path = folder / POLICY_NAME
    policy, own = read_policy(path), public_of(known_key(folder))
    found: dict[str, str] = {policy.silo: own.hex()}
    for name, key in map(read_public, files):
        if name not in silos:
            raise FederatedError(f"A file is the public key of silo {name!r}, which the federation does not know.")
        if found.get(name, policy.peers.get(name, key)) != key:
            raise FederatedError(f"There are two public keys of silo {name!r}; ask that silo which of them is its own.")
        found[name] = key
    new = {name: key for name, key in found.items() if name not in policy.peers and name != policy.silo}
    changed = replace(policy, peers={**policy.peers, **new})
    check_peers(changed, own, silos, complete=False)
    if new:
        text = path.read_text().rstrip("\n") + ("\n" if policy.peers else "\n\n[peers]\n")
        text += "".join(f'{name} = "{key}"\n' for name, key in new.items())
        if _policy_of(text) != changed:
            raise FederatedError(f"{path} has another form than `init` gave it; put the keys under [peers] by hand.")
        write_whole(path, text.encode())
    return changed


def _policy_of(text: str) -> SiloPolicy | None:
    try:
        return SiloPolicy(**checked_fields(SiloPolicy, tomllib.loads(text), POLICY_NAME))
    except ValueError:
        return None


def check_peers(policy: SiloPolicy, own: bytes, silos: Collection[str], *, complete: bool = True) -> Mapping[str, str]:
    """Refuses a policy with which no secure sum of these silos is possible, or none that keeps its vector secret.

    Args:
      policy: Of the silo.
      own: Its public key.
      silos: Names of all silos of the federation.
      complete: Whether every other silo's key has to be there.

    Returns:
      The other silos' public keys, by name.

    Raises:
      FederatedError: Naming the silos.
    """
    peers = dict(policy.peers)
    if peers.pop(policy.silo, own.hex()) != own.hex():
        raise FederatedError(f"The policy of silo {policy.silo!r} names another public key than its own.")
    strangers = sorted(set(peers) - set(silos))
    if strangers:
        raise FederatedError(
            f"The policy of silo {policy.silo!r} has a public key of {', '.join(strangers)}, which the federation does "
            "not know."
        )
    if len({*peers.values(), own.hex()}) != len(peers) + 1:
        raise FederatedError(f"The policy of silo {policy.silo!r} has the same public key for two silos.")
    missing = sorted(set(silos) - set(peers) - {policy.silo})
    if missing and complete:
        raise FederatedError(
            f"The policy of silo {policy.silo!r} lacks the public keys of {', '.join(missing)}; get them from these "
            "silos, not from the server, and add them with `dpsb federate key FOLDER --peer FILE`."
        )
    return peers
