"""Signatures: who stands behind a ledger and its report.

A ledger's hash chain has no key: it shows that the lines fit together, not who wrote them. A signature binds a
person or an institution to one state of one ledger, to the report made of it and to the tensor files beside it.
It does not make a dishonest signer honest.

The signature is a file of its own, `signature.json`:

* `schema`: "dpsb-signature/1"; `algorithm`: "ed25519"; `public_key`: 32 bytes, hexadecimal;
* `signed`: `run_id`, `ledger_head`, `ledger_length`, `report_sha256` (of the report's canonical JSON; null if there
  was none) and `files` (name to SHA-256 of every tensor file beside the ledger);
* `signature`: 64 bytes, hexadecimal, over the text "dpsb-signature/1", a newline, and the canonical JSON of `signed`
  (keys sorted, no spaces, ASCII).

The key inside the file is a convenience for finding the right one. A check always uses the key that the auditor
holds, from elsewhere.

References:
    Josefsson and Liusvaara (2017), RFC 8032 (Ed25519).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dpsb_accounting import strict
from dpsb_accounting.chain import canonical
from dpsb_accounting.positions import Check
from dpsb_accounting.record import LedgerRecord

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SCHEMA = "dpsb-signature/1"
SIGNATURE_NAME = "signature.json"
_FIELDS = {"schema", "algorithm", "public_key", "signed", "signature"}


class SignatureError(ValueError):
    """A key or a signature cannot be read or made; the message says why."""


def make_keys(private_path: str | os.PathLike[str]) -> Path:
    """Writes a new private key, readable by its owner only, and its public key beside it.

    Args:
        private_path: Where the private key goes, PEM (PKCS 8), not encrypted. Must not exist. Secret.

    Returns:
        Where the public key is: the same name with ".pub" added. Public.

    Raises:
        SignatureError: If either file exists or cannot be written.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    path = Path(private_path)
    beside = path.with_name(f"{path.name}.pub")
    made: list[Path] = []
    for target, content, mode in ((path, private, 0o600), (beside, public, 0o644)):
        try:
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            made.append(target)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
        except OSError as error:
            for each in made:  # half a pair, or of another pair than what is there, is of no use to anybody
                each.unlink()
            raise SignatureError(f"cannot create {target}: {error.strerror}") from None
    return beside


def sign(
    record: LedgerRecord, report: Mapping[str, object] | None, private_path: str | os.PathLike[str]
) -> dict[str, object]:
    """Returns the content of the signature file for one state of a ledger and its report.

    Args:
        record: The ledger, verified.
        report: The report beside it, as JSON holds it; None if there is none.
        private_path: An ed25519 private key, PEM. Secret.

    Raises:
        SignatureError: If the key cannot be read or is of another kind.
    """
    key = _private_key(Path(private_path))
    signed = {
        "run_id": record.run_id,
        "ledger_head": record.head,
        "ledger_length": record.length,
        "report_sha256": None if report is None else report_digest(report),
        "files": _digests(record.path.parent),
    }
    return {
        "schema": SCHEMA,
        "algorithm": "ed25519",
        "public_key": key.public_key().public_bytes_raw().hex(),
        "signed": signed,
        "signature": key.sign(_message(signed)).hex(),
    }


def report_digest(report: Mapping[str, object]) -> str:
    """Returns the SHA-256 of a report's canonical JSON, hexadecimal: the same however the file is laid out."""
    return hashlib.sha256(canonical(report)).hexdigest()


