"""Parts of one data file: training, validation and test rows, told apart by a public seed. Needs no torch.

A source such as ``mail.parquet#train(test=0.2,validation=0.1,seed=0)`` names a part wherever a file can be named, so
that no second file with private text is ever written, and the ledger says what was trained on.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

SIDES = ("train", "validation", "test")
_SPEC = re.compile(
    r"(?P<source>.+)#(?P<side>train|validation|test)"
    r"\(test=(?P<test>[\d.e-]+),validation=(?P<validation>[\d.e-]+),seed=(?P<seed>\d+)(?:,by=(?P<by>.+))?\)"
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One side of a split.

    Each row belongs to one side, which a hash of the public seed and of the row decides, whatever else the file holds:
    a row more or less moves nobody else to another side, and equal rows stay together.

    Args:
      source: The file, as the user named it.
      side: ``"train"``, ``"validation"`` or ``"test"``.
      test: Expected share of the test rows.
      validation: Expected share of the validation rows.
      seed: Public.
      by: A column: rows with the same value there, such as those of one person, stay together. Values are compared as
        units are (:func:`dpsb.data.by_unit`); a row without one is on its own.

    Raises:
      ValueError: If a share is out of range or leaves nothing to train on.
    """

    source: str
    side: str
    test: float
    validation: float
    seed: int
    by: str | None = None

    def __post_init__(self) -> None:
        for name in ("test", "validation"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"Expected {name}_share={getattr(self, name)!r} of at least 0 and below 1.")
        if self.test + self.validation >= 1:
            raise ValueError(
                f"test_share={self.test!r} and validation_share={self.validation!r} leave nothing to train on."
            )
        if self.seed < 0:
            raise ValueError(f"Expected split_seed={self.seed!r} of at least 0.")

    def __str__(self) -> str:
        by = f",by={self.by}" if self.by else ""
        return f"{self.source}#{self.side}(test={self.test:g},validation={self.validation:g},seed={self.seed}{by})"

    def other(self, side: str) -> Part:
        """Another side of the same split."""
        return replace(self, side=side)

    def rows(self, columns: Mapping[str, Sequence[Any]]) -> list[int]:
        """Which rows of a table belong to this side. As sensitive as they are."""
        count = len(next(iter(columns.values()), []))
        return [row for row in range(count) if self._side({name: columns[name][row] for name in columns}) == self.side]

    def _side(self, row: Mapping[str, Any]) -> str:
        owner = owner_of(row.get(self.by)) if self.by else ""
        key = json.dumps(owner or sorted(row.items()), default=str)
        place = int.from_bytes(sha256(f"{self.seed}\n{key}".encode()).digest()[:8], "big") / 2**64
        if place < self.test:
            return "test"
        return "validation" if place < self.test + self.validation else "train"


def owner_of(value: Any) -> str:
    """Whose a row is: the value as text without surrounding blanks; empty if it is missing (null, empty or NaN)."""
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return "" if missing else str(value).encode("utf-8", "replace").decode("utf-8").strip()


def part_of(source: str) -> Part | None:
    """The part that a source names; None for a whole file.

    Example:
      >>> part = part_of("mail.csv#test(test=0.2,validation=0,seed=7)")
      >>> part.source, part.side, str(part.other("train"))
      ('mail.csv', 'test', 'mail.csv#train(test=0.2,validation=0,seed=7)')
    """
    found = _SPEC.fullmatch(source)
    if found is None:
        return None
    return Part(
        source=found["source"],
        side=found["side"],
        test=float(found["test"]),
        validation=float(found["validation"]),
        seed=int(found["seed"]),
        by=found["by"],
    )


def same_data(one: str, other: str) -> bool:
    """Whether two names hold the same rows: the same file or folder, or the same split of a data set on the Hub.

    Two sides of one split of a file share no row; a part and its whole file, or parts of two splits, do. Parts may be
    of parts. Slices of a split on the Hub (``train[:80%]``) count as the whole split. A copy under another name cannot
    be noticed here.
    """
    (one, first), (other, second) = _parts_of(one), _parts_of(other)
    for mine, theirs in zip(first, second, strict=False):
        if replace(theirs, source=mine.source, side=mine.side) != mine:
            break
        if theirs.side != mine.side:
            return False
    if Path(one).exists() and Path(other).exists():
        return Path(one).samefile(other)
    (name, splits), (again, others) = _hub_splits(one), _hub_splits(other)
    return name == again and ("all" in splits | others or bool(splits & others))


def seen_from(folder: Path, name: str) -> str:
    """The same rows, where the name of their file is relative to another folder.

    Example:
      >>> seen_from(Path("/project"), "mail.csv#test(test=0.2,validation=0,seed=7)")
      '/project/mail.csv#test(test=0.2,validation=0,seed=7)'
    """
    return of_file(folder / file_of(name), name)


def of_file(file: Path, name: str) -> str:
    """The same part as ``name``, of another file."""
    return f"{file}{name[len(_parts_of(name)[0]) :]}"


def located(name: str) -> str:
    """The same rows by the whole path of their file; a name on the Hub as it is."""
    return seen_from(Path.cwd(), name) if file_of(name).exists() else name


def file_of(name: str) -> Path:
    """The file or folder that a name's rows come from; where they come from the Hub there is none."""
    return Path(_parts_of(name)[0])


def _parts_of(name: str) -> tuple[str, list[Part]]:
    """The file that a name means in the end, and the parts that are taken of it, one after the other."""
    parts: list[Part] = []
    while (part := part_of(name)) is not None:
        name = part.source
        parts.insert(0, part)
    return name, parts


def _hub_splits(name: str) -> tuple[str, set[str]]:
    """The data set and the splits that ``NAME:SPLIT`` means; without a split it is ``train``, as it is read."""
    repository, _, splits = name.partition(":")
    return repository.strip("/").lower(), {split.partition("[")[0].strip() for split in (splits or "train").split("+")}
