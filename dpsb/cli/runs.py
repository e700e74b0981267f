"""``dpsb plan``, ``report``, ``export`` and ``demo``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from dpsb.cli._shared import Json, app, guarded, train_and_print
from dpsb_accounting.ledger import LEDGER_NAME

if TYPE_CHECKING:
    from dpsb.memory import MemoryPlan


@app.command()
def plan(
    epsilon: Annotated[float, typer.Option(help="Target epsilon; the plan never exceeds it.")],
    num_examples: Annotated[int, typer.Option(help="N, declared as a public number.")],
    delta: Annotated[float | None, typer.Option(help="Below 1/N. \\[default: 1/(10 N)]")] = None,
    expected_batch_size: Annotated[int, typer.Option(help="M; every step draws each example with q = M/N.")] = 256,
    epochs: Annotated[float | None, typer.Option(help="Expected passes over the data. \\[default: 10]")] = None,
    steps: Annotated[int | None, typer.Option(help="Number of steps T, instead of --epochs.")] = None,
    neighboring: Annotated[str, typer.Option(help="add_or_remove_one, zero_out or replace_one.")] = "add_or_remove_one",
    model: Annotated[
        str | None,
        typer.Option(rich_help_panel="Memory", help="Also plan the memory of a step on this model, from its config."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Memory", help="classification or causal-lm. \\[default: what the model's config is for]"
        ),
    ] = None,
    rank: Annotated[int, typer.Option(rich_help_panel="Memory", help="r of the cores.")] = 16,
    targets: Annotated[str, typer.Option(rich_help_panel="Memory", help="As for dpsb train.")] = "all-linear",
    max_length: Annotated[int, typer.Option(rich_help_panel="Memory", help="Tokens per example.")] = 256,
    dtype: Annotated[
        str, typer.Option(rich_help_panel="Memory", help="float32 or bfloat16, frozen weights.")
    ] = "float32",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", rich_help_panel="Memory", help="With activation checkpointing.")
    ] = False,
    world_size: Annotated[
        int | None,
        typer.Option(rich_help_panel="Several processes", help="With --model: what each of so many processes takes."),
    ] = None,
    shard_base: Annotated[
        bool,
        typer.Option("--shard-base", rich_help_panel="Several processes", help="The base's blocks cut over them."),
    ] = False,
    token_budget: Annotated[
        int,
        typer.Option(rich_help_panel="Several processes", help="Tokens per microbatch on each: a row of the table."),
    ] = 4096,
    teraflops: Annotated[
        float | None,
        typer.Option(rich_help_panel="Several processes", help="What a process sustains, measured; for the time."),
    ] = None,
    as_json: Json = False,
) -> None:
    """What a budget buys: noise multiplier, sampling probability, steps and cost. Touches no data.

    With --model also the memory that a step on it takes, from its config: no weights are loaded.

    Example: [bold]dpsb plan --epsilon 3 --delta 1e-5 --num-examples 4000 --expected-batch-size 512 --epochs 10[/bold]
    """
    from dpsb.display import print_memory, print_plan, print_scaling
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
        if world_size is not None and model is None:
            raise ValueError(f"world_size={world_size} needs --model.")
        memory = None if model is None else _memory(model, task, rank, targets, max_length, dtype, checkpointing)
        scaling = None
        if memory is not None and world_size is not None:
            from dpsb.distributed.scaling import scaling_plan

            scaling = scaling_plan(
                made,
                memory,
                world_size=world_size,
                sharded=shard_base,
                token_budget=token_budget,
                teraflops=teraflops,
                checkpointing=checkpointing,
            )
        if as_json:
            facts = plan_summary(made) | ({} if memory is None else {"memory": memory.to_json()})
            facts |= {} if scaling is None else {"scaling": scaling.to_json()}
            typer.echo(json.dumps(facts, indent=1))
            return
        print_plan(Console(), made, cost_table_too=True)
        if memory is not None:
            print_memory(Console(), memory)
        if scaling is not None:
            print_scaling(Console(), scaling)

    guarded(run)


def _memory(
    model: str, task: str | None, rank: int, targets: str, max_length: int, dtype: str, checkpointing: bool
) -> MemoryPlan:
    import torch

    from dpsb.memory import memory_plan
    from dpsb.models import usual_task
    from dpsb.prepare import targets_of

    task = usual_task(model) if task is None else task
    if task not in ("classification", "causal-lm"):
        raise ValueError(f"Expected task to be classification or causal-lm, got {task!r}.")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"Expected dtype to be float32 or bfloat16, got {dtype!r}.")
    return memory_plan(
        model,
        task,
        rank=rank,
        targets=targets_of(targets),
        max_length=max_length,
        dtype=getattr(torch, dtype),
        checkpointing=checkpointing,
    )


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
        made = make_report(Ledger.read(folder / LEDGER_NAME))
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
            moved = export_merged(folder, merged)
            typer.echo(f"wrote {merged}; merging moves the output on random tokens by {moved:.1g} of its norm")
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
