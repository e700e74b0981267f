"""Errors while private data are in use: only their kind and place get out, never their message."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dpsb.capture import CaptureError
from dpsb.reasons import STOPS, kind_and_place


class StepError(RuntimeError):
    """Something went wrong while private data were in use. Only its kind and place are told, never its message."""


class StepMemoryError(MemoryError):
    """Memory ran out while private data were in use. The message is ours: NumPy's tells the shape of an array."""


@contextmanager
def messages_withheld(what: str, so: str = "It is charged.") -> Iterator[None]:
    """Lets no message of an error out that may quote an example, a label or the size of the draw.

    With DPSB_TRACEBACK in the environment it goes to standard error, and nowhere else: a sweep writes down why a run
    failed.
    """
    try:
        yield
    except (CaptureError, StepMemoryError, *STOPS):
        raise
    except MemoryError:
        raise StepMemoryError(
            f"{what} ran out of memory. {so} Lower token_budget or max_length, or resume on a machine with more memory."
        ) from None
    except BaseException as error:  # noqa: BLE001 - another one is raised
        if os.environ.get("DPSB_TRACEBACK"):
            traceback.print_exc()
        raise StepError(
            f"{what} failed ({kind_and_place(error)}). {so} The message is withheld, because it may quote "
            "data; DPSB_TRACEBACK=1 shows it. The data set, collate or loss_fn breaks its contract for some example."
        ) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the processor or on a device."""
    marks = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(mark in str(error) for mark in marks)
