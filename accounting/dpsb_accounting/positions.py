"""Positions: which state of the ledger the other files of a run saw, so that a rolled-back ledger is noticed.

Everything that a trainer writes after a charge names the ledger's length and the hash of its last line at that
moment: each checkpoint in `checkpoint.json`, each tensor file in its safetensors header (`run_id`,
`ledger_length`, `ledger_head`), the report under "ledger". A ledger that is behind any of them has lost charges.

A safetensors file is 8 bytes (the length of its header, little endian), the header as JSON, then the tensors. Only
the header is read here, and no code is run from it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dpsb_accounting import strict
from dpsb_accounting.chain import LedgerError
from dpsb_accounting.record import LedgerRecord

_CHECKPOINT = re.compile(r"checkpoint(\.old|-\d+)?")  # of `fit`, and of a Trainer
_START = "start.safetensors"
_RESULTS = ("adapter_model.safetensors", "dpsb_core.safetensors")
_LONGEST_HEADER = 100_000_000  # bytes; the limit that safetensors itself sets


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was checked: its name, whether it holds, and what was found."""

    name: str
    ok: bool
    detail: str


def metadata(ledger: LedgerRecord) -> dict[str, str]:
    """Returns the entries by which a tensor file names the ledger's present state. Public.

    Returns:
        `run_id`, `ledger_length` and `ledger_head`, all text, as safetensors metadata must be.
    """
    return {"run_id": ledger.run_id, "ledger_length": str(ledger.length), "ledger_head": ledger.head}


def safetensors_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Returns the metadata of a safetensors file without reading its tensors.

    Raises:
        StrictError: If the file cannot be read or its header is not that of a safetensors file.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            there = os.fstat(file.fileno()).st_size
            if not 2 <= size <= min(_LONGEST_HEADER, there - 8):
                raise strict.StrictError(f"{path} is no safetensors file: its header cannot have {size} bytes")
            header = file.read(size)
    except OSError as error:
        raise strict.StrictError(f"cannot read {path}: {error.strerror}") from None
    try:
        found = strict.mapping(strict.loads(header)).get("__metadata__", {})
    except (ValueError, RecursionError):
        raise strict.StrictError(f"{path} is no safetensors file: its header is not JSON") from None
    if not isinstance(found, Mapping) or not all(isinstance(value, str) for value in found.values()):
        raise strict.StrictError(f"{path} is no safetensors file: its metadata must map names to text")
    return {name: str(value) for name, value in found.items()}


def check_files(record: LedgerRecord) -> list[Check]:
    """Checks that the ledger is not behind any tensor file or checkpoint beside it, nor of another run or its files."""
    folder = record.path.parent
    return [*_tensor_files(record, folder), *_checkpoints(record, folder), *_bound(record, folder)]


def check_position(record: LedgerRecord, name: str, stated: Mapping[str, object]) -> Check:
    """Checks one named state of the ledger: `run_id`, `length` (a whole number) and `head`."""
    length, head, run_id = stated.get("length"), stated.get("head"), stated.get("run_id")
    if type(length) is not int or not isinstance(head, str):
        return Check(name=name, ok=False, detail=f"names no state of the ledger: {strict.short(dict(stated))}")
    if run_id != record.run_id:
        return Check(name=name, ok=False, detail=f"belongs to another run: {run_id!r}, not {record.run_id!r}")
    try:
        record.check_not_behind(length, head)
    except (LedgerError, ValueError) as error:
        return Check(name=name, ok=False, detail=str(error))
    return Check(name=name, ok=True, detail=f"the ledger's line {length} has the head {head[:16]} named there")


def _tensor_files(record: LedgerRecord, folder: Path) -> Iterator[Check]:
    for path in sorted(folder.glob("*.safetensors")):
        try:
            found = safetensors_metadata(path)
        except strict.StrictError as error:
            yield Check(name=path.name, ok=False, detail=str(error))
            continue
        if "ledger_length" in found or "ledger_head" in found:
            length: object = found.get("ledger_length", "")
            if isinstance(length, str) and length.isascii() and length.isdigit() and len(length) < 20:
                length = int(length)
            stated = {"run_id": found.get("run_id"), "length": length, "head": found.get("ledger_head")}
            yield check_position(record, path.name, stated)
        elif path.name in _RESULTS:
            same = found.get("run_id", record.run_id) == record.run_id
            detail = "names no state of the ledger, so it cannot show whether the ledger was rolled back"
            other = f"belongs to another run: {found.get('run_id')!r}, not {record.run_id!r}"
            yield Check(name=path.name, ok=same, detail=detail if same else other)


def _checkpoints(record: LedgerRecord, folder: Path) -> Iterator[Check]:
    for name in sorted(path.name for path in folder.iterdir() if path.is_dir() and _CHECKPOINT.fullmatch(path.name)):
        try:
            facts = strict.mapping(strict.load(folder / name / "checkpoint.json"))
        except strict.StrictError as error:
            yield Check(name=name, ok=False, detail=str(error))
            continue
        stated = {"run_id": facts.get("run_id"), "length": facts.get("ledger_length"), "head": facts.get("ledger_head")}
        yield check_position(record, name, stated)


def _bound(record: LedgerRecord, folder: Path) -> Iterator[Check]:
    """Files that are bound by their hash: the start to the plan, what charged releases produced to the ledger."""
    planned = record.plan.details.get("start_sha256")
    start = [(_START, planned, "plan")] if isinstance(planned, str) else []
    for name, stated, by in [*start, *((name, digest, "ledger") for name, digest in record.files.items())]:
        path = folder / name
        if path.parent != folder or not path.is_file():  # a finished run keeps none that it can do without
            continue
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        same = found == stated
        detail = f"is the one that the {by} names"
        other = f"has the hash {found[:16]}, the {by} names {stated[:16]}"
        yield Check(name=name, ok=same, detail=detail if same else other)
