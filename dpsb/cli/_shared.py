"""What the commands share: the application, and how a command ends."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
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
    as_json: Annotated[bool, typer.Option("--json", help="With --version: of all that it rests on, as JSON.")] = False,
) -> None:
    if version:
        from dpsb.versions import versions

        typer.echo(json.dumps(versions(), indent=1) if as_json else f"dpsb {__version__}")
        raise typer.Exit
    if as_json:
        fail("--json before a command goes with --version only; a command takes its own --json.")
    del context


def train_and_print(work: Callable[[Any], Any], as_json: bool) -> None:
    """Runs a fine-tune under a live display, then prints its result."""
    from dpsb.display import Display, print_run

    display = Display(Console(stderr=as_json, quiet=as_json))
    with display:
        run = work(display.callbacks())
    if as_json:
        facts = {**run.report.to_json(), "out": str(run.out), "files": list(run.files)}
        typer.echo(json.dumps(facts, indent=1))
    else:
        print_run(Console(), run)


def guarded(run: Callable[[], None]) -> None:
    """Runs a command; what went wrong becomes one sentence on standard error and exit code 1.

    Of an error that nobody foresaw only the kind and the place are shown: its message may quote a row.
    """
    from dpsb.reasons import STOPS, foreseen, reason

    try:
        run()
    except (typer.Exit, typer.Abort):  # a RuntimeError, but its sentence has been said
        raise
    except KeyboardInterrupt:
        fail("interrupted; charged steps are spent, --resume continues with the rest.")
    except BaseException as error:
        if isinstance(error, STOPS) or (not foreseen(error) and os.environ.get("DPSB_TRACEBACK")):
            raise
        fail(reason(error))


def fail(sentence: str) -> NoReturn:
    """Ends the command with one sentence on standard error."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[red]error:[/red] {escape(sentence)}")
    raise typer.Exit(1)
