"""An audit as one HTML file that a non-specialist can read: opens offline, runs no script, loads nothing."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dpsb_accounting.auditing.bounds import LowerBound
from dpsb_accounting.auditing.roc import Roc
from dpsb_accounting.document import document
from dpsb_accounting.report.svg import Axis, Line, interval_plot, line_plot

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1a1a1a; background: #fff;
  margin: 0 auto; padding: 24px 28px 60px; max-width: 980px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 26px 0 6px; }
.verdict { border-left: 6px solid #2e6b34; background: #f1f6f1; padding: 12px 18px; margin: 16px 0; }
.verdict.refuted { border-color: #a02020; background: #faf0f0; }
.verdict b { font-size: 26px; line-height: 1.25; display: block; }
table { border-collapse: collapse; width: 100%; margin: 4px 0; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: 4px 10px 4px 0; border-bottom: 1px solid #e4e4e4; }
td.number, th.number { text-align: right; white-space: nowrap; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 18px 26px; }
figure { margin: 0; } figure.bounds { max-width: 560px; } figcaption { font-size: 13px; color: #444; }
svg { width: 100%; height: auto; font: 11px system-ui, Helvetica, Arial, sans-serif; fill: #333; }
svg .grid { stroke: #e8e8e8; } svg .frame { fill: none; stroke: #999; }
ul { margin: 4px 0; padding-left: 20px; }
"""
_EPSILON = (
    "Epsilon limits what the trained model can tell about any one person: whatever somebody concludes from it becomes "
    "at most e<sup>epsilon</sup> times as likely through that person's data, up to a chance of about delta. The "
    "ledger of the run supports the claim from above; this page attacks the same training from outside, which bounds "
    "epsilon from below."
)
_FEW = (
    "With fewer strangers than one over the false alarm rate, a column says how many members are found without a "
    "single false alarm. In brackets: 95 % intervals."
)
_METHODS = {
    "clopper-pearson": "counts right and wrong guesses, and assumes nothing about how the noise is made.",
    "gdp": "the same counts, if the trade-off between the two errors is that of Gaussian noise; usually the sharpest.",
    "one-run": "counts guesses about one run whose canaries may influence each other; assumes nothing about the noise.",
    "one-run-fdp": "the same, if the trade-off is that of Gaussian noise.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Attack:
    """One attack of an audit: the bounds that follow from its scores, and its ROC.

    Args:
        name: Such as "gradient canaries".
        threat_model: What the attacker saw and chose.
        bounds: Lower bounds on epsilon, each at a confidence at which the largest may be quoted; may be empty.
        roc: Its ROC.
        expected: For each method the bound that an honest mechanism is expected to show, where that is known.
        claimed_epsilon: What the attack is held against, where it attacks a part of the run that has a claim of its
            own; None for the claim of the whole.
    """

    name: str
    threat_model: str
    bounds: Sequence[LowerBound]
    roc: Roc
    expected: Mapping[str, float] = field(default_factory=dict)
    claimed_epsilon: float | None = None

    @property
    def epsilon(self) -> float:
        """The largest of the bounds, 0 if there is none."""
        return max((bound.epsilon for bound in self.bounds), default=0.0)

    def held_against(self, claimed_epsilon: float) -> float:
        """The claim that the attack may refute: its part's own, or that of the whole run."""
        return claimed_epsilon if self.claimed_epsilon is None else self.claimed_epsilon

    def refutes(self, claimed_epsilon: float) -> bool:
        """Whether the attack proves more than what it is held against."""
        return self.epsilon > self.held_against(claimed_epsilon)


def to_html(
    *,
    title: str,
    claimed_epsilon: float,
    delta: float,
    confidence: float,
    attacks: Sequence[Attack],
    notes: Sequence[str],
) -> str:
    """Returns the page.

    Args:
        title: Its heading.
        claimed_epsilon: The upper bound that the ledger supports.
        delta: Of the claim.
        confidence: With which each attack's best bound holds.
        attacks: What was tried.
        notes: Sentences on how the audit was made and what it cost.
    """
    best = max((attack.epsilon for attack in attacks), default=0.0)
    refuted = any(attack.refutes(claimed_epsilon) for attack in attacks)
    kind = "verdict refuted" if refuted else "verdict"
    headline = "The claim is refuted" if refuted else "No attack contradicts the claim"
    verdict = f"Claimed is that epsilon is at most {claimed_epsilon:.4g} (at delta {delta:.3g}). "
    if best == 0.0:
        verdict += "The attacks prove nothing against it: they could not tell well enough who was in the data. "
    else:
        verdict += f"The strongest attack proves that it is at least {best:.3g} (confidence {confidence:.0%}). "
    if refuted:
        verdict += "One of the two is wrong: do not rely on the claim."
        for attack in attacks:
            if attack.claimed_epsilon is not None and attack.refutes(claimed_epsilon):
                verdict += (
                    f" ({attack.name} attack a part whose own claim is {attack.claimed_epsilon:.4g}, and prove that it "
                    f"is at least {attack.epsilon:.3g}.)"
                )
        against = [(bound, attack.held_against(claimed_epsilon)) for attack in attacks for bound in attack.bounds]
        if all(bound.mu is not None for bound, claim in against if bound.refutes(claim)):
            verdict += " (Only bounds that assume a Gaussian trade-off, see below, exceed it.)"
    else:
        verdict += (
            f"That is {best / claimed_epsilon:.0%} of the claim. Attacks can refute a claim; they can never prove one, "
            "and a small figure may only mean that they were weak."
        )
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<div class="{kind}"><b>{headline}</b>{html.escape(verdict)}</div>',
        f"<p>{_EPSILON}</p>",
        "<h2>How much the attacks prove</h2>",
        _bounds_plot(attacks, claimed_epsilon),
        _bounds_table(attacks, claimed_epsilon),
        _methods(attacks),
        "<h2>What the attackers were given</h2>",
        _list([f"{attack.name}: {attack.threat_model}" for attack in attacks]),
        "<h2>How often the attacks find a member</h2>",
        "<p>Members were in the data of this run, strangers were not; the attacker has to tell them apart. The "
        "horizontal axis is the share of strangers that it wrongly calls members, the vertical axis the share of "
        "members that it finds, both logarithmic. Dashed: guessing. The further above, the better the attack.</p>",
        '<div class="plots">',
        *(_roc_plot(attack) for attack in attacks),
        "</div>",
        _roc_table(attacks),
        f"<p>{_FEW}</p>",
        "<h2>What the bounds assume</h2>",
        *(
            f"<p><b>{html.escape(attack.name)}, {bound.method}</b></p>{_list(bound.assumptions)}"
            for attack in attacks
            for bound in attack.bounds
        ),
        "<h2>How this was made</h2>",
        _list(notes),
    ]
    return document(title, _STYLE, parts)


