"""The report: what a ledger supports claiming, in words for a lawyer and in numbers for a mathematician.

`build` makes it, `words` holds its sentences, `page` prints it as text; `html`, with `curves` and `svg`, draws it.
"""

from __future__ import annotations

from dpsb_accounting.report.build import (
    HELD_OUT_NOTE,
    REVISION,
    SCHEMA,
    Report,
    make_report,
    report_content,
)
from dpsb_accounting.report.words import attackers, statement

__all__ = [
    "HELD_OUT_NOTE",
    "REVISION",
    "SCHEMA",
    "Report",
    "attackers",
    "make_report",
    "report_content",
    "statement",
]
