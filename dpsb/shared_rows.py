"""Rows that are named as public and are private too: what is computed from the public file would leak them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from typing import Any, NamedTuple

from dpsb.basis.sources import columns_here, columns_read
from dpsb.data import Columns, DataError, Table

_TELLING = 20
"""Characters that a text must have to tell that two rows are the same row."""

_TEMPLATE = 20
"""Different public rows that must say something in a column for it to be an instruction, say, and nobody's own text."""

_MOST_DIGESTS = 3
"""Of a row: its whole text, and each of two columns."""


class PublicRows(NamedTuple):
    """What a party that does not have a public file needs to know of it. Public.

    Args:
      source: The file.
      rows: How many it holds.
      digests: For each row, SHA-256 of its text, its label left out, and then of each column of the text by itself; an
        empty string where that is too short to tell.
    """

    source: str
    rows: int
    digests: list[list[str]]


class SharedRowsError(DataError):
    """Private rows are in a public file. The message tells how many: for the operator's screen, not for a file."""


def public_rows(table: Table, columns: Columns, task: str) -> PublicRows:
    """The digests of a public file."""
    return PublicRows(table.source, len(table), [_digests(cells) for cells in _texts(table, columns, task)])


def stated_rows(stated: Any) -> PublicRows:
    """What a party that has the file says of it.

    Raises:
      ValueError: If it is not of the shape of :class:`PublicRows`: a row is told by few digests, so that their number
        says how many texts are asked for.
    """
    if not isinstance(stated, dict) or set(stated) != set(PublicRows._fields):
        raise ValueError(f"expected {', '.join(PublicRows._fields)}")
    rows = PublicRows(**stated)
    if not isinstance(rows.source, str):
        raise ValueError(f"its source is {rows.source!r}")
    if not isinstance(rows.digests, list) or len(rows.digests) != rows.rows:
        raise ValueError(f"it states {rows.rows!r} rows and has digests of another number")
    for index, row in enumerate(rows.digests):
        if not isinstance(row, list) or not 1 <= len(row) <= _MOST_DIGESTS or not all(isinstance(d, str) for d in row):
            raise ValueError(f"row {index} is not a list of 1 to {_MOST_DIGESTS} digests")
    return rows


def check_not_shared(
    private: Table, public: Sequence[PublicRows], columns: Columns, task: str, *, owner: str = "the private data"
) -> None:
    """Refuses public files that hold rows of the private one.

    Texts are compared as they stand, but for white space: the whole text of a row on either side with that of a row on
    the other and with each of its columns, as either file may have a column more. Short ones (below 20 characters),
    such as "ok" or "thanks", are not: they are alike in many files and nobody's own. Nor is a text that 20 or more
    different public rows have in a column, such as an instruction, where a row has no more to it: where a private row
    with an empty column says it, or a public row as a whole.

    Raises:
      SharedRowsError: With the number of such rows, for the operator's screen. No row is shown.
    """
    texts = _texts(private, columns, task) if public else []
    rows = [(all(cells), _digests(cells)) for cells in texts]
    complete = {row[0] for is_complete, row in rows if is_complete} - {""}
    partial = {row[0] for is_complete, row in rows if not is_complete} - {""}
    anywhere = {digest for _, row in rows for digest in row} - {""}
    for file in public:
        template = _templates(file)
        whole, own = complete | (partial - template), anywhere - template
        found = [whole.intersection(row) | own.intersection(row[:1]) for row in file.digests]
        count = sum(map(bool, found))
        if count:
            raise SharedRowsError(
                f"{count} of the {file.rows} rows of {file.source}, named as public, are in {owner} too, as a whole or "
                f"in a column (distinct texts: {len(set().union(*found))}); a row is one or the other: leave them out "
                f"of {owner}, or name another public file."
            )


def _templates(file: PublicRows) -> set[str]:
    """The digests that stand in a column of many different rows."""
    different = {row[0]: set(row[1:]) for row in file.digests}
    count = Counter(digest for cells in different.values() for digest in cells)
    return {digest for digest, rows in count.items() if rows >= _TEMPLATE}


def _texts(table: Table, columns: Columns, task: str) -> list[list[str]]:
    """What stands in each row's columns of text, white space made one blank. Sensitive."""
    parts = [table.column(name) for name in columns_read(table, columns_here(table, columns), task)]
    return [["" if v is None else " ".join(str(v).split()) for v in row] for row in zip(*parts, strict=True)]


def _digests(cells: Sequence[str]) -> list[str]:
    """Of a row's whole text and of each of its columns; empty where one is too short to tell. As sensitive as they."""
    texts = [" ".join(filter(None, cells)), *cells]
    return [sha256(t.encode(errors="replace")).hexdigest() if len(t) >= _TELLING else "" for t in texts]
