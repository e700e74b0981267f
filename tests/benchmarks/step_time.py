"""Seconds of one training step: private R-only against three alternatives, as ratios within one run.

Arms, all with rank 16 on every linear layer, dropout 0, train mode, the same examples, Adam, and a model copy each:

private       one step of ``dpsb.fit``: ledger line with fsync, Poisson draw, collating, forward and backward with
              per-example gradients, clipping in float64, noise, Adam. The draw is made over 4096 rows and then
              replaced by the batch, so that every arm sees the same number of examples.
nonprivate_r  the same adapter and loss, plain autograd, mean over the batch.
peft_lora     PEFT LoRA (A and B, and the classifier's head), the model's own loss, as a user of PEFT writes it.
opacus_lora   the same LoRA under Opacus' PrivacyEngine in hooks mode.
opacus_ghost  the same in ghost mode, two backward passes; for smollm2 only, which takes minutes and runs when named.

On a machine with a GPU all of it runs there, and the peak of its memory is measured too, per step and beyond what lies
there between two steps; `--model gpu` is SmolLM2's shape with 16 x 512 tokens and Llama-3.2-1B's with 8 x 512.

After a warm-up the arms are interleaved. A ratio is the median over rounds of the ratio within the round.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from common import Workload
from opacus import PrivacyEngine
from torch.utils.data import DataLoader, TensorDataset

from dpsb.adapter import Adapter
from dpsb.data import Collator, synthetic_examples
from dpsb.randomness import SystemRandomness
from dpsb.train import Knobs, Progress, fit
from dpsb_accounting import Ledger, Phase, Plan, PoissonGaussian

ROWS = 4096
WARM_UP = 2
TARGETS = {"nonprivate_r": 1.05, "peft_lora": 1.00, "opacus_lora": 0.80}
CHOICES = {**common.WORKLOADS, "smollm2": common.SMOLLM2, **common.GPU_WORKLOADS}
DTYPES = ("float32", "bfloat16")
RATIO_NAMES = {
    "nonprivate_r": "private_over_nonprivate_r",
    "peft_lora": "private_over_peft_lora",
    "opacus_lora": "private_over_opacus_lora",
    "opacus_ghost": "private_over_opacus_ghost",
}


class FixedDraw(SystemRandomness):
    """Draws as :class:`SystemRandomness` does, then says that the first ``size`` rows were drawn."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def bernoulli(self, count: int, probability: float) -> np.ndarray:
        super().bernoulli(count, probability)
        return np.arange(count) < self._size


def plan(workload: Workload, steps: int) -> Plan:
    """A plan with a given noise multiplier; what it claims does not matter here."""
    sampling_prob = workload.batch_size / ROWS
    event = PoissonGaussian(noise_multiplier=1.0, sampling_prob=sampling_prob)
    return Plan(
        phases=(Phase("train", event, steps),),
        delta=1e-5,
        target_epsilon=10.0,
        neighboring="add_or_remove_one",
        num_examples=ROWS,
        num_examples_declared=True,
        expected_batch_size=workload.batch_size,
        sampling_prob=sampling_prob,
        l2_clip_norm=1.0,
        clipping="flat",
        basis={"kind": "random", "access": "data_free"},
    )


def adapter_of(workload: Workload, dtype: torch.dtype) -> Adapter:
    """The workload's R-only adapter, where this machine computes."""
    adapter = workload.adapter(dtype)
    adapter.model.to(common.DEVICE)
    return adapter


def nonprivate_r_step(
    workload: Workload, examples: list[Any], collate: Collator, dtype: torch.dtype
) -> Callable[[], None]:
    """One step of the R-only adapter without privacy."""
    adapter = adapter_of(workload, dtype)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-4)

    def step() -> None:
        workload.loss_fn(adapter.model, collate(examples, workload.tokens)).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peft_step(workload: Workload, examples: list[Any], collate: Collator, dtype: torch.dtype) -> Callable[[], None]:
    """One step of LoRA as a user of PEFT writes it."""
    model = workload.lora(dtype).to(common.DEVICE).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    return _huggingface_step(model, optimizer, workload, examples, collate)


def opacus_step(workload: Workload, examples: list[Any], collate: Collator, dtype: torch.dtype) -> Callable[[], None]:
    """One step of LoRA under Opacus in hooks mode."""
    model, optimizer, _ = _under_opacus(workload, "hooks", dtype)
    return _huggingface_step(model, optimizer, workload, examples, collate)


def ghost_step(workload: Workload, examples: list[Any], collate: Collator, dtype: torch.dtype) -> Callable[[], None]:
    """One step of LoRA on a causal model under Opacus in ghost mode, with the criterion that it wants."""
    model, optimizer, criterion, _ = _under_opacus(workload, "ghost", dtype)

    def step() -> None:
        batch = collate(examples, workload.tokens)
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        criterion(logits.flatten(0, 1), labels.flatten(), shape=logits.shape).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _under_opacus(workload: Workload, mode: str, dtype: torch.dtype) -> Any:
    model = workload.lora(dtype).to(common.DEVICE).train()
    return PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4),
        data_loader=DataLoader(TensorDataset(torch.zeros(ROWS)), batch_size=workload.batch_size),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )


