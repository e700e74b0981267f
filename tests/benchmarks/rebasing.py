"""Periodic re-basing: every so many steps B R A goes into the frozen weights, R back to 0, and new directions come in.

    python tests/benchmarks/rebasing.py --data-dir DIR --out DIR --basis random --periods 0,20,10 --repeats 3

It reads released R and public directions only, so it is post-processing: no epsilon is spent. What is measured is
whether it helps: R-only on random directions, or with --basis near on those of a public gradient, taken anew at the
weights and the head that training has reached; everything else as in `utility.py`. Period 0 is without. Prints a JSON
object for each run and keeps it in --out, so that a second start goes on; then a table. With --freeze-head-after S the
head is left where it is from step S on (its rows are still clipped along).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from utility import TARGETS, TASKS, write_parts

from dpsb.adapter import attach
from dpsb.basis.stage import plan_basis
from dpsb.beginning import basis_setup
from dpsb.config import RunConfig
from dpsb.head_share import clip_parts
from dpsb.inputs import read_inputs
from dpsb.models import HEAD_NAMES, in_head
from dpsb.optimizers import make_optimizer
from dpsb.plan import make_plan
from dpsb.rebasing import rebasing_of
from dpsb.train import private_steps
from dpsb_accounting import Ledger

DELTA = 1e-5


def one_run(config: RunConfig, freeze_head_after: int | None) -> dict[str, Any]:
    """Trains and evaluates; returns its metrics."""
    inputs = read_inputs(config, warm=True)
    prepared = inputs.prepared
    setup = basis_setup(inputs, DELTA)
    adapter = attach(inputs.model, plan_basis(setup).basis, allow=HEAD_NAMES)
    rebasing = rebasing_of(setup, adapter)
    parts = {} if config.head_share is None else {"clip_parts": clip_parts(adapter, config.head_share)}
    plan = make_plan(
        epsilon=config.epsilon,
        delta=DELTA,
        num_examples=len(prepared.examples),
        num_examples_declared=False,
        expected_batch_size=config.expected_batch_size,
        steps=config.steps,
        clipping="automatic",
        basis=adapter.provenance.to_json(),
        details=parts,
    )
    optimizer, schedule = make_optimizer(config, adapter, plan)
    heads = [p for name, p in adapter.named_parameters() if in_head(name)]
    with tempfile.TemporaryDirectory() as scratch, Ledger.create(Path(scratch) / "ledger.jsonl", plan) as ledger:
        for progress, _ in private_steps(
            adapter,
            prepared.examples,
            ledger=ledger,
            optimizer=optimizer,
            loss_fn=inputs.loss_fn,
            collate=inputs.collate,
            synthetic=inputs.synthetic(),
            max_length=prepared.max_length,
            schedule=schedule,
            token_budget=config.token_budget,
        ):
            if freeze_head_after is not None and progress.step == freeze_head_after:
                frozen = [head.detach().clone() for head in heads]
            if freeze_head_after is not None and progress.step > freeze_head_after:
                with torch.no_grad():
                    for head, value in zip(heads, frozen, strict=True):
                        head.copy_(value)
            if rebasing is not None:
                rebasing.after_step(progress.step, progress.steps, adapter, optimizer)
    return inputs.metrics()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with NAME.parquet")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--set", choices=list(TASKS), default="banking77", help="default banking77")
    parser.add_argument("--basis", choices=["random", "near"], default="random", help="default random")
    parser.add_argument("--periods", default="0,20,10", help="steps between two re-basings; default 0,20,10")
    parser.add_argument("--repeats", type=int, default=3, help="default 3")
    parser.add_argument("--epsilon", type=float, default=3.0, help="default 3")
    parser.add_argument("--lr", type=float, default=0.05, help="default 0.05")
    parser.add_argument("--head-share", type=float, help="by default a row is clipped as a whole")
    parser.add_argument("--freeze-head-after", type=int, help="by default never")
    options = parser.parse_args()
    task = TASKS[options.set]
    parts = write_parts(task, options.data_dir, options.out / "data")
    labels = sorted(set(pq.read_table(parts["private"])["label"].to_pylist()))
    config = RunConfig(
        model="minilm",
        data=str(parts["private"]),
        eval_data=str(parts["test"]),
        out=str(options.out),
        labels=",".join(labels),
        basis="random" if options.basis == "random" else f"public:{parts['near']}",
        epsilon=options.epsilon,
        delta=DELTA,
        steps=40,
        max_length=task.max_length,
        targets=TARGETS["top2"],
        token_budget=2048,
        learning_rate=options.lr,
        head_learning_rate=0.1,
        head_share=options.head_share,
    )
    found: dict[int, list[float]] = {}
    for repeat in range(1, options.repeats + 1):
        for period in (int(part) for part in options.periods.split(",")):
            told = f"period{period}-share{options.head_share}-freeze{options.freeze_head_after}-lr{options.lr:g}"
            file = options.out / f"{options.set}-{options.basis}-{told}-run{repeat}.json"
            if not file.exists():
                metrics = one_run(replace(config, rebase_every=period or None), options.freeze_head_after)
                file.write_text(json.dumps({"period": period, "repeat": repeat, **metrics}) + "\n")
            found.setdefault(period, []).append(json.loads(file.read_text())["accuracy"])
            print(f"{file.name}: {file.read_text().strip()}", flush=True)
    for period, values in found.items():
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        print(f"| {options.basis} | {period or 'never'} | {statistics.fmean(values):.3f}{spread} ({len(values)}) |")


if __name__ == "__main__":
    main()
