"""The sweep as one HTML page: opens offline, runs no script, loads nothing."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpsb import __version__
from dpsb.curves import words
from dpsb.curves.plot import draw
from dpsb.curves.settings import DEMO, MACHINE
from dpsb.curves.style import STYLE
from dpsb.curves.sweep import Curve
from dpsb.curves.table import FAILED, Point
from dpsb_accounting.document import document
from dpsb_accounting.files import write_whole
from dpsb_accounting.report.words import up


def write_page(curve: Curve, out: Path) -> None:
    """Writes ``curve.html``, ``curve.png`` and ``curve.svg``.

    Guarantees: whatever a user named is escaped; the page holds no script and no address that a browser loads, no row
        of the data and no time that a private step took.
    """
    for kind in ("png", "svg"):
        write_whole(out / f"curve.{kind}", draw(curve.points, curve.metric, kind))
    write_whole(out / "curve.html", page(curve).encode())


def page(curve: Curve) -> str:
    """The page as text."""
    title = f"{curve.metric.capitalize()} over ε"
    figure = draw(curve.points, curve.metric, "inline").decode()
    body = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="sub">{_text(_subtitle(curve))}</p>',
        f'<p class="lead">{_text(" ".join(words.findings(curve)))}</p>',
        f"<figure>{figure}<figcaption>{_text(_caption(curve))}</figcaption></figure>",
        *_price(curve),
        f"<h2>{_text(curve.metric.capitalize())}</h2>",
        _pivot(curve),
        "<h2>Bounds on ε of a single run</h2>",
        _bounds(curve),
        "<h2>How learning rates were chosen</h2>",
        _list(words.tuning(curve)),
        "<h2>What was run</h2>",
        _facts(_setting(curve)),
        *_failures(curve),
        "<h2>What this does not say</h2>",
        _list(_limits(curve)),
        "<details><summary>Every run</summary>",
        _runs(curve),
        "</details>",
        f'<p class="small">Made by dpsb {__version__}. To check a run: <code>dpsb-accounting verify '
        "cells/NAME/ledger.jsonl</code>.</p>",
    ]
    return document(f"{title}: {_data(curve)}", STYLE, body)


def _subtitle(curve: Curve) -> str:
    shared = curve.settings.shared
    model, count = Path(str(shared.get("model"))).name, len(curve.settings.entries)
    methods = f"{count} method{'s' * (count != 1)}"
    return f"{model} on {_data(curve)}: {curve.settings.task}, {methods}, {_repeats(curve)}"


def _data(curve: Curve) -> str:
    data = str(curve.settings.shared["data"])
    return "the embedded mail" if data == DEMO else Path(data).name


def _repeats(curve: Curve) -> str:
    count = curve.settings.repeats
    return "a single run of each" if count == 1 else f"{count} runs of each"


def _caption(curve: Curve) -> str:
    band = "" if curve.settings.repeats == 1 else " Line and band: mean ± one sample standard deviation."
    free = " Dashed: without clipping and noise (ε = ∞)." if math.inf in curve.settings.epsilons else ""
    grey = " Grey and dashed: ε = ∞ whatever the target." if any(p.unbounded for p in curve.points) else ""
    return (
        f"{curve.metric.capitalize()} on held-out rows over the target ε of one run, {_repeats(curve)}, each with "
        f"fresh noise and draws, no seed.{band}{free}{grey} The ε of the whole figure is below."
    )


def _price(curve: Curve) -> list[str]:
    headline, made = words.price(curve.price)
    bound = curve.price.bound
    kind = "" if bound is not None and bound.is_finite and not curve.price.tainted else " none"
    return [
        f'<div class="price{kind}"><span>Everything on this page together, for the rows trained on</span>'
        f"<b>{_text(headline)}</b>",
        f"{_text(made)} Every accuracy is a release, so all runs count, those that chose learning rates too. "
        f"{_text(words.not_trained_on(curve))}",
        "</div>",
    ]


def _pivot(curve: Curve) -> str:
    """Methods down, epsilons across; the best of each column is bold."""
    best = {epsilon: words.best_mean(curve, epsilon) for epsilon in curve.settings.epsilons}

    def cell(point: Point) -> str:
        text = _text(words.with_sd(point, curve.metric))
        if point.unbounded:
            text = f'<span class="reference">{text}, ε = ∞</span>'
        elif point.mean is not None and point.mean == best[point.epsilon]:
            text = f"<b>{text}</b>"
        few = f' <span class="small">n = {point.n}</span>' if point.n != curve.settings.repeats else ""
        return text + few

    note = "percent; " if curve.metric == "accuracy" else ""
    note += "mean ± sample standard deviation; " if curve.settings.repeats > 1 else ""
    return _grid(curve, cell) + f'<p class="small">{note}bold: best mean at that ε. {_text(words.OUTSIDE)}</p>'


def _bounds(curve: Curve) -> str:
    """A row for each pair of bounds and the methods that have it: without a paid basis one for each epsilon."""
    shared: dict[tuple[float, float, float], list[str]] = {}
    for point in curve.points:
        if point.lower is not None and point.upper is not None:
            shared.setdefault((point.epsilon, point.lower, point.upper), []).append(point.label)
    rows = [
        '<tr><th>asked for</th><th class="number">at least</th><th class="number">at most</th><th>methods</th></tr>'
    ]
    for (epsilon, lower, upper), labels in shared.items():
        ends = f'<td class="number">{_end(lower, False)}</td><td class="number"><b>{_end(upper, True)}</b></td>'
        rows.append(f"<tr><td>{words.listed([epsilon])}</td>{ends}<td>{_text(', '.join(labels))}</td></tr>")
    delta = next((point.delta for point in curve.points if point.delta is not None), None)
    at = f" at δ = {words.power(delta)}" if delta is not None else ""
    note = f'<p class="small">Bounds on ε{at}; the upper one is what whoever sees that run only may rely on.</p>'
    return f'<table class="bounds">{"".join(rows)}</table>{note}'


def _grid(curve: Curve, cell: Any) -> str:
    heads = "".join(f'<th class="number">{_text(words.listed([e]))}</th>' for e in curve.settings.epsilons)
    rows = [f"<tr><th>method</th>{heads}</tr>"]
    for label in dict.fromkeys(point.label for point in curve.points):
        mine = {point.epsilon: point for point in curve.points if point.label == label}
        cells = [
            cell(mine[e]) if e in mine else '<span class="small">does not exist</span>' for e in curve.settings.epsilons
        ]
        rows.append(f"<tr><td>{_text(label)}</td>" + "".join(f'<td class="number">{c}</td>' for c in cells) + "</tr>")
    return f"<table>{''.join(rows)}</table>"


def _setting(curve: Curve) -> dict[str, Any]:
    settings = curve.settings
    split = settings.split()
    first = {"data": _data(curve), "model": settings.shared["model"]}
    shared = {name: value for name, value in settings.shared.items() if value is not None and name not in first}
    facts = {name.replace("_", " "): _file(value) for name, value in (first | shared).items() if name not in MACHINE}
    if split is not None:
        facts["split"] = (
            f"by a public seed ({split.seed}) and each row's own hash: test {split.test:g}, validation "
            f"{split.validation:g} of the rows"
        )
    bound = curve.price.bound
    if bound is not None:
        facts |= {"neighbouring relation": bound.neighboring, "protected unit": bound.unit}
        facts["number of units"] = curve.price.num_examples
    return facts


def _file(value: Any) -> Any:
    """A setting as the page shows it: of a whole path the name, as where it lies is nobody's business."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _failures(curve: Curve) -> list[str]:
    if not curve.failures:
        return []
    lines = [f"{row.folder}: {FAILED}" for row in curve.failures]
    return ["<h2>What failed</h2>", _list(lines)]