def _huggingface_step(
    model: Any, optimizer: Any, workload: Workload, examples: list[Any], collate: Collator
) -> Callable[[], None]:
    def step() -> None:
        model(**collate(examples, workload.tokens)).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def arms_here(workload: Workload, dtype: torch.dtype) -> dict[str, Callable[[], common.Elapsed]]:
    """The arms beside the private one that run in this process."""
    collate = Collator(0, common.DEVICE)
    batch = workload.examples(workload.batch_size)
    steps = {
        "nonprivate_r": nonprivate_r_step(workload, batch, collate, dtype),
        "peft_lora": peft_step(workload, batch, collate, dtype),
        "opacus_lora": opacus_step(workload, batch, collate, dtype),
    }
    if workload.ghost:
        steps["opacus_ghost"] = ghost_step(workload, batch, collate, dtype)
    return {name: partial(common.timed, step) for name, step in steps.items()}


def time_rounds(
    workload: Workload,
    repetitions: int,
    others: Mapping[str, Callable[[], common.Elapsed]],
    dtype: torch.dtype = torch.float32,
) -> list[common.Round]:
    """The time of every arm in every round; ``others`` make one step each and say what it took.

    ``fit`` runs once from start to end. Its ``on_step`` callback runs the other arms and starts the clock again, so
    the private arm is timed exactly as users get it.
    """
    collate = Collator(0, common.DEVICE)
    examples = workload.examples(ROWS)
    adapter = adapter_of(workload, dtype)
    minutes_long = workload.name == common.SMOLLM2.name
    order = random.Random(0)
    rounds: list[common.Round] = []
    watch = common.Stopwatch()

    def on_step(_progress: Progress) -> None:
        nonlocal watch
        times = {"private": watch.elapsed()}
        for name in order.sample(list(others), len(others)):
            times[name] = others[name]()
        rounds.append(times)
        if minutes_long:
            seconds = {name: f"{took.wall:.1f} ({took.cpu:.1f})" for name, took in times.items()}
            print(
                f"round {len(rounds)} of {steps}, seconds (of processor time): {seconds}", file=sys.stderr, flush=True
            )
        watch = common.Stopwatch()

    warm_up, longest_probed = WARM_UP, workload.tokens
    if minutes_long:  # the probe before the first step sees short examples only
        warm_up, longest_probed = 1, 16
    steps = warm_up + repetitions
    with (
        tempfile.TemporaryDirectory() as folder,
        common.no_garbage_collection(),
        Ledger.create(Path(folder) / "ledger.jsonl", plan(workload, steps)) as ledger,
    ):
        fit(
            adapter,
            examples,
            ledger=ledger,
            optimizer=torch.optim.Adam(adapter.parameters(), lr=1e-4),
            loss_fn=workload.loss_fn,
            collate=collate,
            synthetic=synthetic_examples(workload.task, 8000, len(common.LABELS), longest_probed),
            max_length=workload.tokens,
            knobs=Knobs(token_budget=workload.batch_size * workload.tokens, checkpoint_every=0),
            randomness=FixedDraw(workload.batch_size),
            on_step=on_step,
        )
    return rounds[warm_up:]


def measure(workload: Workload, repetitions: int, dtype_name: str) -> dict[str, Any]:
    """The ratios, with the times behind them."""
    dtype = getattr(torch, dtype_name)
    rounds = time_rounds(workload, repetitions, arms_here(workload, dtype), dtype)
    compared = [arm for arm in RATIO_NAMES if arm in rounds[0]]
    ratios = {arm: common.paired_ratio(rounds, "private", arm) for arm in compared}
    times = {arm: common.quartiles([times[arm].wall for times in rounds]) for arm in rounds[0]}
    return {
        "model": workload.name,
        **{RATIO_NAMES[arm]: ratios[arm][1] for arm in compared},
        "targets": {RATIO_NAMES[arm]: target for arm, target in TARGETS.items()},
        "ratio_quartiles": {RATIO_NAMES[arm]: ratios[arm] for arm in compared},
        "ratio_of_processor_time": {
            RATIO_NAMES[arm]: common.paired_ratio(rounds, "private", arm, "cpu")[1] for arm in compared
        },
        "median_seconds": {arm: values[1] for arm, values in times.items()},
        "seconds_quartiles": times,
        "median_processor_seconds": {
            arm: common.quartiles([times[arm].cpu for times in rounds])[1] for arm in rounds[0]
        },
        "tokens_per_second": {
            arm: round(workload.batch_size * workload.tokens / values[1]) for arm, values in times.items()
        },
        "gpu_peak_mib": {arm: round(max(times[arm].gpu_mib for times in rounds)) for arm in rounds[0]},
        "batch": [workload.batch_size, workload.tokens],
        "dtype": dtype_name,
        "rank": common.RANK,
        "repetitions": len(rounds),
        "machine": common.machine(),
    }


def main() -> None:
    parser = common.arguments(__doc__, repetitions=12, threads=2)
    parser.formatter_class = common.argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", choices=[*CHOICES, "all", "gpu"], default="all")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the frozen weights")
    options = parser.parse_args()
    common.quiet()
    torch.set_num_threads(options.threads)
    groups = {"all": common.WORKLOADS, "gpu": common.GPU_WORKLOADS}
    for name in groups.get(options.model, [options.model]):
        common.show(measure(CHOICES[name], options.repetitions, options.dtype), options.json)


if __name__ == "__main__":
    main()
