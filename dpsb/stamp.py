"""The ledger's state, written into the header of every tensor file that a run leaves."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from dpsb_accounting import LedgerRecord
from dpsb_accounting.positions import metadata


def stamp(folder: Path, ledger: LedgerRecord) -> None:
    """Adds run, length and head of the ledger to the metadata of each safetensors file in ``folder``.

    An auditor then sees a ledger that was put back to an older state. Tensors are copied as they are; other metadata
    (such as PEFT's format) stays. Everything added is public.

    Args:
      folder: Where the files are; each is replaced by a new one.
      ledger: As it is when the files are written.
    """
    for path in sorted(folder.glob("*.safetensors")):
        new = path.with_name(f"{path.name}.new")
        with path.open("rb") as old, new.open("wb") as file:
            header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
            header["__metadata__"] = {**header.get("__metadata__", {}), **metadata(ledger)}
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)  # the format wants tensors to begin at a multiple of 8 bytes
            file.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(old, file)
        os.replace(new, path)
