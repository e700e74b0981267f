"""What may be said of an error: one sentence that cannot quote private text."""

from __future__ import annotations

import traceback
from pathlib import Path

STOPS = (KeyboardInterrupt, SystemExit, GeneratorExit)
"""What ends a program on purpose. Whatever else is raised may quote data, even if it is no ``Exception``: a panic of a
tokenizer written in Rust is none."""


def foreseen(error: BaseException) -> bool:
    """Whether an error is of a kind whose messages this package writes, or that quote no data."""
    from dpsb_accounting import CalibrationInfeasible, LedgerError
    from dpsb_accounting.engines import ResourceLimit

    kinds = (ValueError, RuntimeError, OSError, MemoryError, LedgerError, CalibrationInfeasible, ResourceLimit)
    return isinstance(error, kinds)


def reason(error: BaseException) -> str:
    """One sentence on an error.

    Of an error that nobody foresaw only the kind and the place are told: its message may quote a row.
    """
    if foreseen(error):
        return " ".join(str(error).split()) or type(error).__name__
    return (
        f"unexpected {kind_and_place(error)}. Its message is withheld, because it may quote data; "
        "DPSB_TRACEBACK=1 shows it."
    )


def kind_and_place(error: BaseException) -> str:
    """All that may be told of an error whose message may quote data: its type, and the line where it was raised."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return "".join([type(error).__name__, *(f" at {Path(frame.filename).name}:{frame.lineno}" for frame in last)])
