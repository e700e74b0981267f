"""A sweep on disk: its settings, one folder a cell, and what was cut off too early to go on."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpsb.curves.cells import Cell
from dpsb_accounting import Ledger, LedgerError
from dpsb_accounting.files import write_whole
from dpsb_accounting.ledger import LEDGER_NAME

SETTINGS_NAME, LOCK_NAME = "curve.json", ".curve.lock"
CELLS, ABANDONED = "cells", "abandoned"
INTERRUPTIONS = "interruptions.json"
BEGUN = "begun.txt"
"""Run id and cell of every run that may have charged: what it spent stays spent, even if its folder is deleted."""
_SCHEMA = "dpsb-curve/1"


class FolderError(RuntimeError):
    """The folder of a sweep is not in a state for what was asked; the message says what to do."""


@contextmanager
def sweep_folder(out: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Holds the folder for one sweep: writes its settings, or checks that they are those of the sweep in it.

    Raises:
      FolderError: If another process works in it, it holds something else, or the settings differ; names the first key.
    """
    if (out / LEDGER_NAME).exists():
        raise FolderError(f"out={str(out)!r} holds a single run; choose another folder for the curve.")
    if out.is_dir() and not (out / SETTINGS_NAME).exists():
        other = sorted({path.name for path in out.iterdir()} - {CELLS, LOCK_NAME})
        if other:
            raise FolderError(f"out={str(out)!r} is not empty and holds no curve ({other[0]}); choose another folder.")
    try:
        (out / CELLS).mkdir(parents=True, exist_ok=True)
        lock = os.open(out / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise FolderError(f"out={str(out)!r} cannot be written: {error.strerror}.") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderError(f"out={str(out)!r} is in use by another sweep.") from None
        _check_settings(out, settings)
        yield
    finally:
        os.close(lock)


def _check_settings(out: Path, settings: Mapping[str, Any]) -> None:
    wanted = json.loads(json.dumps(dict(settings)))
    path = out / SETTINGS_NAME
    if not path.exists():
        if any((out / CELLS).iterdir()):
            raise FolderError(f"{out} holds cells, but {SETTINGS_NAME} is gone; choose another --out.")
        write_whole(path, json.dumps({"schema": _SCHEMA, "settings": wanted}, indent=1).encode() + b"\n")
        return
    try:
        found = json.loads(path.read_text())
        schema, held = found["schema"], dict(found["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FolderError(f"{path} cannot be read ({type(error).__name__}); choose another --out.") from None
    if schema != _SCHEMA:
        raise FolderError(f"{path} has schema {schema!r}, not {_SCHEMA!r}; choose another --out.")
    for key in [*wanted, *(key for key in held if key not in wanted)]:
        if held.get(key) != wanted.get(key):
            raise FolderError(
                f"{out} holds a curve with {key}={held.get(key)!r}, not {wanted.get(key)!r}; start it with the same "
                "settings to go on, or choose another --out."
            )


def is_finished(folder: Path) -> bool:
    """Whether the cell's run is complete; the report is the last file it writes."""
    return (folder / "report.json").is_file()


def prepare_cell(out: Path, cell: Cell) -> bool:
    """Makes a cell ready to run. Returns whether it is to be resumed.

    A run that was cut off before it can be resumed is moved to ``abandoned``, where its ledger still counts.
    """
    from dpsb.checkpoint import remove_checkpoint

    folder = out / CELLS / cell.name
    if not (folder / LEDGER_NAME).exists():
        return False
    if resumable(folder):
        _note_interruption(folder)
        return True
    number = 1
    while (out / ABANDONED / f"{cell.name}-{number}").exists():
        number += 1
    (out / ABANDONED).mkdir(exist_ok=True)
    remove_checkpoint(folder)
    folder.rename(out / ABANDONED / f"{cell.name}-{number}")
    return False


def note_begun(out: Path, cell: Cell) -> None:
    """Notes a cell's run before it charges anything; one that was resumed is there already."""
    run_id = Ledger.read(out / CELLS / cell.name / LEDGER_NAME).run_id
    if run_id in dict(begun(out)):
        return
    with (out / BEGUN).open("a") as file:  # one short write, so lines of several processes do not mix
        file.write(f"{run_id} {cell.name}\n")
        file.flush()
        os.fsync(file.fileno())


def begun(out: Path) -> list[tuple[str, str]]:
    """Run id and cell's name of every run that was noted."""
    lines = (out / BEGUN).read_text().splitlines() if (out / BEGUN).exists() else []
    return [(run_id, name) for run_id, _, name in (line.partition(" ") for line in lines) if name]


def resumable(folder: Path) -> bool:
    """Whether an unfinished run has all that it needs to go on: its start and, if it paid for one, its basis."""
    from dpsb.basis.stage import BASIS_NAME
    from dpsb.start import StartError, read_start

    try:
        ledger = Ledger.read(folder / LEDGER_NAME)
    except LedgerError:
        return False
    try:
        read_start(folder, ledger.plan)
    except StartError:
        return False
    return ledger.plan.basis["access"] != "released" or (BASIS_NAME in ledger.files and (folder / BASIS_NAME).exists())


def _note_interruption(folder: Path) -> None:
    """Notes which updates are lost: steps charged since the last checkpoint, which are spent and not made again."""
    lines = (folder / LEDGER_NAME).read_bytes().splitlines(keepends=True)
    kept = 0
    for name in ("checkpoint", "checkpoint.old"):
        try:
            facts = json.loads((folder / name / "checkpoint.json").read_text())
            kept = _charges(lines[: int(facts["ledger_length"])])
            break
        except (OSError, ValueError, KeyError):
            continue
    noted = _noted(folder)
    noted = {"resumed": noted["resumed"] + 1, "lost": {**noted["lost"], str(kept): _charges(lines) - kept}}
    write_whole(folder / INTERRUPTIONS, json.dumps(noted).encode() + b"\n")


def _charges(lines: Sequence[bytes]) -> int:
    return sum(b'"kind":"charge"' in line and b'"phase":"train"' in line and line.endswith(b"\n") for line in lines)


def _noted(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / INTERRUPTIONS).read_text()))
    except (OSError, ValueError):
        return {"resumed": 0, "lost": {}}


def lost_steps(folder: Path) -> int:
    """How many charged steps left no trace in a cell's model, because it was cut off."""
    return sum(_noted(folder)["lost"].values())
