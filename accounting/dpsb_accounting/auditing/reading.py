"""Reads canary scores from files that somebody else wrote: sizes are limited, nothing is executed."""

from __future__ import annotations

import csv
import io
import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from dpsb_accounting.auditing.bounds import UNSTATED
from dpsb_accounting.auditing.scores import CanaryScores
from dpsb_accounting.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Sequence

LARGEST_FILE = 256 << 20
_TRUE, _FALSE = ("1", "true", "in"), ("0", "false", "out")


def read_scores(path: str | os.PathLike[str], threat_model: str = UNSTATED) -> CanaryScores:
    """Reads scores from `.npz` (arrays `scores` and `included`) or `.csv` (columns `score` and `included`).

    Args:
        path: The file.
        threat_model: What the attacker saw and chose.

    Raises:
        ValueError: If the file is too large, lacks a column or holds anything but numbers.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if size > LARGEST_FILE:
        raise ValueError(f"{path} has {size} bytes; scores of more than {LARGEST_FILE} bytes are not read")
    if path.suffix == ".npz":
        return _read_npz(path, threat_model)
    if path.suffix == ".csv":
        return _read_csv(path, threat_model)
    raise ValueError(f"{path} must end in .npz or .csv")


def write_scores(scores: CanaryScores, path: str | os.PathLike[str]) -> None:
    """Writes scores as `.npz`, as `read_scores` reads them, for its owner alone: they may be losses of examples."""
    import numpy

    content = io.BytesIO()
    numpy.savez(content, scores=scores.values, included=scores.included)
    write_whole(Path(path), content.getvalue(), mode=0o600)


def _read_npz(path: Path, threat_model: str) -> CanaryScores:
    import numpy

    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > LARGEST_FILE:
                raise ValueError(f"{path} unpacks to more than {LARGEST_FILE} bytes")
        with numpy.load(path, allow_pickle=False) as arrays:
            if not {"scores", "included"} <= set(arrays.files):
                raise ValueError(f"{path} must hold the arrays scores and included, not {sorted(arrays.files)}")
            return CanaryScores(arrays["scores"], arrays["included"], threat_model)
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise ValueError(f"{path} is not a file of arrays: {type(error).__name__}") from None


def _read_csv(path: Path, threat_model: str) -> CanaryScores:
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        if not {"score", "included"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path} must have the columns score and included, not {list(reader.fieldnames or ())}")
        rows: Sequence[dict[str, str | None]] = list(reader)
    values, included = [], []
    for number, row in enumerate(rows, start=2):
        bit = (row["included"] or "").strip().lower()
        try:
            values.append(float(row["score"] or ""))
        except ValueError:
            raise ValueError(f"{path}, line {number}: score must be a number, not {row['score']!r}") from None
        if bit not in (*_TRUE, *_FALSE):
            raise ValueError(f"{path}, line {number}: included must be 0 or 1, not {row['included']!r}")
        included.append(bit in _TRUE)
    return CanaryScores(values, included, threat_model)
