"""The command that solves for the one setting left open: `calibrate`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dpsb_accounting.calibrate import Calibration, calibrate
from dpsb_accounting.cli._shared import AsJson, Delta, Neighboring, app, bound_json


@app.command("calibrate")
def calibrate_command(
    delta: Delta,
    target_epsilon: Annotated[float | None, typer.Option(help="The epsilon that must not be exceeded.")] = None,
    noise_multiplier: Annotated[
        float | None, typer.Option(help="Noise standard deviation divided by the clip norm, of the sum of gradients.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Number of steps.")] = None,
    sampling_prob: Annotated[
        float | None, typer.Option(help="Probability with which each example is drawn, in each step.")
    ] = None,
    expected_batch_size: Annotated[
        float | None, typer.Option(help="In place of the sampling probability, with --num-examples.")
    ] = None,
    num_examples: Annotated[
        int | None, typer.Option(help="Declared number of examples; alone it asks for the expected batch size.")
    ] = None,
    neighboring: Neighboring = "add_or_remove_one",
    as_json: AsJson = False,
) -> None:
    """Solve for the one setting left out: noise multiplier, steps, sampling probability or batch size, or epsilon.

    The result is checked with the upper bound that `epsilon` reports, which never exceeds the target.

    Example:  dpsb-accounting calibrate --target-epsilon 3 --sampling-prob 0.01 --steps 1000 --delta 1e-5
    """
    found = calibrate(
        target_epsilon=target_epsilon,
        delta=delta,
        noise_multiplier=noise_multiplier,
        steps=steps,
        sampling_prob=sampling_prob,
        expected_batch_size=expected_batch_size,
        num_examples=num_examples,
        neighboring=neighboring,
    )
    if as_json:
        setting = {
            "noise_multiplier": found.noise_multiplier,
            "sampling_prob": found.sampling_prob,
            "steps": found.steps,
        }
        solved = {"solved_for": found.parameter, "value": found.value, "target_epsilon": target_epsilon, **setting}
        typer.echo(json.dumps({**solved, **bound_json(found.bound)}, indent=2))
        return
    Console().print(_table(found, target_epsilon))


def _table(found: Calibration, target: float | None) -> Table:
    bound = found.bound
    table = Table(show_header=False)
    table.add_row(f"solved for: {found.parameter.replace('_', ' ')}", f"[bold]{found.value!r}[/]")  # all digits
    if target is not None:
        table.add_row("target epsilon", f"{target:g}")
    table.add_row("epsilon, upper bound (the claim)", f"[bold]{bound.upper:.6g}[/]")
    table.add_row("epsilon, lower bound", f"{bound.lower:.6g}")
    table.add_row("delta", f"{bound.delta:g}")
    table.add_row("noise multiplier", f"{found.noise_multiplier!r}")
    table.add_row("sampling probability", f"{found.sampling_prob!r}")
    table.add_row("steps", f"{found.steps}")
    table.add_row("relation", bound.neighboring)
    table.add_row("method", bound.method)
    return table