def check_signature(
    record: LedgerRecord,
    report: Mapping[str, object] | None,
    public_path: str | os.PathLike[str],
    signature_path: str | os.PathLike[str],
) -> list[Check]:
    """Checks a signature against the ledger, the report and the tensor files that are here.

    Guarantees: holds only if the given public key's owner signed exactly this ledger, whole, and this report. A
    tensor file that was signed but is not here is named and does not count as a fault.

    Args:
        record: The ledger as read here.
        report: The report as read here; None if there is none.
        public_path: The signer's public key, PEM, which the auditor got from the signer. Public.
        signature_path: The signature file. Public.

    Raises:
        SignatureError: If the public key cannot be read.
    """
    key = _public_key(Path(public_path))
    try:
        signed, signature = _load(Path(signature_path))
    except (strict.StrictError, SignatureError) as error:
        return [Check(name="signature", ok=False, detail=str(error))]
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, _message(signed))
    except InvalidSignature:
        detail = f"{Path(signature_path).name} was not signed with the key that belongs to {public_path}"
        return [Check(name="signature", ok=False, detail=detail)]
    fingerprint = key.public_bytes_raw().hex()
    return [
        Check(name="signature", ok=True, detail=f"signed by the owner of the ed25519 key {fingerprint}"),
        *_check_content(record, report, signed),
    ]


def _check_content(
    record: LedgerRecord, report: Mapping[str, object] | None, signed: Mapping[str, object]
) -> list[Check]:
    here = {"run_id": record.run_id, "ledger_head": record.head, "ledger_length": record.length}
    odd = [name for name in here if signed.get(name) != here[name]]
    detail = f"line {record.length}, the last, is the one signed"
    if odd:
        detail = f"another state was signed: {', '.join(f'{n} {strict.short(signed.get(n))}' for n in odd)}"
    checks = [Check(name="signature: ledger", ok=not odd, detail=detail)]
    digest, stated = None if report is None else report_digest(report), signed.get("report_sha256")
    if digest is None and isinstance(stated, str):
        detail = f"a report with the hash {stated[:16]} was signed, but there is none here"
    else:
        detail = "this report was signed" if digest == stated else "another report, or none, was signed"
    checks.append(Check(name="signature: report", ok=digest == stated, detail=detail))
    files, found = strict.mapping(signed.get("files")), _digests(record.path.parent)
    for name in sorted({*files, *found}):
        if name not in found:
            checks.append(Check(name=f"signature: {name}", ok=True, detail="was signed; it is not here to compare"))
        else:
            same = files.get(name) == found[name]
            detail = "this file was signed" if same else f"this file was not signed; its hash is {found[name][:16]}"
            checks.append(Check(name=f"signature: {name}", ok=same, detail=detail))
    return checks


def _message(signed: Mapping[str, object]) -> bytes:
    return SCHEMA.encode("ascii") + b"\n" + canonical(signed)


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _load(path: Path) -> tuple[Mapping[str, object], bytes]:
    data = strict.mapping(strict.load(path))
    if data.get("schema") != SCHEMA:
        raise SignatureError(f"{path} must have schema {SCHEMA!r}, not {data.get('schema')!r}")
    if set(data) != _FIELDS or data.get("algorithm") != "ed25519" or not isinstance(data["signed"], Mapping):
        raise SignatureError(f"{path} must hold {', '.join(sorted(_FIELDS))} with algorithm 'ed25519', and no more")
    try:
        return data["signed"], bytes.fromhex(str(data["signature"]))
    except ValueError:
        raise SignatureError(f"{path} holds a signature that is not hexadecimal") from None


def _private_key(path: Path) -> Ed25519PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    pem = _pem(path)
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except TypeError:
        raise SignatureError(f"{path} is encrypted; write it out without a password for signing") from None
    except (ValueError, UnsupportedAlgorithm):
        raise SignatureError(f"{path} holds no private key in PEM") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SignatureError(f"{path} is no ed25519 key; make one with `dpsb-accounting keygen`")
    return key


def _public_key(path: Path) -> Ed25519PublicKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    pem = _pem(path)
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise SignatureError(f"{path} holds no public key in PEM") from None
    if not isinstance(key, Ed25519PublicKey):
        raise SignatureError(f"{path} is no ed25519 key")
    return key


def _pem(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SignatureError(f"cannot read {path}: {error.strerror}") from None
