"""The command line of the auditor: `dpsb-accounting`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import dpsb_accounting
from dpsb_accounting import accountant
from dpsb_accounting.bound import Bound
from dpsb_accounting.engines import ResourceLimit
from dpsb_accounting.events import PoissonGaussian
from dpsb_accounting.ledger import Ledger, LedgerError
from dpsb_accounting.plan import number_to_json
from dpsb_accounting.report import make_report
from dpsb_accounting.verify import verify

app = typer.Typer(
    name="dpsb-accounting",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Compute and check the epsilon of a differentially private training run.\n\n"
        "Every epsilon is a pair of bounds; only the upper one may be claimed. A ledger is the file in which the "
        "trainer charged every step before it drew any data.\n\n"
        "To check a run somebody handed you:  dpsb-accounting verify run/ledger.jsonl"
    ),
)

NoiseMultiplier = Annotated[
    float, typer.Option(help="Noise standard deviation divided by the clip norm, of the sum of gradients.")
]
SamplingProb = Annotated[
    float, typer.Option(help="Probability with which each example is drawn, in each step; 1 for all of them.")
]
Steps = Annotated[int, typer.Option(help="Number of steps.")]
Delta = Annotated[float, typer.Option(help="Delta; should be well below 1 / number of examples.")]
Neighboring = Annotated[
    str, typer.Option(help="What protecting one example means: add_or_remove_one, zero_out or replace_one.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
LedgerPath = Annotated[Path, typer.Argument(metavar="LEDGER", help="The ledger, such as run/ledger.jsonl.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dpsb-accounting {dpsb_accounting.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Holds the options that every command shares."""


@app.command("epsilon")
def epsilon_command(
    noise_multiplier: NoiseMultiplier,
    sampling_prob: SamplingProb,
    steps: Steps,
    delta: Delta,
    neighboring: Neighboring = "add_or_remove_one",
    as_json: AsJson = False,
) -> None:
    """Bound the epsilon of private training with given noise.

    Example:  dpsb-accounting epsilon --noise-multiplier 1 --sampling-prob 0.01 --steps 1000 --delta 1e-5
    """
    event = PoissonGaussian(noise_multiplier=noise_multiplier, sampling_prob=sampling_prob)
    bound = accountant.epsilon([(event, steps)], delta, neighboring)
    _show_bound(bound, as_json, {})


@app.command("noise-multiplier")
def noise_multiplier_command(
    epsilon: Annotated[float, typer.Option(help="The epsilon that must not be exceeded.")],
    sampling_prob: SamplingProb,
    steps: Steps,
    delta: Delta,
    neighboring: Neighboring = "add_or_remove_one",
    as_json: AsJson = False,
) -> None:
    """Find the least noise that keeps training within a target epsilon.

    Example:  dpsb-accounting noise-multiplier --epsilon 3 --sampling-prob 0.01 --steps 1000 --delta 1e-5
    """
    noise = accountant.noise_multiplier_for(
        target_epsilon=epsilon,
        delta=delta,
        sampling_prob=sampling_prob,
        steps=steps,
        neighboring=neighboring,
    )
    event = PoissonGaussian(noise_multiplier=noise, sampling_prob=sampling_prob)
    _show_bound(accountant.epsilon([(event, steps)], delta, neighboring), as_json, {"noise_multiplier": noise})


@app.command("verify")
def verify_command(
    ledger: LedgerPath,
    report: Annotated[
        Path | None, typer.Option(help="The report to compare; otherwise report.json beside the ledger.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Verify a ledger and recompute everything its report says.

    Exit code 0 only if every check holds. The chain proves that the lines are consistent, not that an honest
    program wrote them.

    Example:  dpsb-accounting verify run/ledger.jsonl
    """
    outcome = verify(ledger, report)
    if as_json:
        bound = {} if outcome.epsilon is None else _bound_json(outcome.epsilon)
        typer.echo(json.dumps({**outcome.to_json(), **bound}, indent=2))
    else:
        table = Table("check", "", "found", title=f"Verification of {ledger}", title_justify="left")
        for check in outcome.checks:
            table.add_row(check.name, "[green]ok[/]" if check.ok else "[red]FAIL[/]", _plain(check.detail))
        Console().print(table)
        if outcome.epsilon is not None:
            typer.echo(f"recomputed: {outcome.epsilon}")
    if not outcome.ok:
        first = outcome.failures[0]
        _fail(
            f"verification failed ({len(outcome.failures)} of {len(outcome.checks)} checks): "
            f"{first.name}: {first.detail}"
        )


@app.command("report")
def report_command(ledger: LedgerPath, as_json: AsJson = False) -> None:
    """Print the report that a ledger supports, recomputed now.

    Example:  dpsb-accounting report run/ledger.jsonl
    """
    made = make_report(Ledger.read(ledger))
    typer.echo(json.dumps(made.to_json(), indent=2) if as_json else made.to_text(), nl=as_json)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; bad input ends with one sentence on stderr and exit code 1."""
    try:
        app(args=arguments)
    except (ValueError, LedgerError, ResourceLimit, accountant.CalibrationInfeasible) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


def _fail(message: str) -> None:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)


def _bound_json(bound: Bound) -> dict[str, object]:
    return {
        "epsilon": {"lower": number_to_json(bound.lower), "upper": number_to_json(bound.upper)},
        "delta": bound.delta,
        "neighboring": bound.neighboring,
        "unit": bound.unit,
        "method": bound.method,
    }


def _show_bound(bound: Bound, as_json: bool, further: dict[str, float]) -> None:
    if as_json:
        typer.echo(json.dumps({**further, **_bound_json(bound)}, indent=2))
        return
    table = Table(show_header=False)
    for name, value in further.items():
        table.add_row(name.replace("_", " "), f"[bold]{value:.6g}[/]")
    table.add_row("epsilon, upper bound (the claim)", f"[bold]{bound.upper:.6g}[/]")
    table.add_row("epsilon, lower bound", f"{bound.lower:.6g}")
    table.add_row("delta", f"{bound.delta:g}")
    table.add_row("relation", bound.neighboring)
    table.add_row("unit", bound.unit)
    table.add_row("method", bound.method)
    Console().print(table)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


if __name__ == "__main__":
    main()
