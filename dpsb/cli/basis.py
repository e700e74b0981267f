"""``dpsb basis``: which bases there are, and which one public data speak for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dpsb.cli._shared import Json, app, guarded

if TYPE_CHECKING:
    from dpsb.basis.figures import Diagnosis

_NOTE = (
    "energy: share of the mean gradient's energy that the cores hold, measured on public examples that the basis was "
    "not computed from (with several files: on the other files; own half: on the other half of its own). of own: "
    "energy over what a basis of the judging file's own holds, which compares files. at most: for a hybrid, if its "
    "release had no noise. rho: an example's gradient in the cores over that in the weights (medians). signal "
    "/ noise: of one step, mean gradient over noise, clip norm at the median row. private and hybrid rows are "
    "forecasts: the release rehearsed on public examples, scaled to N, with its noise."
)


@app.command()
def basis(
    diagnose: Annotated[
        bool, typer.Option("--diagnose", help="Judge every basis on --public; without it they are only listed.")
    ] = False,
    public: Annotated[
        str | None, typer.Option(help="PUBLIC files, comma-separated. A half of each fits, the other judges.")
    ] = None,
    model: Annotated[str, typer.Option(help="Folder, Hub id, or 'minilm' (embedded).")] = "minilm",
    task: Annotated[str, typer.Option(help="classification or causal-lm.")] = "classification",
    labels: Annotated[
        str | None, typer.Option(help="Label set of the run, 'ham,spam'. \\[default: each file has its own]")
    ] = None,
    rank: Annotated[int, typer.Option(help="r of the adapters.")] = 16,
    targets: Annotated[str, typer.Option(help="Modules, comma-separated, or re:REGEX.")] = "all-linear",
    basis_width: Annotated[int | None, typer.Option(help="K of a hybrid. \\[default: 6 times the rank]")] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Target of the run; with --num-examples for signal / noise and forecasts.")
    ] = None,
    num_examples: Annotated[int | None, typer.Option(help="N of the private data, a declared public number.")] = None,
    delta: Annotated[float | None, typer.Option(help="Below 1/N. \\[default: 1/(10 N)]")] = None,
    expected_batch_size: Annotated[int, typer.Option(help="M; every step draws each example with q = M/N.")] = 256,
    epochs: Annotated[float | None, typer.Option(help="Expected passes over the data. \\[default: 10]")] = None,
    steps: Annotated[int | None, typer.Option(help="Number of steps T, instead of --epochs.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens per example.")] = 128,
    examples: Annotated[int, typer.Option(help="Examples of each file, both halves together.")] = 256,
    as_json: Json = False,
) -> None:
    """Which bases there are; with --diagnose, what each holds of the gradient and which one to use.

    Reads public files only: there is no option for private data.

    Example: [bold]dpsb basis --diagnose --public near.parquet,far.parquet --epsilon 3 --num-examples 4000[/bold]
    """

    def run() -> None:
        if not diagnose:
            _list_kinds(as_json)
            return
        from dpsb.basis.rehearsal import Budget
        from dpsb.diagnosis import diagnose_files

        budget = None
        if epsilon is not None and num_examples is not None:
            if num_examples < 1:
                raise ValueError(f"Expected num_examples={num_examples!r} of at least 1.")
            budget = Budget(
                epsilon=epsilon,
                delta=0.1 / num_examples if delta is None else delta,
                num_examples=num_examples,
                expected_batch_size=expected_batch_size,
                steps=steps,
                epochs=10 if steps is None and epochs is None else epochs,
            )
        elif epsilon is not None or num_examples is not None:
            raise ValueError(f"Give both epsilon={epsilon!r} and num_examples={num_examples!r}, or neither.")
        console = Console(stderr=True, quiet=as_json)
        with console.status("reading the public data") as status:
            found = diagnose_files(
                model=model,
                public=[name.strip() for name in (public or "").split(",") if name.strip()],
                task=task,
                labels=labels,
                rank=rank,
                targets=targets,
                width=basis_width,
                budget=budget,
                max_length=max_length,
                examples=examples,
                on_status=lambda message: status.update(escape(message)),
            )
        if as_json:
            typer.echo(json.dumps(found.to_json(), indent=1))
        else:
            _print(Console(), found)

    guarded(run)


def _list_kinds(as_json: bool) -> None:
    from dpsb.basis_spec import KINDS

    if as_json:
        typer.echo(json.dumps(KINDS, indent=1))
        return
    table = Table(title="bases, for dpsb train --basis", title_justify="left")
    table.add_column("basis")
    table.add_column("what A and B are")
    for kind, meaning in KINDS.items():
        table.add_row(kind, meaning)
    console = Console()
    console.print(table)
    console.print("Which one? dpsb basis --diagnose --public FILE judges them on public data.", style="dim")


def _print(console: Console, found: Diagnosis) -> None:
    title = f"{found.layers} weights, rank {found.rank}: {found.numbers:,} numbers; hybrid width {found.width}"
    table = Table(title=title, title_justify="left")
    table.add_column("basis", overflow="fold")
    distinct = len({Path(entry.name).name for entry in found.sets}) == len(found.sets)
    for heading in (
        "energy",
        "of own",
        "own half",
        "at most",
        "rho",
        "signal / noise",
        "share of budget",
        "above noise",
    ):
        table.add_column(heading, justify="right")
    for row in found.bases:
        kind, colon, file = row.basis.partition(":")
        name = kind + colon + (Path(file).name if distinct else file)
        shares = [_percent(row.energy), _percent(row.of_own), _percent(row.own_half), _percent(row.at_most)]
        numbers = ["-" if value is None else f"{value:.3g}" for value in (row.rho, row.snr_per_step)]
        cost = _percent(row.share) if row.paid else "free"
        style = "bold" if row.basis == found.recommended else None
        table.add_row(escape(name), *shares, *numbers, cost, _percent(row.visible_layers), style=style)
    console.print(table)
    for entry in found.sets:
        facts = (
            f"{entry.examples} examples, labels: {entry.labels}; its judging quarters agree to {entry.coherence:.2f}"
        )
        console.print(f"{entry.name}: {facts}", highlight=False, markup=False)
    console.print(_NOTE, style="dim", highlight=False)
    console.print(f"[bold]Use --basis {escape(found.recommended)}[/bold]: {escape(found.reason)}", highlight=False)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3g} %"
