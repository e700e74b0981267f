"""Seconds of one private step of a causal language model of 135 million parameters: R-only against opake's LoRA.

Arms, on SmolLM2-135M's shape with random weights, fp32, rank 16 on every linear layer, dropout 0, clip norm 1, noise
multiplier 1, Adam, the same examples of 512 tokens:

private       one step of ``dpsb.fit``, timed as in ``step_time.py``: ledger line with fsync, Poisson draw, collating,
              per-example gradients, clipping in float64, noise, Adam.
opake         one step of opake's own functions for A and B, as its Trainer puts them together on a CPU: collating,
              ``clipped_grad`` over the whole batch at once with the loss in pieces, ``gaussian_noise``, ``adam``. No
              sampler, no accountant, no callbacks, so it does less than its Trainer.
opake_logits  the same with the model's plain loss over all logits.

opake runs in ``opake_worker.py`` under the interpreter given by --opake-python, which stays alive and times its own
steps; both processes have the same base weights, token ids and number of threads. Before the first round the losses and
the number of adapted layers are compared, and opake's clipped mean is compared with a loop over examples. Arms are
interleaved in random order after one round of warm-up, one at a time. Ratios are taken within rounds: [least, median,
most]. Memory is the most that a process held during a step, its model included.

An interpreter for it: ``python -m venv V && V/bin/pip install torch==2.13.0 opake==0.16.1 transformers==5.23.0 peft``.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from common import Workload
from peak import forget_peak, peak_mib
from step_time import time_rounds

from dpsb.data import Collator

TARGET = 0.5
WORKER = Path(__file__).with_name("opake_worker.py")
ARMS = ("opake", "opake_logits")


class Opake:
    """The worker, from its set-up to the end of this block."""

    def __init__(self, python: Path, workload: Workload) -> None:
        self._process = subprocess.Popen([python, WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.peaks: dict[str, list[float]] = {name: [] for name in ("private", *ARMS)}
        self._private_seen = False
        model, examples = workload.lora(), workload.examples(workload.batch_size)
        with torch.no_grad():
            losses = workload.loss_fn(model, Collator(pad_token_id=0)(examples, workload.tokens)).tolist()
        self.facts = self._ask(
            json.dumps(
                {
                    "config": json.loads(model.config.to_json_string()),
                    "examples": [example["input_ids"] for example in examples],
                    "rank": common.RANK,
                    "clip": 1.0,
                    "noise": 1.0,
                    "threads": torch.get_num_threads(),
                }
            )
        )
        targets = sum(name.endswith("lora_A.default.weight") for name, _ in model.named_parameters())
        assert self.facts["targets"] == targets, "another number of adapted layers"
        assert torch.allclose(torch.tensor(losses), torch.tensor(self.facts["losses"]), rtol=1e-4), "other losses"
        for checks in self.facts["checks"].values():
            assert checks["distance_from_a_loop"] < 1e-3, checks
            assert 0.99 < checks["noise_over_stated"] < 1.01, checks
            assert checks["smallest_change_of_a_tensor"] > 0, checks

    def __enter__(self) -> Opake:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(line, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "opake's worker ended; standard error says why"
        return json.loads(answer)

    def step(self, arm: str) -> common.Elapsed:
        """One step over there; the memory of this process's step before it is noted, too."""
        if self._private_seen:
            self.peaks["private"].append(peak_mib())
        took = self._ask(arm)
        self.peaks[arm].append(took["peak_mib"])
        forget_peak()
        self._private_seen = True
        return common.Elapsed(took["wall"], took["cpu"])


def spread(values: list[float]) -> list[float]:
    """Least, median and most."""
    ordered = sorted(values)
    return [float(f"{value:.4g}") for value in (ordered[0], common.quartiles(ordered)[1], ordered[-1])]


def measure(python: Path, workload: Workload, repetitions: int) -> dict[str, Any]:
    """The ratios, with the times and the memory behind them."""
    with Opake(python, workload) as opake:
        others: dict[str, Callable[[], common.Elapsed]] = {name: partial(opake.step, name) for name in ARMS}
        rounds = time_rounds(workload, repetitions, others)

    def ratios(clock: str) -> dict[str, list[float]]:
        pick = {arm: [getattr(times[arm], clock) for times in rounds] for arm in rounds[0]}
        return {
            f"private_over_{arm}": spread(
                [ours / theirs for ours, theirs in zip(pick["private"], pick[arm], strict=True)]
            )
            for arm in ARMS
        }

    return {
        "model": workload.name,
        "ratio_of_processor_time": ratios("cpu"),
        "ratio_of_wall_clock_time": ratios("wall"),
        "target": TARGET,
        "processor_seconds": {arm: spread([times[arm].cpu for times in rounds]) for arm in rounds[0]},
        "wall_clock_seconds": {arm: spread([times[arm].wall for times in rounds]) for arm in rounds[0]},
        "peak_mib": {arm: round(max(values)) for arm, values in opake.peaks.items()},
        "batch": [workload.batch_size, workload.tokens],
        "rank": common.RANK,
        "repetitions": len(rounds),
        "opake": {name: value for name, value in opake.facts.items() if name != "losses"},
        "machine": common.machine(),
    }


def main() -> None:
    parser = common.arguments(__doc__, repetitions=5, threads=1, batch=1)
    parser.formatter_class = common.argparse.RawDescriptionHelpFormatter
    parser.add_argument("--opake-python", type=Path, required=True, help="the interpreter that has opake")
    options = parser.parse_args()
    common.quiet()
    torch.set_num_threads(options.threads)
    workload = replace(common.SMOLLM2, batch_size=options.batch)
    common.show(measure(options.opake_python, workload, options.repetitions), options.json)


if __name__ == "__main__":
    main()
