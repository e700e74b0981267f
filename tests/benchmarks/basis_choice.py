"""How often `--basis-choice private` takes the nearer of two public files, by epsilon and number of private rows.

    python tests/benchmarks/basis_choice.py --data-dir DIR --out DIR --set banking77

The files are 512 near public rows and 512 far ones, as `utility.py` cuts them; the nearer is the one whose basis holds
more of the gradient of *test* rows, which the private rows have no part in. Private rows are scored as
`PrivateExamples.release_preferences` scores them, one pass for all of them; noise is then drawn as often as --draws
says for each epsilon, with the share of the budget that dpsb takes by default. For fewer rows random subsets are
scored, a new one for each draw. It reads the private rows as often as it likes and takes seeded noise, so it claims no
epsilon. Prints a table, or JSON with --json.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from basis_sums import AUTOMATIC, DELTA, Bench, Tensors, add_bench_options, mechanism_of, read_bench
from utility import EPSILONS

from dpsb.adapter import Basis, Provenance
from dpsb.basis.budget import basis_noise_multiplier, default_share
from dpsb.basis.choose import gradient_basis, held_energy, sketches_of
from dpsb.basis.per_example import preferences
from dpsb.probe import without_dropout

COUNTS = (20, 50, 100, 300, 1000, 4000)


def clipped_scores(bench: Bench, bases: Mapping[str, Basis]) -> torch.Tensor:
    """Each private row's clipped preference for the bases, shape ``(n, m)``."""
    model, mechanism = bench.inputs.model, mechanism_of(AUTOMATIC, 1.0)
    sketches = [sketches_of(basis.factors) for basis in bases.values()]
    batches = bench.batches(bench.inputs.prepared.examples)
    rows = torch.cat([preferences(model, bench.inputs.loss_fn, batch, bench.layers, sketches) for batch in batches])
    return rows * mechanism.scale(rows.norm(dim=1))[:, None]


def measure(bench: Bench, gradients: Mapping[str, Tensors]) -> list[dict[str, Any]]:
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
                for _ in range(bench.draws)
            ]
            rate = float(np.mean([list(bases)[int(scored.argmax())] == nearer for scored in drawn]))
            facts = {"share": share, "noise_multiplier": noise, "nearer": nearer, "rate": rate}
            facts["standard_error"] = math.sqrt(rate * (1 - rate) / bench.draws)
            held_by = {f"held_{name}": value for name, value in held.items()}
            found.append({**bench.facts, **held_by, "count": count, "epsilon": float(epsilon), **facts})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_bench_options(parser, draws=1000)
    parser.add_argument("--json", action="store_true", help="a line of JSON for each figure")
    options = parser.parse_args()
    bench, gradients = read_bench(options)
    with without_dropout(bench.inputs.model):
        rows = measure(bench, gradients)
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
