"""Privacy-utility table: bases and baselines on real text at equal epsilon, delta, data and tuning effort.

    python tests/benchmarks/utility.py --data-dir DIR --out DIR --sets snli20k --processes 2

Sweeps of `dpsb curve`: at one epsilon (--tuned-at) every arm gets the same number of learning rates, one run each,
judged on validation rows, and then its repeats on test rows; at the other epsilons it keeps the rate chosen there.
The head alone goes first, and every other arm trains its head with the rate that was best there.
Start it again to go on: finished runs are kept, and an arm or a data set can be added later, also by another process.
Writes `utility.csv` (a row for every run) and `utility.md` (mean and standard deviation) into --out. Reads NAME.parquet
from --data-dir, with the columns text or text_a and text_b, label and split.

With --head-lr every arm trains its head at that rate instead, and with --rate-factor every grid is moved by a factor.
With --head-share every row's head and adapter are clipped apart, in all arms that have both.
With --together all arms of a data set share a sweep, so that many processes have work (on a GPU, say).
Arms with a public set use 512 further rows of the same task ("near") or rows of another task ("far").
With --warm-start-epochs every arm is trained on the near rows first, without privacy; the arm "trained" is for it.
With --public-alone the near rows are the data, at epsilon inf: what they are worth without any private step. Give it
arms without a public set, --arms lora, and an --out of its own.
e2e is a task for a language model, SmolLM2; it has no head, and is measured by perplexity.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from dpsb.baselines.methods import PEFT_INITS, PUBLIC_STARTS

SEED = 20261125
"""Of the split into rows; public, as these data sets are."""
ROWS, NEAR, HELD_OUT = 4000, 512, 1000
EPSILONS = ("1", "3", "8")
TARGETS = {
    "top2": r"re:.*layer\.[45]\..*(query|key|value|dense)",
    "top3": r"re:.*layer\.[345]\..*(query|key|value|dense)",
    "all": "all-linear",
    "top4of30": r"re:.*layers\.2[6-9]\..*_proj",
}
RATES = {
    "sb": "0.02|0.05|0.12",
    "lora": "0.005|0.015|0.05",
    "lora-plus": "0.0015|0.005|0.015",
    "ffa-lora": "0.01|0.03|0.1",
    "lora-xs": "0.01|0.03|0.08",
    "peft": "0.005|0.015|0.05",
    "bitfit": "0.005|0.015|0.05",
    "full": "0.0005|0.0015|0.005",
    "head-only": "0.03|0.1|0.3",
}
"""Three for each arm, set beforehand: sb and lora-xs around the rate of the demo, the others by rule of thumb.
lora-plus: A's, B has sixteen times as much. peft: LoRA with another start, from public rows or from the weights."""
CAUSAL_RATES = {
    "sb": "0.1|0.3|1",
    "lora": "0.01|0.03|0.1",
    "lora-plus": "0.003|0.01|0.03",
    "ffa-lora": "0.03|0.1|0.3",
    "lora-xs": "0.03|0.1|0.3",
    "peft": "0.01|0.03|0.1",
}
"""Three each, around those that `e2e.py` chose for sb and lora. SmolLM2 has no biases and no head, and full fine-tuning
would hold a row of 135 million numbers for each example."""


@dataclass(frozen=True)
class Task:
    """A data set, and the other task that its far public rows come from. Without a head: for a language model."""

    name: str
    far: str
    max_length: int
    has_head: bool = True

    @property
    def metric(self) -> str:
        return "accuracy" if self.has_head else "perplexity"


TRAINED = "trained"
"""The arm that needs --warm-start-epochs."""

HEAD = "head-only"
"""Runs first: the rate that it chooses is the head's in every other arm."""

TASKS = {
    task.name: task
    for task in (
        Task("snli20k", "qnli5k", 64),
        Task("banking77", "snli20k", 48),
        Task("qnli5k", "snli20k", 96),
        Task("e2e", "medquad", 96, has_head=False),
    )
}


