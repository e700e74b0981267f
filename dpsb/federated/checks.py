"""Checks of settings and messages by name, and the error that they raise."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

_MOST = 1_000_000_000


class FederatedError(ValueError):
    """Settings of a federation that are unknown, missing or out of range; the message names them."""


def checked_fields(kind: type[Any], content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The content, if all its keys are fields of the dataclass ``kind`` and none without a default is missing."""
    known = {each.name: each.default is MISSING and each.default_factory is MISSING for each in fields(kind)}
    for name in sorted(set(content) - set(known)):
        raise FederatedError(f"{where}: unknown key {name!r}; known are {', '.join(sorted(known))}.")
    for name, required in known.items():
        if required and name not in content:
            raise FederatedError(f"{where}: {name!r} is missing.")
    return dict(content)


def check_whole(least: int, **values: object) -> None:
    """Refuses by name what is no whole number of at least ``least``."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST:
            raise FederatedError(f"Expected {name}={value!r} to be a whole number of at least {least}.")


def check_positive(**values: object) -> None:
    """Refuses by name what is no positive finite number."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < sys.float_info.max:
            raise FederatedError(f"Expected {name}={value!r} to be positive and finite.")


def check_text(**values: object) -> None:
    """Refuses by name what is no text, unless it was left out."""
    for name, value in values.items():
        if value is not None and not isinstance(value, str):
            raise FederatedError(f"Expected {name}={value!r} to be a text.")


def check_choice(choices: tuple[str | None, ...], **values: object) -> None:
    """Refuses by name what is none of the choices."""
    for name, value in values.items():
        if value not in choices:
            raise FederatedError(f"Expected {name}={value!r} to be one of {', '.join(filter(None, choices))}.")


def check_match(pattern: re.Pattern[str], **values: object) -> None:
    """Refuses by name what does not have the form of the pattern."""
    for name, value in values.items():
        if not isinstance(value, str) or pattern.fullmatch(value) is None:
            raise FederatedError(f"Expected {name}={value!r} to have the form {pattern.pattern}.")
