"""Parts of one file, told apart by a public seed; sentences and heights of labels."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import workbench
from hypothesis import given
from hypothesis import strategies as st

from dpsb.config import ConfigError
from dpsb.curves import words
from dpsb.curves.plot import apart
from dpsb.curves.settings import curve_settings
from dpsb.curves.sweep import Curve
from dpsb.curves.table import Point
from dpsb.data import DataError, read_table
from dpsb.parts import SIDES, Part, part_of

SPLIT = "(test=0.2,validation=0.1,seed=3)"


def sides(rows, **changes):
    """The side of each row."""
    part = Part(source="x", side="train", test=0.3, validation=0.2, seed=1, **changes)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    found = {i: side for side in SIDES for i in part.other(side).rows(columns)}
    assert sorted(found) == list(range(len(rows))), "each row has one side"
    return [found[i] for i in range(len(rows))]


def test_a_row_more_or_less_moves_nobody_else():
    rows = [{"text": f"row {i}", "label": i % 2} for i in range(200)]
    whole = sides(rows)
    for gone in (0, 57, 199):
        assert sides(rows[:gone] + rows[gone + 1 :]) == whole[:gone] + whole[gone + 1 :]
    assert sides(rows[::-1]) == whole[::-1]
    assert 30 < whole.count("test") < 90
    assert 20 < whole.count("validation") < 60


def test_equal_rows_and_rows_of_a_person_stay_together():
    assert len(set(sides([{"text": "the same"}] * 20))) == 1
    rows = [{"text": f"row {i}", "who": f"person {i % 10}"} for i in range(100)]
    found = sides(rows, by="who")
    assert all(found[i] == found[i % 10] for i in range(100))
    assert len(set(found)) == 3


@pytest.mark.parametrize("written", ["{} ", " {}", "\t{}"])
def test_a_person_is_on_one_side_however_blanks_stand_around_the_name(written):
    """As units are formed: a person who is trained on is not measured on as well."""
    names = [f"person {i}" for i in range(40)]
    plain, spaced = (sides([{"text": "x", "who": how.format(n)} for n in names], by="who") for how in ("{}", written))
    assert spaced == plain
    for missing in (None, "", "  ", math.nan):
        rows = [{"text": f"row {i}", "who": missing} for i in range(40)]
        assert len(set(sides(rows, by="who"))) == 3, "rows of nobody do not belong together"


def test_the_parts_of_a_file_are_read_without_a_copy(tmp_path):
    source = workbench.data_file(count=60)
    whole = read_table(source).columns["text"]
    parts = [read_table(f"{source}#{side}{SPLIT}") for side in SIDES]
    assert sorted(text for part in parts for text in part.columns["text"]) == sorted(whole)
    assert parts[0].source.endswith(f"rows.jsonl#train{SPLIT}")
    with pytest.raises(DataError, match="no column 'who'"):
        read_table(f"{source}#train(test=0.2,validation=0.1,seed=3,by=who)")
    with pytest.raises(DataError, match="does not exist"):
        read_table(f"{tmp_path}/gone.jsonl#train{SPLIT}")
    literal = tmp_path / f"a#train{SPLIT}.jsonl"
    literal.write_text(json.dumps({"text": "a"}) + "\n")
    assert len(read_table(literal)) == 1, "a file of that name is a file"


@given(
    st.text(min_size=1).filter(lambda text: "\n" not in text),
    st.sampled_from(SIDES),
    st.integers(0, 99),
    st.integers(0, 10**9),
)
def test_a_part_is_named_and_found_again(source, side, percent, seed):
    part = Part(source=source, side=side, test=percent / 200, validation=percent / 250, seed=seed)
    assert part_of(str(part)) == part


def test_two_sides_of_a_split_are_not_the_same_data(tmp_path):
    source = str(workbench.data_file())

    def config(data, eval_data, **changes):
        return workbench.run_config(tmp_path, data=data, eval_data=eval_data, **changes)

    config(f"{source}#train{SPLIT}", f"{source}#test{SPLIT}")
    for other in (source, f"{source}#train{SPLIT}", f"{source}#test(test=0.2,validation=0.1,seed=4)"):
        with pytest.raises(ConfigError, match="is the training data"):
            config(f"{source}#train{SPLIT}", other)
    with pytest.raises(ConfigError, match="private training data as public"):
        config(f"{source}#train{SPLIT}", None, basis=f"public:{source}")


def test_parts_of_parts_are_told_apart_from_what_holds_them(tmp_path):
    """A sweep on a part splits that part again; whole file and outer part hold its training rows."""
    source, again = str(workbench.data_file()), "(test=0.3,validation=0,seed=5)"
    inner = f"{source}#train{SPLIT}#train{again}"
    for disjoint in (
        f"{source}#test{SPLIT}",
        f"{source}#train{SPLIT}#test{again}",
        f"{source}#test{SPLIT}#train{again}",
    ):
        workbench.run_config(tmp_path, data=inner, eval_data=disjoint)
    for holds in (source, f"{source}#train{SPLIT}", inner, f"{source}#test{again}"):
        for data, eval_data in ((inner, holds), (holds, inner)):
            with pytest.raises(ConfigError, match="is the training data"):
                workbench.run_config(tmp_path, data=data, eval_data=eval_data)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=8))
def test_labels_do_not_overlap(values):
    heights = apart(values, 0, 10, 1)
    assert len(heights) == len(values)
    ordered = sorted(heights)
    assert all(b - a >= 1 - 1e-9 for a, b in itertools.pairwise(ordered))
    order = sorted(range(len(values)), key=lambda i: values[i])
    assert [heights[i] for i in order] == ordered
    assert all(-1e-9 <= height <= 10 + 1e-9 for height in heights)


# --- what a curve is said to show


def curve_of(means, *, sd=0.01, epsilons="1,8,inf"):
    """A curve from means by method, one for each epsilon."""
    settings = curve_settings(
        workbench.run_settings("nowhere", eval_data=str(workbench.data_file(seed=5))),
        methods=",".join(means),
        epsilons=epsilons,
        repeats=1 if sd is None else 3,
        learning_rates=None,
        tuning_repeats=1,
        validation_data=None,
        test_share=0.2,
        validation_share=0.1,
        split_seed=0,
    )
    points = [
        Point(
            method=entry.text,
            label=entry.label,
            epsilon=epsilon,
            delta=1e-5,
            lower=0.9 * epsilon,
            upper=epsilon,
            learning_rate=0.02,
            n=3,
            mean=means[entry.method][place],
            sd=sd,
            tuning_runs=0,
            failed=0,
        )
        for place, epsilon in enumerate(settings.epsilons)
        for entry in settings.entries
    ]
    return Curve(settings, (), tuple(points), None, {})


def test_findings_name_the_best_and_say_whether_chance_could():
    found = words.findings(curve_of({"sb": [0.9, 0.92, 0.93], "lora": [0.7, 0.915, 0.95]}))
    assert found == [
        "At ε = 1 sb (weight) is ahead of lora by more than one standard deviation.",
        "At ε = 8 sb (weight) is ahead of lora within one standard deviation.",
        "At ε = ∞ lora is ahead of sb (weight) by more than one standard deviation.",
        "The best at ε = 8, sb (weight), lies 3.0 points below the best without privacy, lora.",
    ]
    single = words.findings(curve_of({"sb": [0.9, 0.9, 0.9], "lora": [0.7, 0.8, 0.9]}, sd=None))
    assert single[:3] == [
        "At ε = 1 and 8 sb (weight) is ahead of lora.",
        "At ε = ∞ sb (weight) and lora are equal.",
        "Each is a single run, which does not tell how far chance goes.",
    ]
    missing = words.findings(curve_of({"sb": [None, 0.9, 0.9], "lora": [0.7, None, None]}, epsilons="1,2,4"))
    assert missing == [
        "At ε = 1 lora is the only method with a result.",
        "At ε = 2 and 4 sb (weight) is the only method with a result.",
    ]


def test_bounds_are_rounded_outward():
    assert words.down(0.99968399) == "0.999683"
    assert float(words.down(math.pi)) <= math.pi
    assert words.down(0.0) == "0"


def test_a_part_whose_size_depends_on_a_replaced_row_needs_a_declared_size(tmp_path):
    data = f"{workbench.data_file()}#train(test=0.2,validation=0,seed=0)"
    with pytest.raises(ConfigError, match="neighboring='replace_one' needs num_examples"):
        workbench.run_config(tmp_path, data=data, neighboring="replace_one")
    assert workbench.run_config(tmp_path, data=data, neighboring="replace_one", num_examples=40).num_examples == 40


def test_chance_on_few_rows_is_told_and_nothing_to_draw_draws():
    from dpsb.curves.plot import draw

    curve = curve_of({"sb": [0.9, 0.92, 0.9], "lora": [0.7, 0.915, 0.95]})
    assert words.resolution(curve) == "", "no rows, nothing to tell"
    nothing = curve_of({"sb": [None] * 3, "lora": [None] * 3})
    for kind in ("png", "svg", "inline"):
        assert draw(nothing.points, "accuracy", kind)
    assert draw(curve.points[:1], "accuracy", "inline").startswith(b"<svg")
    assert words.power(3.31e-5) == "3.31·10⁻⁵"
    assert words.power(1e-5) == "1·10⁻⁵"
    assert words.power(1.001e-5) == "1.01·10⁻⁵", "an epsilon at 1.001e-5 need not hold at 1e-5"
    assert words.power(9.999e-5) == "1·10⁻⁴"
    assert words.power(0.01234) == "0.0124"
    dollars = [replace(point, label="sb (public: $x$_^.csv)") for point in curve.points]
    assert b"$x$_^" in draw(dollars, "accuracy", "svg")
