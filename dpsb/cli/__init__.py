"""The command line ``dpsb``: it reads options and prints, the work is elsewhere. One file per group of commands."""

from __future__ import annotations

import sys

from dpsb.cli import auditing, basis, compare, curve, federate, generate, hub, runs, selftest, serving, train
from dpsb.cli._shared import app

COMMANDS = (runs, train, basis, compare, curve, federate, generate, selftest, auditing, serving, hub)
"""Importing them registers their commands."""

__all__ = ["COMMANDS", "app", "main"]


def main() -> None:
    """Entry point of the console script."""
    sys.exit(app())
