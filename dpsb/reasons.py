"""What may be said of an error: one sentence that cannot quote private text."""

from __future__ import annotations

from pathlib import Path


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
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = "" if place is None else f" at {Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}"
    return (
        f"unexpected {type(error).__name__}{where}. Its message is withheld, because it may quote data; "
        "DPSB_TRACEBACK=1 shows it."
    )
