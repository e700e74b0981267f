"""The command that takes somebody else's claim apart: `lint`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dpsb_accounting import claims
from dpsb_accounting.cli._shared import AsJson, app

_COLORS = {"error": "red", "warning": "yellow", "info": "blue"}


@app.command("lint")
def lint_command(
    claim: Annotated[
        Path | None,
        typer.Argument(metavar="CLAIM", help="The claim: .json, .toml, .md, or a report.json of dpsb."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Count every warning as an error.")] = False,
    explain: Annotated[
        str | None, typer.Option(metavar="ID", help="Print what a finding means and where that is written; then stop.")
    ] = None,
    example: Annotated[bool, typer.Option("--example", help="Print a claim to fill in (TOML); then stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Take apart a claim about the privacy of a training run: recompute it and list what is wrong with it.

    A claim is a file with what somebody says: epsilon, delta, num_examples, batch_size, epochs or steps,
    noise_multiplier, sampler, neighboring, unit, basis, tuning_runs and more; --example prints one. What it does not
    say is listed too. A claim without errors is not thereby proved: a claim can be silent or untrue.

    Exit code 0: no error was found. 1: there is an error (or, with --strict, a warning). 2: the file cannot be read.

    Example:  dpsb-accounting lint --example > claim.toml

    Example:  dpsb-accounting lint claim.toml

    Example:  dpsb-accounting lint --explain shuffled-as-poisson
    """
    try:
        if explain is not None:
            _show_explanation(explain, as_json)
        elif example:
            typer.echo(claims.example(), nl=False)
        elif claim is None:
            raise ValueError("give a claim to check, or --example, or --explain ID")
        else:
            outcome = claims.lint(claims.read_claim(claim))
            outcome = outcome.strict() if strict else outcome
            if as_json:
                typer.echo(json.dumps(outcome.to_json(), indent=2, allow_nan=False))
            else:
                _show(outcome, str(claim))
            raise typer.Exit(0 if outcome.ok else 1)
    except ValueError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None


def _show_explanation(name: str, as_json: bool) -> None:
    found = claims.explain(name)
    if as_json:
        fields = ("id", "severity", "title", "meaning", "action", "source")
        typer.echo(json.dumps({field: getattr(found, field) for field in fields}, indent=2))
        return
    table = Table(show_header=False, title=f"{found.id}: {found.title}", title_justify="left")
    for field in ("meaning", "action", "severity", "source"):
        table.add_row({"action": "what to do"}.get(field, field), escape(getattr(found, field)))
    Console().print(table)


def _show(outcome: claims.Lint, name: str) -> None:
    claim = outcome.claim
    console = Console()
    table = Table("", "finding", "what was found, and what to do", title=escape(f"Claim {name}"), title_justify="left")
    before = "missing-fact"  # whose message says what to do
    for finding in outcome.findings:
        color = _COLORS[finding.severity]
        text = escape(finding.message)
        if finding.id not in (before, "missing-fact"):
            text += f"\n[dim]{escape(claims.CATALOG[finding.id].action)}[/]"
        before = finding.id
        table.add_row(f"[{color}]{finding.severity}[/]", finding.id, text)
    if outcome.findings:
        console.print(table)
    stated = "nothing" if claim.epsilon is None else f"epsilon {claim.epsilon:g}"
    delta = "" if claim.delta is None else f" at delta {claim.delta:g}"
    console.print(f"claimed:    {stated}{delta}", highlight=False)
    console.print(f"recomputed: {_recomputed(outcome)}", highlight=False)
    counts = {kind: sum(finding.severity == kind for finding in outcome.findings) for kind in _COLORS}
    summary = ", ".join(
        f"{count} {kind}{'s' if count != 1 and kind != 'info' else ''}" for kind, count in counts.items()
    )
    console.print(f"{summary}. `dpsb-accounting lint --explain ID` says what a finding means.", highlight=False)


def _recomputed(outcome: claims.Lint) -> str:
    found = outcome.recomputed
    if found is None:
        return "no bound, as facts are missing or no bound is known for this combination"
    if found.upper == math.inf:
        return "epsilon inf: there is no guarantee"
    return (
        f"epsilon {found} with everything taken into account, at delta {found.delta:g}, {found.neighboring} "
        f"({found.method})"
    )
