"""A reference without a guarantee stands on the page, and nobody may take it for a method at a finite epsilon."""

import math
import re
from pathlib import Path

import pytest
from sweeps import settings_of, shared

from dpsb.curves.cells import Cell, pairs
from dpsb.curves.composed import composed
from dpsb.curves.page import page
from dpsb.curves.plot import draw
from dpsb.curves.sweep import Curve
from dpsb.curves.table import Row, points_of, read_row
from dpsb.curves.words import findings


@pytest.fixture
def curve(tmp_path):
    """What a sweep finds whose leak is the best everywhere, without the runs."""
    given = shared(allow_non_private_basis=True)
    settings = settings_of(given, methods="sb:weight,sb:leak", epsilons="1,8,inf")
    rows = []
    for entry, epsilon in pairs(settings):
        row = vars(read_row(Path(), Cell(entry, epsilon, 0.02, 1, False), "classification", failure="not run"))
        leaks = entry.basis == "leak"
        ends = {"epsilon_lower": math.inf, "epsilon_upper": math.inf} if leaks else {"epsilon_upper": epsilon}
        found = {"failure": None, "metrics": {"accuracy": 0.9 if leaks else 0.5}}
        rows.append(Row(**(row | ends | found)))
    points = points_of(pairs(settings), rows, "accuracy")
    return Curve(settings, tuple(rows), tuple(points), composed(tmp_path), {})


def test_a_leak_is_never_ahead_and_never_bold(curve):
    assert [point.unbounded for point in curve.points] == [False, True, False, True, False, False]
    said = " ".join(findings(curve))
    assert "At ε = 1 and 8 sb (weight) is the only method with a result and a finite ε." in said
    assert "The best at ε = 8, sb (weight), lies" in said
    assert "sb (leak) is a reference: its ε is infinite whatever the target, so it is not compared." in said
    text = page(curve)
    assert text.count('<span class="reference">90.0, ε = ∞</span>') == 2
    assert text.count("<b>50.0</b>") == 2
    assert text.count("<b>90.0</b>") == 1, "at ε = ∞ nobody has a guarantee, so there it is compared"


def test_a_leak_is_drawn_grey_and_dashed_with_its_epsilon(curve):
    picture = draw(curve.points, "accuracy", "inline").decode()
    assert "sb (leak), ε = ∞" in picture
    line = r'<path d="M [^"]*" clip-path="[^"]*" style="fill: none; stroke-dasharray: [^"]*stroke: #8a8f98'
    assert re.search(line, picture)
    alone = [point for point in curve.points if not point.unbounded]
    assert "grey" in picture
    assert "grey" not in draw(alone, "accuracy", "inline").decode()
