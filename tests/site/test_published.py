"""The published tables say what the rows in the results' files say."""

from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def published(monkeypatch):
    if not (ROOT / "tests" / "benchmarks" / "results").is_dir():
        pytest.skip("the rows of runs are in a checkout, not in a source distribution")
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    return import_module("published")


def test_the_tables_in_the_documentation_are_those_of_the_rows(published):
    assert published.BEGIN + published.block() + published.END in published.PAGE.read_text()


@pytest.mark.parametrize("number", range(4))
def test_every_set_has_each_required_arm_and_no_arm_is_bold_whose_epsilon_is_infinite(published, number):
    one = published.SETS[number]
    found = {(point.method, point.epsilon) for point in published.points(one, published.runs_of(one))}
    required = ("public-near", "hybrid-near", "weight", "random", "private", "leak", "lora", "ffa-lora")
    assert {(arm, 3.0) for arm in required} <= found
    lines = published.table(one).splitlines()
    assert not [line for line in lines if "leak" in line and "**" in line]
    assert sum(line.count("**") for line in lines) == 2 * len(published.EPSILONS)


def test_an_arms_runs_are_those_of_the_last_file_that_has_any(published, tmp_path, monkeypatch):
    monkeypatch.setattr(published, "RESULTS", tmp_path)
    head = "arm,purpose,learning_rate,target,epsilon,perplexity\n"
    (tmp_path / "old.csv").write_text(
        head + "sb-near,table,0.1,8,7.99,5\nsb-near,tuning,0.1,8,7.99,4\nlora,table,0.1,8,7.99,9\n"
        "sb,table,0.1,inf,inf,3\n–,before,0,,,20\n"
    )
    (tmp_path / "new.csv").write_text(head + "sb-near,table,0.1,8,7.99,6\nsb-near,table,0.1,8,7.99,7\n")
    one = published.Published("e2e", "E2E", "perplexity", 2, ("old.csv", "new.csv"))
    runs = published.runs_of(one)
    assert sorted((run.arm, run.tuning, run.value) for run in runs) == [
        ("lora", False, 9.0),
        ("public-near", False, 6.0),
        ("public-near", False, 7.0),
        ("public-near", True, 4.0),
    ]
    assert "| R-only, `public` near | 0.1: 4.00 | – | – | **6.50 ± 0.71** (2) |" in published.table(one)
    assert "| DP-LoRA |  | – | – | 9.00 (1) |" in published.table(one)