def write_parts(task: Task, data_dir: Path, out: Path, num_rows: int = ROWS) -> dict[str, Path]:
    """Private training rows, near and far public rows, validation and test rows; all disjoint."""
    out.mkdir(parents=True, exist_ok=True)
    table = pq.read_table(data_dir / f"{task.name}.parquet")
    rng = np.random.default_rng(SEED)
    rows = {split: rng.permutation(np.flatnonzero(table["split"].to_numpy() == split)) for split in ("train", "test")}
    size = min(num_rows, len(rows["train"]) - NEAR - HELD_OUT // 2)
    chosen = {
        "private": rows["train"][:size],
        "near": rows["train"][size : size + NEAR],
        "validation": rows["train"][size + NEAR :][:HELD_OUT],
        "test": rows["test"][: 2 * HELD_OUT],
    }
    columns = [name for name in ("text", "text_a", "text_b", "label") if name in table.column_names]
    table = table.select(columns)
    if "label" in columns:
        table = table.set_column(columns.index("label"), "label", pc.cast(table["label"], "string"))
    paths = {name: out / f"{name}.parquet" for name in (*chosen, "far")}
    for name, index in chosen.items():
        pq.write_table(table.take(np.sort(index)), paths[name])
    far = pq.read_table(data_dir / f"{task.far}.parquet")
    far = far.filter(pc.equal(far["split"], "train")).slice(0, 2 * NEAR)
    pq.write_table(
        far.select([name for name in far.column_names if name in (*columns, "text_a", "text_b")]), paths["far"]
    )
    return paths


def arms_of(parts: dict[str, Path]) -> dict[str, str]:
    """Every arm by its short name, as `dpsb curve` takes it."""
    bases = {
        "random": "random",
        "weight": "weight",
        "public-far": f"public:{parts['far']}",
        "public-near": f"public:{parts['near']}",
        "private": "private",
        "hybrid": "hybrid",
        "hybrid-far": f"hybrid:{parts['far']}",
        "hybrid-near": f"hybrid:{parts['near']}",
        "complementary": "complementary",
        "hadamard": "hadamard",
        "leak": "leak",
        TRAINED: "trained",
    }
    others = {name: name for name in RATES if name not in ("sb", "peft")}
    starts = {f"{kind}-near": f"peft:{kind}:{parts['near']}" for kind in PUBLIC_STARTS}
    starts |= {kind: f"peft:{kind}" for kind in PEFT_INITS}
    return {**{name: f"sb:{basis}" for name, basis in bases.items()}, **others, **starts}


ARMS = arms_of({"near": Path("near"), "far": Path("far")})
"""Every arm, whatever its files."""


def sweep(
    task: Task, parts: dict[str, Path], out: Path, options: argparse.Namespace, epsilons: str, rates: dict[str, str]
) -> None:
    """One sweep by the command line; ``rates`` by arm, as `dpsb curve` takes both."""
    command = [
        *(sys.executable, "-m", "dpsb.cli", "curve", "--out", str(out)),
        *("--data", str(parts["private"]), "--eval-data", str(parts["test"])),
        *("--methods", ",".join(rates), "--epsilons", epsilons),
        *("--learning-rates", ",".join(f"{arm}={given}" for arm, given in rates.items())),
        *("--repeats", str(options.repeats), "--delta", "1e-5"),
        *("--steps", str(options.steps), "--expected-batch-size", str(options.batch), "--auto-clip"),
        *("--schedule", options.schedule),
        *("--max-length", str(task.max_length), "--targets", TARGETS[options.targets], "--rank", str(options.rank)),
        *("--token-budget", str(options.token_budget), "--dtype", options.dtype),
        *("--processes", str(options.processes), "--allow-non-private-basis", "--json"),
    ]
    if task.has_head:
        labels = sorted(set(pq.read_table(parts["private"])["label"].to_pylist()))
        command += ["--model", "minilm", "--labels", ",".join(labels)]
    else:
        command += ["--model", options.language_model, "--task", "causal-lm"]
        command += ["--prompt-column", "text_a", "--completion-column", "text_b"]
    if options.warm_start_epochs:
        command += ["--warm-start", str(parts["near"]), "--warm-start-epochs", str(options.warm_start_epochs)]
        command += ["--warm-start-lr", repr(options.warm_start_lr)]
    if any("|" in given for given in rates.values()):
        command += ["--validation-data", str(parts["validation"])]
    if list(rates) != [HEAD] and task.has_head:
        command += ["--head-share", options.head_share] if options.head_share else []
        command += ["--head-lr", repr(options.head_lr or chosen_rate(options.out, task.name, HEAD))]
    if options.basis_share:
        command += ["--basis-share", options.basis_share]
    if list(rates) == [HEAD] or (options.targets != "all" and not {"bitfit", "full"} & set(rates)):
        command.append("--remember-frozen-blocks")
    with (out.parent / f"{out.name}.log").open("wb") as log:
        if subprocess.run(command, stdout=subprocess.DEVNULL, stderr=log, check=False).returncode:
            print(f"some runs at epsilon {epsilons} on {task.name} failed; see {log.name}", flush=True)


def chosen_rate(out: Path, task: str, arm: str) -> float | None:
    """The learning rate that an arm's tuning runs chose; None if it was not run yet."""
    found = (row for row in rows_in(out) if (row["set"], row["arm"], row["purpose"]) == (task, arm, "curve"))
    return next((float(row["learning_rate"]) for row in found), None)


def run_arms(task: Task, names: Sequence[str], folder: str, options: argparse.Namespace) -> None:
    """Tuning and repeats at one epsilon, then the repeats at the others, in sweeps below a folder name."""
    out = options.out / task.name
    parts = write_parts(task, options.data_dir, out / "data", options.rows)
    arms = arms_of(parts)
    grids = grids_of(task)
    first = options.tuned_at
    if options.public_alone:
        first, parts = "inf", {**parts, "private": parts["near"]}
    rates = {arms[name]: moved(grids[kind_of(name)], options.rate_factor) for name in names}
    sweep(task, parts, out / f"{folder}-{first}", options, first, rates)
    chosen = {arms[name]: rate for name in names if (rate := chosen_rate(options.out, task.name, name)) is not None}
    if not chosen or options.only_tuned or options.public_alone:
        return
    others = [epsilon for epsilon in EPSILONS if epsilon != first]
    for given in [",".join(others)] if options.together else others:
        fixed = {arm: repr(rate) for arm, rate in chosen.items()}
        sweep(task, parts, out / f"{folder}-{given.replace(',', '-')}", options, given, fixed)


def grids_of(task: Task) -> dict[str, str]:
    """Learning rates by kind of arm."""
    return RATES if task.has_head else CAUSAL_RATES


def kind_of(arm: str) -> str:
    """Whose rates an arm takes."""
    return ARMS[arm].partition(":")[0]


def moved(grid: str, factor: float) -> str:
    """A grid of learning rates, each of them multiplied."""
    return "|".join(f"{float(rate) * factor:.3g}" for rate in grid.split("|"))


def arm_of(row: dict[str, Any]) -> str:
    """An arm's short name, from a row of a sweep."""
    named = str(row["basis"] if row["method"] == "sb" else row["method"])
    kind, _, file = named.removeprefix("peft:").partition(":")
    return f"{kind}-{Path(file).stem}" if file else kind


def rows_in(out: Path) -> list[dict[str, Any]]:
    """A row for every run of every sweep below a folder."""
    rows = []
    for name in TASKS:
        for file in sorted((out / name).glob("*/curve.parquet")):
            rows += [{"set": name, "arm": arm_of(row), **row} for row in pq.read_table(file).to_pylist()]
    return rows


FAMILIES = {
    "R-only, any basis": lambda arm: (
        arm not in (*RATES, *PEFT_INITS, "leak") and not arm.startswith(tuple(PUBLIC_STARTS))
    ),
    "LoRA, FFA-LoRA or LoRA-XS": lambda arm: arm in ("lora", "ffa-lora", "lora-xs"),
    "LoRA+ or another data-free start": lambda arm: arm in ("lora-plus", *PEFT_INITS),
    "BitFit or full fine-tuning": lambda arm: arm in ("bitfit", "full"),
    "LoRA from public rows": lambda arm: arm.startswith(tuple(PUBLIC_STARTS)),
}
"""What may be picked from for the lines that say what a user gets who tries all of a family on validation rows."""


def picked(rows: Sequence[dict[str, Any]], name: str, family: str) -> tuple[str, int]:
    """The arm of a family with the best tuning run on a data set, and how many tuning runs it was picked from."""
    task = TASKS[name]
    tried = [row for row in rows if (row["set"], row["purpose"]) == (name, "tuning") and row[task.metric] is not None]
    tried = [row for row in tried if FAMILIES[family](row["arm"])]
    best = max if task.has_head else min
    return (best(tried, key=lambda row: float(row[task.metric]))["arm"] if tried else "", len(tried))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: accuracy or perplexity by data set, arm and epsilon; and what is picked from each family."""
    lines = ["| data set | arm | learning rate | " + " | ".join(f"epsilon {e}" for e in EPSILONS) + " |"]
    lines.append("|" + "---|" * (len(EPSILONS) + 3))
    for name in dict.fromkeys(row["set"] for row in rows):
        labels = {arm: arm for arm in dict.fromkeys(row["arm"] for row in rows if row["set"] == name)}
        choices = {family: picked(rows, name, family) for family in FAMILIES}
        labels |= {f"{family}: {arm}, of {tried} tuning runs": arm for family, (arm, tried) in choices.items() if arm}
        for label, arm in labels.items():
            mine = [r for r in rows if (r["set"], r["arm"], r["purpose"]) == (name, arm, "curve")]
            cells = [spread([r[TASKS[name].metric] for r in mine if r["epsilon"] == float(e)]) for e in EPSILONS]
            rate = mine[0]["learning_rate"] if mine else "–"
            lines.append(f"| {name} | {label} | {rate} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float | None]) -> str:
    """Mean, standard deviation and number of runs."""
    found = [value for value in values if value is not None]
    deviation = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):.3f}{deviation} ({len(found)})" if found else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with NAME.parquet")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--sets", default=",".join(TASKS), help="default: all four")
    arms = ",".join(arm for arm in ARMS if arm != TRAINED)
    parser.add_argument("--arms", default=arms, help=f"comma-separated; default: {arms}")
    parser.add_argument("--targets", choices=list(TARGETS), default="top2", help="blocks that are adapted")
    parser.add_argument(
        "--tuned-at", choices=EPSILONS, default="3", help="epsilon at which rates are chosen; default 3"
    )
    parser.add_argument("--head-share", help="clip head and adapter apart; by default a row is clipped as a whole")
    parser.add_argument("--schedule", default="linear", help="of all learning rates: linear, cosine or constant")
    parser.add_argument("--basis-share", help="of the budget, for bases that are paid for; by default that of dpsb")
    parser.add_argument("--head-lr", type=float, help="of every arm; default: the rate that the head alone chose")
    parser.add_argument("--rate-factor", type=float, default=1.0, help="of all grids of learning rates; default 1")
    parser.add_argument("--warm-start-epochs", type=int, default=0, help="passes over the near rows before; default 0")
    parser.add_argument("--warm-start-lr", type=float, default=0.005, help="of these passes; default 0.005")
    parser.add_argument("--together", action="store_true", help="all arms of a data set in one sweep")
    parser.add_argument("--language-model", default="smollm2", help="of e2e; a name or a folder")
    parser.add_argument("--dtype", default="float32", help="of the frozen weights")
    parser.add_argument("--only-tuned", action="store_true", help="the epsilon of --tuned-at only")
    parser.add_argument("--public-alone", action="store_true", help="train on the near rows alone, without privacy")
    for name, value in (("repeats", 3), ("steps", 40), ("batch", 256), ("rank", 16), ("processes", 2)):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"private rows at most; default {ROWS}")
    parser.add_argument("--token-budget", type=int, default=2048, help="default 2048")
    options = parser.parse_args()
    if options.warm_start_epochs and any(arm.startswith(("private", "hybrid")) for arm in options.arms.split(",")):
        parser.error("--warm-start-epochs is refused with a basis that is paid for: name --arms without them")
    for name in options.sets.split(","):
        task, given = TASKS[name], options.arms.split(",")
        named = [arm for arm in given if arm != HEAD and kind_of(arm) in grids_of(task)]
        groups = [("all", named)] if options.together and named else [(arm, [arm]) for arm in named]
        left_out = [arm for arm in given if kind_of(arm) not in grids_of(task)]
        if left_out:
            print(f"{name}: no {', '.join(left_out)}; see CAUSAL_RATES", flush=True)
        if task.has_head and (HEAD in given or (not options.head_lr and chosen_rate(options.out, name, HEAD) is None)):
            groups = [(HEAD, [HEAD]), *groups]
        for folder, arms_together in groups:
            run_arms(task, arms_together, folder, options)
            print(f"{name}: {', '.join(arms_together)} done", flush=True)
    rows = rows_in(options.out)
    pcsv.write_csv(pa.Table.from_pylist(rows), options.out / "utility.csv")
    (options.out / "utility.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
