"""What each switch of the optimization is worth at equal epsilon: one sweep a switch, all else as in the reference.

    python tests/benchmarks/switches.py --data-dir DIR --out DIR --set banking77 --processes 2

The reference is R-only on the weights' own directions with the settings of `utility.py`: epsilon 3, AUTO-S, Adam,
linear decay, rank 16, 256 expected examples a step. Every switch gets three learning rates, one run each, judged on
validation rows, and then its repeats on test rows. Start it again to go on: finished runs are kept.
Writes `switches.csv` (a row for every run) and `switches.md` into --out.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
from utility import TARGETS, TASKS, Task, write_parts

EPSILON, METHOD = "3", "sb:weight"
ADAM, SGD, HEAD = "0.02|0.05|0.12", "0.3|1|3", "0.003|0.01|0.03"
USUAL = {"--auto-clip": "", "--rank": "16", "--expected-batch-size": "256", "--steps": "40", "--head-lr": "0.1"}
REMEMBER = "--remember-frozen-blocks"
CONSTANT: dict[str, str | None] = {"--schedule": "constant"}
SWITCHES: dict[str, dict[str, str | None]] = {
    "reference": {},
    "warm start, near": {"--warm-start": "near"},
    "warm start, near, head rate 0.01": {"--warm-start": "near", "--head-lr": "0.01"},
    "head alone, warm start, near": {"method": "head-only", "--warm-start": "near", "--head-lr": None, REMEMBER: None},
    "second moments, near": {"--precondition": "near"},
    "near basis, second moments": {"basis": "public", "--precondition": "near"},
    "near basis, warm start, second moments": {"basis": "public", "--warm-start": "near", "--precondition": "near"},
    "warm start, second moments": {"--warm-start": "near", "--precondition": "near"},
    "flat clipping, C = 1": {"--auto-clip": None},
    "adaptive clipping, q = 0.5": {"--auto-clip": None, "--adaptive-clip": "0.5"},
    "adam-corrected": {"--optimizer": "adam-corrected"},
    "adamw, decay 0.01": {"--optimizer": "adamw", "--weight-decay": "0.01"},
    "sgd, momentum 0.9": {"--optimizer": "sgd", "--head-lr": None},
    "constant rate": CONSTANT,
    "cosine decay": {"--schedule": "cosine"},
    **{f"rank {rank}": {"--rank": str(rank)} for rank in (2, 4, 8, 32, 64, 128)},
    "128 x 80": {"--expected-batch-size": "128", "--steps": "80"},
    "512 x 20": {"--expected-batch-size": "512", "--steps": "20"},
    **{f"rank {rank}, constant rate": {"--rank": str(rank), **CONSTANT} for rank in (2, 4, 8, 32, 64, 128)},
    "flat clipping, constant rate": {"--auto-clip": None, **CONSTANT},
    "adaptive clipping, constant rate": {"--auto-clip": None, "--adaptive-clip": "0.5", **CONSTANT},
    "sgd, momentum 0.9, constant rate": {"--optimizer": "sgd", "--head-lr": None, **CONSTANT},
    "156 steps": {"--steps": "156"},
    "156 steps, constant rate": {"--steps": "156", **CONSTANT},
    "128 x 80, constant rate": {"--expected-batch-size": "128", "--steps": "80", **CONSTANT},
    "512 x 20, constant rate": {"--expected-batch-size": "512", "--steps": "20", **CONSTANT},
}
"""What differs from the usual options; None leaves one out, "near" stands for the file of public rows, the basis
"public" is that file's, and "method" is another method."""


def sweep(task: Task, parts: dict[str, Path], out: Path, options: argparse.Namespace, changes: dict[str, Any]) -> None:
    """The runs of one switch, by the command line."""
    labels = sorted(set(pq.read_table(parts["private"])["label"].to_pylist()))
    near = f"sb:public:{parts['near']}" if changes.get("basis") == "public" else METHOD
    method = changes.get("method", near)
    rates = SGD if changes.get("--optimizer") == "sgd" else HEAD if method == "head-only" else ADAM
    command = [
        *(sys.executable, "-m", "dpsb.cli", "curve", "--out", str(out), "--model", "minilm"),
        *("--data", str(parts["private"]), "--eval-data", str(parts["test"]), "--labels", ",".join(labels)),
        *("--validation-data", str(parts["validation"]), "--methods", method, "--epsilons", EPSILON),
        *("--learning-rates", f"{method}={rates}", "--repeats", str(options.repeats), "--delta", "1e-5"),
        *("--max-length", str(task.max_length), "--targets", TARGETS["top2"]),
        *("--token-budget", "2048", "--processes", str(options.processes), "--json"),
    ]
    for name, value in {**USUAL, REMEMBER: "", **changes}.items():
        if value is not None and name.startswith("--"):
            command += [name, str(parts["near"]) if value == "near" else value] if value else [name]
    if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
        print(f"some runs of {out.name} failed; see {out}", flush=True)


def rows_in(out: Path, task: str) -> list[dict[str, Any]]:
    """A row for every run of every switch."""
    rows = []
    for name in SWITCHES:
        file = out / task / folder_of(name) / "curve.parquet"
        rows += (
            [{"set": task, "switch": name, **row} for row in pq.read_table(file).to_pylist()] if file.exists() else []
        )
    return rows


def folder_of(switch: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in switch)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: validation accuracy by rate and test accuracy of each switch."""
    lines = ["| switch | validation accuracy by learning rate | test accuracy |", "|---|---|---|"]
    for name in dict.fromkeys(row["switch"] for row in rows):
        mine = [row for row in rows if row["switch"] == name and row["accuracy"] is not None]
        tried = sorted((r["learning_rate"], r["accuracy"]) for r in mine if r["purpose"] == "tuning")
        values = [row["accuracy"] for row in mine if row["purpose"] == "curve"]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        result = f"{statistics.fmean(values):.3f}{spread} ({len(values)})" if values else "–"
        lines.append(f"| {name} | {', '.join(f'{rate:g}: {value:.3f}' for rate, value in tried)} | {result} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with NAME.parquet")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--set", choices=list(TASKS), default="banking77", help="default banking77")
    parser.add_argument("--switches", default=";".join(SWITCHES), help=f"semicolon-separated: {'; '.join(SWITCHES)}")
    parser.add_argument("--repeats", type=int, default=3, help="default 3")
    parser.add_argument("--processes", type=int, default=2, help="default 2")
    options = parser.parse_args()
    task = TASKS[options.set]
    parts = write_parts(task, options.data_dir, options.out / task.name / "data")
    for name in (switch.strip() for switch in options.switches.split(";")):
        if name not in SWITCHES:
            parser.error(f"no switch is called {name!r}; there are {'; '.join(SWITCHES)}")
        sweep(task, parts, options.out / task.name / folder_of(name), options, SWITCHES[name])
        print(f"{name} done", flush=True)
    rows = rows_in(options.out, task.name)
    pcsv.write_csv(pa.Table.from_pylist(rows), options.out / "switches.csv")
    (options.out / "switches.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
