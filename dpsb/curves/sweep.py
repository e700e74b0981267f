"""The sweep: tuning runs, the choice of learning rates, then the curve; whatever is finished already is kept."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dpsb.curves.cells import Cell, curve_cells, pairs, tuning_cells
from dpsb.curves.composed import Composed, composed
from dpsb.curves.fits import check_data, check_methods, check_public_files
from dpsb.curves.folder import CELLS, is_finished, sweep_folder
from dpsb.curves.pool import run_jobs
from dpsb.curves.settings import CurveSettings
from dpsb.curves.table import METRICS, Point, Row, is_better, points_of, read_row, write_tables
from dpsb.curves.work import Job, is_complete


class Watch(Protocol):
    """What the operator is told; none of it is written anywhere."""

    def begin(self, total: int, kept: int) -> None: ...

    def step(self, job: Job, step: int, steps: int) -> None: ...

    def end(self, row: Row) -> None: ...


@dataclass(frozen=True)
class Curve:
    """A sweep that is through.

    Args:
      settings: What was asked.
      rows: A row for each cell.
      points: A point for each (method, epsilon).
      price: The composed epsilon of all of it.
      chosen: Learning rates that the tuning runs chose, by (method, epsilon).
    """

    settings: CurveSettings
    rows: tuple[Row, ...]
    points: tuple[Point, ...]
    price: Composed
    chosen: Mapping[tuple[str, float], float]

    @property
    def metric(self) -> str:
        """What the curve shows."""
        return METRICS[self.settings.task][0]

    @property
    def failures(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.failure is not None)


def run_sweep(settings: CurveSettings, out: Path, watch: Watch, *, processes: int = 1) -> Curve:
    """Runs what is missing of a sweep in ``out`` and writes its tables.

    Finished cells stay as they are, to the byte. A cell that was cut off is resumed: charged steps are spent. One that
    cannot be resumed is moved aside and started anew; its ledger still counts. A cell that fails is recorded, and the
    others go on.

    Args:
      settings: What to run, checked.
      out: Folder of the sweep.
      watch: Where progress goes.
      processes: Cells at a time.

    Raises:
      CurveError: If a method cannot be run on the model; nothing has been written.
      DataError: If the data cannot be read, lack a column, or nobody declared their labels; nothing has been written.
      SharedRowsError: If private rows are in a file that a method takes for public; nothing has been written.
      FolderError: If the folder is in use or holds another sweep.
    """
    if processes < 1:
        raise ValueError(f"Expected processes={processes!r} of at least 1.")
    check_methods(settings)
    check_data(settings)
    check_public_files(settings)
    with sweep_folder(out, settings.to_json()):
        tuning = tuning_cells(settings)
        total = len(tuning) + settings.repeats * len(pairs(settings))
        watch.begin(total, sum(is_finished(folder) for folder in (out / CELLS).iterdir()))
        rows = _run(settings, tuning, out, watch, processes)
        chosen = choose(settings, rows)
        rows += _run(settings, curve_cells(settings, chosen), out, watch, processes)
        rows += _never_run(settings, chosen)
        points = points_of(pairs(settings), rows, METRICS[settings.task][0])
        write_tables(out, rows, points, settings.task)
        return Curve(settings, tuple(rows), tuple(points), composed(out), chosen)


def _run(settings: CurveSettings, cells: Sequence[Cell], out: Path, watch: Watch, processes: int) -> list[Row]:
    rows: dict[str, Row] = {}
    jobs = []
    for cell in cells:
        if is_complete(out, cell):
            rows[cell.name] = read_row(out, cell, settings.task)
        else:
            folder = out / CELLS / cell.name
            config = settings.run(cell.entry, cell.epsilon, cell.learning_rate, folder, tuning=cell.tuning)
            jobs.append(Job(cell, config, out))
    for job, failure in run_jobs(jobs, processes, watch.step):
        row = read_row(out, job.cell, settings.task, failure)
        rows[job.cell.name] = row
        watch.end(row)
    return [rows[cell.name] for cell in cells]


def choose(settings: CurveSettings, rows: Sequence[Row]) -> dict[tuple[str, float], float]:
    """The best learning rate of each (method, epsilon) by the mean over its tuning runs; the first one of equals.

    A pair whose tuning runs all failed, or came to no finite number, is left out.
    """
    metric = METRICS[settings.task][0]
    chosen: dict[tuple[str, float], float] = {}
    for entry, epsilon in pairs(settings):
        rates = settings.rates[entry.text]
        if len(rates) == 1:
            chosen[entry.text, epsilon] = rates[0]
            continue
        best: float | None = None
        for rate in rates:
            key = (entry.method, entry.basis, epsilon, rate)
            values = [
                value
                for row in rows
                if (row.method, row.basis, row.epsilon, row.learning_rate) == key
                and (value := row.metrics[metric]) is not None
                and math.isfinite(value)
            ]
            if values and (best is None or is_better(metric, statistics.fmean(values), best)):
                best = statistics.fmean(values)
                chosen[entry.text, epsilon] = rate
    return chosen


def _never_run(settings: CurveSettings, chosen: Mapping[tuple[str, float], float]) -> list[Row]:
    """Rows of cells without a learning rate to run them with."""
    missing = [(entry, epsilon) for entry, epsilon in pairs(settings) if (entry.text, epsilon) not in chosen]
    return [
        read_row(
            Path(),
            Cell(entry, epsilon, settings.rates[entry.text][0], repeat, False),
            settings.task,
            f"every run that was to choose its learning rate failed or has no finite {METRICS[settings.task][0]}.",
        )
        for repeat in range(1, settings.repeats + 1)
        for entry, epsilon in missing
    ]
