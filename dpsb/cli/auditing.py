"""``dpsb audit``: attack a run's mechanism with canaries and say what the attacks prove."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dpsb.cli._shared import Json, app, guarded


@app.command()
def audit(
    folder: Annotated[Path, typer.Argument(help="Folder of the run whose settings are audited.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the audit. \\[default: FOLDER-audit]")] = None,
    canaries: Annotated[int, typer.Option(help="Gradient canaries, at most the number of trained numbers.")] = 3000,
    input_canaries: Annotated[int, typer.Option(help="Examples of random tokens put into the data.")] = 200,
    confidence: Annotated[float, typer.Option(help="Probability that each attack's bound holds.")] = 0.95,
    put_into_report: Annotated[
        bool, typer.Option("--into-report", help="Put what the gradient canaries prove into FOLDER/report.json.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Trains once more with canaries under a run's settings; writes what that proves about epsilon, as HTML and JSON.

    The canary run is separate: its ledger is tainted and its model is not for release. Exit code 1 if the claim is
    refuted.

    Example: [bold]dpsb audit demo-run --out demo-audit[/bold]
    """

    def run() -> None:
        from dpsb.audit import audit_run, into_report
        from dpsb.display import Display
        from dpsb.run import resumed_config

        config = resumed_config(str(folder), {})
        display = Display(Console(stderr=as_json, quiet=as_json))
        with display:
            found = audit_run(
                config,
                out or folder.with_name(folder.name + "-audit"),
                gradient_canaries=canaries,
                input_canaries=input_canaries,
                confidence=confidence,
                callbacks=display.callbacks(),
            )
        if as_json:
            typer.echo(json.dumps(found.content, indent=1))
        else:
            table = Table("attack", "method", "epsilon is at least", "of the claim")
            for attack in found.attacks:
                for bound in attack.bounds:
                    share = f"{bound.epsilon / float(str(found.content['claimed_epsilon'])):.0%}"
                    table.add_row(attack.name, bound.method, f"{bound.epsilon:.4g}", share)
            console = Console()
            console.print(table)
            console.print(f"claimed: epsilon <= {found.content['claimed_epsilon']:.4g}; page: {found.out}/audit.html")
        if found.content["refuted"]:
            raise RuntimeError(
                "the claim is refuted: an attack proves a larger epsilon. Do not rely on this run's report."
            )
        if put_into_report:
            into_report(folder, found)

    guarded(run)
