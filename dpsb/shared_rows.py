"""Rows that are named as public and are private too: what is computed from the public file would leak them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import NamedTuple

from dpsb.basis.sources import columns_here
from dpsb.data import Columns, DataError, Table, chosen_columns

_TELLING = 20
"""Characters that a text must have to tell that two rows are the same row."""


class PublicRows(NamedTuple):
    """What a party that does not have a public file needs to know of it. Public.

    Args:
      source: The file.
      rows: How many it holds.
      digests: For each row, SHA-256 of its text, its label left out, and of each column of the text by itself; of those
        that are long enough to tell.
    """

    source: str
    rows: int
    digests: list[list[str]]


class SharedRowsError(DataError):
    """Private rows are in a public file. The message tells how many: for the operator's screen, not for a file."""


def public_rows(table: Table, columns: Columns, task: str) -> PublicRows:
    """The digests of a public file."""
    rows = ({" ".join(texts), *texts} for texts in _texts(table, columns, task))
    return PublicRows(table.source, len(table), [sorted(map(_digest, filter(_tells, row))) for row in rows])


def check_not_shared(
    private: Table, public: Sequence[PublicRows], columns: Columns, task: str, *, owner: str = "the private data"
) -> None:
    """Refuses public files that hold rows of the private one.

    Texts are compared as they stand, but for white space: the whole text of a private row with that of a public one and
    with each of its columns, as a public file may have more of them than the private one. Short ones (below 20
    characters), such as "ok" or "thanks", are not: they are alike in many files and nobody's own.

    Raises:
      SharedRowsError: With the number of such rows, for the operator's screen. No row is shown.
    """
    whole = map(" ".join, _texts(private, columns, task)) if public else ()
    own = set(map(_digest, filter(_tells, whole)))
    for file in public:
        count = sum(not own.isdisjoint(row) for row in file.digests)
        if count:
            raise SharedRowsError(
                f"{count} of the {file.rows} rows of {file.source}, named as public, are in {owner} too; a row is one "
                "or the other: leave them out there, or name another public file."
            )


def _texts(table: Table, columns: Columns, task: str) -> Iterator[list[str]]:
    """What stands in each row's columns of text, white space made one blank, empty ones left out."""
    found = chosen_columns(table, columns_here(table, columns), task)
    parts = [table.column(name) for part, name in found.items() if name is not None and part != "label"]
    for row in zip(*parts, strict=True):
        cells = (" ".join(str(value).split()) for value in row if value is not None)
        yield [cell for cell in cells if cell]


def _tells(text: str) -> bool:
    return len(text) >= _TELLING


def _digest(text: str) -> str:
    """Of a private text as sensitive as the text."""
    return sha256(text.encode(errors="surrogatepass")).hexdigest()
