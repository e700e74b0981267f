"""``dpsb selftest``: does this model, with this task, train privately?"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dpsb.cli._shared import Json, app, guarded


@app.command()
def selftest(
    model: Annotated[str, typer.Option(help="Folder, Hub id, or 'minilm' (embedded).")] = "minilm",
    task: Annotated[str, typer.Option(help="classification or causal-lm.")] = "classification",
    labels: Annotated[str, typer.Option(help="Labels of a classifier, separated by commas.")] = "no,yes",
    rank: Annotated[int, typer.Option(help="r of the cores.")] = 16,
    targets: Annotated[str, typer.Option(help="Modules, comma-separated, or re:REGEX.")] = "all-linear",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, frozen weights.")] = "float32",
    max_length: Annotated[int, typer.Option(help="Tokens per example.")] = 64,
    full: Annotated[
        bool, typer.Option("--full", help="Also train on neighbouring data, resume, reload, search.")
    ] = False,
    on_private_data: Annotated[
        str | None,
        typer.Option(
            help="For a local debug run only: a file whose first rows take the place of the synthetic ones. Taints the "
            "result; there is no report of it."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Tests one's model, collator and loss on synthetic examples, before any private data is read.

    Exit code 1 if a check fails.

    Example: [bold]dpsb selftest --model minilm --full[/bold]
    """

    def run() -> None:
        from dpsb.selftest.command import Subject, selftest_subject

        if on_private_data is not None and as_json:
            raise ValueError("--on-private-data writes no report; leave --json out.")
        names = tuple(name.strip() for name in labels.split(",")) if task == "classification" else ()
        subject = Subject(model, task, names, rank, targets, dtype, max_length)
        found = selftest_subject(subject, full=full, private=on_private_data)
        if as_json:
            typer.echo(json.dumps(found.to_json(), indent=1))
        else:
            _show(Console(), found)
        if not found.ok:
            failed = ", ".join(check.name for check in found.failures)
            raise RuntimeError(f"{len(found.failures)} of {len(found.checks)} checks failed: {failed}.")

    guarded(run)


def _show(console: Console, found: Any) -> None:
    table = Table("check", "", "measured", "limit", "what it means", title=escape(found.subject), title_justify="left")
    marks = {True: "[green]ok[/]", False: "[red]FAIL[/]", None: "[dim]not tested[/]"}
    for check in found.checks:
        figure = "" if check.figure is None else f"{check.figure:.4g}"
        table.add_row(check.name, marks[check.passed], figure, escape(check.limit), escape(check.detail))
    console.print(table)
    if found.tainted:
        console.print(
            "[red]Tainted:[/] figures and messages above depend on private examples and have no guarantee. They are "
            "for this screen: do not keep, send or publish them, and choose no setting of a private run by them."
        )
