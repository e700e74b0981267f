"""Which modules are a classifier's head, by their names. Needs no torch."""

from __future__ import annotations

HEAD_NAMES = ("classifier", "score")
"""Modules that PEFT trains beside a sequence-classification adapter."""


def in_head(name: str) -> bool:
    """Whether a module's or parameter's name lies in a classifier's head, however PEFT wraps it."""
    return not set(HEAD_NAMES).isdisjoint(name.split("."))
