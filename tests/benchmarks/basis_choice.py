"""How often `--basis-choice private` takes the nearer of two public files, by epsilon and number of private rows.

    python tests/benchmarks/basis_choice.py --data-dir DIR --out DIR --set banking77

The files are 512 near public rows and 512 far ones, as `utility.py` cuts them; the nearer is the one whose basis holds
more of the gradient of *test* rows, which the private rows have no part in. Private rows are scored as
`PrivateExamples.release_preferences` scores them, one pass for all of them; noise is then drawn as often as --noises
says for each epsilon, with the share of the budget that dpsb takes by default. For fewer rows random subsets are
scored, a new one for each draw. It reads the private rows as often as it likes and takes seeded noise, so it claims no
epsilon. Prints a table, or JSON with --json.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from basis_sums import AUTOMATIC, DELTA, Bench, Tensors, mechanism_of, read_bench
from utility import EPSILONS, ROWS, TARGETS, TASKS

from dpsb.adapter import Basis, Provenance
from dpsb.basis.budget import basis_noise_multiplier, default_share
from dpsb.basis.choose import gradient_basis, held_energy, sketches_of
from dpsb.basis.per_example import WHOLE, example_norms
from dpsb.probe import without_dropout

COUNTS = (20, 50, 100, 300, 1000, 4000)


def clipped_scores(bench: Bench, bases: Mapping[str, Basis]) -> torch.Tensor:
    """Each private row's clipped preference for the bases, shape ``(n, m)``."""
    model, mechanism = bench.inputs.model, mechanism_of(AUTOMATIC, 1.0)
    sketches = [sketches_of(basis.factors) for basis in bases.values()]
    whole, found = dict.fromkeys(bench.layers, WHOLE), []
    for batch in bench.batches(bench.inputs.prepared.examples):
        norms = example_norms(model, bench.inputs.loss_fn, batch, bench.layers, [whole, *sketches])
        energy = (norms[:, 1:] / norms[:, :1]).square()
        rows = energy - energy.mean(dim=1, keepdim=True)
        found += [mechanism.clip_and_sum(row[None]) for row in rows]
    return torch.stack(found)


def measure(bench: Bench, gradients: Mapping[str, Tensors], noises: int) -> list[dict[str, Any]]:
    provenance = Provenance(kind="public", access="public")
    bases = {name: gradient_basis(bench.inputs.model, gradients[name], provenance) for name in ("near", "far")}
    held = {name: held_energy(basis.factors, gradients["test"]) for name, basis in bases.items()}
    nearer = max(held, key=lambda name: held[name])
    scores = clipped_scores(bench, bases).numpy()
    rng, found = np.random.default_rng(0), []
    for count in [c for c in COUNTS if c < len(scores)] + [len(scores)]:
        for epsilon in EPSILONS:
            share = default_share("choice", float(epsilon))
            noise = basis_noise_multiplier(epsilon=float(epsilon), delta=DELTA, share=share)
            drawn = [
                scores[rng.choice(len(scores), count, replace=False)].sum(axis=0) + noise * rng.standard_normal(2)
                for _ in range(noises)
            ]
            rate = float(np.mean([list(bases)[int(scored.argmax())] == nearer for scored in drawn]))
            facts = {"share": share, "noise_multiplier": noise, "nearer": nearer, "rate": rate}
            facts["standard_error"] = math.sqrt(rate * (1 - rate) / noises)
            held_by = {f"held_{name}": value for name, value in held.items()}
            found.append({**bench.facts, **held_by, "count": count, "epsilon": float(epsilon), **facts})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with NAME.parquet")
    parser.add_argument("--out", type=Path, required=True, help="folder for gradients, which a second start takes")
    parser.add_argument("--set", choices=[name for name, task in TASKS.items() if task.has_head], default="banking77")
    parser.add_argument("--targets", choices=list(TARGETS), default="top2", help="blocks that are adapted")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"private rows at most; default {ROWS}")
    parser.add_argument("--rank", type=int, default=16, help="default 16")
    parser.add_argument("--noises", type=int, default=1000, help="draws for each figure; default 1000")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each figure")
    options = parser.parse_args()
    bench, gradients = read_bench(argparse.Namespace(**vars(options), draws=0))
    with without_dropout(bench.inputs.model):
        rows = measure(bench, gradients, options.noises)
    if options.json:
        print("\n".join(json.dumps(row) for row in rows))
        return
    held = {name: f"{rows[0][f'held_{name}']:.3f}" for name in ("near", "far")}
    print(f"{options.set}: near holds {held['near']} of the test rows' gradient, far {held['far']}")
    print(f"| private rows | {' | '.join(f'epsilon {epsilon}' for epsilon in EPSILONS)} |")
    print("|---" * (len(EPSILONS) + 1) + "|")
    for count in dict.fromkeys(row["count"] for row in rows):
        rates = [f"{row['rate']:.3f}" for row in rows if row["count"] == count]
        print(f"| {count} | " + " | ".join(rates) + " |")


if __name__ == "__main__":
    main()
