"""The report as one HTML file: opens offline, runs no script, loads nothing. Page one claims, page two proves."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping

from dpsb_accounting.document import document
from dpsb_accounting.plan import Plan
from dpsb_accounting.record import LedgerRecord
from dpsb_accounting.report.build import HELD_OUT_NOTE, Report
from dpsb_accounting.report.curves import Curves, Opinion, curves
from dpsb_accounting.report.page import attacks, audits, number, rows_of, schedule, upper_end
from dpsb_accounting.report.svg import Axis, Line, interval_plot, line_plot
from dpsb_accounting.report.words import up
from dpsb_accounting.strict import items, mapping

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1a1a1a; background: #fff;
  margin: 0 auto; padding: 24px 28px 60px; max-width: 980px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 26px 0 6px; }
.page + .page { border-top: 2px solid #ddd; margin-top: 40px; padding-top: 24px; }
.verdict { border-left: 6px solid #2e6b34; background: #f1f6f1; padding: 12px 18px; margin: 16px 0; }
.verdict.none { border-color: #a02020; background: #faf0f0; }
.verdict b { font-size: 30px; line-height: 1.2; display: block; }
table { border-collapse: collapse; width: 100%; margin: 4px 0; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: 4px 10px 4px 0; border-bottom: 1px solid #e4e4e4; }
th { font-weight: 600; } table.facts th { width: 200px; }
td { overflow-wrap: anywhere; } td.number, th.number { text-align: right; white-space: nowrap; }
ul { margin: 4px 0; padding-left: 20px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 18px 26px; }
figure { margin: 0; break-inside: avoid; } figcaption { font-size: 13px; color: #444; }
svg { width: 100%; height: auto; font: 11px system-ui, Helvetica, Arial, sans-serif; fill: #333; }
svg .grid { stroke: #e8e8e8; } svg .frame { fill: none; stroke: #999; }
.small { color: #555; font-size: 13px; } code, pre { font: 12px ui-monospace, Menlo, Consolas, monospace; }
pre { background: #f6f6f6; padding: 10px; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
@media print { .page + .page { break-before: page; border: 0; margin: 0; padding: 0; } details { display: none; } }
"""


def to_html(report: Report, ledger: LedgerRecord) -> str:
    """Returns the report as a self-contained HTML page.

    Guarantees: everything from the ledger is escaped; the page holds no script and no address that a browser loads.
        Every plotted value is computed here from the plan.

    Args:
        report: What `make_report` returned for this ledger.
        ledger: The ledger it was made of.
    """
    content = report.to_json()
    drawn = curves(ledger.plan, report.epsilon.upper) if report.claim and report.epsilon.upper else None
    title = f"Privacy report of run {content_text(mapping(content['ledger'])['run_id'])[:16]}"
    return document(title, _STYLE, [*_first_page(title, content), *_second_page(content, ledger.plan, drawn)])


def content_text(value: object) -> str:
    """Returns a JSON value as text for a table cell, not escaped."""
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def _first_page(title: str, content: Mapping[str, object]) -> list[str]:
    ends, spent = mapping(content["epsilon"]), mapping(content["spent"])
    parts = ['<section class="page">', f"<h1>{html.escape(title)}</h1>"]
    if content["claim"]:
        headline = f"epsilon ≤ {upper_end(ends)} at delta = {number(content['delta'])}, per {content['unit']}"
        parts.append(f'<div class="verdict"><b>{html.escape(headline)}</b>{_words(content["statement"])}</div>')
    else:
        parts.append(f'<div class="verdict none"><b>No privacy claim</b>{_words(content["statement"])}</div>')
    parts += ["<h2>What this means for a person in the data</h2>", _list(attacks(content))]
    declared = "declared beforehand" if content["num_examples_declared"] else "the true number, which counts as public"
    facts = {
        "protected unit": content["unit"],
        "neighbouring relation": mapping(content["disclosure"])["relation"],
        "number of units": f"{content['num_examples']} ({declared})",
        "asked for": f"epsilon {number(content['target_epsilon'])}",
        "spent so far": f"epsilon {upper_end(mapping(spent['epsilon']))} after {spent['steps']} of {spent['of']} steps "
        "(information, not the claim)",
        "second engine": f"{content['cross_check']}: {content['cross_check_reason']}",
        "audit by attack": audits(content),
    }
    parts += ["<h2>The claim</h2>", _facts(facts)]
    if content["taints"]:
        taints = [f"{taint['name']}: {taint['reason']}" for taint in rows_of(content["taints"])]
        parts += ["<h2>What voids a claim</h2>", _list(taints)]
    parts += ["<h2>This rests on</h2>", _list(map(str, items(content["assumptions"])))]
    parts += ["<h2>This does not cover</h2>", _list(map(str, items(content["not_covered"])))]
    return [*parts, "</section>"]


