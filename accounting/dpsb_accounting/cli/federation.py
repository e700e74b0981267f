"""The command that makes one report of a federation from its silos' ledgers: `federated`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dpsb_accounting import _checks, federated
from dpsb_accounting.bound import Bound
from dpsb_accounting.cli._shared import AsJson, app, fail, plain
from dpsb_accounting.federated import FederatedReport, Silo
from dpsb_accounting.federated.report import rounded_up
from dpsb_accounting.ledger import Ledger


@app.command("federated")
def federated_command(
    ledgers: Annotated[
        list[Path], typer.Argument(metavar="LEDGER...", help="Every silo's ledger (or the coordinator's).")
    ],
    model: Annotated[str, typer.Option(help="silo_local, secagg, client_level or trusted_server.")],
    delta: Annotated[float | None, typer.Option(help="Recompute all at this delta, where the ledgers' differ.")] = None,
    silos_per_person: Annotated[int | None, typer.Option(help="Silos that may hold a record of one person.")] = None,
    local_steps: Annotated[int | None, typer.Option(help="Gradient steps between two aggregations.")] = None,
    colluders: Annotated[int | None, typer.Option(help="Parties that may help the server; at least 1.")] = None,
    dropouts: Annotated[int | None, typer.Option(help="Parties that may be missing in a sum that is opened.")] = None,
    noise_of: Annotated[
        str | None,
        typer.Option(help="What the noise multiplier in the plans is that of: sum (the default), share, guaranteed."),
    ] = None,
    participation: Annotated[
        str | None, typer.Option(help="every_round, poisson or fixed_cohort (of clients).")
    ] = None,
    noise_by: Annotated[
        str | None, typer.Option(help="Who adds the noise to clients' updates: server, shares.")
    ] = None,
    clients: Annotated[int | None, typer.Option(help="Shares of noise in a round, before any is lost.")] = None,
    as_json: AsJson = False,
) -> None:
    """Report what a federation may claim, from the ledgers of its silos.

    silo_local      every silo adds its own noise; nobody else is trusted
    secagg          noise in shares, one gradient sum per secure aggregation
    client_level    whole clients are hidden, not single examples
    trusted_server  the server sees everything and adds the noise

    Exit code 0 only if the federation as a whole may claim its epsilon.

    Example:  dpsb-accounting federated --model silo_local north.jsonl south.jsonl

    Example:  dpsb-accounting federated --model secagg --local-steps 1
    --dropouts 1 --colluders 1 silos/*.jsonl
    """
    given = {
        "silos_per_person": silos_per_person,
        "local_steps": local_steps,
        "colluders": colluders,
        "dropouts": dropouts,
        "noise_of": noise_of,
        "participation": participation,
        "noise_by": noise_by,
        "clients": clients,
    }
    _check_options(model, {name for name, value in given.items() if value is not None})
    silos = [Silo.from_ledger(Ledger.read(path)) for path in ledgers]
    if model == "silo_local":
        report = federated.silo_local(
            silos, silos_per_person=1 if silos_per_person is None else silos_per_person, delta=delta
        )
    elif model == "secagg":
        report = federated.secagg(
            silos,
            local_steps=_given(local_steps),
            dropouts=_given(dropouts),
            colluders=_given(colluders),
            noise_of=noise_of or "sum",
            silos_per_person=1 if silos_per_person is None else silos_per_person,
            delta=delta,
        )
    elif model == "client_level":
        report = federated.client_level(
            silos,
            participation=participation or "",
            noise_by=noise_by or "server",
            clients=clients,
            dropouts=dropouts or 0,
            colluders=1 if colluders is None else colluders,
            noise_of=noise_of or "sum",
            delta=delta,
        )
    else:
        report = federated.trusted_server(
            silos,
            local_steps=_given(local_steps),
            silos_per_person=1 if silos_per_person is None else silos_per_person,
            delta=delta,
        )
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
    else:
        show_federation(report)
    if not report.claim:
        fail(report.statement)


_NEEDED: dict[str, set[str]] = {
    "silo_local": set(),
    "secagg": {"local_steps", "dropouts", "colluders"},
    "client_level": {"participation"},
    "trusted_server": {"local_steps"},
}
_OPTIONAL = {
    "silo_local": {"silos_per_person"},
    "secagg": {"noise_of", "silos_per_person"},
    "client_level": {"noise_by", "clients", "dropouts", "colluders", "noise_of"},
    "trusted_server": {"silos_per_person"},
}


def _check_options(model: str, given: set[str]) -> None:
    """Refuses a model that does not exist, options that it lacks, and options that mean nothing to it."""
    _checks.one_of(choices=federated.MODELS, model=model)
    for name in sorted(_NEEDED[model] - given):
        raise ValueError(f"model {model!r} needs --{name.replace('_', '-')}")
    for name in sorted(given - _NEEDED[model] - _OPTIONAL[model]):
        raise ValueError(f"--{name.replace('_', '-')} has no meaning in model {model!r}")


def _given(value: int | None) -> int:
    """An option that `_check_options` has seen to be there."""
    if value is None:
        raise ValueError("an option that the model needs is missing")
    return value


def show_federation(report: FederatedReport) -> None:
    """Prints a federation's report as tables and sentences."""
    console = Console()
    table = Table(title=f"Federation, model {report.model}", title_justify="left")
    for name in ("silo", "epsilon, upper bound", "lower", "steps charged", ""):
        table.add_column(name, justify="left" if name in ("silo", "") else "right")
    for entry in report.per_silo:
        charged = "-" if entry.charged is None else str(entry.charged)
        upper, lower = _ends(entry.epsilon)
        table.add_row(plain(entry.name), upper, lower, f"{charged} of {entry.planned}", plain(entry.reason))
    console.print(table)
    seen = Table("who", "sees", "epsilon against them", title="What each party sees", title_justify="left")
    for party in report.parties:
        seen.add_row(plain(party.name), plain(party.sees), _ends(party.epsilon)[0])
    console.print(seen)
    if report.incomplete_rounds:
        typer.echo(
            f"{report.incomplete_rounds} rounds are charged in some ledgers and not in all; they stay charged, and the "
            "claim is for every round that was planned."
        )
    if report.claim:
        typer.echo(report.statement)
    typer.echo("This rests on:")
    for line in report.assumptions:
        typer.echo(f"  - {line}")


def _ends(bound: Bound | None) -> tuple[str, str]:
    if bound is None:
        return "none", "-"
    return rounded_up(bound.upper), f"{bound.lower:.4g}"
