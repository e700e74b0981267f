"""The pass for a private basis against a plain forward and backward over the same examples: time and peak memory.

plain    forward and backward of the frozen model in the same microbatches, the gradient flowing from its embeddings on.
summed   the same, and the gradient of every target weight summed up, without norms and without clipping.
whole    the pass of one release of whole gradients (``--basis private`` up to 1,024 wide).
right    the pass of a release of sketches G V, V of rank + 8 columns: noisy subspace iteration, first half of a round.
left     the pass of a release of sketches U^T G: second half of a round.
both     the pass of a release of cores U^T G V of width 6 r (``--basis hybrid``).

A pass is ``dpsb.basis.per_example.add_clipped_sum`` on every microbatch, as ``PrivateExamples.release`` calls it and
in its microbatches, which are an eighth smaller than those of training (``pass_budget``). What a release adds once,
whatever the number of examples, is the noise (``seconds_of_noise``). After a warm-up the arms are interleaved; a ratio
is the median over rounds of the ratio within the round.

Peak memory is the highest total of bytes that torch's allocator holds beyond the model, from every single allocation of
one microbatch. A pass may hold what a plain forward and backward for the gradients of the same weights holds at its
peak, each gradient dropped as soon as it is made (``plain_peak_mib``; ``activations_mib`` of it are kept between its
forward and its backward), and the float64 sums. ``peak_over_allowed`` is a pass's peak over both together.
"""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import common
import memory
import torch
from common import Workload
from torch import nn
from torch.profiler import ProfilerActivity, profile

from dpsb.adapter import lora_layers
from dpsb.basis.gradient import mean_gradients
from dpsb.basis.per_example import WHOLE, Sketch, add_clipped_sum, zeros_for
from dpsb.basis.private import _OVERSAMPLING
from dpsb.basis.release import pass_budget
from dpsb.data import Collator
from dpsb.mechanism import Mechanism
from dpsb.models import HEAD_NAMES
from dpsb.randomness import SystemRandomness

TARGET = 2.5
WARM_UP = 1
MECHANISM = Mechanism(l2_clip_norm=1.0, noise_multiplier=4.0, clipping="automatic")
HYBRID_WIDTH = 6 * common.RANK

WIDE = Workload("llama-4096", "causal-lm", 4, 128, lambda dtype: common.llama(dtype, 4096, 1, 1024))
LONG = replace(common.MINILM, name="minilm-256", batch_size=8, tokens=256)
ARMS = {
    "minilm": (common.MINILM, ("whole", "both")),
    "minilm-256": (LONG, ("whole", "both")),
    "llama-4096": (WIDE, ("whole", "right", "left", "both")),
}

Layers = Mapping[str, Any]
Sums = dict[str, torch.Tensor]


def sketches_for(layers: Layers, arm: str) -> dict[str, Sketch]:
    """What of each gradient the arm releases, through random orthonormal frames."""
    width = {"left": common.RANK + _OVERSAMPLING, "right": common.RANK + _OVERSAMPLING, "both": HYBRID_WIDTH}
    sketches = {}
    for name, layer in layers.items():
        left = _frame(layer.out_features, width[arm]) if arm in ("left", "both") else None
        right = _frame(layer.in_features, width[arm]) if arm in ("right", "both") else None
        sketches[name] = WHOLE if arm == "whole" else Sketch(left, right)
    return sketches


def _frame(rows: int, columns: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, columns)).Q


def plain_pass(workload: Workload, model: nn.Module, batches: list[Any]) -> None:
    for batch in batches:
        workload.loss_fn(model, batch).sum().backward()