def _bounds_plot(attacks: Sequence[Attack], claimed: float) -> str:
    rows = [(attack.name, 0.0, attack.epsilon, True) for attack in attacks if attack.bounds]
    if not rows:
        return ""
    top = 1.1 * max(claimed, *(attack.epsilon for attack in attacks))
    axis = Axis(label="epsilon that each attack rules out; vertical: the claim", low=0.0, high=top)
    plot = interval_plot("epsilon values that each attack rules out, and the claim", axis, rows, claimed)
    return f'<figure class="bounds">{plot}</figure>'


def _methods(attacks: Sequence[Attack]) -> str:
    used = {bound.method for attack in attacks for bound in attack.bounds}
    return _list([f"{method}: {words}" for method, words in _METHODS.items() if method in used])


def _bounds_table(attacks: Sequence[Attack], claimed: float) -> str:
    rows = [
        (
            attack.name,
            bound.method,
            f"{bound.epsilon:.4g}",
            f"{bound.epsilon / attack.held_against(claimed):.0%}",
            f"{attack.expected[bound.method]:.4g}" if bound.method in attack.expected else "",
            f"{bound.confidence:.4g}",
        )
        for attack in attacks
        for bound in attack.bounds
    ]
    heads = ("attack", "method", "epsilon is at least", "of the claim", "expected of an honest run", "confidence")
    return _table(heads, rows, words=2)


def _roc_plot(attack: Attack) -> str:
    least = 1e-3 if attack.roc.non_members < 3000 else 1e-4
    axis = {"low": least, "high": 1.0, "log": True}
    curve = line_plot(
        f"ROC of {attack.name}",
        Axis(label="strangers called members", **axis),  # type: ignore[arg-type]
        Axis(label="members found", **axis),  # type: ignore[arg-type]
        [
            Line(name="", points=list(zip(attack.roc.fpr, attack.roc.tpr, strict=True))),
            Line(name="", points=[(least, least), (1.0, 1.0)], dashed=True),
        ],
    )
    return f"<figure>{curve}<figcaption>{html.escape(attack.name)}</figcaption></figure>"


def _roc_table(attacks: Sequence[Attack]) -> str:
    rates = [point.fpr for point in attacks[0].roc.points] if attacks else []
    heads = ("attack", "members", "strangers", "area", *(f"found at {rate:.1%} false alarms" for rate in rates))
    rows = [
        (
            attack.name,
            str(attack.roc.members),
            str(attack.roc.non_members),
            f"{attack.roc.auc:.3f}",
            *(f"{p.tpr:.2%} ({p.low:.2%} to {p.high:.2%})" for p in attack.roc.points),
        )
        for attack in attacks
    ]
    return _table(heads, rows, words=1)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{'' if i < words else ' class=' + chr(34) + 'number' + chr(34)}>{html.escape(cell)}</{tag}>"
            for i, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', heads)}</tr>{body}</table>"


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def to_json(claimed_epsilon: float, delta: float, confidence: float, attacks: Sequence[Attack]) -> dict[str, object]:
    """Returns the audit as a JSON object; the fields of `report.make_report`'s audits are among them."""
    found: list[Mapping[str, object]] = [
        {
            "name": attack.name,
            "threat_model": attack.threat_model,
            "bounds": [bound.to_json() for bound in attack.bounds],
            "expected_epsilon_lower": dict(attack.expected),
            "roc": attack.roc.to_json(),
            **({} if attack.claimed_epsilon is None else {"claimed_epsilon": attack.claimed_epsilon}),
        }
        for attack in attacks
    ]
    best = max((attack.epsilon for attack in attacks), default=0.0)
    return {
        "schema": "dpsb-audit/1",
        "claimed_epsilon": claimed_epsilon,
        "delta": delta,
        "confidence": confidence,
        "epsilon_lower": best,
        "ratio": best / claimed_epsilon,
        "refuted": any(attack.refutes(claimed_epsilon) for attack in attacks),
        "attacks": found,
    }
