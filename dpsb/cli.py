"""The command line ``dpsb``. It only reads options and prints; the work is in ``run``, ``plan`` and ``demo``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from dpsb import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Fine-tune a language model on text that must not leak, with an epsilon that an auditor can check.\n\n"
    "Start with [bold]dpsb demo[/bold]; then [bold]dpsb plan[/bold] to see what a budget buys, and "
    "[bold]dpsb train[/bold] on your own file.",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        typer.echo(f"dpsb {__version__}")
        raise typer.Exit
    del context


@app.command()
def plan(
    epsilon: Annotated[float, typer.Option(help="Target epsilon; the plan never exceeds it.")],
    num_examples: Annotated[int, typer.Option(help="N, declared as a public number.")],
    delta: Annotated[float | None, typer.Option(help="Below 1/N. [default: 1/(10 N)]")] = None,
    expected_batch_size: Annotated[int, typer.Option(help="M; every step draws each example with q = M/N.")] = 256,
    epochs: Annotated[float | None, typer.Option(help="Expected passes over the data. [default: 10]")] = None,
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

    _guarded(run)


@app.command()
def train(
    model: Annotated[str | None, typer.Option(help="Folder, Hub id, or 'minilm' (embedded).")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Private training data: .parquet, .jsonl, .csv, a data set folder, or a Hub id."),
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder of the run; one run each.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings from a TOML file; an unknown key is an error.")] = None,
    task: Annotated[str | None, typer.Option(help="classification or causal-lm.")] = None,
    eval_data: Annotated[
        str | None,
        typer.Option(help="Held-out file; its metrics lie outside the guarantee.", rich_help_panel="Data"),
    ] = None,
    text_column: Annotated[str | None, typer.Option(rich_help_panel="Data", help="Found by name if left out.")] = None,
    text_pair_column: Annotated[str | None, typer.Option(rich_help_panel="Data", help="Second text of a pair.")] = None,
    label_column: Annotated[str | None, typer.Option(rich_help_panel="Data", help="Class of a text.")] = None,
    prompt_column: Annotated[str | None, typer.Option(rich_help_panel="Data", help="Not part of the loss.")] = None,
    completion_column: Annotated[str | None, typer.Option(rich_help_panel="Data", help="What is learnt.")] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Data",
            help="The public label set: 'ham,spam', or 'from-data' to state that what the file holds is public. "
            "Rows with another label contribute zero.",
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(rich_help_panel="Data", help="Tokens per example; longer ones are cut. [default: 256]"),
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(
            rich_help_panel="Privacy", help="Target; 'inf' trains without noise, claims nothing. [default: 3]"
        ),
    ] = None,
    delta: Annotated[
        float | None, typer.Option(rich_help_panel="Privacy", help="Below 1/N. [default: 1/(10 N)]")
    ] = None,
    num_examples: Annotated[
        int | None,
        typer.Option(
            rich_help_panel="Privacy",
            help="A declared public N, never compared with the file. Without it the true number counts as public.",
        ),
    ] = None,
    neighboring: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Privacy",
            help="add_or_remove_one (default if N is declared), zero_out (default otherwise) or replace_one.",
        ),
    ] = None,
    expected_batch_size: Annotated[
        int | None, typer.Option(rich_help_panel="Privacy", help="M; q = M/N. [default: 256]")
    ] = None,
    steps: Annotated[int | None, typer.Option(rich_help_panel="Privacy", help="Number of steps T, or")] = None,
    epochs: Annotated[
        float | None,
        typer.Option(rich_help_panel="Privacy", help="expected passes over the data. [default: 10]"),
    ] = None,
    l2_clip_norm: Annotated[
        float | None,
        typer.Option(rich_help_panel="Privacy", help="C, flat clipping of each row. [default: 1]"),
    ] = None,
    auto_clip: Annotated[
        bool | None,
        typer.Option("--auto-clip", rich_help_panel="Privacy", help="AUTO-S instead of flat clipping."),
    ] = None,
    rank: Annotated[int | None, typer.Option(rich_help_panel="Adapter", help="r of the cores. [default: 16]")] = None,
    basis: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Adapter",
            help="weight (SVD of the weights, default), random, public:FILE (gradient of public data), lora-sb:FILE "
            "(as published, public gradients). private and hybrid[:FILE] are still to come.",
        ),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(rich_help_panel="Adapter", help="Modules, comma-separated, or re:REGEX. [default: all-linear]"),
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option(rich_help_panel="Adapter", help="Classifier: auto (default), native or mean over the tokens."),
    ] = None,
    head_init_std: Annotated[
        float | None, typer.Option(rich_help_panel="Adapter", help="Spread of the new head's weights. [default: 0.3]")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(rich_help_panel="Optimizer", help="Learning rate of the cores. [default: 0.02]"),
    ] = None,
    head_lr: Annotated[
        float | None,
        typer.Option(rich_help_panel="Optimizer", help="Of the head. [default: that of the cores]"),
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(rich_help_panel="Optimizer", help="constant, linear (default) or cosine.")
    ] = None,
    optimizer: Annotated[str | None, typer.Option(rich_help_panel="Optimizer", help="adam (default) or sgd.")] = None,
    tokens_per_example: Annotated[
        int | None,
        typer.Option(rich_help_panel="Optimizer", help="Causal LM: divide losses by this, not by own token count."),
    ] = None,
    token_budget: Annotated[
        int | None,
        typer.Option(rich_help_panel="Machine", help="Tokens per microbatch: memory and speed only. [default: 4096]"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(rich_help_panel="Machine", help="float32 (default) or bfloat16, frozen weights."),
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(rich_help_panel="Machine", help="Steps between checkpoints. [default: 25]")
    ] = None,
    allow_dropout: Annotated[
        bool | None,
        typer.Option("--allow-dropout", rich_help_panel="Machine", help="Leave the model's dropout on."),
    ] = None,
    insecure_seed: Annotated[
        int | None,
        typer.Option(rich_help_panel="Machine", help="Repeatable noise, for tests; the run claims nothing."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out; charged steps are spent.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fine-tunes on private data and writes a plain LoRA adapter, its ledger and its epsilon report.

    Example: [bold]dpsb train --model minilm --data mail.parquet --labels ham,spam --epsilon 3 --out run[/bold]
    """
    given = {
        key: value
        for key, value in locals().items()
        if value is not None and key not in ("config", "resume", "as_json", "lr", "head_lr")
    }
    given |= {k: v for k, v in (("learning_rate", lr), ("head_learning_rate", head_lr)) if v is not None}

    def run() -> None:
        from dpsb.config import make_config, read_config
        from dpsb.run import fine_tune, resumed_config

        settings = {**(read_config(config) if config else {}), **given}
        if resume:
            chosen = resumed_config(str(settings.get("out", "")), {k: v for k, v in settings.items() if k != "out"})
        else:
            chosen = make_config(settings)
        _train_and_print(lambda callbacks: fine_tune(chosen, resume=resume, callbacks=callbacks), as_json)

    _guarded(run)


