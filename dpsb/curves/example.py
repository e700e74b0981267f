"""The sweep that runs without any data of one's own: the embedded mail, in steps that two cores can make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LEARNING_RATES: Mapping[str, float] = {"sb": 0.05, "lora": 0.01, "ffa-lora": 0.05}
"""Chosen on the validation mails with as many runs for each method; docs/curves.md tells how."""


SMALLER: Mapping[str, Any] = {"steps": 30, "expected_batch_size": 64, "max_length": 64}
"""A fifth of the demo's work, so that twelve cells end in less than half an hour on two cores."""


def example_settings() -> dict[str, Any]:
    """Settings of every cell: those of ``dpsb demo``, with fewer, smaller steps on the first 64 tokens."""
    from dpsb.demo import LABELS, SETTINGS

    usual = {name: value for name, value in SETTINGS.items() if name != "learning_rate"}
    return {**usual, "model": "minilm", "labels": ",".join(LABELS), **SMALLER}
