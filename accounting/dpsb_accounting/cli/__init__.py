"""The command line of the auditor: `dpsb-accounting`. One file per group of commands."""

from __future__ import annotations

import sys

import typer

from dpsb_accounting.calibrate import CalibrationInfeasible
from dpsb_accounting.cli import auditing, bounds, calibration, comparison, federation, linting, runs
from dpsb_accounting.cli._shared import app
from dpsb_accounting.engines import ResourceLimit
from dpsb_accounting.ledger import LedgerError

# Importing them registers their commands, in this order.
COMMANDS = (bounds, calibration, runs, comparison, federation, auditing, linting)

__all__ = ["COMMANDS", "app", "main"]


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; bad input ends with one sentence on stderr and exit code 1."""
    try:
        app(args=arguments)
    except (ValueError, LedgerError, ResourceLimit, CalibrationInfeasible) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except ArithmeticError as error:
        typer.echo(f"error: a number is too large or too small to compute with ({error})", err=True)
        sys.exit(1)
