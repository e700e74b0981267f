"""The published tables and pictures: bases and baselines at epsilon 1, 3 and 8 on four data sets.

    python tests/benchmarks/published.py

Reads the rows in tests/benchmarks/results/ that `utility.py` and `e2e.py` left, writes the tables into
docs/benchmarks.md between its two marks and a picture of each set beside it. Trains nothing.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpsb.curves.plot import draw
from dpsb.curves.table import Point, is_better

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests" / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- tables: tests/benchmarks/published.py -->\n", "<!-- end of tables -->\n"
EPSILONS = (1.0, 3.0, 8.0)
USUAL_RUNS = 3
ARMS = {
    "public-near": "R-only, `public` near",
    "hybrid-near": "R-only, `hybrid` near",
    "weight": "R-only, `weight`",
    "random": "R-only, `random`",
    "private": "R-only, `private`",
    "leak": "R-only, `leak` (epsilon ∞)",
    "lora": "DP-LoRA",
    "ffa-lora": "FFA-LoRA",
    "lora-xs": "LoRA-XS",
    "head-only": "head alone",
    "lora_ga-near": "LoRA-GA from near rows",
}
REFERENCE = "leak"
LEFT_OUT_OF_PICTURES = ("random", "lora-xs")
E2E_ARMS = {
    "sb": "weight",
    "sb-near": "public-near",
    "sb-hybrid": "hybrid-near",
    "lora-ga-near": "lora_ga-near",
}
"""`e2e.py`'s names of arms, where they are not sb- and a name above."""


@dataclass(frozen=True)
class Published:
    """A data set, its metric and decimals, and the files of its rows: of an arm those of the last that has any."""

    name: str
    title: str
    metric: str
    decimals: int
    files: tuple[str, ...]


SETS = (
    Published("banking77", "Banking77: questions of 77 kinds, accuracy", "accuracy", 3, ("three_sets.csv",)),
    Published("qnli5k", "QNLI: question and sentence, accuracy", "accuracy", 3, ("three_sets.csv",)),
    Published("snli20k", "SNLI: premise and hypothesis, accuracy", "accuracy", 3, ("snli.csv",)),
    Published(
        "e2e",
        "E2E with SmolLM2: texts from tables, perplexity (lower is better)",
        "perplexity",
        2,
        ("e2e.csv", "e2e_other_tables.csv"),
    ),
)


@dataclass(frozen=True)
class Run:
    """One run: at which epsilon and rate, whether it chose a rate or counts, and what came out."""

    arm: str
    epsilon: float
    tuning: bool
    rate: float
    value: float


def runs_of(published: Published) -> list[Run]:
    """A set's runs at the epsilons above, and those that chose their rates."""
    runs: list[Run] = []
    for file in published.files:
        with (RESULTS / file).open(newline="") as lines:
            found = [run for row in csv.DictReader(lines) if (run := _run(row, published)) is not None]
        newer = {run.arm for run in found if not run.tuning}
        runs = [run for run in runs if run.tuning or run.arm not in newer] + found
    return runs


def _run(row: dict[str, str], published: Published) -> Run | None:
    """A row of either script; None if it is another set's, another arm's or at another epsilon."""
    arm = E2E_ARMS.get(row["arm"], row["arm"].removeprefix("sb-"))
    epsilon = float(row.get("target") or row["epsilon"] or "nan")
    known = arm in ARMS and epsilon in EPSILONS and row.get("set", "e2e") == published.name
    tuning = row["purpose"] == "tuning"
    return Run(arm, epsilon, tuning, float(row["learning_rate"]), float(row[published.metric])) if known else None


def points(published: Published, runs: Sequence[Run]) -> list[Point]:
    """Mean and deviation of every arm and epsilon that has runs."""
    found = []
    for arm, label in ARMS.items():
        for epsilon in EPSILONS:
            mine = [run for run in runs if (run.arm, run.epsilon, run.tuning) == (arm, epsilon, False)]
            if mine:
                values = [run.value for run in mine]
                found.append(
                    Point(
                        method=arm,
                        label=label.replace("`", "").partition(" (")[0],
                        epsilon=epsilon,
                        delta=None,
                        lower=None,
                        upper=math.inf if arm == REFERENCE else epsilon,
                        learning_rate=mine[0].rate,
                        n=len(mine),
                        mean=statistics.fmean(values),
                        sd=statistics.stdev(values) if len(values) > 1 else None,
                        tuning_runs=sum(run.tuning and run.arm == arm for run in runs),
                        failed=0,
                    )
                )
    return found


def table(published: Published) -> str:
    """Markdown: validation by rate, then mean ± standard deviation at each epsilon; the best mean bold."""
    runs = runs_of(published)
    summary = points(published, runs)
    best = {epsilon: _best(published.metric, summary, epsilon) for epsilon in EPSILONS}
    columns = " | ".join(f"epsilon {epsilon:g}" for epsilon in EPSILONS)
    lines = [f"| {published.title} | validation by rate | {columns} |", "|" + "---|" * (2 + len(EPSILONS))]
    for arm, label in ARMS.items():
        mine = {point.epsilon: point for point in summary if point.method == arm}
        if mine:
            cells = [_cell(mine.get(e), published.decimals, best[e] is mine.get(e)) for e in EPSILONS]
            lines.append(f"| {label} | {_tried(published, runs, arm)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _best(metric: str, summary: Iterable[Point], epsilon: float) -> Point | None:
    """The best mean at an epsilon; the reference does not count."""
    best: Point | None = None
    for point in summary:
        if point.epsilon == epsilon and not point.unbounded and point.mean is not None:
            best = point if best is None or is_better(metric, point.mean, best.mean or 0.0) else best
    return best


def _tried(published: Published, runs: Sequence[Run], arm: str) -> str:
    tried = sorted({(run.rate, run.value) for run in runs if run.tuning and run.arm == arm})
    return ", ".join(f"{rate:g}: {value:.{published.decimals}f}" for rate, value in tried)


def _cell(point: Point | None, decimals: int, is_best: bool) -> str:
    if point is None or point.mean is None:
        return "–"
    text = f"{point.mean:.{decimals}f}" + (f" ± {point.sd:.{decimals}f}" if point.sd is not None else "")
    text = f"**{text}**" if is_best else text
    return text if point.n == USUAL_RUNS else f"{text} ({point.n})"


def block() -> str:
    """All tables, each with its picture, as they stand between the marks."""
    parts = [f"{table(one)}\n![{one.title}](benchmarks/{one.name}.svg)\n" for one in SETS]
    return "\n" + "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + block() + END + rest.partition(END)[2])
    for one in SETS:
        shown = [point for point in points(one, runs_of(one)) if point.method not in LEFT_OUT_OF_PICTURES]
        (PAGE.parent / "benchmarks" / f"{one.name}.svg").write_bytes(draw(shown, one.metric, "svg"))


if __name__ == "__main__":
    main()
