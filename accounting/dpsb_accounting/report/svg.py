"""Plots as inline SVG: lines on linear or logarithmic axes, and intervals beside each other."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 14, 46
_COLOURS = ("#1f4e79", "#b3541e", "#4d7c4d", "#777777")


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of a plot.

    Args:
        name: What the legend says; empty for none.
        points: (x, y) pairs in drawing order; those that an axis cannot show are left out.
        dashed: Whether it is a reference, not a result.
        dots: Whether every point is marked.
    """

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False
    dots: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """An axis: its label, its ends, and whether it is logarithmic (both ends above 0 then)."""

    label: str
    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies between the ends, 0 to 1."""
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def holds(self, value: float) -> bool:
        """Whether the axis can show a value."""
        return math.isfinite(value) and self.low <= value <= self.high

    def ticks(self) -> list[float]:
        """Round values between the ends."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            stride = max(1, math.ceil((last - first) / 6))
            return [10.0**power for power in range(first, last + 1, stride)]
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
        count = math.floor((self.high - self.low) / step + 1e-9)
        start = math.ceil(self.low / step - 1e-9) * step
        return [start + step * i for i in range(count + 1) if start + step * i <= self.high * (1 + 1e-12)]


def line_plot(title: str, x: Axis, y: Axis, lines: Sequence[Line]) -> str:
    """Returns one plot as an SVG element.

    Args:
        title: What it shows, for readers who cannot see it.
        x: The horizontal axis.
        y: The vertical axis.
        lines: What is drawn, in order.
    """
    parts = _frame(title, x, y)
    for i, line in enumerate(lines):
        colour = _COLOURS[i % len(_COLOURS)]
        inside = [(_x(x, a), _y(y, b)) for a, b in line.points if x.holds(a) and y.holds(b)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in inside)
        dash = ' stroke-dasharray="5 4"' if line.dashed else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>')
        if line.dots:
            parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.6" fill="{colour}"/>' for a, b in inside]
    return "\n".join([*parts, *_legend(lines), "</svg>"])


def interval_plot(title: str, x: Axis, rows: Sequence[tuple[str, float, float, bool]], mark: float) -> str:
    """Returns intervals below each other, one per engine, and a vertical line where the claim is.

    Args:
        title: What it shows.
        x: The horizontal axis.
        rows: Name, lower end, upper end (either may lie beyond the axis), and whether it is a bound (else dashed).
        mark: The claim.
    """
    height = _TOP + 26 * len(rows) + _BOTTOM
    left = 120
    parts = [_open(title, height)]
    bottom = height - _BOTTOM

    def at(value: float) -> float:
        return left + min(max(x.place(value), 0.0), 1.0) * (WIDTH - _RIGHT - left)

    for tick in x.ticks():
        parts.append(f'<line x1="{at(tick):.1f}" y1="{_TOP}" x2="{at(tick):.1f}" y2="{bottom}" class="grid"/>')
        parts.append(f'<text x="{at(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{_tick(tick)}</text>')
    for i, (name, low, high, rigorous) in enumerate(rows):
        middle = _TOP + 26 * i + 13
        first, last = at(low), at(min(high, x.high))
        dash = "" if rigorous else ' stroke-dasharray="4 3"'
        colour = _COLOURS[0] if rigorous else _COLOURS[3]
        style = f'stroke="{colour}" stroke-width="2"'
        parts.append(f'<text x="{left - 8}" y="{middle + 4}" text-anchor="end">{html.escape(name)}</text>')
        parts.append(f'<line x1="{first:.1f}" y1="{middle}" x2="{last:.1f}" y2="{middle}" {style}{dash}/>')
        for value, place in ((low, first), (high, last)):
            if x.holds(value):
                parts.append(f'<line x1="{place:.1f}" y1="{middle - 5}" x2="{place:.1f}" y2="{middle + 5}" {style}/>')
    parts.append(f'<line x1="{at(mark):.1f}" y1="{_TOP}" x2="{at(mark):.1f}" y2="{bottom}" stroke="{_COLOURS[1]}"/>')
    centre = (left + WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{centre:.1f}" y="{height - 8}" text-anchor="middle">{html.escape(x.label)}</text>')
    return "\n".join([*parts, "</svg>"])


def _frame(title: str, x: Axis, y: Axis) -> list[str]:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = [_open(title, HEIGHT)]
    for tick in x.ticks():
        at = f"{_x(x, tick):.1f}"
        parts.append(f'<line x1="{at}" y1="{_TOP}" x2="{at}" y2="{bottom}" class="grid"/>')
        parts.append(f'<text x="{at}" y="{bottom + 16}" text-anchor="middle">{_tick(tick)}</text>')
    for tick in y.ticks():
        at = f"{_y(y, tick):.1f}"
        parts.append(f'<line x1="{_LEFT}" y1="{at}" x2="{right}" y2="{at}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at}" dy="4" text-anchor="end">{_tick(tick)}</text>')
    width, height = right - _LEFT, bottom - _TOP
    parts.append(f'<rect x="{_LEFT}" y="{_TOP}" width="{width}" height="{height}" class="frame"/>')
    centre = (_LEFT + right) / 2
    parts.append(f'<text x="{centre}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(x.label)}</text>')
    middle = (_TOP + bottom) / 2
    turned = f'transform="rotate(-90 14 {middle})" text-anchor="middle"'
    parts.append(f'<text x="14" y="{middle}" {turned}>{html.escape(y.label)}</text>')
    return parts


def _legend(lines: Sequence[Line]) -> list[str]:
    parts, named = [], [(i, line) for i, line in enumerate(lines) if line.name]
    for place, (i, line) in enumerate(named):
        y, right = _TOP + 16 + 16 * place, WIDTH - _RIGHT - 8
        colour, dash = _COLOURS[i % len(_COLOURS)], ' stroke-dasharray="5 4"' if line.dashed else ""
        parts.append(f'<text x="{right - 26}" y="{y}" text-anchor="end" class="key">{html.escape(line.name)}</text>')
        parts.append(
            f'<line x1="{right - 20}" y1="{y - 4}" x2="{right}" y2="{y - 4}" stroke="{colour}" stroke-width="2"{dash}/>'
        )
    return parts


def _open(title: str, height: int) -> str:
    text = html.escape(title)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{text}"><title>{text}</title>'


def _x(axis: Axis, value: float) -> float:
    return _LEFT + axis.place(value) * (WIDTH - _RIGHT - _LEFT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - _BOTTOM - axis.place(value) * (HEIGHT - _BOTTOM - _TOP)


def _tick(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        mantissa, _, power = f"{value:.0e}".partition("e")
        sign = "−" if power.startswith("-") else ""
        return f"{mantissa}e{sign}{int(power.lstrip('+-'))}"
    return f"{value:.6g}"
