"""The table of `tests/benchmarks/utility.py`: what is averaged, and what a family's best arm is picked by."""

from importlib import import_module
from pathlib import Path

import pytest


@pytest.fixture
def utility(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return import_module("utility")


def run(arm, purpose, value, epsilon=3.0, name="banking77", metric="accuracy"):
    return {"set": name, "arm": arm, "purpose": purpose, "epsilon": epsilon, "learning_rate": 0.1, metric: value}


def test_the_best_of_a_family_is_picked_by_tuning_runs_alone(utility):
    rows = [
        *(run("weight", "tuning", value) for value in (0.5, 0.7)),
        *(run("random", "tuning", value) for value in (0.6, None)),
        *(run("leak", "tuning", 0.9), run("lora", "tuning", 0.8)),
        *(run("random", "curve", 0.95), run("weight", "curve", 0.4), run("weight", "curve", 0.6)),
    ]
    assert utility.picked(rows, "banking77", "R-only, any basis") == ("weight", 3)
    assert utility.picked(rows, "banking77", "LoRA, FFA-LoRA or LoRA-XS") == ("lora", 1)
    (line,) = [line for line in utility.table(rows).splitlines() if "of 3 tuning runs" in line]
    assert line.endswith("| – | 0.500 ± 0.141 (2) | – |")


def test_a_language_model_is_picked_by_the_lowest_perplexity(utility):
    rows = [run(arm, "tuning", value, name="e2e", metric="perplexity") for arm, value in (("weight", 9), ("random", 7))]
    assert utility.picked(rows, "e2e", "R-only, any basis") == ("random", 2)
    assert utility.picked(rows, "e2e", "LoRA, FFA-LoRA or LoRA-XS") == ("", 0)


def test_an_arm_is_known_by_what_its_rows_say(utility):
    parts = {"near": Path("a/near.parquet"), "far": Path("a/far.parquet")}
    for arm, text in utility.arms_of(parts).items():
        method, _, basis = text.partition(":")
        row = {"method": "sb", "basis": basis} if method == "sb" else {"method": text, "basis": None}
        assert utility.arm_of(row) == arm
        families = [family for family, belongs in utility.FAMILIES.items() if belongs(arm)]
        assert len(families) == (arm not in ("leak", "head-only")), arm
