"""What secure sums are made of: keys, masks from ChaCha20, sealed notes, tags, and shares of secrets."""

from __future__ import annotations

import hmac
import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from dpsb.federated.checks import FederatedError
from dpsb.federated.secure.whole_numbers import Masked
from dpsb_accounting.files import write_new

KEY_NAME = "sum.key"
KEY_BYTES = 32
_NONCE_BYTES = 12


class SecureSumError(FederatedError):
    """A secure sum that cannot go on; the message says why and quotes no data."""


def own_key(folder: Path) -> bytes:
    """The silo's long-lived secret key, made where there is none, readable by its owner alone."""
    try:
        return new_key(folder)
    except FileExistsError:
        return (folder / KEY_NAME).read_bytes()


def new_key(folder: Path) -> bytes:
    """Makes the silo's long-lived secret key: whole and on disk, or not at all, and never what was there already.

    Raises:
      FileExistsError: If something has that name, be it a link that leads nowhere.
    """
    secret = os.urandom(KEY_BYTES)
    write_new(folder / KEY_NAME, secret)
    return secret


def public_of(secret: bytes) -> bytes:
    """The public half of a secret key of X25519."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def agreed(secret: bytes, public: bytes, purpose: str) -> bytes:
    """256 bits that only the owners of two keys have, one value for each purpose: X25519, then HKDF-SHA256.

    Raises:
      SecureSumError: If the public key is none, or one with which anybody agrees on zero.
    """
    try:
        shared = X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise SecureSumError("A public key of a secure sum is not valid.") from None
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=None, info=f"dpsb sum/1 {purpose}".encode()).derive(
        shared
    )


def mask_purpose(context: str, one: str, other: str) -> str:
    """What the mask between two silos is for. With both names: a silo that announces another's public key as its own
    would otherwise share that one's mask, and the two would cancel in a third silo's vector."""
    first, second = sorted((one, other))
    return f"{context} mask {first} {second}"


def mask(key: bytes, dimension: int) -> Masked:
    """The key stream of ChaCha20 as whole numbers modulo 2^32. A key is for one vector: the nonce is zero."""
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(4 * dimension))
    return np.frombuffer(stream, dtype="<u4").astype(np.uint32)


def seal(key: bytes, content: bytes, context: str) -> bytes:
    """Content that only who has the key can read, and that is refused in any other context."""
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, content, context.encode())


def unseal(key: bytes, sealed: bytes, context: str) -> bytes:
    """The inverse of :func:`seal`.

    Raises:
      SecureSumError: If it is not from who has the key, or for another context.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], context.encode())
    except (InvalidTag, ValueError):
        raise SecureSumError("A note of a secure sum is not from the silo that it names.") from None


def tag(key: bytes, statement: str) -> bytes:
    """What proves to who has the key that the other owner made the statement."""
    return hmac.digest(key, statement.encode(), sha256)


def same(one: bytes, other: bytes) -> bool:
    """Whether two tags are equal, in a time that tells nothing."""
    return hmac.compare_digest(one, other)


def split(secret: bytes, threshold: int, parties: int) -> list[bytes]:
    """Shamir's shares of a secret: any ``threshold`` of them give it, fewer tell nothing. Flower's, tested there.

    Raises:
      SecureSumError: If Flower is not there: nothing else takes its place.
    """
    create, combine = _sharing()
    shares = [bytes(share) for share in create(secret, threshold, parties)]
    if combine(shares[-threshold:]) != secret:
        raise SecureSumError("The secret sharing of the installed Flower does not give a secret back.")
    return shares


def join(shares: Sequence[bytes]) -> bytes:
    """The secret that shares are of.

    Raises:
      SecureSumError: If they are of none.
    """
    _, combine = _sharing()
    try:
        return bytes(combine(list(shares)))
    except (ValueError, IndexError):
        raise SecureSumError("The shares of a secret do not go together.") from None


def _sharing():  # type: ignore[no-untyped-def]
    try:
        from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
    except ImportError:
        raise SecureSumError(
            "Secure sums need the secret sharing of Flower 1.41, which is not there: pip install '.[federated]' in a "
            "checkout."
        ) from None
    return create_shares, combine_shares
