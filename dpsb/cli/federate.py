"""``dpsb federate simulate`` and ``dpsb federate report``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dpsb.cli._shared import Json, app, fail, guarded

federate = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Several silos train one adapter together and exchange only the small cores R.\n\n"
    "Every silo adds its own noise and keeps its own ledger; nobody has to be trusted with its data. Start with "
    "[bold]dpsb federate simulate --config examples/federated_mail/fed.toml[/bold].",
)
app.add_typer(federate, name="federate")


@federate.command()
def simulate(
    config: Annotated[Path, typer.Option(help="Settings (TOML): those of dpsb train, [federation], [silos.NAME].")],
    out: Annotated[Path | None, typer.Option(help="Folder of the federation; takes the place of the file's.")] = None,
    as_json: Json = False,
) -> None:
    """Runs a federation on this machine, in one process: to try out settings before anything is deployed.

    The file says on which data (one file that is split by a column, or one for each silo), which model, how many
    rounds, how many private steps between two averages, and each silo's epsilon.

    The folder then holds a folder for each silo (policy, ledger, replies), the server's checkpoint, a plain LoRA
    adapter and one report. Kill it at any time and start it again: it goes on at the round that is open.

    Example: [bold]dpsb federate simulate --config examples/federated_mail/fed.toml --out fed-run[/bold]
    """

    def run() -> None:
        from dpsb.federated.config import read_federation
        from dpsb.federated.simulate import Callbacks
        from dpsb.federated.simulate import simulate as run_simulation

        settings = read_federation(config, None if out is None else str(out))
        console = Console(stderr=as_json, quiet=as_json)
        with _bar(console) as progress:
            task = progress.add_task("training", total=None, round="")

            def on_terms(terms: Any, policies: Mapping[str, Any]) -> None:
                _show_terms(console, terms, policies)
                progress.update(task, total=terms.rounds * len(terms.silos))

            finished = run_simulation(
                settings,
                callbacks=Callbacks(
                    on_status=lambda message: console.print(f"[dim]{escape(message)}[/dim]", highlight=False),
                    on_terms=on_terms,
                    on_reply=lambda reply: progress.update(task, advance=1, round=f"round {reply.round + 1}"),
                    on_round=lambda record: _show_round(console, record),
                    on_problem=lambda reason: console.print(f"[yellow]{escape(reason)}[/yellow]", highlight=False),
                ),
            )
        _print(finished.federation, finished.out, finished.held_out, as_json)

    def stoppable() -> None:
        try:
            run()
        except KeyboardInterrupt:
            fail("interrupted; charged steps are spent, the same command goes on at the round that is open.")

    guarded(stoppable)


@federate.command()
def report(
    out: Annotated[Path, typer.Argument(help="Folder of a federation.")],
    as_json: Json = False,
) -> None:
    """Recomputes the report of a federation, finished or not, from its silos' ledgers.

    Exit code 0 only if the federation as a whole may claim its epsilon.

    Example: [bold]dpsb federate report fed-run[/bold]
    """

    def run() -> None:
        from dpsb.federated.report import federation_report

        _print(federation_report(out), out, {}, as_json)

    guarded(run)


def _print(federation: Any, out: Path, held_out: Mapping[str, float], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({**federation.to_json(held_out), "out": str(out)}, indent=1))
    else:
        from dpsb_accounting.cli.federation import show_federation

        show_federation(federation.report)
        console = Console()
        state = federation.state
        used = [len(record.silos) for record in state.history]
        console.print(
            f"rounds: {state.round} of {state.terms.rounds}, replies used: {sum(used)} of "
            f"{state.round * len(state.terms.silos)}",
            highlight=False,
        )
        for silo, why in state.left.items():
            console.print(f"{silo} left: {why}", highlight=False, markup=False)
        for silo in federation.never:
            console.print(f"{silo} has no ledger: it charged nothing and released nothing.", markup=False)
        if held_out:
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in held_out.items())
            console.print(f"held-out ({numbers}): outside the guarantee")
        console.print(f"files in {out}: adapter/, server/, silos/, report.json", highlight=False, markup=False)
    if not federation.report.claim:
        fail(federation.report.statement)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]replies"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[round]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=console.quiet or not console.is_terminal,
    )


def _show_terms(console: Console, terms: Any, policies: Mapping[str, Any]) -> None:
    table = Table(title=f"federation, model {terms.model.value}", title_justify="left")
    for heading in ("silo", "epsilon at most", "q", "noise multiplier"):
        table.add_column(heading, justify="left" if heading == "silo" else "right")
    for name, asked in terms.silos.items():
        table.add_row(
            escape(name),
            f"{policies[name].max_epsilon:g}",
            f"{asked.sampling_prob:.4g}",
            f"{asked.noise_multiplier:.4f}",
        )
    console.print(table)
    console.print(f"{terms.rounds} rounds of {terms.local_steps} private steps in each silo", highlight=False)


def _show_round(console: Console, record: Any) -> None:
    if record.lost or not console.is_terminal:
        lost = "".join(f"; {name} lost ({why})" for name, why in record.lost.items())
        console.print(f"round {record.round + 1}: {len(record.silos)} silos{lost}", highlight=False, markup=False)
