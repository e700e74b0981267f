"""Files that another process sees either as they were or whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Writes a file atomically: on disk under another name first, then put in the place of the old one.

    Raises:
        OSError: If the disk does not take it; the old file stays, and nothing is left beside it.
    """
    with _beside(path, content) as name:
        os.chmod(name, mode)
        os.replace(name, path)


def write_new(path: Path, content: bytes) -> None:
    """Writes a file that its owner alone may read: whole and on disk, or not at all, and never over what is there.

    Raises:
        FileExistsError: If something has that name, be it a link that leads nowhere.
        OSError: If the disk does not take it.
    """
    with _beside(path, content) as name:
        os.link(name, path)


@contextmanager
def _beside(path: Path, content: bytes) -> Iterator[str]:
    """The content on disk in the folder of ``path``, under a name that is gone afterwards; then the folder's names."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield name
    finally:
        Path(name).unlink(missing_ok=True)
    flush(path.parent)


def flush(path: Path) -> None:
    """Puts a file, or a folder's list of names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
