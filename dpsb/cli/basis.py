"""``dpsb basis``: which bases there are, and which one public data speak for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dpsb.cli._shared import Json, app, guarded

if TYPE_CHECKING:
    from dpsb.basis.figures import Diagnosis

_NOTE = (
    "energy: share of the mean gradient's energy that the cores hold, on public rows that the basis was not computed "
    "from: of the files with the run's labels, or of all files if none has them. of own: energy over what a basis of "
    "the judging file's own holds. at most: for a hybrid, if its release had no noise. rho: an example's gradient in "
    "the cores over that in the weights (medians). head: what the head has of a row's squared norm, beside the cores "
    "(median). S/N: of one step, mean gradient over noise, clip norm at the median row. price: share of the budget. "
    "seen: layers whose strongest direction stands above the release's noise. private and hybrid rows are forecasts: "
    "the release rehearsed on public examples, scaled to N, with its noise."
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
            unused = {"--public": public, "--labels": labels, "--epsilon": epsilon, "--num-examples": num_examples}
            given = [name for name, value in unused.items() if value is not None]
            if given:
                raise ValueError(f"Add --diagnose, or leave out {' and '.join(given)}: without it bases are listed.")
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
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    table.add_column("basis", overflow="fold", min_width=13)
    columns = {
        "energy": [_percent(row.energy) for row in found.bases],
        "of own": [_percent(row.of_own) for row in found.bases],
        "at most": [_percent(row.at_most) for row in found.bases],
        "rho": [_number(row.rho) for row in found.bases],
        "head": [_percent(row.head_share) for row in found.bases],
        "S/N": [_number(row.snr_per_step) for row in found.bases],
        "price": [_percent(row.share) if row.paid else "free" for row in found.bases],
        "seen": [_percent(row.visible_layers) for row in found.bases],
    }
    if sum(entry.judges for entry in found.sets) == 1:
        del columns["of own"]  # the same order as energy
    shown = {heading: cells for heading, cells in columns.items() if set(cells) - {"-", "free"}}
    for heading in shown:
        table.add_column(heading, justify="right", no_wrap=True)
    distinct = len({Path(entry.name).name for entry in found.sets}) == len(found.sets)
    for row, *cells in zip(found.bases, *shown.values(), strict=True):
        kind, colon, file = row.basis.partition(":")
        name = kind + colon + (Path(file).name if distinct else file)
        table.add_row(escape(name), *cells, style="bold" if row.basis == found.recommended else None)
    console.print(table)
    for entry in found.sets:
        facts = (
            f"{entry.examples} examples, labels: {entry.labels}; its judging quarters agree to {entry.coherence:.2f}; "
            f"a basis of its own holds {_percent(entry.own_half)} of its other half"
        )
        verdict = "" if entry.judges else "; judges nothing"
        console.print(f"{entry.name}: {facts}{verdict}", highlight=False, markup=False)
    console.print(_NOTE, style="dim", highlight=False)
    console.print(f"[bold]Use --basis {escape(found.recommended)}[/bold]: {escape(found.reason)}", highlight=False)
    if found.advice:
        console.print(found.advice, highlight=False, markup=False)


def _percent(share: float | None) -> str:
    """At most six characters."""
    if share is None:
        return "-"
    return "<0.1 %" if 0 < share < 0.001 else f"{100 * share:.{3 if share >= 0.01 else 2}g} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"
