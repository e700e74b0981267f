"""Commands about a run that somebody handed over: `verify`, `report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dpsb_accounting.cli._shared import AsJson, LedgerPath, app, bound_json, fail, plain
from dpsb_accounting.ledger import Ledger
from dpsb_accounting.report import make_report
from dpsb_accounting.verify import verify


@app.command("verify")
def verify_command(
    ledger: LedgerPath,
    report: Annotated[
        Path | None, typer.Option(help="The report to compare; otherwise report.json beside the ledger.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Verify a ledger and recompute everything its report says.

    Exit code 0 only if every check holds. The chain proves that the lines are consistent, not that an honest
    program wrote them.

    Example:  dpsb-accounting verify run/ledger.jsonl
    """
    outcome = verify(ledger, report)
    if as_json:
        bound = {} if outcome.epsilon is None else bound_json(outcome.epsilon)
        typer.echo(json.dumps({**outcome.to_json(), **bound}, indent=2))
    else:
        table = Table("check", "", "found", title=f"Verification of {ledger}", title_justify="left")
        for check in outcome.checks:
            table.add_row(check.name, "[green]ok[/]" if check.ok else "[red]FAIL[/]", plain(check.detail))
        Console().print(table)
        if outcome.epsilon is not None:
            typer.echo(f"recomputed: {outcome.epsilon}")
    if not outcome.ok:
        first = outcome.failures[0]
        fail(
            f"verification failed ({len(outcome.failures)} of {len(outcome.checks)} checks): "
            f"{first.name}: {first.detail}"
        )


@app.command("report")
def report_command(ledger: LedgerPath, as_json: AsJson = False) -> None:
    """Print the report that a ledger supports, recomputed now.

    Example:  dpsb-accounting report run/ledger.jsonl
    """
    made = make_report(Ledger.read(ledger))
    typer.echo(json.dumps(made.to_json(), indent=2) if as_json else made.to_text(), nl=as_json)
