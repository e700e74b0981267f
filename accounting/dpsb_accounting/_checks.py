"""Argument checks whose message names the argument and shows its value."""

from __future__ import annotations

import math
from collections.abc import Collection

RELATIONS = ("add_or_remove_one", "zero_out", "replace_one")


def number(*, infinite: bool = False, **named: object) -> float:
    """Returns the one named value as a float; refuses booleans, text, NaN and (by default) infinity."""
    name, value = _only(named)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, not {value!r}")
    try:
        result = float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large for a float: {value!r}") from None
    if math.isnan(result) or (math.isinf(result) and not infinite):
        raise ValueError(f"{name} must be finite, not {value!r}" if not infinite else f"{name} is {value!r}")
    return result


def positive(*, infinite: bool = False, **named: object) -> float:
    """Returns the one named value as a float greater than 0.

    Example:
        >>> positive(noise_multiplier=1)
        1.0
        >>> positive(noise_multiplier=-1)
        Traceback (most recent call last):
        ValueError: noise_multiplier must be greater than 0, not -1
    """
    name, value = _only(named)
    result = number(infinite=infinite, **named)
    if result <= 0:
        raise ValueError(f"{name} must be greater than 0, not {value!r}")
    return result


def scale(**named: object) -> float:
    """Returns the one named value as a float from 1e-50 to 1e50: ratios of two and their squares are floats too."""
    name, value = _only(named)
    result = positive(infinite=False, **named)
    if not 1e-50 <= result <= 1e50:
        raise ValueError(f"{name} must be between 1e-50 and 1e50, not {value!r}")
    return result


def nonnegative(*, infinite: bool = False, **named: object) -> float:
    """Returns the one named value as a float of at least 0."""
    name, value = _only(named)
    result = number(infinite=infinite, **named)
    if result < 0:
        raise ValueError(f"{name} must be at least 0, not {value!r}")
    return result


def probability(*, open_interval: bool = False, **named: object) -> float:
    """Returns the one named value as a float in (0, 1], or in (0, 1) with `open_interval`."""
    name, value = _only(named)
    result = number(infinite=False, **named)
    if not 0 < result <= 1 or (open_interval and result == 1):
        interval = "(0, 1)" if open_interval else "(0, 1]"
        raise ValueError(f"{name} must be in {interval}, not {value!r}")
    return result


def delta_below(num_examples: int, whose: str = "", **named: object) -> float:
    """Returns the one named value, a delta at which nobody may release the whole record of a unit drawn at random."""
    name, value = _only(named)
    result = probability(open_interval=True, **named)
    if result >= 1 / num_examples:
        raise ValueError(
            f"{name}={value!r} must be less than 1 / num_examples = {1 / num_examples:.3g}{whose}: "
            "with a larger delta, releasing the whole record of one person at random would be allowed"
        )
    return result


def whole(*, at_least: int, **named: object) -> int:
    """Returns the one named value as an int of at least `at_least`; 3.0 counts as 3."""
    name, value = _only(named)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, not {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, not {value!r}")
    return value


def text(**named: object) -> str:
    """Returns the one named value as a text that is not empty."""
    name, value = _only(named)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a text that is not empty, not {value!r}")
    return value


def flag(**named: object) -> bool:
    """Returns the one named value, which must be True or False."""
    name, value = _only(named)
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, not {value!r}")
    return value


def one_of(*, choices: Collection[str], **named: object) -> str:
    """Returns the one named value, which must be one of `choices`."""
    name, value = _only(named)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")
    return value


def _only(named: dict[str, object]) -> tuple[str, object]:
    if len(named) != 1:
        raise TypeError(f"give exactly one named value, not {sorted(named)}")
    return next(iter(named.items()))
