"""What the operator sees of a sweep: cells done, time left. Screen only; nothing here is written."""

from __future__ import annotations

import math
import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dpsb.curves.table import METRICS, Row
from dpsb.curves.work import Job

_SECONDS_BETWEEN_LINES = 60
"""Where there is no terminal for a bar, so that a log shows that the sweep lives."""


class Watcher:
    """A bar over all cells, moved by every step of every cell; a line for each cell that ends."""

    def __init__(self, console: Console, task: str) -> None:
        self._console = console
        self._metric = METRICS[task][0]
        self._progress = Progress(
            TextColumn("[bold]curve"),
            BarColumn(),
            TextColumn("{task.fields[cells]} cells  {task.fields[running]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=console.quiet or not console.is_terminal,
        )
        self._bar = self._progress.add_task("curve", total=1.0, cells="", running="", left="")
        self._total = self._kept = self._ended = 0
        self._parts: dict[str, float] = {}
        self._began = self._last_line = time.monotonic()

    def __enter__(self) -> Watcher:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, total: int, kept: int) -> None:
        """Called once: how many cells there are, and how many were finished before."""
        self._total, self._kept = total, min(kept, total)
        self._began = self._last_line = time.monotonic()
        self._console.print(f"{total} runs, each of which adds to the epsilon of all", highlight=False)
        if kept:
            self._console.print(f"{kept} of {total} cells are finished already and stay as they are", highlight=False)
        self._show()

    def step(self, job: Job, step: int, steps: int) -> None:
        """Called after each step of a cell."""
        self._parts[job.cell.name] = step / steps
        self._show()
        if not self._console.is_terminal and time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._console.print(f"{job.cell.name}: step {step}/{steps}  {self._left()}", highlight=False, markup=False)

    def end(self, row: Row) -> None:
        """Called with each cell that ended."""
        self._ended += 1
        self._parts.pop(row.folder.rpartition("/")[2], None)
        self._show()
        name = f"{row.method}{':' + row.basis if row.basis else ''}"
        what = f"{name}, epsilon {row.epsilon:g}, learning rate {row.learning_rate:g}, {row.purpose} run {row.repeat}"
        value = row.metrics.get(self._metric)
        result = f"{self._metric} {value:.4g}" if value is not None else "no metric"
        result = f"[red]failed:[/red] {escape(row.failure)}" if row.failure is not None else result
        place = f"{self._kept + self._ended}/{self._total}"
        self._console.print(f"[dim]{place}[/dim] {escape(what)}: {result}  [dim]{self._left()}[/dim]", highlight=False)

    def _show(self) -> None:
        done = self._kept + self._ended
        running = f"({len(self._parts)} running)" if self._parts else ""
        self._progress.update(
            self._bar,
            total=float(max(1, self._total)),
            completed=done + sum(self._parts.values()),
            cells=f"{done}/{self._total}",
            running=running,
            left=self._left(),
        )

    def _left(self) -> str:
        """Time left, from what was done since the start of this command."""
        made = self._ended + sum(self._parts.values())
        missing = self._total - self._kept - made
        if missing <= 0 or made <= 0:
            return ""
        seconds = (time.monotonic() - self._began) / made * missing
        minutes = math.ceil(seconds / 60)
        return f"about {minutes} min left" if minutes < 90 else f"about {minutes / 60:.1f} h left"
