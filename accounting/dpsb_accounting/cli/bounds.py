"""Commands that compute a bound: `epsilon`, `delta`, `compose`, `noise-multiplier`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dpsb_accounting import accountant
from dpsb_accounting.bound import Bound
from dpsb_accounting.calibrate import noise_multiplier_for
from dpsb_accounting.cli._inputs import Question, ask, read_source, relation
from dpsb_accounting.cli._shared import (
    AsJson,
    Delta,
    Neighboring,
    SamplingProb,
    Steps,
    app,
    show_bound,
)
from dpsb_accounting.events import Event, PoissonGaussian
from dpsb_accounting.ledger import LedgerRecord
from dpsb_accounting.plan import number_to_json

_Source = Annotated[Path | None, typer.Argument(metavar="[LEDGER]", help="A ledger, such as run/ledger.jsonl.")]
_EventFile = Annotated[
    Path | None,
    typer.Option("--event", help="JSON file with an event: dp-accounting's class and field names, or our own tags."),
]
_Noise = Annotated[
    float | None, typer.Option("--noise-multiplier", help="Noise standard deviation divided by the clip norm.")
]
_Prob = Annotated[
    float | None, typer.Option("--sampling-prob", help="Probability with which each example is drawn in each step.")
]
_Count = Annotated[int | None, typer.Option("--steps", help="Number of steps.")]
_Delta = Annotated[float | None, typer.Option("--delta", help="Delta; for a ledger left out, that of its plan.")]
_Relation = Annotated[
    str | None,
    typer.Option(
        "--neighboring",
        help="add_or_remove_one, zero_out or replace_one; left out, that of the ledger, else add_or_remove_one.",
    ),
]


@app.command("epsilon")
def epsilon_command(
    ledger: _Source = None,
    event: _EventFile = None,
    noise_multiplier: _Noise = None,
    sampling_prob: _Prob = None,
    steps: _Count = None,
    delta: _Delta = None,
    neighboring: _Relation = None,
    as_json: AsJson = False,
) -> None:
    """Bound epsilon: of private training with given noise, of a ledger's whole plan, or of an event file.

    Example:  dpsb-accounting epsilon --noise-multiplier 1 --sampling-prob 0.01 --steps 1000 --delta 1e-5

    Example:  dpsb-accounting epsilon --event event.json --delta 1e-5 --neighboring zero_out --json
    """
    question = ask(ledger, event, noise_multiplier, sampling_prob, steps)
    _check_delta([question], delta)
    show_bound(_epsilon(question, delta, neighboring), as_json, {})


@app.command("delta")
def delta_command(
    epsilon: Annotated[float, typer.Option("--epsilon", help="The epsilon at which delta is bounded.")],
    ledger: _Source = None,
    event: _EventFile = None,
    noise_multiplier: _Noise = None,
    sampling_prob: _Prob = None,
    steps: _Count = None,
    neighboring: _Relation = None,
    as_json: AsJson = False,
) -> None:
    """Bound delta at a given epsilon: of the same things as `epsilon`.

    Example:  dpsb-accounting delta --epsilon 2 --noise-multiplier 1 --sampling-prob 0.01 --steps 1000
    """
    question = ask(ledger, event, noise_multiplier, sampling_prob, steps)
    found = accountant.delta(question.schedule, epsilon, relation(question, neighboring))
    _note(question)
    _show_delta(found, as_json)


@app.command("compose")
def compose_command(
    sources: Annotated[list[Path], typer.Argument(metavar="A B ...", help="Ledgers or event files on the same data.")],
    delta: _Delta = None,
    neighboring: _Relation = None,
    as_json: AsJson = False,
) -> None:
    """Bound epsilon of several runs on the same data together: every ledger's whole plan, every event.

    Left out, delta is the largest of the ledgers' deltas. Ledgers of different relations are refused.

    Example:  dpsb-accounting compose run1/ledger.jsonl run2/ledger.jsonl
    """
    questions = [read_source(path) for path in sources]
    relations = {question.neighboring for question in questions if question.neighboring}
    if len(relations) > 1:
        raise ValueError(f"the ledgers have different relations, {', '.join(sorted(relations))}: they do not compose")
    units = {question.unit for question in questions if question.neighboring}
    if len(units) > 1:
        raise ValueError(f"the ledgers protect different units, {', '.join(sorted(units))}: they do not compose")
    _refuse_same_run(questions)
    deltas = [question.delta for question in questions if question.delta is not None]
    undeclared = [
        question
        for question in questions
        if isinstance(question.schedule, LedgerRecord) and not question.schedule.plan.num_examples_declared
    ]
    together = Question(
        schedule=[part for question in questions for part in _parts(question)],
        delta=max(deltas, default=None),
        neighboring=next(iter(relations), None),
        unit=next(iter(units), "example"),
        notes=tuple(note for question in questions for note in question.notes),
    )
    wanted = relation(together, neighboring)
    if undeclared and wanted == "add_or_remove_one":
        raise ValueError(
            "neighboring='add_or_remove_one' does not hold here: a ledger's number of examples was not declared"
        )
    _check_delta(questions, together.delta if delta is None else delta)
    show_bound(_epsilon(together, delta, neighboring), as_json, {})


def _check_delta(questions: Sequence[Question], delta: float | None) -> None:
    """Refuses a delta at which a run could publish one of its units at random and keep to the bound."""
    for question in questions:
        if isinstance(question.schedule, LedgerRecord) and delta is not None:
            question.schedule.plan.check_delta(delta, f" of run {question.schedule.run_id}")


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
    noise = noise_multiplier_for(
        target_epsilon=epsilon,
        delta=delta,
        sampling_prob=sampling_prob,
        steps=steps,
        neighboring=neighboring,
    )
    event = PoissonGaussian(noise_multiplier=noise, sampling_prob=sampling_prob)
    show_bound(accountant.epsilon([(event, steps)], delta, neighboring), as_json, {"noise_multiplier": noise})


def _epsilon(question: Question, delta: float | None, neighboring: str | None) -> Bound:
    at = question.delta if delta is None else delta
    if at is None:
        raise ValueError("--delta must be given where there is no ledger to take it from")
    found = accountant.epsilon(question.schedule, at, relation(question, neighboring))
    _note(question)
    return Bound(
        lower=found.lower,
        upper=found.upper,
        delta=found.delta,
        neighboring=found.neighboring,
        unit=question.unit,
        method=found.method,
    )


def _note(question: Question) -> None:
    for note in question.notes:
        typer.echo(f"note: {note}", err=True)


def _parts(question: Question) -> list[tuple[Event, int]]:
    schedule = question.schedule
    return accountant.parts_of(schedule.plan.phases if isinstance(schedule, LedgerRecord) else schedule)  # type: ignore[arg-type]


def _refuse_same_run(questions: list[Question]) -> None:
    runs = [question.schedule.run_id for question in questions if isinstance(question.schedule, LedgerRecord)]
    again = sorted({run for run in runs if runs.count(run) > 1})
    if again:
        raise ValueError(f"the run {again[0]} is given twice; a run is composed with others, not with itself")


def _show_delta(bound: Bound, as_json: bool) -> None:
    data = {
        "delta": {"lower": bound.lower, "upper": bound.upper},
        "epsilon": number_to_json(bound.epsilon or 0.0),
        "neighboring": bound.neighboring,
        "unit": bound.unit,
        "method": bound.method,
    }
    if as_json:
        typer.echo(json.dumps(data, indent=2))
    else:
        typer.echo(str(bound))
