"""Strict JSON: read a file that somebody else wrote, and refuse what two readers could read in two ways."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

MOST_BYTES = 1 << 26
_MOST_DIGITS = 1000


class StrictError(ValueError):
    """A file cannot be read, or is not strict JSON; the message names the file and says why."""


def load(path: str | os.PathLike[str]) -> object:
    """Returns the JSON value that a file holds.

    Guarantees: no key occurs twice in an object, every number is finite, and no more than 64 MiB are read.

    Raises:
        StrictError: One sentence; it never quotes the file's content but for a key that occurs twice.
    """
    path = Path(path)
    if path.is_dir():
        raise StrictError(f"{path} is a directory, not a JSON file")
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise StrictError(f"cannot read {path}: {error.strerror}") from None
    if len(content) > MOST_BYTES:
        raise StrictError(f"{path} is larger than {MOST_BYTES >> 20} MiB, too large for what it should be")
    try:
        return loads(content)
    except (ValueError, RecursionError) as error:
        raise StrictError(f"{path} is not valid JSON: {error}") from None


def loads(content: bytes, *, infinite: bool = False) -> object:
    """Returns the JSON value of a text; ValueError or RecursionError if it is not strict JSON.

    Args:
        content: The text, in UTF-8.
        infinite: Whether Infinity, and what is too large for a float, may stand for a number.

    Example:
        >>> loads(b'{"a": 1, "a": 2}')
        Traceback (most recent call last):
        ValueError: the key 'a' occurs twice in one object
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("it is not text in UTF-8") from None
    return json.loads(
        text,
        object_pairs_hook=_once,
        parse_constant=_maybe_infinite if infinite else _finite,
        parse_float=float if infinite else _finite,
        parse_int=_whole,
    )


def mapping(value: object) -> Mapping[str, object]:
    """Returns the value if it is a JSON object, an empty one otherwise."""
    return value if isinstance(value, Mapping) else {}


def items(value: object) -> list[object]:
    """Returns the value if it is a JSON array, an empty one otherwise."""
    return value if isinstance(value, list) else []


def short(value: object) -> str:
    """Returns the JSON text of a value, cut where it gets long."""
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:197] + "..."


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for name, value in pairs:
        if name in result:  # one reader would take the first value, another the last
            raise ValueError(f"the key {name!r} occurs twice in one object")
        result[name] = value
    return result


def _whole(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"{text[:20]}... has {len(text)} digits, too many for a number that means anything")
    return int(text)


def _maybe_infinite(text: str) -> float:
    return math.inf if text == "Infinity" else _finite(text)


def _finite(text: str) -> float:
    """Refuses NaN and Infinity, which are not JSON, and numbers too large for a float."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value
