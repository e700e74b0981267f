"""Folders that another process sees either as they were or whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpsb_accounting.files import flush


def check_new(folder: Path) -> None:
    """Refuses a name under which something is.

    Raises:
      FileExistsError: If it is a file, a link, or a folder that is not empty.
    """
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        raise FileExistsError(f"{folder} exists already; choose another folder.")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes ``folder`` when the block ends well; otherwise nothing of it is left.

    Where ``folder`` is there and empty, what was written moves into it, as it may be where a disk is mounted.

    Raises:
      FileExistsError: If something is there, before or after the block.
    """
    check_new(folder)
    there = folder.exists()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder if there else folder.parent, prefix=f".{folder.name}.") as name:
        new = Path(name) / "new"
        new.mkdir()
        yield new
        _flush(new)
        if not there:
            check_new(folder)
            new.rename(folder)
        elif os.listdir(folder) != [Path(name).name]:
            raise FileExistsError(f"{folder} is not empty any more; choose another folder.")
        else:
            for path in new.iterdir():
                path.rename(folder / path.name)
    flush(folder.parent)


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