def _limits(curve: Curve) -> list[str]:
    lost = sum(row.lost_steps for row in curve.rows)
    said = [
        "The ε of a single run holds for whoever sees that run only. Whoever sees this page has seen all of them.",
        "Methods are compared at these settings; another rank, batch size or number of steps may order them otherwise.",
    ]
    if curve.price.bound is not None and curve.price.bound.unit == "example":
        said.append(
            "The ε are per example: a person with several rows is protected less (group privacy: with k rows at worst "
            "k times ε, at a δ that grows faster still); --unit-column protects people."
        )
    if curve.settings.repeats > 1:
        said.append("The standard deviation is over noise and draws on one split; it does not cover another split.")
    if any(len(rates) == 1 for rates in curve.settings.rates.values()):
        said.append("A learning rate that was given but had been chosen on this data before costs those runs as well.")
    if words.resolution(curve):
        said.insert(0, words.resolution(curve))
    if lost:
        said.append(
            f"Runs were cut off and went on: {lost} charged steps left no trace in their models (see the rows)."
        )
    return said


def _runs(curve: Curve) -> str:
    heads = ("run", "purpose", "learning rate", "ε at least", "ε at most", "noise", curve.metric, "lost steps")
    rows = ["<tr>" + "".join(f"<th>{_text(head)}</th>" for head in heads) + "</tr>"]
    for row in curve.rows:
        ends = [_end(row.epsilon_lower, False), _end(row.epsilon_upper, True)]
        noise = "–" if row.noise_multiplier is None else f"{row.noise_multiplier:.4g}"
        value = words.shown(row.metrics.get(curve.metric), curve.metric) if row.failure is None else "failed"
        name = row.folder.rpartition("/")[2]
        cells = [name, row.purpose, f"{row.learning_rate:g}", *ends, noise, value, str(row.lost_steps)]
        rows.append("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>")
    return f'<table class="runs">{"".join(rows)}</table>'


def _end(value: float | None, upper: bool) -> str:
    if value is None:
        return "–"
    if math.isinf(value):
        return "∞"
    return up(value, 6) if upper else words.down(value)


def _facts(facts: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in facts.items())
    return f'<table class="facts">{rows}</table>'


def _list(lines: Iterable[str] | Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{_text(line)}</li>" for line in lines) + "</ul>"


def _text(value: object) -> str:
    return html.escape(str(value))
