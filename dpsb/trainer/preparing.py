"""Tokenization that belongs to somebody else: what may be said while it runs, and what its errors may say."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from dpsb.data import DataError
from dpsb.reasons import STOPS, kind_and_place

_SPEAKERS = ("trl.trainer.sft_trainer", "trl.data_utils", "transformers.tokenization_utils_base")


class _NoText(logging.Filter):
    """Keeps back that a row is long, and lets TRL's warning through once, without the piece of a prompt it quotes."""

    _said = False

    def filter(self, record: logging.LogRecord) -> bool:
        if "sequence length is longer than" in str(record.msg):
            return False
        if "is not a prefix of" in str(record.msg):
            if self._said:
                return False
            self._said = True
            record.msg, record.args = (
                "The tokenized prompt of an example is not a prefix of prompt and completion; the completion starts "
                "where they part. (dpsb leaves out the text that TRL quotes here.)",
                (),
            )
        return True


@contextmanager
def warnings_without_text() -> Iterator[None]:
    """Keeps private text and lengths out of the warnings of TRL and of tokenizers inside the block."""
    silent = _NoText()
    loggers = [logging.getLogger(name) for name in _SPEAKERS]
    for speaker in loggers:
        speaker.addFilter(silent)
    try:
        yield
    finally:
        for speaker in loggers:
            speaker.removeFilter(silent)


@contextmanager
def data_withheld() -> Iterator[None]:
    """Lets no message of an error out that may quote a row of the data set.

    Raises:
      DataError: In the place of any error, with its kind and place.
    """
    try:
        yield
    except STOPS:
        raise
    except BaseException as error:
        if os.environ.get("DPSB_TRACEBACK"):
            raise
        raise DataError(
            f"The data set cannot be tokenized ({kind_and_place(error)}). "
            "The message is withheld, because it may quote data; DPSB_TRACEBACK=1 shows it. Nothing was charged."
        ) from None