def _second_page(content: Mapping[str, object], plan: Plan, drawn: Curves | None) -> list[str]:
    parts = ['<section class="page">', "<h1>The mathematics</h1>"]
    parts += ["<h2>Mechanism of a training step</h2>", _facts(mapping(content["mechanism"]))]
    parts += ["<h2>Schedule</h2>", _facts({str(p["name"]): schedule(p) for p in rows_of(content["phases"])})]
    parts += ["<h2>Basis</h2>", _facts(mapping(content["basis"]))]
    if drawn is not None:
        upper = mapping(content["epsilon"])["upper"]
        parts += _plots(plan, drawn, float(upper) if isinstance(upper, (int, float)) else math.inf)
    parts += ["<h2>Accounting</h2>"]
    tools = {f"{entry['tool']} {entry['version']}": entry["method"] for entry in rows_of(content["accounting"])}
    parts.append(_facts(tools))
    if drawn is not None:
        parts.append(_engines(drawn.engines))
    parts += _noise(mapping(content["noise_on_weights"]))
    parts += ["<h2>Fields that guidelines ask for</h2>", _facts(mapping(content["disclosure"]))]
    parts.append('<p class="small">After NIST SP 800-226 (2025) and Ponomareva et al. (2023), arXiv:2303.00654.</p>')
    if "held_out" in content:
        metrics = mapping(mapping(content["held_out"])["metrics"])
        parts += [f"<h2>Held-out metrics: {html.escape(HELD_OUT_NOTE)}</h2>", _facts(metrics)]
    parts += ["<h2>Ledger</h2>", _facts(mapping(content["ledger"])), "<h2>Software</h2>"]
    parts.append(_facts(mapping(content["software"])))
    file = html.escape(content_text(mapping(content["ledger"])["file"]))
    parts.append(f"<p>To recompute all of this: <code>dpsb-accounting verify {file}</code></p>")
    text = html.escape(json.dumps(content, indent=2))
    parts.append(f"<details><summary>The report as JSON</summary><pre>{text}</pre></details>")
    return [*parts, "</section>"]


