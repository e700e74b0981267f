"""Rows that are named as public and are private too: what is computed from the public file would leak them."""

from __future__ import annotations

from collections.abc import Sequence
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
      digests: SHA-256 of each row's text, its label left out, where the text is long enough to tell.
    """

    source: str
    rows: int
    digests: list[str]


class SharedRowsError(DataError):
    """Private rows are in a public file. The message tells how many: for the operator's screen, not for a file."""


def public_rows(table: Table, columns: Columns, task: str) -> PublicRows:
    """The digests of a public file."""
    return PublicRows(table.source, len(table), _digests(table, columns, task))


def check_not_shared(
    private: Table, public: Sequence[PublicRows], columns: Columns, task: str, *, owner: str = "the private data"
) -> None:
    """Refuses public files that hold rows of the private one.

    Texts are compared as they stand, but for white space. Short ones (below 20 characters), such as "ok" or "thanks",
    are not: they are alike in many files and nobody's own.

    Raises:
      SharedRowsError: With the number of such rows, for the operator's screen. No row is shown.
    """
    own = set(_digests(private, columns, task)) if public else set()
    for file in public:
        count = sum(digest in own for digest in file.digests)
        if count:
            raise SharedRowsError(
                f"{count} of the {file.rows} rows of {file.source}, named as public, are in {owner} too; a row is one "
                "or the other: leave them out there, or name another public file."
            )


def _digests(table: Table, columns: Columns, task: str) -> list[str]:
    """Of a private table as sensitive as the table."""
    found = chosen_columns(table, columns_here(table, columns), task)
    parts = [table.column(name) for part, name in found.items() if name is not None and part != "label"]
    texts = (" ".join(" ".join(str(v) for v in row if v is not None).split()) for row in zip(*parts, strict=True))
    return [sha256(text.encode(errors="surrogatepass")).hexdigest() for text in texts if len(text) >= _TELLING]
