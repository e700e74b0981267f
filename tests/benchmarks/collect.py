"""Appends the rows of finished sweeps to a file of results, which `published.py` makes tables of.

    python tests/benchmarks/collect.py tests/benchmarks/results/three_sets.csv --set qnli5k DIR [DIR ...]

A DIR is the folder of one `dpsb curve`, or one that holds such folders, as `utility.py` leaves them. Rows that the file
has already are left out, and repeats are numbered on. Runs that failed, or lost updates because they were cut off, are
named and left out. Arms have `utility.py`'s names, with the ending -warm where training on public rows came first.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from utility import TRAINED, arm_of

from dpsb_accounting.files import write_whole

SAME = ("set", "arm", "purpose", "epsilon", "learning_rate", "accuracy", "cross_entropy")
"""Columns by which two rows are of one run."""


def rows_of(folders: Sequence[Path], name: str, tuning: bool) -> Iterator[dict[str, Any]]:
    """The rows of all sweeps in some folders, by arm; of a sweep that was judged on validation rows with ``tuning``."""
    for folder in folders:
        found = (
            [folder]
            if (folder / "curve.parquet").exists()
            else sorted(p.parent for p in folder.glob("*/curve.parquet"))
        )
        for sweep in found:
            settings = json.loads((sweep / "curve.json").read_text())["settings"]
            for row in pq.read_table(sweep / "curve.parquet").to_pylist():
                if row["failure"] or row["lost_steps"]:
                    print("left out:", sweep / row["folder"], row["failure"] or f"lost {row['lost_steps']} updates")
                    continue
                arm = arm_of(row)
                warm = "-warm" if settings.get("warm_start_epochs") and arm != TRAINED else ""
                judged = {"purpose": "tuning", "evaluated_on": "validation"} if tuning else {}
                yield {**row, **judged, "set": name, "arm": f"{arm}{warm}"}


def numbered(known: Sequence[dict[str, str]], rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that are not known, each with the number that its repeat has."""
    texts = {tuple(row[name] for name in SAME) for row in known}
    count = Counter(
        (row["set"], row["arm"], row["purpose"], float(row["epsilon"]), float(row["learning_rate"])) for row in known
    )
    new = []
    for row in rows:
        if tuple(str(row[name]) for name in SAME) not in texts:
            key = (row["set"], row["arm"], row["purpose"], row["epsilon"], row["learning_rate"])
            count[key] += 1
            new.append({**row, "repeat": count[key]})
    return new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--set", required=True, help="name of the data set, as in the file")
    parser.add_argument("--tuning", action="store_true", help="the runs were judged on validation rows")
    options = parser.parse_args()
    content = options.results.read_bytes().decode()
    reader = csv.DictReader(content.splitlines())
    new = numbered(list(reader), rows_of(options.folders, options.set, options.tuning))
    end = "\r\n" if "\r\n" in content else "\n"
    lines = [
        ",".join("" if row.get(name) is None else str(row[name]) for name in reader.fieldnames or ()) for row in new
    ]
    if new:
        write_whole(options.results, end.join([content.rstrip(), *lines, ""]).encode())
    print("\n".join([*lines, f"{len(new)} rows"]))


if __name__ == "__main__":
    main()
