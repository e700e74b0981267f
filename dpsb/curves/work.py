"""One cell: run it, or go on with it, and say in one sentence why it failed if it does."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpsb.curves.cells import Cell
from dpsb.curves.folder import CELLS, FolderError, is_finished, note_begun, prepare_cell
from dpsb_accounting import Ledger, LedgerError
from dpsb_accounting.ledger import LEDGER_NAME, in_use

if TYPE_CHECKING:
    from dpsb.frozen_prefix import FrozenOutputs

_SECONDS_FOR_A_WRITER_TO_DIE = 20.0

OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """A cell to run.

    Args:
      cell: Which one.
      config: Settings of its run.
      out: Folder of the sweep.
    """

    cell: Cell
    config: Any
    out: Path


def run_job(
    job: Job, on_step: OnStep = lambda _step, _of: None, frozen_outputs: FrozenOutputs | None = None
) -> str | None:
    """Runs a cell to its end. Returns None, or in one sentence why it failed: for a screen, not for a file.

    A failed cell is tried again when the sweep is started again; what it charged stays charged.

    Args:
      job: The cell.
      on_step: Called with its steps done and their number.
      frozen_outputs: What the cells of a process share of a model's frozen blocks, where the run remembers them.
    """
    from dpsb.reasons import STOPS, reason

    try:
        _run(job, on_step, frozen_outputs)
    except STOPS:
        raise
    except BaseException as error:  # noqa: BLE001 - the other cells go on
        return reason(error)
    finally:
        gc.collect()
    return None


def _run(job: Job, on_step: OnStep, frozen_outputs: FrozenOutputs | None) -> None:
    from dpsb.run import Callbacks, fine_tune

    folder = job.out / CELLS / job.cell.name
    _wait_for_writer(folder)
    resume = prepare_cell(job.out, job.cell)
    if is_finished(folder):
        raise FolderError(f"{folder} holds a report without a ledger; move it away.")
    callbacks = Callbacks(
        on_ledger=lambda: note_begun(job.out, job.cell),
        on_step=lambda progress: on_step(progress.step, progress.steps),
    )
    fine_tune(job.config, resume=resume, callbacks=callbacks, frozen_outputs=frozen_outputs)


def _wait_for_writer(folder: Path) -> None:
    """A process of a sweep that was killed ends soon, but perhaps not yet."""
    last = time.monotonic() + _SECONDS_FOR_A_WRITER_TO_DIE
    while in_use(folder / LEDGER_NAME):
        if time.monotonic() > last:
            raise LedgerError(f"{folder / LEDGER_NAME} is in use by another run; only one may write it.")
        time.sleep(0.1)


def is_complete(out: Path, cell: Cell) -> bool:
    """Whether a cell is finished and has the ledger that its report is about.

    Raises:
      FolderError: If the two do not belong together.
    """
    folder = out / CELLS / cell.name
    if not is_finished(folder) or not (folder / LEDGER_NAME).exists():
        return False
    try:
        Ledger.read(folder / LEDGER_NAME)
    except LedgerError as error:
        raise FolderError(f"{error}; a curve cannot be made of a cell whose ledger is damaged.") from None
    return True
