"""The command that bounds epsilon from below by the scores of canaries: `audit`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dpsb_accounting import _checks, auditing
from dpsb_accounting.cli._shared import AsJson, Delta, app, fail, plain


@app.command("audit")
def audit_command(
    scores: Annotated[
        Path, typer.Argument(metavar="SCORES", help=".npz (scores, included) or .csv (score, included).")
    ],
    delta: Delta,
    method: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(auditing.METHODS)}; or all: each at a quarter of the error probability, so that the "
            "largest may be quoted."
        ),
    ] = "all",
    confidence: Annotated[float, typer.Option(help="Probability that the statement holds.")] = 0.95,
    threshold: Annotated[
        list[float] | None,
        typer.Option(help="A threshold written down before the scores were seen; repeatable, each is paid for."),
    ] = None,
    split: Annotated[
        float | None, typer.Option(help="Share of the scores on which a threshold is chosen. [default: 0.1]")
    ] = None,
    guesses: Annotated[
        list[int] | None,
        typer.Option(help="Number of guesses of the one-run methods, fixed beforehand; repeatable, each is paid for."),
    ] = None,
    claim: Annotated[
        float | None, typer.Option(help="A claimed epsilon: exit code 1 if it is refuted at this confidence.")
    ] = None,
    threat_model: Annotated[str, typer.Option(help="What the attacker saw and chose.")] = auditing.UNSTATED,
    as_json: AsJson = False,
) -> None:
    """Bound epsilon from below by the scores of canaries: what an attack proves, with its confidence.

    Example:  dpsb-accounting audit scores.npz --delta 1e-5 --method gdp --threshold 0.5 --claim 4
    """
    if threshold and split is not None:
        raise ValueError(f"threshold={threshold} and split={split} exclude each other")
    _checks.probability(open_interval=True, confidence=confidence)
    if claim is not None:
        _checks.nonnegative(claim=claim)
    share = auditing.SplitThreshold() if split is None else auditing.SplitThreshold(split)
    rule: auditing.Thresholds = auditing.FixedThresholds(tuple(threshold)) if threshold else share
    read = auditing.read_scores(scores, threat_model)
    methods = auditing.METHODS if method == "all" else (method,)
    each = 1 - (1 - confidence) / len(methods)
    bounds = [
        auditing.audit(read, name, delta=delta, confidence=each, thresholds=rule, guesses=tuple(guesses or ()))
        for name in methods
    ]
    best = max(bounds, key=lambda bound: bound.epsilon)
    refuted = claim is not None and best.refutes(claim)
    if as_json:
        content = {
            "confidence": confidence,
            "epsilon_lower": best.to_json()["epsilon_lower"],
            "bounds": [bound.to_json() for bound in bounds],
            "roc": auditing.roc(read).to_json(),
        }
        if claim is not None:
            content |= {"claimed_epsilon": claim, "ratio": best.epsilon / claim if claim else None, "refuted": refuted}
        typer.echo(json.dumps(content, indent=2))
    else:
        _show(bounds, claim)
    if refuted:
        fail(f"the claimed epsilon {claim:g} is refuted: {best}")


def _show(bounds: list[auditing.LowerBound], claim: float | None) -> None:
    table = Table("method", "epsilon is at least", "confidence", *(("of the claim",) if claim else ()))
    for bound in bounds:
        share = (f"{bound.epsilon / claim:.1%}",) if claim else ()
        table.add_row(bound.method, f"[bold]{bound.epsilon:.5g}[/]", f"{bound.confidence:.4g}", *share)
    console = Console()
    console.print(table)
    for bound in bounds:
        console.print(f"[bold]{bound.method}[/] holds if")
        for line in bound.assumptions:
            console.print(f"  - {plain(line)}")
    console.print(f"threat model: {plain(bounds[0].threat_model)}")
