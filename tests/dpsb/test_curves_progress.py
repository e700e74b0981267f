"""What the operator of a sweep sees: how far it is, and how long it takes."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from dpsb.curves import progress
from dpsb.curves.progress import Watcher


def ended(name, value=0.5, failure=None):
    facts = {"method": "sb", "basis": "weight", "epsilon": 3.0, "learning_rate": 0.02, "purpose": "curve", "repeat": 1}
    return SimpleNamespace(folder=f"cells/{name}", metrics={"accuracy": value}, failure=failure, **facts)


def job(name):
    return SimpleNamespace(cell=SimpleNamespace(name=name))


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def test_time_left_is_that_of_what_this_start_has_done(clock):
    screen = io.StringIO()
    with Watcher(Console(file=screen, width=200), "classification") as watch:
        watch.begin(total=12, kept=2)
        assert watch._left() == "", "nothing is known yet"
        clock.seconds += 60
        watch.step(job("a"), 20, 40)
        assert watch._left() == "about 19 min left", "9.5 cells of two minutes each; the kept ones tell nothing"
        clock.seconds += 60
        watch.end(ended("a"))
        assert watch._left() == "about 18 min left"
        clock.seconds += 1380
        watch.step(job("b"), 4, 40)
        watch.end(ended("c", failure="no [room]"))
        assert watch._left() == "about 1.6 h left"
        for name in "bdefghij":
            watch.end(ended(name))
        assert watch._left() == ""
    lines = screen.getvalue().splitlines()
    assert lines[0] == "12 runs, each of which adds to the epsilon of all"
    assert lines[1] == "2 of 12 cells are finished already and stay as they are"
    assert "3/12 sb:weight, epsilon 3, learning rate 0.02, curve run 1: accuracy 0.5" in lines[2]
    assert "b: step 4/40  about" in lines[3], "a line a minute where there is no bar"
    assert "failed: no [room]" in lines[4]
