"""The report as plain text: page one for a lawyer, page two for a mathematician."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping

from dpsb_accounting.report.words import NOT_AUDITED, up
from dpsb_accounting.strict import items, mapping

WIDTH = 98


def text(content: Mapping[str, object]) -> str:
    """Returns the report's JSON object as plain text, at most 100 columns wide."""
    lines = ["PRIVACY REPORT", "=" * WIDTH, ""]
    lines += [*textwrap.wrap(str(content["statement"]), WIDTH), ""]
    lines += _table("Guarantee", _guarantee(content))
    lines += _list("What the best attacker gains", attacks(content))
    lines += _list("Taints", [f"{taint['name']}: {taint['reason']}" for taint in rows_of(content["taints"])])
    lines += _list("This rests on", [str(line) for line in items(content["assumptions"])])
    lines += _list("This does not cover", [str(line) for line in items(content["not_covered"])])
    lines += ["THE MATHEMATICS", "=" * WIDTH, ""]
    lines += _table("Mechanism of a training step", mapping(content["mechanism"]))
    for phase in rows_of(content["phases"]):
        lines += _table(f"Phase {phase['name']}", {"schedule": schedule(phase)})
    lines += _table("Basis", mapping(content["basis"]))
    lines += _table("Accounting", _accounting(content))
    lines += _list("Noise on the weights, at the same epsilon", _noise(content))
    lines += _table("Asked by NIST SP 800-226 and by Ponomareva et al. (2023)", mapping(content["disclosure"]))
    lines += _table("Ledger", mapping(content["ledger"]))
    if "held_out" in content:
        lines += _table("Held-out metrics: OUTSIDE THE GUARANTEE", mapping(mapping(content["held_out"])["metrics"]))
    return "\n".join(lines).rstrip() + "\n"


def attacks(content: Mapping[str, object]) -> list[str]:
    """Returns what the claim means for whoever is attacked, a sentence each; nothing where there is no claim."""
    unit = content["unit"]
    return [
        f"Whoever tries to find out whose data was used, and may wrongly accuse at most "
        f"{_percent(entry['false_positive_rate'])} of the {unit}s that were not, finds at most "
        f"{_percent(entry['true_positive_rate_at_most'])} of those that were."
        for entry in rows_of(content["attackers"])
    ] or ["nothing bounds it: there is no claim"]


def _percent(share: object) -> str:
    return f"{100 * share:.4g} %" if isinstance(share, float) else str(share)


def schedule(phase: Mapping[str, object]) -> str:
    """Returns a phase in one line."""
    event = ", ".join(f"{name} {value}" for name, value in mapping(phase["event"]).items())
    return f"{phase['charged']} of {phase['count']} charged: {event}"


def audits(content: Mapping[str, object]) -> str:
    """Returns the lower bounds that attacks gave, or that the model was not audited."""
    found = [
        f"{entry['method']}: epsilon is at least {entry['epsilon_lower']:.4g} at delta {entry['delta']:g} "
        f"(confidence {entry['confidence']:g})"
        for entry in rows_of(content.get("audits"))
    ]
    return "; ".join(found) or NOT_AUDITED


def _guarantee(content: Mapping[str, object]) -> dict[str, object]:
    ends, spent = mapping(content["epsilon"]), mapping(content["spent"])
    used = mapping(spent["epsilon"])
    return {
        "claim": "yes" if content["claim"] else "NO",
        "epsilon": f"{upper_end(ends)} (at least {number(ends['lower'])})",
        "delta": content["delta"],
        "protected unit": content["unit"],
        "relation": content["neighboring"],
        "examples": f"{content['num_examples']}"
        + (" (declared)" if content["num_examples_declared"] else " (true number, counts as public)"),
        "target epsilon": content["target_epsilon"],
        "spent so far": f"{upper_end(used)} after {spent['steps']} of {spent['of']} steps (information only)",
        "audit": audits(content),
    }


def _accounting(content: Mapping[str, object]) -> dict[str, object]:
    tools = {f"{entry['tool']} {entry['version']}": entry["method"] for entry in rows_of(content["accounting"])}
    return {**tools, "cross-check": f"{content['cross_check']}: {content['cross_check_reason']}"}


def _noise(content: Mapping[str, object]) -> list[str]:
    comparison = mapping(content["noise_on_weights"])
    if not comparison:
        return ["the plan does not tell the shapes of the target weights"]
    rows = [
        f"{entry['method']}: {entry['energy']:.4g}, {entry['ratio_to_r_only']:.4g} times that of r_only, "
        f"{entry['dimension']} numbers released"
        for entry in rows_of(comparison["methods"])
    ]
    return [*rows, str(comparison["note"])]


def upper_end(ends: Mapping[str, object]) -> str:
    """Returns the upper end of an interval in six digits, rounded up."""
    value = ends["upper"]
    return up(value, 6) if isinstance(value, float) else str(value)


def number(value: object) -> str:
    """Returns a number in six digits, anything else as it is."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _table(title: str, rows: Mapping[str, object]) -> list[str]:
    lines = [title, "-" * len(title)]
    for name, value in rows.items():
        text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
        lines += textwrap.wrap(
            f"{name.replace('_', ' '):<22} {text}", WIDTH, initial_indent="  ", subsequent_indent=" " * 25
        )
    return [*lines, ""]


def _list(title: str, entries: list[str]) -> list[str]:
    lines = [title, "-" * len(title)]
    for entry in entries or ["none"]:
        lines += textwrap.wrap(entry, WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return [*lines, ""]


def rows_of(value: object) -> list[Mapping[str, object]]:
    """Returns the objects of a JSON array."""
    return [mapping(entry) for entry in items(value)]
