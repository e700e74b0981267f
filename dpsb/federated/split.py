"""One file as several silos: which rows are whose, decided for each row by itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

from dpsb.data import Table
from dpsb.parts import owner_of


def split_table(table: Table, silos: Sequence[str], column: str | None, seed: int) -> dict[str, Table]:
    """The rows of a table by silo, for simulations.

    A public hash of the seed and of the row's value in ``column`` (of the whole row, without one or where the value is
    missing) decides: a row more or less moves nobody else, and rows with the same value stay together.

    Args:
      table: Sensitive.
      silos: Names.
      column: Such as a sender's domain.
      seed: Public.

    Raises:
      DataError: If there is no such column; the message lists those there are.
    """
    if column is not None:
        table.column(column)
    rows: dict[str, list[int]] = {silo: [] for silo in silos}
    for number in range(len(table)):
        row = {name: values[number] for name, values in table.columns.items()}
        owner = owner_of(row[column]) if column is not None else ""
        key = owner or json.dumps(sorted(row.items()), default=str)
        place = int.from_bytes(sha256(f"{seed}\n{key}".encode()).digest()[:8], "big") % len(silos)
        rows[silos[place]].append(number)
    return {silo: _take(table, silo, chosen) for silo, chosen in rows.items()}


def _take(table: Table, silo: str, rows: Sequence[int]) -> Table:
    columns: dict[str, list[Any]] = {name: [values[i] for i in rows] for name, values in table.columns.items()}
    return replace(table, source=f"{table.source} ({silo})", columns=columns)