def _plots(plan: Plan, drawn: Curves, upper: float) -> list[str]:
    delta = f"{plan.delta:g}"
    top = 1.08 * max(y for _, y in drawn.steps)
    steps = line_plot(
        "epsilon over steps",
        Axis(label="training steps charged", low=0, high=plan.steps),
        Axis(label=f"epsilon at delta = {delta}", low=0, high=top),
        [Line(name="", points=drawn.steps, dots=True)],
    )
    shown = [(x, y) for x, y in drawn.profile if y >= 1e-10]
    widest = 1.05 * max(x for x, _ in shown)
    least = 10.0 ** math.floor(math.log10(min(y for _, y in shown)))
    profile = line_plot(
        "delta over epsilon",
        Axis(label="epsilon", low=0, high=widest),
        Axis(label="delta", low=least, high=1, log=True),
        [
            Line(name="upper bound", points=shown, dots=True),
            Line(name="the claim", points=[(0, plan.delta), (upper, plan.delta), (upper, least)], dashed=True),
        ],
    )
    errors = line_plot(
        "errors of the best attacker",
        Axis(label="false-positive rate", low=0, high=1),
        Axis(label="false-negative rate, at least", low=0, high=1),
        [
            Line(name="whole curve", points=drawn.errors),
            Line(name="the claim alone", points=drawn.claim_errors, dashed=True),
            Line(name="guessing", points=[(0, 1), (1, 0)], dashed=True),
        ],
    )
    found = [
        '<div class="plots">',
        _figure(steps, "What the run has cost as steps are charged. The claim is the right end, wherever it stopped."),
        _figure(profile, f"Every dot is a bound that holds for this run; delta = {delta} was chosen beforehand."),
        _figure(errors, "Every attacker on one unit lies on or above the solid curve; the claim alone shows less."),
    ]
    said = [opinion for opinion in drawn.engines if opinion.says_something]
    if said:
        ends = [end for opinion in said for end in (opinion.lower, opinion.upper) if end and math.isfinite(end)]
        low, high = _around([*ends, upper], upper)
        rows = [(opinion.name, opinion.lower, opinion.upper, opinion.rigorous) for opinion in said]
        axis = Axis(label=f"epsilon at delta = {delta}; the line is the claim", low=low, high=high)
        plot = interval_plot("epsilon by engine", axis, rows, upper)
        found.append(_figure(plot, "Each engine's interval; grey: an estimate, never a claim."))
    return ["<h2>Curves</h2>", *found, "</div>"]


def _around(values: list[float], upper: float) -> tuple[float, float]:
    """Ends of an axis that shows what lies near the claim; engines far off run out of it."""
    near = [value for value in values if 0.4 * upper <= value <= 2.5 * upper] or [upper]
    margin = 0.15 * (max(near) - min(near)) or 0.05 * upper
    return max(0.0, min(near) - margin), max(near) + margin


def _engines(found: tuple[Opinion, ...]) -> str:
    rows = ['<tr><th>engine</th><th class="number">at least</th><th class="number">at most</th><th></th></tr>']
    for opinion in found:
        low = f"{opinion.lower:.7g}" if opinion.lower else "–"
        high = up(opinion.upper, 7) if math.isfinite(opinion.upper) else "–"
        kind = "" if opinion.rigorous or not opinion.says_something else "estimate, not a bound: "
        rows.append(
            f'<tr><td>{html.escape(opinion.name)}</td><td class="number">{low}</td><td class="number">{high}</td>'
            f"<td>{html.escape(kind + opinion.note)}</td></tr>"
        )
    return f"<table>{''.join(rows)}</table>"


def _noise(comparison: Mapping[str, object]) -> list[str]:
    if not comparison:
        return []
    heads = ("method", "energy of the noise", "times r_only", "numbers released")
    rows = ["<tr>" + "".join(f"<th{_right(i)}>{head}</th>" for i, head in enumerate(heads)) + "</tr>"]
    for entry in rows_of(comparison["methods"]):
        cells = (
            str(entry["method"]),
            f"{entry['energy']:.4g}",
            f"{entry['ratio_to_r_only']:.4g}",
            f"{entry['dimension']:,}",
        )
        rows.append("<tr>" + "".join(f"<td{_right(i)}>{html.escape(c)}</td>" for i, c in enumerate(cells)) + "</tr>")
    note = f'<p class="small">{html.escape(str(comparison["note"]))}</p>'
    return ["<h2>Noise on the weights at the same epsilon</h2>", f"<table>{''.join(rows)}</table>", note]


def _right(column: int) -> str:
    return ' class="number"' if column else ""


def _facts(facts: Mapping[str, object]) -> str:
    rows = [
        f"<tr><th>{html.escape(name.replace('_', ' '))}</th><td>{html.escape(content_text(value))}</td></tr>"
        for name, value in facts.items()
    ]
    return f'<table class="facts">{"".join(rows)}</table>'


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def _words(value: object) -> str:
    return html.escape(str(value))


def _figure(plot: str, caption: str) -> str:
    return f"<figure>{plot}<figcaption>{html.escape(caption)}</figcaption></figure>"
