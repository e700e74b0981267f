"""Whether anything of the data is left in the files and messages of a run: a planted string is searched for."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dpsb.selftest.result import Check, at_most

PLANTED = "zyxomma-48151"
_WORDS = ("meeting", "order", "today", "price", "thanks", "report", "free", "please")


def check_no_trace(train: Callable[[Path, Path], object], labels: tuple[str, ...]) -> Iterator[Check]:
    """Trains on synthetic rows two of which hold a planted string, and looks for it in all that the run leaves.

    Args:
      train: ``(data_file, out)``: a run on a JSON-lines file with ``text`` (and ``label``) into a folder.
      labels: Of a classifier; empty for language models.
    """
    with tempfile.TemporaryDirectory(prefix="dpsb-selftest-") as scratch:
        data, out, log = Path(scratch) / "rows.jsonl", Path(scratch) / "run", Path(scratch) / "output"
        data.write_text("".join(json.dumps(row) + "\n" for row in _rows(labels)))
        with _output_into(log):
            train(data, out)
        needles = [PLANTED, PLANTED.split("-")[0]]
        texts = [path.read_bytes() for path in (*out.rglob("*"), log) if path.is_file()]
        found = sum(needle.encode() in text for needle in needles for text in texts)
        detail = f"a string planted in the data is in none of {len(texts) - 1} files and no message of a run"
        yield at_most("no_trace", found, 0, detail)


def _rows(labels: tuple[str, ...]) -> list[Mapping[str, str]]:
    rows: list[Mapping[str, str]] = []
    for i in range(24):
        text = " ".join(_WORDS[(i * k) % len(_WORDS)] for k in range(1, 2 + i % 5))
        row = {"text": f"{text} {PLANTED}" if i in (3, 11) else text}
        rows.append({**row, "label": labels[i % len(labels)]} if labels else row)
    return rows


@contextmanager
def _output_into(path: Path) -> Iterator[None]:
    """Sends what this process prints, from any language, into a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    with path.open("wb") as file:
        try:
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, old in zip((1, 2), kept, strict=True):
                os.dup2(old, descriptor)
                os.close(old)
