"""SmolLM2-135M writes restaurant texts from E2E's tables: bases of R-only, FFA-LoRA and LoRA, at equal epsilon.

    python tests/benchmarks/e2e.py --data-dir DIR --out DIR --arms sb,lora --epsilons 8,3,1,inf

A smoke run by default: 2,000 rows, 20 steps of 64 expected rows, adapters on the four highest of thirty blocks. Equal
for all arms: rows, epsilon, delta, steps, sampling, AUTO-S clipping, Adam with linear decay, and four learning rates at
epsilon 8, one run each, judged by perplexity on validation rows (and four at epsilon inf for what runs there); every
other epsilon takes the rate of 8. *near* is a basis from the gradient of 256 further rows, which count as public;
*private* and *hybrid* pay for theirs out of the same epsilon, in every run anew; *leak* is the raw gradient of 512
private rows: its epsilon is infinite, its noise that of the others. *trained* and *warm* train on those 256 rows first,
without privacy, and then privately on private ones; where they start is scored too, so that --warm-start-lr can be
chosen (each rate with an --out of its own). *near-alone* is LoRA trained on those 256 rows and on no private
one, without privacy: it runs at --epsilons inf only.

Scores of greedy answers to test tables at the epsilons of --answers-at, each with all its references: BLEU (sacrebleu),
ROUGE-L. Start it again to go on: each run is a JSON file in --out, and those that are there are kept. Frozen blocks
run once per row for all runs of all arms of a process. Reads e2e.parquet from --data-dir (columns
text_a, text_b, split) and writes `e2e.csv` and `e2e.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import torch
from common import planned_basis, shortest

from dpsb.adapter import attach, lora_layers
from dpsb.basis.release import PrivateExamples
from dpsb.basis.stage import Planned, charge_leak, release_basis
from dpsb.basis_spec import RELEASED, parse_basis
from dpsb.beginning import basis_setup, begin
from dpsb.config import RunConfig
from dpsb.data import read_table
from dpsb.frozen_prefix import FrozenOutputs, remember_frozen_prefix, whole_model
from dpsb.generation import generate, references_by_prompt, scores
from dpsb.inputs import Inputs, read_inputs
from dpsb.optimizers import make_optimizer
from dpsb.plan import make_plan
from dpsb.prepare import columns_of
from dpsb.randomness import SystemRandomness
from dpsb.train import Knobs, fit
from dpsb_accounting import Ledger, Plan, epsilon
from dpsb_accounting.files import write_whole

SEED = 20261126
"""Of the choice of rows; public, as these data are."""
WEIGHT_RATES, GRADIENT_RATES = (0.03, 0.1, 0.3, 1.0), (0.01, 0.03, 0.1, 0.3)
"""Of R by what its basis is from. For the weights two higher ones were added to (0.01, 0.03, 0.1) and, of LoRA, to
(0.0003, 0.001, 0.003), the lowest left out, because the highest had been best for both, with and without privacy, by
validation rows. Directions of gradients hold more of a step, so their grid is one rate lower."""


@dataclass(frozen=True)
class Arm:
    """What is trained, from which basis and rows, the rates that are tried, and that of five passes over the near rows
    without privacy before the private steps, if there are any."""

    method: str
    rank: int
    rates: tuple[float, ...]
    basis: str | None = None
    rows: str = "train"
    warm: float | None = None


ARMS = {
    "sb": Arm("sb", 16, WEIGHT_RATES, "weight"),
    "sb-random": Arm("sb", 16, WEIGHT_RATES, "random"),
    "sb-near": Arm("sb", 16, GRADIENT_RATES, "public:{near}"),
    "sb-hybrid": Arm("sb", 16, GRADIENT_RATES, "hybrid:{near}"),
    "sb-private": Arm("sb", 16, GRADIENT_RATES, "private"),
    "sb-leak": Arm("sb", 16, GRADIENT_RATES, "leak"),
    "lora": Arm("lora", 4, (0.001, 0.003, 0.01, 0.03)),
    "ffa-lora": Arm("ffa-lora", 4, (0.003, 0.01, 0.03, 0.1)),
    "lora-xs": Arm("lora-xs", 16, (0.003, 0.01, 0.03, 0.1)),
    "eva-near": Arm("peft:eva:{near}", 4, (0.001, 0.003, 0.01, 0.03)),
    "lora-ga-near": Arm("peft:lora_ga:{near}", 4, (0.001, 0.003, 0.01, 0.03)),
    "sb-trained": Arm("sb", 16, GRADIENT_RATES, "trained", warm=0.005),
    "lora-warm": Arm("lora", 4, (0.001, 0.003, 0.01, 0.03), warm=0.01),
    "ffa-lora-warm": Arm("ffa-lora", 4, (0.003, 0.01, 0.03, 0.1), warm=0.1),
    "near-alone": Arm("lora", 4, (0.001, 0.003, 0.01, 0.03), rows="near"),
}
"""LoRA's rank is small because its noise grows with the number of its entries. Public rates (`warm`): the
best of two for R-only and of three for FFA-LoRA by the perplexity of the start, and that of *near-alone* for LoRA."""
TARGETS = r"re:.*layers\.2[6-9]\..*_proj"
OUTPUTS = FrozenOutputs()
"""What the blocks below the adapters computed, the same for every arm."""
METRICS = ("bleu", "rouge_l", "perplexity")
VALIDATION, NEAR, PROMPTS, NEW_TOKENS, DELTA = 150, 256, 100, 48, 1e-5


def write_parts(data_dir: Path, out: Path, rows: int) -> dict[str, Path]:
    """Training rows, near public rows of other tables from the same split, validation rows, and all test rows.

    Splits have no table in common, so nothing is judged on a table that any arm has seen.
    """
    table = pq.read_table(data_dir / "e2e.parquet")
    rng = np.random.default_rng(SEED)
    paths = {}
    splits = {
        s: table.filter(pc.equal(table["split"], s)).select(["text_a", "text_b"])
        for s in table["split"].unique().to_pylist()
    }
    order = {split: rng.permutation(len(splits[split])) for split in ("train", "validation")}
    parts = {
        "train": splits["train"].take(np.sort(order["train"][:rows])),
        "validation": splits["validation"].take(np.sort(order["validation"][:VALIDATION])),
        "near": splits["train"].take(np.sort(_of_other_tables(splits["train"]["text_a"], order["train"], rows)[:NEAR])),
        "test": splits["test"],
    }
    for name, part in parts.items():
        paths[name] = out / f"{name}.parquet"
        pq.write_table(part, paths[name])
    return paths


def _of_other_tables(tables: pa.ChunkedArray, order: np.ndarray, rows: int) -> np.ndarray:
    """Of the rows behind the first ``rows``, those whose table none of the first has; E2E has eight texts a table."""
    seen = pc.is_in(tables.take(order[rows:]), value_set=tables.take(order[:rows]).combine_chunks())
    return np.asarray(order[rows:][~seen.to_numpy(zero_copy_only=False)])


def warm_start(near: Path, rate: float) -> dict[str, Any]:
    return {"warm_start": str(near), "warm_start_epochs": 5, "warm_start_learning_rate": rate}


class Bench:
    """A model with one arm's adapter, and what its frozen blocks have computed."""

    def __init__(self, name: str, paths: dict[str, Path], options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        arm = ARMS[name]
        self.config = RunConfig(
            **{"model": options.model, "task": "causal-lm", "data": str(paths[arm.rows])},
            **{"method": arm.method.format(near=paths["near"])},
            **{"prompt_column": "text_a", "completion_column": "text_b", "max_length": 96, "out": str(options.out)},
            **{"eval_data": str(paths["validation"]), "targets": TARGETS, "rank": arm.rank},
            **({} if arm.basis is None else {"basis": arm.basis.format(near=paths["near"])}),
            **({} if arm.warm is None else warm_start(paths["near"], options.warm_start_lr or arm.warm)),
            **{"steps": options.steps, "expected_batch_size": options.batch, "token_budget": 2048},
            remember_frozen_blocks=True,
            allow_non_private_basis=True,
        )
        self.inputs: Inputs = read_inputs(self.config, warm=False)
        self._planned: dict[float, Planned] = {}
        self._synthetic = self.inputs.synthetic()
        self.is_paid = arm.basis is not None and parse_basis(self.config.basis).kind in RELEASED
        if arm.basis is None:
            self.adapter, _ = begin(self.inputs, basis_setup(self.inputs, DELTA), lambda _status: None)
        else:
            self.adapter = attach(self.inputs.model, self._plan_basis(8.0).basis)
        self.start = {name: value.clone() for name, value in self.adapter.state().items()}
        self.references = references_by_prompt(read_table(str(paths["test"])), columns_of(self.config), PROMPTS)
        self.remembered = remember_frozen_prefix(self.inputs.model, OUTPUTS)
        self.remembered.__enter__()

    def _plan_basis(self, target: float) -> Planned:
        """The basis, or how it is released; what a release costs depends on the target."""
        key = target if self.is_paid else 0.0
        if key not in self._planned:
            self._planned[key] = planned_basis(self.inputs, replace(self.config, epsilon=target), DELTA)
        return self._planned[key]

    def train(self, target: float, rate: float) -> Plan:
        """A run from the start under a ledger of its own, which pays for the basis where it has to be paid."""
        self.adapter.load_state(self.start)
        inputs = self.inputs
        planned = None if ARMS[self.name].basis is None else self._plan_basis(target)
        plan = make_plan(
            epsilon=target,
            delta=DELTA,
            num_examples=len(inputs.prepared.examples),
            num_examples_declared=False,
            expected_batch_size=self.options.batch,
            steps=self.options.steps,
            clipping="automatic",
            basis=(planned or self.adapter).provenance.to_json(),
            released_before=() if planned is None else planned.phases,
        )
        config = replace(inputs.config, learning_rate=rate, epsilon=target)
        synthetic, self._synthetic = self._synthetic, shortest(self._synthetic, inputs.prepared.max_length)
        with (
            tempfile.TemporaryDirectory() as scratch,
            Ledger.create(Path(scratch) / "ledger.jsonl", plan) as ledger,
        ):
            if planned is not None and planned.make is not None:
                examples = PrivateExamples(
                    model=inputs.model,
                    layers=lora_layers(inputs.model),
                    dataset=inputs.prepared.examples,
                    loss_fn=inputs.loss_fn,
                    collate=inputs.collate,
                    synthetic=synthetic,
                    max_length=inputs.prepared.max_length,
                    token_budget=config.token_budget,
                    ledger=ledger,
                    randomness=SystemRandomness(),
                )
                self.adapter = release_basis(Path(scratch), self.adapter, planned.make, examples)
            charge_leak(ledger)
            optimizer, schedule = make_optimizer(config, self.adapter, plan)
            fit(
                self.adapter,
                inputs.prepared.examples,
                ledger=ledger,
                optimizer=optimizer,
                loss_fn=inputs.loss_fn,
                collate=inputs.collate,
                synthetic=synthetic,
                max_length=inputs.prepared.max_length,
                schedule=schedule,
                knobs=Knobs(token_budget=config.token_budget, checkpoint_every=0),
            )
            if ledger.remaining("train"):
                raise RuntimeError("The run made fewer steps than its plan has.")
        return plan

    def answer(self) -> dict[str, float]:
        """BLEU and ROUGE-L of the answers to the test tables."""
        with whole_model():
            answers = generate(
                self.inputs.model,
                self.inputs.tokenizer,
                list(self.references),
                max_length=self.inputs.prepared.max_length,
                max_new_tokens=NEW_TOKENS,
            )
        return dict(scores(answers, list(self.references.values())))


def run(bench: Bench, target: float | None, rate: float, repeat: int, purpose: str) -> dict[str, Any]:
    """One row. Without ``target``, what the noise is for: the model as it came, or as public rows left it."""
    began = time.perf_counter(), time.process_time()
    row: dict[str, Any] = {
        "arm": "–" if target is None and ARMS[bench.name].warm is None else bench.name,
        "purpose": purpose,
        "learning_rate": rate,
        "repeat": repeat,
    }
    if target is None:
        bench.adapter.load_state(bench.start)
    else:
        plan = bench.train(target, rate)
        row |= {"target": target, "noise_multiplier": plan.noise_multiplier, "trained": bench.adapter.dimension}
        row |= {"epsilon": epsilon(plan).upper if plan.is_private else math.inf}
    row |= bench.inputs.metrics()
    if target is None or (purpose != "tuning" and target in bench.options.answers_at):
        row |= bench.answer()
    return {**row, "seconds": time.perf_counter() - began[0], "processor_seconds": time.process_time() - began[1]}


def kept(out: Path, name: str, bench: Bench, *arguments: Any) -> dict[str, Any]:
    """A run's row: from its file, or made and written there."""
    file = out / f"{name}.json"
    if not file.exists():
        row = run(bench, *arguments)
        write_whole(file, (json.dumps(row) + "\n").encode())
        print(f"{name}: perplexity {row['perplexity']:.3f}, BLEU {row.get('bleu', math.nan):.2f}", flush=True)
    return dict(json.loads(file.read_text()))


def do(arm: str, paths: dict[str, Path], options: argparse.Namespace) -> None:
    """Every run of one arm."""
    bench, out = Bench(arm, paths, options), options.out
    kept(out, "before" if ARMS[arm].warm is None else f"{arm}-start", bench, None, 0.0, 0, "before")
    chosen: dict[float, float] = {}
    for target in options.epsilons:
        without_privacy = math.isinf(target)
        if (bench.is_paid and without_privacy) or (ARMS[arm].rows == "near" and not without_privacy):
            continue
        tuned_at = math.inf if without_privacy else 8.0
        if tuned_at not in chosen:
            names = {rate: f"{arm}-{tuned_at:g}-rate{rate:g}" for rate in ARMS[arm].rates}
            rows = [kept(out, name, bench, tuned_at, rate, 0, "tuning") for rate, name in names.items()]
            chosen[tuned_at] = min(rows, key=lambda row: float(row["perplexity"]))["learning_rate"]
        for repeat in range(options.repeats):
            kept(out, f"{arm}-{target:g}-run{repeat}", bench, target, chosen[tuned_at], repeat, "table")


def write_table(out: Path) -> None:
    """`e2e.csv`, a row for every run, and `e2e.md`, mean and standard deviation."""
    rows = [json.loads(file.read_text()) for file in sorted(out.glob("*.json"))]
    names = list(dict.fromkeys(name for row in rows for name in row))
    pcsv.write_csv(pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]), out / "e2e.csv")
    lines = ["| epsilon | arm | rate | BLEU | ROUGE-L | perplexity | runs |", "|---|---|---|---|---|---|---|"]
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["purpose"] != "tuning":
            groups.setdefault((row.get("target", -1.0), row["arm"]), []).append(row)
    for (target, arm), found in sorted(groups.items()):
        scored = {name: [row[name] for row in found if row.get(name) is not None] for name in METRICS}
        means = " | ".join(spread(values) if values else "–" for values in scored.values())
        at = "before" if target < 0 else f"{target:g}"
        lines.append(f"| {at} | {arm} | {found[0]['learning_rate']:g} | {means} | {len(found)} |")
    (out / "e2e.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    mean = statistics.fmean(values)
    return f"{mean:.3g} ± {statistics.stdev(values):.2g}" if len(values) > 1 else f"{mean:.3g}"


def numbers(text: str) -> tuple[float, ...]:
    """Comma-separated numbers."""
    return tuple(map(float, text.split(",")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--model", default="smollm2", help="or the folder of a model that public rows were trained into"
    )
    parser.add_argument("--arms", default=",".join(ARMS), help=f"one after the other; default {','.join(ARMS)}")
    parser.add_argument(
        "--warm-start-lr", type=float, help="public rate of the arms that begin on near rows; default: their own"
    )
    parser.add_argument("--epsilons", type=numbers, default="8,3,1", help="inf is without privacy; default 8,3,1")
    parser.add_argument("--answers-at", type=numbers, default="8", help="epsilons with BLEU and ROUGE-L; default 8")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64, help="expected batch size")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    paths = write_parts(options.data_dir, options.out, options.rows)
    for arm in options.arms.split(","):
        do(arm, paths, options)
    write_table(options.out)


if __name__ == "__main__":
    main()
