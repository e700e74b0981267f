"""Folders that another process sees either as they were or whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpsb_accounting.files import flush

_SCRATCH = ".dpsb-new-"


def check_new(folder: Path) -> None:
    """Refuses a name under which something is.

    Raises:
      FileExistsError: If it is a file, a link that leads nowhere, or a folder that is not empty. What a start that was
        killed left in it hidden does not count.
    """
    if folder.is_dir():
        taken = not all(name.startswith(_SCRATCH) for name in os.listdir(folder))
    else:
        taken = folder.exists() or folder.is_symlink()
    if taken:
        raise FileExistsError(f"{folder} exists already; choose another folder.")


@contextmanager
def new_folder(folder: Path, *, last: str = "") -> Iterator[Path]:
    """Yields an empty folder that becomes ``folder`` when the block ends well; otherwise nothing is written there.

    Where ``folder`` is there and empty, what was written moves into it, as it may be where a disk is mounted. A process
    that is killed leaves a hidden folder whose name begins with ``.dpsb-new-``, and nothing else.

    Args:
      folder: The new folder.
      last: The file in it that says that all the others are there.

    Raises:
      FileExistsError: If something is there, before or after the block.
    """
    check_new(folder)
    there = folder.exists()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder if there else folder.parent, prefix=_SCRATCH) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        yield new
        _flush(new)
        check_new(folder)
        if there:
            for path in sorted(new.iterdir(), key=lambda path: path.name == last):
                path.rename(folder / path.name)
        else:
            new.rename(folder)
    flush(folder if there else folder.parent)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yields an empty sibling folder that takes the place of ``folder`` when the block ends well.

    For a folder within one of our own, as ``NAME.new`` and ``NAME.old`` beside it are taken to be ours too. A crash
    leaves the old folder, the new one, or for an instant the old one under ``NAME.old``; never a half-written one.
    """
    new, old = folder.with_name(f"{folder.name}.new"), folder.with_name(f"{folder.name}.old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        _flush(new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        flush(path)
