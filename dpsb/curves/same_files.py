"""Whether a sweep goes on with the files that it began with: means over runs on different rows would say nothing."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from dpsb.curves.folder import FolderError
from dpsb.parts import file_of
from dpsb_accounting.files import write_whole

NAME = ".files.json"
"""Keyed digests of the files, in the sweep's folder, for its owner alone: nobody can tell by them which rows there were
without the key, and page and tables hold none."""
_CHUNK = 1 << 20


def check_same_files(out: Path, files: Mapping[str, str]) -> None:
    """Notes the files of a new sweep, or checks that they are as they were when it began.

    Args:
      out: Folder of the sweep, held by this process.
      files: Names of files and folders by the argument that gave them; those that are on the Hub are not looked at.

    Raises:
      FolderError: If a file has changed since; names the argument.
    """
    path = out / NAME
    try:
        new = {"key": secrets.token_hex(32), "files": {}}
        noted: dict[str, Any] = json.loads(path.read_text()) if path.exists() else new
        key, held = bytes.fromhex(noted["key"]), dict(noted["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FolderError(f"{path} cannot be read ({type(error).__name__}); choose another --out.") from None
    now = {name: _digest(file_of(source), key) for name, source in files.items() if file_of(source).exists()}
    for name, digest in now.items():
        if held.get(name, digest) != digest:
            raise FolderError(
                f"{name}={files[name]!r} has changed since the sweep in {out} began: its runs would be of other rows "
                "than those that are finished. Put the file back, or choose another --out."
            )
    if now.keys() - held.keys():
        write_whole(path, json.dumps({"key": key.hex(), "files": {**held, **now}}).encode() + b"\n", mode=0o600)


def _digest(source: Path, key: bytes) -> str:
    """Of a file's content, or of names and contents of all files in a folder."""
    digest = blake2b(key=key, digest_size=32)
    whole_folder = sorted(file for file in source.rglob("*") if file.is_file()) if source.is_dir() else [source]
    for file in whole_folder:
        digest.update(f"{file.relative_to(source)}\n{file.stat().st_size}\n".encode())
        with file.open("rb") as content:
            while chunk := content.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()
