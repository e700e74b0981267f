"""``dpsb curve``."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dpsb.cli._shared import Json, app, fail, guarded
from dpsb.cli.train import train

_SWEEP = "Curve"
_NOT_OF_A_CELL = ("out", "config", "epsilon", "method", "insecure_seed", "resume", "as_json")


def with_options_of(command: Callable[..., None], leave_out: tuple[str, ...]) -> Callable[..., Callable[..., None]]:
    """Gives a command the options of another one; those that the user set arrive as its argument ``given``."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "given"]
        others = inspect.signature(command, eval_str=True).parameters.values()
        added = [p for p in others if p.name not in {*leave_out, *(mine.name for mine in own)}]

        def both(**values: Any) -> None:
            given = {p.name: values[p.name] for p in added if values[p.name] is not None}
            function(given=given, **{p.name: values[p.name] for p in own})

        both.__name__, both.__doc__ = function.__name__, function.__doc__
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in [*own, *added]]
        both.__dict__["__signature__"] = inspect.Signature(parameters)
        both.__annotations__ = {p.name: p.annotation for p in parameters}
        return both

    return decorate


@app.command()
@with_options_of(train, _NOT_OF_A_CELL)
def curve(
    given: dict[str, Any],
    out: Annotated[Path, typer.Option(help="Folder of the curve; start again with the same settings to go on.")] = Path(
        "curve"
    ),
    data: Annotated[
        str | None,
        typer.Option(
            help="Private training data, as for dpsb train. Without it: the embedded mail, and settings for it."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Settings of the runs from a TOML file; its epsilon, method and out are not used."),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            rich_help_panel=_SWEEP,
            help="Comma-separated: sb, sb:BASIS (sb:weight, sb:private, sb:public:a.csv+b.csv ...), or another method "
            "of dpsb train (lora, peft:eva:a.csv ...).",
        ),
    ] = "sb,lora,ffa-lora",
    epsilons: Annotated[
        str,
        typer.Option(
            rich_help_panel=_SWEEP, help="Targets; 'inf' is a run without privacy, which makes the sum infinite."
        ),
    ] = "1,2,4,8",
    repeats: Annotated[
        int, typer.Option(rich_help_panel=_SWEEP, help="Runs of each method and epsilon, each with fresh randomness.")
    ] = 1,
    learning_rates: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_SWEEP,
            help="Rates to choose from at every epsilon: '0.01,0.03' for all, or 'sb=0.02|0.05,lora=0.002'. One rate "
            "a method is no tuning. Every run that tunes counts in the sum of epsilon. Without it: --lr for all.",
        ),
    ] = None,
    tuning_repeats: Annotated[int, typer.Option(rich_help_panel=_SWEEP, help="Runs of each rate that is tried.")] = 1,
    validation_data: Annotated[
        str | None,
        typer.Option(rich_help_panel=_SWEEP, help="Where rates are chosen. Without it: a part of --data."),
    ] = None,
    test_share: Annotated[
        float,
        typer.Option(rich_help_panel=_SWEEP, help="Share of --data held out for the curve if there is no --eval-data."),
    ] = 0.2,
    validation_share: Annotated[
        float,
        typer.Option(rich_help_panel=_SWEEP, help="Share held out for tuning if there is no --validation-data."),
    ] = 0.1,
    split_seed: Annotated[int, typer.Option(rich_help_panel=_SWEEP, help="Public seed of these parts.")] = 0,
    processes: Annotated[
        int, typer.Option(rich_help_panel="Machine", help="Cells at a time, each with its share of the cores.")
    ] = 1,
    as_json: Json = False,
) -> None:
    """Draws accuracy over epsilon for several methods, and says what all its runs together cost.

    Writes curve.html (one page, opens offline), curve.png, curve.svg, curve.csv, curve.parquet, summary.csv.

    Kill it at any time and start it again: finished cells stay, others go on. Without --data: the embedded mail.

    Example: [bold]dpsb curve --data mail.csv --model minilm --labels ham,spam --methods sb,lora --epsilons 1,3,8[/bold]
    """

    def run() -> None:
        from dpsb.config_file import read_config
        from dpsb.curves.plot import check_matplotlib
        from dpsb.curves.settings import curve_settings

        settings = curve_settings(
            {**(read_config(config) if config else {}), **given, **({"data": data} if data else {})},
            methods=methods,
            epsilons=epsilons,
            repeats=repeats,
            learning_rates=learning_rates,
            tuning_repeats=tuning_repeats,
            validation_data=validation_data,
            test_share=test_share,
            validation_share=validation_share,
            split_seed=split_seed,
        )
        check_matplotlib()

        from dpsb.curves.page import write_page
        from dpsb.curves.progress import Watcher
        from dpsb.curves.sweep import run_sweep

        if settings.left_out() and not as_json:
            Console().print(settings.left_out(), highlight=False, markup=False)
        try:
            with Watcher(Console(stderr=as_json, quiet=as_json), settings.task) as watcher:
                found = run_sweep(settings, out, watcher, processes=processes)
        except KeyboardInterrupt:
            fail("interrupted; charged steps are spent, finished cells are kept, and the same command goes on.")
        write_page(found, out)
        _print(found, out, as_json)
        if found.failures:
            fail(
                f"{len(found.failures)} of {len(found.rows)} cells failed, the first with: {found.failures[0].failure} "
                "The same command tries them again."
            )

    guarded(run)


def _print(found: Any, out: Path, as_json: bool) -> None:
    from dpsb.curves.summary import summary
    from dpsb.curves.words import OUTSIDE, findings, price, with_sd
    from dpsb_accounting.report.words import up

    if as_json:
        typer.echo(json.dumps(summary(found, out), indent=1))
        return
    console = Console()
    table = Table(title=f"{found.metric}, mean ± sd over repeats", title_justify="left")
    for heading in ("method", "epsilon", "epsilon at most", found.metric, "runs", "learning rate", "tuning runs"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for point in found.points:
        upper = "-" if point.upper is None else up(point.upper, 5) if math.isfinite(point.upper) else "∞"
        rate = "-" if point.learning_rate is None else f"{point.learning_rate:g}"
        numbers = (
            f"{point.epsilon:g}",
            upper,
            with_sd(point, found.metric),
            f"{point.n}",
            rate,
            f"{point.tuning_runs}",
        )
        table.add_row(escape(point.label), *numbers)
    console.print(table)
    for sentence in findings(found):
        console.print(sentence, highlight=False, markup=False)
    headline, made = price(found.price)
    console.print(f"[bold]composed: {headline}[/bold]", highlight=False)
    console.print(f"{made} {OUTSIDE}", style="dim", highlight=False, markup=False)
    console.print(f"page: {out / 'curve.html'}", highlight=False, markup=False)
