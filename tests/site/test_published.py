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
    page = published.PAGE.read_text()
    assert published.replaced(page) == page


def test_each_picture_is_of_the_points_of_the_rows(published):
    for one in published.SETS:
        assert published.picture_of(one).read_text().endswith(published.mark(one)), one.name
        assert len({point.label for point in published.shown(one)}) == 8, "a picture has eight colours"


def test_every_set_has_each_required_arm_and_one_best_mean_a_column(published):
    required = ("public-near", "hybrid-near", "weight", "random", "private", "leak", "lora", "ffa-lora")
    for one in published.SETS:
        found = {(point.method, point.epsilon) for point in published.points(published.runs_of(one))}
        assert {(arm, 3.0) for arm in required} <= found
        assert published.table(one).count("**") == 2 * len(published.EPSILONS)  # two marks a cell


def test_a_page_without_its_marks_is_left_alone(published):
    begin, end = published.BEGIN, published.END
    marks = [
        (published.AIM_BEGIN, published.AIM_END),
        (published.FIXED_BEGIN, published.FIXED_END),
        (published.TRIED_BEGIN, published.TRIED_END),
    ]
    aims = "".join(f"{first}old\n{last}" for first, last in marks)
    for page in (aims, begin + aims, end + begin + aims, begin + 2 * end + aims, begin + end):
        with pytest.raises(ValueError, match="once each"):
            published.replaced(page)
    changed = published.replaced(f"before\n{begin}old\n{end}after\n{aims}")
    tables = (published.aim(), published.fixed(), published.tried())
    made = "".join(f"{first}{table}{last}" for (first, last), table in zip(marks, tables, strict=True))
    assert changed == f"before\n{begin}{published.block()}{end}after\n{made}"


def test_ahead_means_by_more_than_either_standard_deviation(published):
    def point(mean, sd):
        runs = [
            published.Run("lora", 3.0, False, 0.1, value) for value in (mean - sd, mean, mean + sd)[: 3 if sd else 1]
        ]
        (found,) = published.points(runs)
        return found

    assert published.verdict("accuracy", point(0.6, 0.02), point(0.55, 0.04)) == "ahead"
    assert published.verdict("accuracy", point(0.6, 0.02), point(0.55, 0.06)) == "level"
    assert published.verdict("perplexity", point(9.0, 0.1), point(8.0, 0.2)) == "behind"
    assert published.verdict("perplexity", point(9.0, 0), point(12.0, 0.2)) == "one run"


def test_an_arms_runs_are_those_of_the_last_file_that_has_any(published, tmp_path, monkeypatch):
    monkeypatch.setattr(published, "RESULTS", tmp_path)
    head = "arm,purpose,learning_rate,target,epsilon,perplexity\n"
    (tmp_path / "old.csv").write_text(
        head + "sb-near,table,0.1,8,7.99,5\nsb-near,tuning,0.1,8,7.99,4\nlora,table,0.1,8,7.99,9\n"
        "sb-near,tuning,0.3,8,7.99,9\nsb-leak,table,0.1,8,inf,2\nsb,table,0.1,inf,inf,3\n–,before,0,,,20\n"
    )
    (tmp_path / "new.csv").write_text(head + "sb-near,table,0.1,8,7.99,6\nsb-near,table,0.1,8,7.99,7\n")
    one = published.Published("e2e", "E2E", "perplexity", 2, ("old.csv", "new.csv"))
    runs = published.runs_of(one)
    assert sorted((run.arm, run.tuning, run.value) for run in runs) == [
        ("leak", False, 2.0),
        ("lora", False, 9.0),
        ("public-near", False, 6.0),
        ("public-near", False, 7.0),
        ("public-near", True, 4.0),
        ("public-near", True, 9.0),
    ]
    near = "| R-only, `public` near | <u>0.1</u>: 4.00, 0.3: 9.00 | – | – | 6.50 ± 0.71 (2) |"
    assert near in published.table(one)
    assert "| R-only, `leak` (epsilon ∞) |  | – | – | 2.00 (1) |" in published.table(one)
    assert "| DP-LoRA |  | – | – | 9.00 (1) |" in published.table(one)
