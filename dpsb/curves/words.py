"""Sentences on what a curve shows. All of them follow from the tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_CEILING, Decimal

from dpsb.curves.composed import Composed
from dpsb.curves.entries import labels_of
from dpsb.curves.sweep import Curve
from dpsb.curves.table import Point, is_better
from dpsb_accounting.report.words import up

OUTSIDE = (
    "Held-out metrics are outside the guarantee: they are computed on the held-out rows without noise, so whoever sees "
    "them learns something about the people in those rows."
)
_NAMES = {"accuracy": "accuracy", "perplexity": "perplexity"}


def findings(curve: Curve) -> list[str]:
    """What the curve shows: the best method at each epsilon, whether by more than a standard deviation, and the gap.

    The standard deviation is the larger one of the best two methods. A point whose epsilon is infinite at a finite
    target is compared with nothing; a sentence of its own says so, and one which methods have no point at infinity.
    """
    groups: list[tuple[tuple[str, str], list[float]]] = []
    for epsilon in curve.settings.epsilons:
        verdict = _verdict(curve, epsilon)
        if verdict is None:
            continue
        if groups and groups[-1][0] == verdict:
            groups[-1][1].append(epsilon)
        else:
            groups.append((verdict, [epsilon]))
    said = [f"At {listed(epsilons)} {best} {how}." for (best, how), epsilons in groups]
    if curve.settings.repeats == 1 and said:
        said.append("Each is a single run, which does not tell how far chance goes.")
    return [*said, *filter(None, [_gap(curve), _references(curve), curve.settings.left_out()])]


def _verdict(curve: Curve, epsilon: float) -> tuple[str, str] | None:
    ranked = _ranked(curve, epsilon)
    if len(ranked) < 2:
        if not ranked or len(curve.settings.entries) == 1:
            return None
        others = any(point.unbounded for point in curve.points if point.epsilon == epsilon)
        return ranked[0].label, "is the only method with a result" + " and a finite ε" * others
    best, second = ranked[0], ranked[1]
    if best.mean == second.mean:
        return f"{best.label} and {second.label}", "are equal"
    if best.sd is None or second.sd is None:
        return best.label, f"is ahead of {second.label}"
    margin, spread = abs((best.mean or 0) - (second.mean or 0)), max(best.sd, second.sd)
    far = "by more than one standard deviation" if margin > spread else "within one standard deviation"
    return best.label, f"is ahead of {second.label} {far}"


def _ranked(curve: Curve, epsilon: float) -> list[Point]:
    """The points at one epsilon, the best first; without those that have no guarantee at a finite one."""
    points = [p for p in curve.points if p.epsilon == epsilon and p.mean is not None and not p.unbounded]
    rising = is_better(curve.metric, 1.0, 0.0)
    return sorted(points, key=lambda point: -(point.mean or 0) if rising else (point.mean or 0))


def best_mean(curve: Curve, epsilon: float) -> float | None:
    """The best mean at one epsilon among the points that are compared; None without one."""
    return next((point.mean for point in _ranked(curve, epsilon)), None)


def _references(curve: Curve) -> str:
    """Which methods are shown at a finite target although their epsilon is infinite."""
    labels = list(dict.fromkeys(point.label for point in curve.points if point.unbounded))
    if not labels:
        return ""
    are, their = ("is a reference", "its") if len(labels) == 1 else ("are references", "their")
    return f"{' and '.join(labels)} {are}: {their} ε is infinite whatever the target, so it is not compared."


def _gap(curve: Curve) -> str:
    """How far the best private cell is from the best non-private one."""
    finite = [epsilon for epsilon in curve.settings.epsilons if math.isfinite(epsilon)]
    free, private = _ranked(curve, math.inf), _ranked(curve, finite[-1]) if finite else []
    if not free or not private:
        return ""
    best, top = private[0], free[0]
    difference = (best.mean or 0) - (top.mean or 0)
    amount = f"{abs(100 * difference):.1f} points" if curve.metric == "accuracy" else f"{abs(difference):.3g}"
    if not difference:
        return f"The best at {listed(finite[-1:])}, {best.label}, equals the best without privacy, {top.label}."
    where = "below" if difference < 0 else "above"
    return (
        f"The best at {listed(finite[-1:])}, {best.label}, lies {amount} {where} the best without privacy, {top.label}."
    )


def price(composed: Composed) -> tuple[str, str]:
    """The composed epsilon: a headline, and what it is made of."""
    made = [f"{composed.curve} of the curve"] if composed.curve else []
    made += [f"{composed.tuning} for tuning"] if composed.tuning else []
    made += [f"{composed.unfinished} unfinished"] if composed.unfinished else []
    made += [f"{composed.abandoned} abandoned"] if composed.abandoned else []
    runs = f"{composed.runs} run{'s' * (composed.runs != 1)} ({', '.join(made)})"
    if composed.bound is None:
        if composed.unreadable:
            lost = ", ".join(composed.unreadable)
            return "unknown", f"{lost} cannot be read or is gone, so nothing bounds what was spent."
        return "0", "Nothing was run."
    delta = f"δ = {power(composed.bound.delta or 0.0)}"
    about = f"per {composed.bound.unit}, {composed.bound.neighboring}"
    if composed.tainted:
        return "no claim", f"{runs}; void, because {'; '.join(composed.tainted)}."
    if composed.bound.is_finite:
        headline = f"ε ≤ {up(composed.bound.upper, 4)} at {delta}"
        return headline, f"All {runs} together, {about}; at least {down(composed.bound.lower, 4)}."
    private = composed.runs - composed.non_private
    rest = ""
    if private and composed.private is not None and composed.private.is_finite:
        rest = (
            f" The {private} private run{'s' * (private != 1)} alone compose to ε ≤ {up(composed.private.upper, 4)} at "
            f"δ = {power(composed.private.delta or 0.0)} (information: the others did run)."
        )
    return "ε = ∞", (
        f"All {runs} together, {about}: {composed.non_private} of them had no guarantee, so the data of this curve has "
        f"none.{rest}"
    )


def not_trained_on(curve: Curve) -> str:
    """What the composed epsilon leaves out."""
    split = curve.settings.split()
    if split is None:
        return OUTSIDE
    parts = ((split.validation, "for tuning"), (split.test, "for the curve"))
    held_out = " and ".join(f"{100 * share:.3g} % {purpose}" for share, purpose in parts if share)
    return f"Of the data {held_out} are held out and not covered. {OUTSIDE}"


def resolution(curve: Curve) -> str:
    """How far an accuracy on so many held-out rows is off by chance; empty for another metric."""
    means = [point.mean for point in curve.points if point.mean is not None]
    counts = [n for row in curve.rows if row.purpose == "curve" and (n := row.metrics.get("examples"))]
    if curve.metric != "accuracy" or not means or not counts:
        return ""
    best, count = max(means), min(counts)
    error = 100 * math.sqrt(best * (1 - best) / count)
    return (
        f"On {count:.0f} held-out rows one standard error of an accuracy of {100 * best:.0f} % is {error:.1f} points."
    )


def tuning(curve: Curve) -> list[str]:
    """How learning rates came about, a sentence for each method."""
    settings, said = curve.settings, []
    labels = labels_of(settings.entries)
    for entry in settings.entries:
        rates, label = settings.rates[entry.text], labels[entry.text]
        points = [point for point in curve.points if point.method == entry.text]
        if len(rates) == 1:
            said.append(f"{label}: learning rate {rates[0]:g}, given; no tuning runs in this sweep.")
            continue
        runs = sum(point.tuning_runs for point in points)
        chosen = {point.learning_rate for point in points if point.learning_rate is not None}
        edge = sorted(chosen & {min(rates), max(rates)}) if len(rates) > 2 else []
        warning = f"; {' and '.join(f'{rate:g}' for rate in edge)} at the edge of the grid" if edge else ""
        said.append(
            f"{label}: {runs} tuning runs over {', '.join(f'{rate:g}' for rate in rates)} at every ε, judged on "
            f"the validation data; chosen {', '.join(f'{rate:g}' for rate in sorted(chosen)) or 'none'}{warning}."
        )
    return said


def power(value: float) -> str:
    """A delta as a reader writes it, ``"3.31·10⁻⁵"``: three digits, rounded up, so that an epsilon holds at it."""
    exact = Decimal(repr(value))
    rounded = exact.quantize(Decimal((0, (1,), exact.adjusted() - 2)), ROUND_CEILING) if value else exact
    mantissa, _, exponent = f"{rounded:.2e}".partition("e")
    if -4 < int(exponent) < 4:
        return f"{float(rounded):.3g}"
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{float(mantissa):g}·10{raised}"


def down(value: float, significant: int = 6) -> str:
    """Some digits, rounded down, so that a printed lower bound is never larger than the bound."""
    if value == 0:
        return "0"
    digits = significant - 1 - math.floor(math.log10(value))
    return f"{math.floor(value * 10.0**digits + 1e-9) / 10.0**digits:.{max(digits, 0)}f}"


def listed(epsilons: Sequence[float]) -> str:
    """``"ε = 0.5, 1 and 2"``; infinity is said in words."""
    names = [f"{value:g}" if math.isfinite(value) else "∞" for value in epsilons]
    return "ε = " + (names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}")


def shown(value: float | None, metric: str) -> str:
    """A metric's value as a reader wants it: accuracies in percent."""
    if value is None:
        return "–"
    return f"{100 * value:.1f}" if metric == "accuracy" else f"{value:.4g}"


def with_sd(point: Point, metric: str) -> str:
    """Mean ± standard deviation."""
    return shown(point.mean, metric) + (f" ± {shown(point.sd, metric)}" if point.sd is not None else "")
