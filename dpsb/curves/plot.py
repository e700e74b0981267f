"""The curve as a picture: mean with a band of one standard deviation, over epsilon on a logarithmic axis."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from dpsb.curves.table import Point

COLOURS = ("#1f5f8b", "#c2571a", "#2e7d4f", "#7b4fa3", "#b03060", "#8a6d1a", "#118a8a", "#1a1a1a")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_GREY = "#8a8f98"
_DASHED = (0, (4, 2))
_LABEL = 1.025
"""Where names begin, in widths of the axes."""
_PERCENT = ("accuracy",)
_AXES = {"accuracy": "held-out accuracy (%)", "perplexity": "held-out perplexity"}


def check_matplotlib() -> None:
    """Raises ValueError if there is nothing to draw with."""
    if find_spec("matplotlib") is None:
        raise ValueError("A curve needs matplotlib: pip install '.[demo]' in a checkout.")


def draw(points: Sequence[Point], metric: str, kind: str) -> bytes:
    """The picture.

    Args:
      points: Of the summary; those without a metric are left out.
      metric: What is drawn.
      kind: ``"png"``, ``"svg"`` (text as outlines, looks the same everywhere) or ``"inline"`` (an ``<svg>`` element
        with text as text, for a page).
    """
    check_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(
        {
            "svg.fonttype": "none" if kind == "inline" else "path",
            "svg.hashsalt": "dpsb",
            "font.size": 10,
            "axes.edgecolor": _GREY,
            "xtick.color": "#333333",
            "ytick.color": "#333333",
            "axes.labelcolor": "#333333",
        }
    ):
        figure = Figure(figsize=(7.6, 4.3), layout="constrained")
        _fill(figure.subplots(), points, metric)
        buffer = io.BytesIO()
        if kind == "png":
            figure.savefig(buffer, format="png", dpi=200)
        else:
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue()) if kind == "inline" else buffer.getvalue()


def _inline(svg: bytes) -> bytes:
    """The ``<svg>`` element alone, without what names addresses that nobody needs."""
    text = svg.decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text)).encode()


def _fill(axes: Any, points: Sequence[Point], metric: str) -> None:
    shown = [point for point in points if point.mean is not None]
    finite = sorted({point.epsilon for point in points if math.isfinite(point.epsilon)})
    places = _Places(finite, any(math.isinf(point.epsilon) for point in points))
    scale = 100.0 if metric in _PERCENT else 1.0
    ends = []
    for number, label in enumerate(dict.fromkeys(point.label for point in points)):
        mine = [point for point in shown if point.label == label]
        if mine:
            style = (COLOURS[number % len(COLOURS)], _MARKERS[number % len(_MARKERS)])
            if any(point.unbounded for point in mine):  # a reference, which has no place on an axis of epsilon
                label, style = f"{label}, ε = ∞", (_GREY, style[1])
            ends.append((label, style[0], *_series(axes, mine, places, scale, style)))
    _frame(axes, places, metric, any(point.unbounded for point in shown))
    _labels(axes, ends)


class _Places:
    """Where epsilons lie on the logarithmic axis: the finite ones, and infinity behind a gap."""

    def __init__(self, finite: Sequence[float], infinite: bool) -> None:
        self.finite = list(finite)
        low, high = (self.finite[0], self.finite[-1]) if self.finite else (1.0, 1.0)
        span = math.log10(high / low)
        decades = max(span, 0.6)
        margin = 10 ** ((0.06 if span else 0.4) * decades)
        self.low = low / margin
        self.infinity = high * 10 ** (0.2 * decades) if infinite else None
        self.half = 10 ** (0.06 * decades)
        self.right = self.infinity * self.half if self.infinity is not None else high * margin
        self.gap = high * 10 ** (0.09 * decades)


def _series(
    axes: Any, points: Sequence[Point], places: _Places, scale: float, style: tuple[str, str]
) -> tuple[float, float]:
    """Draws one method; returns where its last point is."""
    colour, marker = style
    finite = sorted((p for p in points if math.isfinite(p.epsilon)), key=lambda p: p.epsilon)
    x, y = [p.epsilon for p in finite], [scale * (p.mean or 0.0) for p in finite]
    spread = [scale * (p.sd or 0.0) for p in finite]
    if any(spread):
        low = [a - b for a, b in zip(y, spread, strict=True)]
        high = [a + b for a, b in zip(y, spread, strict=True)]
        axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
        if len(x) == 1:  # a band has no width there
            axes.errorbar(x, y, spread, color=colour, alpha=0.5, capsize=4, linewidth=1.2)
    look = {"marker": marker, "markersize": 5.5, "linewidth": 1.9, "markeredgecolor": "white", "zorder": 3}
    axes.plot(x, y, color=colour, linestyle=_DASHED if any(p.unbounded for p in finite) else "-", **look)
    end = (x[-1], y[-1]) if x else (places.low, 0.0)
    for point in points:
        if places.infinity is not None and math.isinf(point.epsilon):
            value, half = scale * (point.mean or 0.0), scale * (point.sd or 0.0)
            ends = (places.infinity / places.half, places.infinity * places.half)
            if half:
                axes.fill_between(ends, value - half, value + half, color=colour, alpha=0.16, linewidth=0)
            axes.plot(ends, (value, value), color=colour, linestyle=_DASHED, linewidth=1.9, zorder=3)
            end = (ends[1], value)
    return end


def _frame(axes: Any, places: _Places, metric: str, references: bool) -> None:
    axes.set_xscale("log")
    axes.set_xlim(places.low, places.right)
    ticks = [*places.finite, *([places.infinity] if places.infinity else [])]
    axes.set_xticks(ticks, [f"{value:g}" for value in places.finite] + ["∞"] * (places.infinity is not None))
    axes.tick_params(axis="both", which="both", length=3, color=_GREY)
    axes.xaxis.set_minor_locator(_no_ticks())
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    notes = [";  ∞: without privacy"] * bool(places.infinity) + ["\ngrey: ε = ∞, drawn at its target"] * references
    axes.set_xlabel("".join(["ε of one run, at most (logarithmic)", *notes]))
    axes.set_ylabel(_AXES.get(metric, metric))
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    if places.infinity is not None and places.finite:
        trans = axes.get_xaxis_transform()
        axes.plot(
            [places.gap], [0], transform=trans, marker=[(-0.5, -1), (0.5, 1)], color=_GREY, clip_on=False, zorder=5
        )
        axes.axvline(places.gap, color="#d5d8dc", linewidth=0.8, linestyle=(0, (1, 3)))


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _labels(axes: Any, ends: Sequence[tuple[str, str, float, float]]) -> None:
    """Each method's name beside its end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    heights = apart([y for *_, y in ends], low, high, (high - low) * 0.062)
    for (label, colour, x, y), height in zip(ends, heights, strict=True):
        axes.annotate(
            label,
            parse_math=False,  # a file's name may hold a dollar sign
            xy=(x, y),
            xytext=(_LABEL, height),
            textcoords=axes.get_yaxis_transform(),
            color=colour,
            va="center",
            fontsize=10,
            fontweight="bold",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0, 0.5),  # at the name's beginning, so that no line crosses another name
                "color": colour,
                "alpha": 0.45,
                "linewidth": 0.9,
                "shrinkA": 1,
                "shrinkB": 3,
            },
        )


def apart(values: Sequence[float], low: float, high: float, least: float) -> list[float]:
    """Heights near ``values``, at least ``least`` from each other, between the ends where there is room.

    Example:
      >>> apart([1.0, 1.0, 5.0], 0.0, 10.0, 2.0)
      [0.0, 2.0, 5.0]
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    blocks: list[tuple[list[int], float]] = []  # indices that touch, and the height of the lowest
    for i in order:
        blocks.append(([i], values[i]))
        while len(blocks) > 1 and blocks[-2][1] + least * len(blocks[-2][0]) > blocks[-1][1]:
            upper, lower = blocks.pop(), blocks.pop()
            merged = lower[0] + upper[0]
            middle = sum(values[j] - least * place for place, j in enumerate(merged)) / len(merged)
            room = high - least * (len(merged) - 1)
            blocks.append((merged, max(low, min(middle, room))))
    heights = [0.0] * len(values)
    for indices, start in blocks:
        for place, i in enumerate(indices):
            heights[i] = start + least * place
    return heights
