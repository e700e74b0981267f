"""``dpsb plan``, ``report``, ``export`` and ``demo``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dpsb.cli._shared import Json, app, guarded, train_and_print


@app.command()
def plan(
    epsilon: Annotated[float, typer.Option(help="Target epsilon; the plan never exceeds it.")],
    num_examples: Annotated[int, typer.Option(help="N, declared as a public number.")],
    delta: Annotated[float | None, typer.Option(help="Below 1/N. \\[default: 1/(10 N)]")] = None,
    expected_batch_size: Annotated[int, typer.Option(help="M; every step draws each example with q = M/N.")] = 256,
    epochs: Annotated[float | None, typer.Option(help="Expected passes over the data. \\[default: 10]")] = None,
    steps: Annotated[int | None, typer.Option(help="Number of steps T, instead of --epochs.")] = None,
    neighboring: Annotated[str, typer.Option(help="add_or_remove_one, zero_out or replace_one.")] = "add_or_remove_one",
    as_json: Json = False,
) -> None:
    """What a budget buys: noise multiplier, sampling probability, steps and cost. Touches no data.

    Example: [bold]dpsb plan --epsilon 3 --delta 1e-5 --num-examples 4000 --expected-batch-size 512 --epochs 10[/bold]
    """
    from dpsb.display import print_plan
    from dpsb.plan import make_plan, plan_summary

    def run() -> None:
        if num_examples < 1:
            raise ValueError(f"Expected num_examples={num_examples!r} of at least 1.")
        if epochs is not None and not 0 < epochs < float("inf"):
            raise ValueError(f"Expected epochs={epochs!r} to be positive and finite.")
        made = make_plan(
            epsilon=epsilon,
            delta=0.1 / num_examples if delta is None else delta,
            num_examples=num_examples,
            expected_batch_size=expected_batch_size,
            epochs=10 if steps is None and epochs is None else epochs,
            steps=steps,
            neighboring=neighboring,
        )
        if as_json:
            typer.echo(json.dumps(plan_summary(made), indent=1))
        else:
            print_plan(Console(), made, cost_table_too=True)

    guarded(run)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run.")],
    as_json: Json = False,
) -> None:
    """Recomputes the report of a run, finished or not, from its ledger.

    Example: [bold]dpsb report run[/bold]
    """
    from dpsb_accounting import Ledger, make_report

    def run() -> None:
        made = make_report(Ledger.read(folder / "ledger.jsonl"))
        typer.echo(json.dumps(made.to_json(), indent=1) if as_json else made.to_text())

    guarded(run)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    merged: Annotated[
        Path | None, typer.Option("--merged", help="Where to write the whole model, adapter merged in.")
    ] = None,
    vllm: Annotated[
        Path | None, typer.Option("--vllm", help="Where to write an adapter that vLLM serves; says why if it cannot.")
    ] = None,
) -> None:
    """Writes a finished run in the form another tool takes: the whole model, or an adapter by vLLM's rules.

    Example: [bold]dpsb export run --merged whole-model[/bold]
    """

    def run() -> None:
        from dpsb.export import export_merged
        from dpsb.serving.vllm import export_for_vllm

        if merged is None and vllm is None:
            raise ValueError("Give --merged FOLDER or --vllm FOLDER.")
        if merged is not None:
            export_merged(folder, merged)
            typer.echo(f"wrote {merged}")
        if vllm is not None:
            rank = export_for_vllm(folder, vllm)
            typer.echo(f"wrote {vllm}; start the server with --enable-lora --max-lora-rank {rank} or more")

    guarded(run)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("demo-run"),
    epsilon: Annotated[float, typer.Option(help="Target epsilon.")] = 3.0,
    with_baselines: Annotated[
        bool,
        typer.Option("--with-baselines", help="Run the baselines again instead of printing recorded figures."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Fine-tunes the embedded model on the embedded mail, privately: the main job, end to end, offline.

    Example: [bold]dpsb demo --out demo-run[/bold]
    """

    def run() -> None:
        from dpsb.demo import print_comparison, run_demo

        train_and_print(lambda callbacks: run_demo(out, epsilon=epsilon, callbacks=callbacks), as_json)
        if not as_json:
            print_comparison(Console(), out, rerun=with_baselines)

    guarded(run)
