"""The published tables and pictures: bases and baselines at epsilon 1, 3 and 8 on four data sets, and their aim.

    python tests/benchmarks/published.py

Reads the rows in tests/benchmarks/results/ that `utility.py` and `e2e.py` left, writes the tables into
docs/benchmarks.md between its marks and a picture of each set into docs/benchmarks/. Trains nothing.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import math
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpsb.curves.plot import draw
from dpsb.curves.table import Point, is_better

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests" / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- tables: tests/benchmarks/published.py -->\n", "<!-- end of tables -->\n"
AIM_BEGIN, AIM_END = "<!-- aim: tests/benchmarks/published.py -->\n", "<!-- end of aim -->\n"
FIXED_BEGIN, FIXED_END = "<!-- fixed: tests/benchmarks/published.py -->\n", "<!-- end of fixed -->\n"
TRIED_BEGIN, TRIED_END = "<!-- tried: tests/benchmarks/published.py -->\n", "<!-- end of tried -->\n"
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
    "trained": "R-only, `trained` near",
    "ffa-lora-warm": "FFA-LoRA, near rows first",
    "lora-warm": "DP-LoRA, near rows first",
}
REFERENCE = "leak"
R_ONLY = ("public-near", "hybrid-near", "weight", "random", "private", "trained")
AGAINST = ("lora", "ffa-lora")
WITH_THE_SAME_ROWS = "ffa-lora-warm"
"""The baseline that trains on the near rows first, as `trained` does."""
LEFT_OUT_OF_PICTURES = ("random", "lora-xs", "trained", "ffa-lora-warm", "lora-warm")
"""A picture has eight colours; random directions lie near those of the weights, LoRA-XS near both, and what begins with
training on the near rows far from all else."""
E2E_ARMS = {
    "sb": "weight",
    "sb-near": "public-near",
    "sb-hybrid": "hybrid-near",
    "lora-ga-near": "lora_ga-near",
}
"""`e2e.py`'s names of arms, where they are not sb- and a name above."""


@dataclass(frozen=True)
class Published:
    """A data set, its metric and decimals, and the files of its rows.

    An arm's runs are those of the last file that has any. Runs that chose a rate are those of all files.
    """

    name: str
    title: str
    metric: str
    decimals: int
    files: tuple[str, ...]

    @property
    def short(self) -> str:
        """The title up to its colon."""
        return self.title.partition(":")[0]


SETS = (
    Published(
        "banking77",
        "Banking77: questions of 77 kinds, accuracy",
        "accuracy",
        3,
        ("three_sets.csv", "banking77_public_first.csv"),
    ),
    Published("qnli5k", "QNLI: question and sentence, accuracy", "accuracy", 3, ("three_sets.csv",)),
    Published(
        "snli20k", "SNLI: premise and hypothesis, accuracy", "accuracy", 3, ("snli.csv", "snli_public_first.csv")
    ),
    Published(
        "e2e",
        "E2E with SmolLM2: texts from tables, perplexity (lower is better)",
        "perplexity",
        2,
        ("e2e.csv", "e2e_other_tables.csv", "e2e_public_first.csv"),
    ),
)


@dataclass(frozen=True)
class Run:
    """One run: the epsilon asked for and the rate, whether it chose a rate or counts, and what came out."""

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
    """A row of either script; None if it is another set's, another arm's or at another epsilon.

    In `e2e.py`'s rows the epsilon asked for is ``target``, in `utility.py`'s it is ``epsilon``.
    """
    arm = E2E_ARMS.get(row["arm"], row["arm"].removeprefix("sb-"))
    epsilon = float(row.get("target") or row["epsilon"] or "nan")
    known = arm in ARMS and epsilon in EPSILONS and row.get("set", "e2e") == published.name
    tuning = row["purpose"] == "tuning"
    return Run(arm, epsilon, tuning, float(row["learning_rate"]), float(row[published.metric])) if known else None


