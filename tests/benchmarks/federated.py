"""Server rules of federated low-rank training side by side: Fed-SB, FedIT, FFA-LoRA, FedEx-LoRA, FLoRA and FedSVD.

Fed-SB runs twice: with the basis of the weights, and with one from 512 public rows of the same task that no silo has.

    python tests/benchmarks/federated.py --data-dir DIR --out DIR --set snli20k --silos 3,10 --split iid,dirichlet-0.5

Equal for all: epsilon, delta, rows, silos, rounds, local steps, sampling, clipping (AUTO-S, C = 1, head and adapter as
one row), rank, Adam with linear decay whose moments begin anew in each round, and tuning effort. Privacy model
``silo_local``: each silo has its own ledger and noise for the target epsilon on its own rows. Each method gets three
learning rates, one run each, judged on validation rows at one setting (3 silos, IID, epsilon 3), and keeps the best of
them for its repeats on test rows in every setting. The head is trained along and averaged, at one rate and from one
start for all, which did well on validation rows for a head alone on frozen features (12 pairs tried).

Start it again to go on: each run is a JSON file in --out, and those that are there are kept. At the end it writes
`federated.csv` (a row for every run), `federated.md`, `accuracy.png` and `bytes.png`. Reads NAME.parquet from
--data-dir, with the columns text or text_a and text_b, label and split; `utility.py` says which rows are taken.

Bytes are of one round and silo, adapter and head, in the library's wire format. Noise energy is what one step's release
does to the averaged update where training ended: by the closed forms of `dpsb_accounting.noise`, and drawn.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import torch
from federated_run import TRAINED_AS, Bench, Job
from utility import TARGETS, TASKS, write_parts

from dpsb.config import RunConfig
from dpsb_accounting.files import write_whole

NAMES = {
    "fed_sb": "Fed-SB, weight basis",
    "fed_sb_public": "Fed-SB, public basis",
    "fedit": "FedIT",
    "ffa_lora": "FFA-LoRA",
    "fedex_lora": "FedEx-LoRA",
    "flora": "FLoRA",
    "fedsvd": "FedSVD",
}
RATES = {"sb": (0.005, 0.015, 0.05), "lora": (0.003, 0.01, 0.03), "ffa-lora": (0.01, 0.03, 0.1)}
"""Three by what the silos train. The two LoRA grids were moved up by one rate after FedIT (0.001, 0.003, 0.01) and
FFA-LoRA (0.003, 0.01, 0.03) had done best, on validation rows, at the upper end of the first ones."""
TUNED_AT = {"silos": 3, "split": "iid", "epsilon": 3.0}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all runs of a folder have in common, as JSON. Hashable, so that a process can keep a bench."""

    text: str

    @property
    def content(self) -> dict[str, Any]:
        """As an object."""
        return dict(json.loads(self.text))


def bench_of(setting: Setting, method: str) -> Bench:
    """The bench of a method, kept from one job to the next; the one before it is given up."""
    if (setting, method) not in _kept:
        forget()
        common = setting.content
        files = {name: Path(common[name]) for name in ("validation", "test", "public")}
        _kept[setting, method] = Bench(RunConfig(**common["config"]), method, common["rounds"], files)
    return _kept[setting, method]


def forget() -> None:
    """Gives up what is kept."""
    for bench in _kept.values():
        bench.close()
    _kept.clear()


_kept: dict[tuple[Setting, str], Bench] = {}


def file_of(out: Path, job: Job) -> Path:
    """Where a run's row is kept."""
    part = f"rate{job.learning_rate:g}" if job.tuning else f"run{job.repeat}"
    return out / f"{job.method}-{job.silos}-{job.split}-eps{job.epsilon:g}-{part}.json"


def do(setting: Setting, out: Path, jobs: Sequence[Job]) -> None:
    """Runs those of some jobs of one method that have no file yet."""
    torch.set_num_threads(1)
    for job in jobs:
        file = file_of(out, job)
        if file.exists():
            continue
        row = bench_of(setting, job.method).run(job)
        write_whole(file, (json.dumps(row) + "\n").encode())
        print(f"{file.stem}: accuracy {row.get('accuracy', math.nan):.4f}", flush=True)