def private_pass(
    workload: Workload, model: nn.Module, batches: list[Any], sketches: Mapping[str, Sketch], totals: Sums
) -> None:
    layers = lora_layers(model)
    for batch in batches:
        add_clipped_sum(model, workload.loss_fn, batch, layers, sketches, MECHANISM, totals)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that torch holds at any moment of ``work`` beyond what was there before it, from every allocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def make_trainable(model: nn.Module) -> None:
    """All linear layers but the head get gradients, which are dropped as soon as they are made."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not set(name.split(".")) & {"lm_head", *HEAD_NAMES}:
            module.weight.requires_grad_(True)
            module.weight.register_post_accumulate_grad_hook(_drop)


def _drop(weight: torch.Tensor) -> None:
    weight.grad = None


def seconds_of_noise(totals: Sums) -> float:
    """The time of the noise of one release."""

    def release() -> None:
        for total in totals.values():
            MECHANISM.release(total.flatten(), SystemRandomness())

    return round(common.timed(release).wall, 3)


def measure(name: str, repetitions: int, microbatches: int) -> dict[str, Any]:
    """Ratios of time with the times behind them, and peaks of memory."""
    workload, passes = ARMS[name]
    collate = Collator(0)
    examples = workload.examples(workload.batch_size * microbatches)
    size = workload.batch_size
    fewer = max(1, pass_budget(size * workload.tokens) // workload.tokens)
    batches, smaller = (
        [collate(examples[i : i + rows], workload.tokens) for i in range(0, len(examples), rows)]
        for rows in (size, fewer)
    )
    frozen, model = memory.floor_model(workload, torch.float32), workload.lora().train()
    layers = lora_layers(model)
    # as in the plain arm: by itself the pass stops at the first target layer, half the backward pass of a single block
    hook = model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())
    sketches = {arm: sketches_for(layers, arm) for arm in passes}
    totals = {arm: zeros_for(layers, sketches[arm], torch.device("cpu")) for arm in passes}
    work: dict[str, Callable[[list[Any]], object]] = {
        "plain": partial(plain_pass, workload, frozen),
        "summed": partial(mean_gradients, model, workload.loss_fn),
    }
    for arm in passes:
        work[arm] = partial(private_pass, workload, model, sketches=sketches[arm], totals=totals[arm])
    arms = {arm: partial(function, smaller if arm in passes else batches) for arm, function in work.items()}
    with common.no_garbage_collection():
        rounds = list(common.interleaved(arms, WARM_UP + repetitions))[WARM_UP:]
    hook.remove()
    peaks = {arm: peak_bytes(partial(work[arm], smaller[:1])) for arm in passes}
    sums = {arm: sum(8 * total.numel() for total in totals[arm].values()) for arm in passes}
    make_trainable(frozen)
    activations = memory.kept_bytes(frozen, memory.forward_of(workload, frozen), nullcontext)
    allowed = peak_bytes(partial(plain_pass, workload, frozen, batches[:1]))
    return {
        "model": workload.name,
        "over_plain": {arm: common.paired_ratio(rounds, arm, "plain")[1] for arm in passes},
        "target": TARGET,
        "over_summed": {arm: common.paired_ratio(rounds, arm, "summed")[1] for arm in passes},
        "over_plain_quartiles": {arm: common.paired_ratio(rounds, arm, "plain") for arm in passes},
        "over_plain_of_processor_time": {arm: common.paired_ratio(rounds, arm, "plain", "cpu")[1] for arm in passes},
        "median_seconds": {arm: common.quartiles([r[arm].wall for r in rounds])[1] for arm in arms},
        "seconds_of_noise": {arm: seconds_of_noise(totals[arm]) for arm in passes},
        "peak_over_allowed": {arm: round((peaks[arm] + sums[arm]) / (allowed + sums[arm]), 4) for arm in passes},
        "plain_peak_mib": _mib(allowed),
        "activations_mib": _mib(activations),
        "peak_mib_without_sums": {arm: _mib(peaks[arm]) for arm in passes},
        "sums_mib": {arm: _mib(value) for arm, value in sums.items()},
        "batch": [workload.batch_size, workload.tokens, microbatches],
        "batch_of_a_pass": [fewer, workload.tokens, len(smaller)],
        "rank": common.RANK,
        "widest": max(max(layer.in_features, layer.out_features) for layer in layers.values()),
        "layers": len(layers),
        "repetitions": len(rounds),
        "machine": common.machine(),
    }


def _mib(value: float) -> float:
    return round(value / memory.MIB, 2)


def main() -> None:
    parser = common.arguments(__doc__, repetitions=8, threads=1, microbatches=7)
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.add_argument("--model", choices=[*ARMS, "all"], default="all")
    options = parser.parse_args()
    common.quiet()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for name in ARMS:
        if options.model in (name, "all"):
            common.show(measure(name, options.repetitions, options.microbatches), options.json)


if __name__ == "__main__":
    main()