def _train_and_print(work: Callable[[Any], Any], as_json: bool) -> None:
    from dpsb.display import Display, print_run

    display = Display(Console(stderr=as_json, quiet=as_json))
    with display:
        run = work(display.callbacks())
    if as_json:
        facts = {**run.report.to_json(), "out": str(run.out), "files": list(run.files)}
        typer.echo(json.dumps(facts, indent=1))
    else:
        print_run(Console(), run)


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

    _guarded(run)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    merged: Annotated[Path, typer.Option("--merged", help="Where to write the whole model, adapter merged in.")],
) -> None:
    """Writes the base model with the adapter merged into its weights, as an ordinary Hugging Face model.

    Example: [bold]dpsb export run --merged whole-model[/bold]
    """

    def run() -> None:
        from dpsb.export import export_merged

        export_merged(folder, merged)
        typer.echo(f"wrote {merged}")

    _guarded(run)


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

        _train_and_print(lambda callbacks: run_demo(out, epsilon=epsilon, callbacks=callbacks), as_json)
        if not as_json:
            print_comparison(Console(), out, rerun=with_baselines)

    _guarded(run)


def _guarded(run: Callable[[], None]) -> None:
    """Runs a command; what went wrong becomes one sentence on standard error and exit code 1.

    Of an error that nobody foresaw only the kind and the place are shown: its message may quote a row.
    """
    from dpsb_accounting import CalibrationInfeasible, LedgerError
    from dpsb_accounting.engines import ResourceLimit

    try:
        run()
    except KeyboardInterrupt:
        _fail("interrupted; charged steps are spent, --resume continues with the rest.")
    except (ValueError, RuntimeError, OSError, MemoryError, LedgerError, CalibrationInfeasible, ResourceLimit) as error:
        _fail(" ".join(str(error).split()) or type(error).__name__)
    except Exception as error:
        if os.environ.get("DPSB_TRACEBACK"):
            raise
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = "" if place is None else f" at {Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}"
        _fail(
            f"unexpected {type(error).__name__}{where}. Its message is withheld, because it may quote data; "
            "DPSB_TRACEBACK=1 shows it."
        )


def _fail(sentence: str) -> NoReturn:
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[red]error:[/red] {escape(sentence)}")
    raise typer.Exit(1)


def main() -> None:
    """Entry point of the console script."""
    sys.exit(app())


if __name__ == "__main__":
    main()
