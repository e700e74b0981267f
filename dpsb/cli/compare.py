"""``dpsb compare``: what each method's noise does to the weights, and what of the gradient stands above it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dpsb.cli._shared import Json, app, guarded

_NOTE = (
    "Noise: expected squared length of one step's noise as it arrives on the target weights, at clip norm 1; "
    "measured with one standard error over the draws. "
    "Signal / noise: length of the mean gradient over that of the noise in one step, each method with its own clip "
    "norm (the median length of its rows). All rows have the same epsilon."
)


@app.command()
def compare(
    model: Annotated[str, typer.Option(help="Folder, Hub id, or 'minilm' (embedded).")] = "minilm",
    methods: Annotated[str, typer.Option(help="Methods, comma-separated; see dpsb train --help.")] = "sb,ffa-lora,lora",
    public: Annotated[str | None, typer.Option(help="PUBLIC data for the gradients; without it only noise.")] = None,
    labels: Annotated[str | None, typer.Option(help="Public label set: 'ham,spam' or 'from-data'.")] = None,
    task: Annotated[str, typer.Option(help="classification or causal-lm.")] = "classification",
    basis: Annotated[
        str, typer.Option(help="Of sb: weight, random, complementary, hadamard, or public (first half of --public).")
    ] = "weight",
    rank: Annotated[int, typer.Option(help="r of the adapters.")] = 16,
    targets: Annotated[str, typer.Option(help="Modules, comma-separated, or re:REGEX.")] = "all-linear",
    noise_multiplier: Annotated[float, typer.Option(help="Noise standard deviation over clip norm.")] = 1.0,
    expected_batch_size: Annotated[int, typer.Option(help="M, the divisor of the noisy sum.")] = 256,
    max_length: Annotated[int, typer.Option(help="Tokens per example.")] = 128,
    examples: Annotated[int, typer.Option(help="Public examples used.")] = 128,
    draws: Annotated[int, typer.Option(help="Draws of noise whose energies are averaged.")] = 8,
    plot: Annotated[Path | None, typer.Option(help="Write a picture: .svg or .png.")] = None,
    as_json: Json = False,
) -> None:
    """Compares methods at equal privacy on a real model: noise on the weights, predicted and measured, and signal.

    Reads no private data and trains nothing.

    Example: [bold]dpsb compare --methods sb,lora,ffa-lora --public public.parquet --plot noise.svg[/bold]
    """

    def run() -> None:
        from dpsb.compare import check_plot, compare_methods
        from dpsb.compare import plot as draw
        from dpsb.prepare import targets_of

        if plot is not None:
            check_plot(plot)
        rows = list(
            compare_methods(
                model=model,
                methods=[name.strip() for name in methods.split(",") if name.strip()],
                task=task,
                public=public,
                labels=labels,
                basis=basis,
                rank=rank,
                targets=targets_of(targets),
                noise_multiplier=noise_multiplier,
                expected_batch_size=expected_batch_size,
                max_length=max_length,
                examples=examples,
                draws=draws,
            )
        )
        if plot is not None:
            draw(rows, plot)
        if as_json:
            typer.echo(json.dumps([row.to_json() for row in rows], indent=1))
            return
        table = Table(title="methods at equal epsilon", title_justify="left")
        for heading in ("method", "numbers released", "expected noise", "measured", "row norm", "signal / noise"):
            whole = heading in ("method", "measured")
            table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=whole)
        for row in rows:
            norm = None if row.signal is None else row.signal.median_norm
            numbers = [
                "-" if value is None else f"{value:.4g}" for value in (row.predicted, row.measured, norm, row.snr)
            ]
            if row.standard_error is not None:
                numbers[1] += f" ± {row.standard_error:.1g}"
            table.add_row(row.method, f"{row.dimension:,}", *numbers)
        console = Console()
        console.print(table)
        console.print(_NOTE, style="dim", highlight=False)
        if plot is not None:
            console.print(f"wrote {plot}", highlight=False, markup=False)

    guarded(run)
