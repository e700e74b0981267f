"""Rows, one a cell, and their summary; both as files. No times: how long a private step takes is private."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dpsb.curves.cells import Cell
from dpsb.curves.entries import Entry, labels_of
from dpsb.curves.folder import CELLS, lost_steps
from dpsb_accounting.files import write_whole

METRICS = {
    "classification": ("accuracy", "cross_entropy", "examples"),
    "causal-lm": ("perplexity", "loss_per_token", "tokens"),
}
"""What is measured on held-out data, by task; the curve shows the first."""
_RISING = ("accuracy",)
FAILED = "failed; why is on the screen of whoever runs the sweep, as it may depend on private rows"
"""What tables and page say of a failure. A failed cell is tried again when the sweep is, and says it again."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A cell and what came out of it. ``None`` where a cell failed."""

    method: str
    basis: str | None
    epsilon: float
    epsilon_lower: float | None
    epsilon_upper: float | None
    delta: float | None
    purpose: str
    repeat: int
    learning_rate: float
    noise_multiplier: float | None
    evaluated_on: str
    metrics: Mapping[str, float | None]
    lost_steps: int
    failure: str | None
    folder: str

    def flat(self, names: Sequence[str]) -> dict[str, Any]:
        """One value a column, the metrics among them; not why it failed, since tables are made to be shown."""
        found = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "metrics"}
        found["failure"] = None if self.failure is None else FAILED
        return {**found, **{name: self.metrics.get(name) for name in names}}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One (method, epsilon) of the curve, over its repeats.

    Args:
      method: As a user writes it.
      label: As a reader sees it.
      epsilon: Target.
      lower: The smallest lower bound on the repeats' epsilon.
      upper: The largest upper bound, at the largest delta; what each single run may claim.
      learning_rate: Of all repeats; None if no cell was run.
      n: Repeats with a metric.
      mean: Of the metric; None without repeats.
      sd: Sample standard deviation; None with fewer than two repeats.
      tuning_runs: Runs made to choose the learning rate here.
      failed: Cells that failed, tuning runs among them.
    """

    method: str
    label: str
    epsilon: float
    delta: float | None
    lower: float | None
    upper: float | None
    learning_rate: float | None
    n: int
    mean: float | None
    sd: float | None
    tuning_runs: int
    failed: int

    @property
    def unbounded(self) -> bool:
        """Whether nothing bounds its epsilon although a finite one was asked for: a reference, never compared."""
        return math.isfinite(self.epsilon) and self.upper is not None and math.isinf(self.upper)


def is_better(metric: str, one: float, other: float) -> bool:
    """Whether one value of a metric is better than another."""
    return one > other if metric in _RISING else one < other


def read_row(out: Path, cell: Cell, task: str, failure: str | None = None) -> Row:
    """What a finished cell's report says of it, or why it failed."""
    folder = out / CELLS / cell.name
    report: dict[str, Any] = {} if failure is not None else json.loads((folder / "report.json").read_text())
    ends = report.get("epsilon", {})
    held_out = report.get("held_out", {}).get("metrics", {})
    return Row(
        method=cell.entry.method,
        basis=cell.entry.basis,
        epsilon=cell.epsilon,
        epsilon_lower=_number(ends.get("lower")),
        epsilon_upper=_number(ends.get("upper")),
        delta=report.get("delta"),
        purpose="tuning" if cell.tuning else "curve",
        repeat=cell.repeat,
        learning_rate=cell.learning_rate,
        noise_multiplier=report.get("mechanism", {}).get("noise_multiplier"),
        evaluated_on="validation" if cell.tuning else "test",
        metrics={name: _number(held_out.get(name)) for name in METRICS[task]},
        lost_steps=lost_steps(folder),
        failure=failure,
        folder=f"{CELLS}/{cell.name}",
    )


def points_of(pairs: Sequence[tuple[Entry, float]], rows: Sequence[Row], metric: str) -> list[Point]:
    """The summary: a point for each (method, epsilon), in the order given."""
    found, labels = [], labels_of(list(dict.fromkeys(entry for entry, _ in pairs)))
    for entry, epsilon in pairs:
        here = [r for r in rows if (r.method, r.basis, r.epsilon) == (entry.method, entry.basis, epsilon)]
        curve = [r for r in here if r.purpose == "curve" and r.failure is None]
        values = [v for r in curve if (v := r.metrics.get(metric)) is not None and math.isfinite(v)]
        lower = [r.epsilon_lower for r in curve if r.epsilon_lower is not None]
        upper = [r.epsilon_upper for r in curve if r.epsilon_upper is not None]
        found.append(
            Point(
                method=entry.text,
                label=labels[entry.text],
                epsilon=epsilon,
                delta=max((r.delta for r in curve if r.delta is not None), default=None),
                lower=min(lower, default=None),
                upper=max(upper, default=None),
                learning_rate=next((r.learning_rate for r in curve), None),
                n=len(values),
                mean=statistics.fmean(values) if values else None,
                sd=statistics.stdev(values) if len(values) > 1 else None,
                tuning_runs=sum(r.purpose == "tuning" for r in here),
                failed=sum(r.failure is not None for r in here),
            )
        )
    return found


def write_tables(out: Path, rows: Sequence[Row], points: Sequence[Point], task: str) -> None:
    """Writes ``curve.csv`` and ``curve.parquet`` (a row a cell) and ``summary.csv`` (a row a point)."""
    import pyarrow
    import pyarrow.parquet

    names = METRICS[task]
    flat = [row.flat(names) for row in rows]
    columns = [entry.name for entry in fields(Row) if entry.name != "metrics"]
    columns[columns.index("lost_steps") : columns.index("lost_steps")] = names
    write_whole(out / "curve.csv", _csv(columns, flat))
    kinds = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
    texts = ("method", "basis", "purpose", "evaluated_on", "failure", "folder")
    schema = pyarrow.schema(
        [
            (name, kinds[str if name in texts else int if name in ("repeat", "lost_steps") else float])
            for name in columns
        ]
    )
    buffer = io.BytesIO()
    arrays = {name: [row[name] for row in flat] for name in columns}
    pyarrow.parquet.write_table(pyarrow.table(arrays, schema=schema), buffer)
    write_whole(out / "curve.parquet", buffer.getvalue())
    summary = [{**vars(point), "metric": names[0]} for point in points]
    order = ["method", "label", "epsilon", "delta", "lower", "upper", "metric", "mean", "sd", "n", "learning_rate"]
    write_whole(out / "summary.csv", _csv([*order, "tuning_runs", "failed"], summary))


def _csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _number(value: Any) -> float | None:
    """A number as a report holds it; infinity is a text there."""
    return None if value is None else float(value)