def do_all(setting: Setting, out: Path, units: Iterable[Sequence[Job]], processes: int) -> None:
    """Runs the jobs of all units, one after the other or in several processes."""
    if processes == 1:
        for unit in units:
            do(setting, out, unit)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(do, setting, out, unit) for unit in units]:
            done.result()


def tuning_jobs(method: str) -> list[Job]:
    """Three learning rates at one setting."""
    rates = RATES[TRAINED_AS[method]]
    return [Job(method=method, learning_rate=rate, repeat=0, tuning=True, **TUNED_AT) for rate in rates]


def chosen_rate(out: Path, method: str) -> float:
    """The rate with the best validation accuracy; of equal ones that with the smaller cross-entropy."""
    rows = [json.loads(file_of(out, job).read_text()) for job in tuning_jobs(method)]
    best = max(rows, key=lambda row: (row["accuracy"], -row["cross_entropy"]))
    return float(best["learning_rate"])


def rows_in(out: Path) -> list[dict[str, Any]]:
    """The rows of all runs in a folder."""
    return [json.loads(file.read_text()) for file in sorted(out.glob("*-eps*.json"))]


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every setting and method: means over the repeats, tuning runs left out."""
    found = []
    keys = sorted({(r["silos"], r["split"], r["epsilon"]) for r in rows if not r["tuning"]})
    for key in keys:
        for method in NAMES:
            mine = [r for r in rows if (r["silos"], r["split"], r["epsilon"]) == key and r["method"] == method]
            mine = [r for r in mine if not r["tuning"]]
            if not mine:
                continue
            numbers = [name for name, value in mine[0].items() if isinstance(value, (int, float))]
            entry = {name: statistics.fmean(r[name] for r in mine) for name in numbers}
            accuracies = [r["accuracy"] for r in mine]
            entry["sd"] = statistics.stdev(accuracies) if len(mine) > 1 else math.nan
            entry["aggregation_error"] = statistics.fmean(error for r in mine for error in r["aggregation_errors"])
            entry["max_epsilon"] = max(r["max_epsilon"] for r in mine)
            found.append({**entry, "silos": key[0], "split": key[1], "method": method, "runs": len(mine)})
    return found


def table(points: Sequence[dict[str, Any]]) -> str:
    """Markdown: one row a setting and method. Bytes: measured (of which by formula), per round and silo."""
    head = "silos | split | epsilon | method | learning rate | trained | test accuracy | cross-entropy"
    head += " | up, bytes (formula) | down, bytes (formula) | noise energy drawn (formula) | aggregation error"
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    for p in points:
        spread = "" if math.isnan(p["sd"]) else f" ± {p['sd']:.4f}"
        cells = [
            *(str(p["silos"]), p["split"], f"{p['epsilon']:g}", NAMES[p["method"]], f"{p['learning_rate']:g}"),
            *(f"{p['trained']:,.0f}", f"{p['accuracy']:.4f}{spread} ({p['runs']})", f"{p['cross_entropy']:.3f}"),
            *(f"{p[f'bytes_{way}']:,.0f} ({p[f'bytes_{way}_formula']:,.0f})" for way in ("up", "down")),
            f"{p['noise_energy']:.4g} ({p['noise_energy_formula']:.4g})",
            f"{p['aggregation_error']:.2g}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plots(points: Sequence[dict[str, Any]], out: Path) -> None:
    """Accuracy by method, and against the bytes of a round."""
    from matplotlib.figure import Figure

    settings = list(dict.fromkeys((p["silos"], p["split"], p["epsilon"]) for p in points))
    colours = {method: f"C{i}" for i, method in enumerate(NAMES)}
    for kind in ("accuracy", "bytes"):
        columns = min(4, len(settings))
        lines = -(-len(settings) // columns)
        figure = Figure(figsize=(4.2 * columns, 3.4 * lines), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
        for axis in axes.flat[len(settings) :]:
            axis.set_axis_off()
        for axis, key in zip(axes.flat, settings, strict=False):
            axis.set_title(f"{key[0]} silos, {key[1]}, epsilon {key[2]:g}", fontsize=9)
            mine = [p for p in points if (p["silos"], p["split"], p["epsilon"]) == key]
            for place, p in enumerate(mine):
                x = place if kind == "accuracy" else (p["bytes_up"] + p["bytes_down"]) / 1e3
                spread = 0.0 if math.isnan(p["sd"]) else 100 * p["sd"]
                name = NAMES[p["method"]]
                axis.errorbar(
                    x, 100 * p["accuracy"], spread, fmt="o", capsize=3, color=colours[p["method"]], label=name
                )
            if kind == "accuracy":
                axis.set_xticks(
                    range(len(mine)), [NAMES[p["method"]] for p in mine], rotation=30, ha="right", fontsize=8
                )
            else:
                axis.set_xscale("log")
                axis.set_xlabel("kB up and down, per round and silo")
                if key == settings[0]:
                    axis.legend(fontsize=7)
        for axis in axes[:, 0]:
            axis.set_ylabel("test accuracy (%)")
        figure.savefig(out / f"{kind}.png", dpi=120)


def write(out: Path) -> str:
    """CSV, table and pictures of what is in a folder; returns the table."""
    rows = rows_in(out)
    flat = [{name: json.dumps(v) if isinstance(v, list) else v for name, v in row.items()} for row in rows]
    if flat:
        pcsv.write_csv(pa.Table.from_pylist(flat), out / "federated.csv")
    points = summary(rows)
    text = table(points)
    (out / "federated.md").write_text(text)
    if points:
        plots(points, out)
    return text


def setting_of(options: argparse.Namespace, out: Path) -> Setting:
    """What all runs share; refused where the folder's runs have another."""
    task = TASKS[options.set]
    parts = write_parts(task, options.data_dir, out / "data")
    config = {
        "model": "minilm",
        "data": str(parts["private"]),
        "out": str(out),
        "labels": ",".join(sorted(set(pq.read_table(parts["private"])["label"].to_pylist()))),
        "delta": 1e-5,
        "steps": options.rounds * options.local_steps,
        "expected_batch_size": options.batch,
        "auto_clip": True,
        "rank": options.rank,
        "max_length": task.max_length,
        "targets": TARGETS[options.targets],
        "token_budget": 2048,
        "head_learning_rate": options.head_lr,
        "head_init_std": options.head_init_std,
    }
    files = {"validation": str(parts["validation"]), "test": str(parts["test"]), "public": str(parts["near"])}
    text = json.dumps({"config": config, "rounds": options.rounds, **files}, indent=1)
    file = out / "setting.json"
    if file.exists() and file.read_text() != text:
        raise SystemExit(f"The runs in {out} have other settings; see {file}, or take another --out.")
    file.write_text(text)
    return Setting(text=text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with NAME.parquet")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--set", choices=list(TASKS), default="snli20k", help="default snli20k")
    parser.add_argument("--silos", default="3,10", help="numbers of silos; default 3,10")
    parser.add_argument("--split", default="iid,dirichlet-0.5", help="default iid,dirichlet-0.5")
    parser.add_argument("--epsilons", default="1,3", help="default 1,3")
    parser.add_argument("--methods", default=",".join(NAMES), help=f"default {','.join(NAMES)}")
    parser.add_argument("--targets", choices=["top2", "top3"], default="top2", help="blocks adapted; default top2")
    parser.add_argument("--head-lr", type=float, default=0.05, help="the head's rate, of every method; default 0.05")
    parser.add_argument("--head-init-std", type=float, default=0.1, help="of the head's start; default 0.1")
    parser.add_argument("--only-write", action="store_true", help="no runs: table and plots of those that are there")
    numbers = {"repeats": 3, "rounds": 4, "local-steps": 10, "batch": 256, "rank": 16, "processes": 1}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    options = parser.parse_args()
    out = options.out / options.set
    if not options.only_write:
        setting = setting_of(options, out)
        methods = options.methods.split(",")
        do_all(setting, out, (tuning_jobs(method) for method in methods), options.processes)
        units = [
            [
                Job(method=m, silos=silos, split=split, epsilon=eps, learning_rate=chosen_rate(out, m), repeat=repeat)
                for repeat in range(1, options.repeats + 1)
            ]
            for m in methods  # first, so that a process keeps its bench from one unit to the next
            for silos in map(int, options.silos.split(","))
            for split in options.split.split(",")
            for eps in map(float, options.epsilons.split(","))
        ]
        do_all(setting, out, units, options.processes)
    print(write(out))


if __name__ == "__main__":
    main()
