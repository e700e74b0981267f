"""What the commands share: the application, options that several take, and how a bound is shown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import dpsb_accounting
from dpsb_accounting.bound import Bound
from dpsb_accounting.plan import number_to_json

app = typer.Typer(
    name="dpsb-accounting",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Compute and check the epsilon of a differentially private training run.\n\n"
        "Every epsilon is a pair of bounds; only the upper one may be claimed. A ledger is the file in which the "
        "trainer charged every step before it drew any data.\n\n"
        "To check a run somebody handed you:  dpsb-accounting verify run/ledger.jsonl"
    ),
)

NoiseMultiplier = Annotated[
    float, typer.Option(help="Noise standard deviation divided by the clip norm, of the sum of gradients.")
]
SamplingProb = Annotated[
    float, typer.Option(help="Probability with which each example is drawn, in each step; 1 for all of them.")
]
Steps = Annotated[int, typer.Option(help="Number of steps.")]
Delta = Annotated[float, typer.Option(help="Delta; should be well below 1 / number of examples.")]
Neighboring = Annotated[
    str, typer.Option(help="What protecting one example means: add_or_remove_one, zero_out or replace_one.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
LedgerPath = Annotated[Path, typer.Argument(metavar="LEDGER", help="The ledger, such as run/ledger.jsonl.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dpsb-accounting {dpsb_accounting.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Holds the options that every command shares."""


def fail(message: str) -> None:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)


def bound_json(bound: Bound) -> dict[str, object]:
    return {
        "epsilon": {"lower": number_to_json(bound.lower), "upper": number_to_json(bound.upper)},
        "delta": bound.delta,
        "neighboring": bound.neighboring,
        "unit": bound.unit,
        "method": bound.method,
    }


def show_bound(bound: Bound, as_json: bool, further: Mapping[str, float]) -> None:
    if as_json:
        typer.echo(json.dumps({**further, **bound_json(bound)}, indent=2))
        return
    table = Table(show_header=False)
    for name, value in further.items():
        table.add_row(name.replace("_", " "), f"[bold]{value:.6g}[/]")
    table.add_row("epsilon, upper bound (the claim)", f"[bold]{bound.upper:.6g}[/]")
    table.add_row("epsilon, lower bound", f"{bound.lower:.6g}")
    table.add_row("delta", f"{bound.delta:g}")
    table.add_row("relation", bound.neighboring)
    table.add_row("unit", bound.unit)
    table.add_row("method", bound.method)
    Console().print(table)


def plain(text: str) -> str:
    return text.replace("[", r"\[")