def points(runs: Sequence[Run]) -> list[Point]:
    """Mean and deviation of every arm and epsilon that has runs, which must all have one rate."""
    found = []
    for arm, label in ARMS.items():
        for epsilon in EPSILONS:
            mine = [run for run in runs if (run.arm, run.epsilon, run.tuning) == (arm, epsilon, False)]
            if mine:
                values = [run.value for run in mine]
                (rate,) = {run.rate for run in mine}
                found.append(
                    Point(
                        method=arm,
                        label=label.replace("`", "").partition(" (")[0],
                        epsilon=epsilon,
                        delta=None,
                        lower=None,
                        upper=math.inf if arm == REFERENCE else epsilon,
                        learning_rate=rate,
                        n=len(mine),
                        mean=statistics.mean(values),
                        sd=statistics.stdev(values) if len(values) > 1 else None,
                        tuning_runs=sum(run.tuning and run.arm == arm for run in runs),
                        failed=0,
                    )
                )
    return found


def table(published: Published) -> str:
    """Markdown: validation by rate, that of the runs underlined, then mean ± standard deviation; the best mean bold."""
    runs = runs_of(published)
    summary = points(runs)
    best = {epsilon: _best(published.metric, summary, epsilon) for epsilon in EPSILONS}
    columns = " | ".join(f"epsilon {epsilon:g}" for epsilon in EPSILONS)
    lines = [f"| {published.title} | validation by rate | {columns} |", "|" + "---|" * (2 + len(EPSILONS))]
    for arm, label in ARMS.items():
        mine = {point.epsilon: point for point in summary if point.method == arm}
        if mine:
            cells = [_cell(mine.get(e), published.decimals, best[e] is mine.get(e)) for e in EPSILONS]
            used = {point.learning_rate for point in mine.values()}
            tried = _tried(published, [run for run in runs if run.tuning and run.arm == arm], used)
            lines.append(f"| {label} | {tried} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _best(metric: str, summary: Iterable[Point], epsilon: float) -> Point | None:
    """The best mean at an epsilon; the reference does not count, nor does an arm with too few runs."""
    enough = [point for point in summary if point.n >= USUAL_RUNS]
    compared = [point for point in enough if point.epsilon == epsilon and not point.unbounded]
    return _best_of(metric)(compared, key=lambda point: point.mean, default=None)


def _best_of(metric: str) -> Callable[..., Any]:
    """``max`` or ``min``, whichever is better."""
    return max if is_better(metric, 1.0, 0.0) else min


def _tried(published: Published, runs: Iterable[Run], used: Collection[float | None]) -> str:
    tried = sorted({(run.rate, run.value) for run in runs})
    shown = [(f"<u>{rate:g}</u>" if rate in used else f"{rate:g}", value) for rate, value in tried]
    return ", ".join(f"{rate}: {value:.{published.decimals}f}" for rate, value in shown)


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


def shown(published: Published) -> list[Point]:
    """What a set's picture draws."""
    return [point for point in points(runs_of(published)) if point.method not in LEFT_OUT_OF_PICTURES]


def picture_of(published: Published) -> Path:
    return PAGE.parent / "benchmarks" / f"{published.name}.svg"


def mark(published: Published) -> str:
    """Stands at the end of a picture: of which points it is."""
    return f"<!-- points: {hashlib.sha256(repr(shown(published)).encode()).hexdigest()} -->\n"


def chosen(published: Published, runs: Sequence[Run]) -> str:
    """The R-only arm whose best tuning run is the best of all: what a user gets who tries them on validation rows."""
    tried = [run for run in runs if run.tuning and run.arm in R_ONLY]
    return _best_of(published.metric)(tried, key=lambda run: run.value).arm


def verdict(metric: str, ours: Point, other: Point) -> str:
    """Ahead or behind by more than the larger of both standard deviations, or level; of one run nothing is said."""
    if ours.mean is None or other.mean is None or ours.sd is None or other.sd is None:
        return "one run"
    if abs(ours.mean - other.mean) <= max(ours.sd, other.sd):
        return "level"
    return "ahead" if is_better(metric, ours.mean, other.mean) else "behind"


def by_cell(runs: Sequence[Run]) -> dict[tuple[str, float], Point]:
    """Each point by its arm and epsilon."""
    return {(point.method, point.epsilon): point for point in points(runs)}


def won(found: Mapping[tuple[str, float], Point], metric: str, arm: str, epsilon: float) -> bool:
    """Whether an arm is ahead of DP-LoRA and of FFA-LoRA at an epsilon."""
    others = [found.get((other, epsilon)) for other in AGAINST]
    ours = found.get((arm, epsilon))
    return ours is not None and all(other and verdict(metric, ours, other) == "ahead" for other in others)


def fixed() -> str:
    """Markdown: where each R-only arm is ahead of both, had it been chosen beforehand, with its own rates alone."""
    names = " | ".join(one.short for one in SETS)
    lines = [f"| R-only, fixed beforehand | {names} | cells |", "|" + "---|" * (2 + len(SETS))]
    tables = [(one, by_cell(runs_of(one))) for one in SETS]
    for arm in R_ONLY:
        cells, ahead, run = [], 0, 0
        for one, found in tables:
            here = [epsilon for epsilon in EPSILONS if (arm, epsilon) in found]
            good = [epsilon for epsilon in here if won(found, one.metric, arm, epsilon)]
            ahead, run = ahead + len(good), run + len(here)
            cells.append(", ".join(f"{epsilon:g}" for epsilon in good) or ("none" if here else "–"))
        lines.append(f"| {ARMS[arm].removeprefix('R-only, ')} | {' | '.join(cells)} | {ahead} of {run} |")
    return "\n" + "\n".join(lines) + "\n\n"


def tried() -> str:
    """Markdown: how many tuning runs the choice of the R-only arm read, and each baseline's."""
    columns = " | ".join(ARMS[arm] for arm in AGAINST)
    lines = [f"| tuning runs | R-only, all arms | {columns} |", "|" + "---|" * (2 + len(AGAINST))]
    for one in SETS:
        tuned = Counter(run.arm for run in runs_of(one) if run.tuning)
        counts = [sum(tuned[arm] for arm in R_ONLY), *(tuned[arm] for arm in AGAINST)]
        lines.append(f"| {one.short} | {' | '.join(map(str, counts))} |")
    return "\n" + "\n".join(lines) + "\n\n"


def aim() -> str:
    """Markdown: the chosen R-only arm of each cell against DP-LoRA, FFA-LoRA and a baseline with the same rows."""
    columns = (*AGAINST, WITH_THE_SAME_ROWS)
    lines = ["| set, epsilon | R-only, chosen on validation rows | " + " | ".join(ARMS[a] for a in columns) + " |"]
    lines.append("|" + "---|" * (2 + len(columns)))
    for one in SETS:
        runs = runs_of(one)
        found = by_cell(runs)
        arm = chosen(one, runs)
        for epsilon in EPSILONS:
            ours = found.get((arm, epsilon))
            said = {other: _against(one, ours, found.get((other, epsilon))) for other in columns}
            bold = won(found, one.metric, arm, epsilon)
            named = f"{ARMS[arm].removeprefix('R-only, ')} {_cell(ours, one.decimals, bold)}"
            lines.append(f"| {one.short}, {epsilon:g} | {named} | {' | '.join(said.values())} |")
    return "\n" + "\n".join(lines) + "\n\n"


def _against(published: Published, ours: Point | None, other: Point | None) -> str:
    said = f"{verdict(published.metric, ours, other)}: " if ours and other else ""
    return said + _cell(other, published.decimals, False)


def replaced(page: str) -> str:
    """A page with what stands between its marks made anew.

    Raises:
      ValueError: If a mark is missing or stands there twice.
    """
    for begin, end, made in (
        (BEGIN, END, block()),
        (AIM_BEGIN, AIM_END, aim()),
        (FIXED_BEGIN, FIXED_END, fixed()),
        (TRIED_BEGIN, TRIED_END, tried()),
    ):
        if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
            raise ValueError(f"Expected the lines {begin.strip()} and {end.strip()} once each, in this order.")
        before, _, rest = page.partition(begin)
        page = before + begin + made + end + rest.partition(end)[2]
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    PAGE.write_text(replaced(PAGE.read_text()))
    for one in SETS:
        picture_of(one).write_bytes(draw(shown(one), one.metric, "svg") + mark(one).encode())


if __name__ == "__main__":
    main()
