"""What `basis_settings.py` measures with: a set's gradients, and clipped sums of its private rows from a single pass.

The pass records what each weight received and the gradient of what it returned; `add_clipped_sum` then gets these
records for the sums of every frame, width and clip, in the place of the model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from utility import ROWS, TARGETS, TASKS, write_parts

from dpsb.adapter import lora_layers
from dpsb.basis.gradient import mean_gradients
from dpsb.basis.per_example import WHOLE, Batch, Sketch, add_clipped_sum, example_norms, watched, zeros_for
from dpsb.basis.release import Clip
from dpsb.basis.sources import EXAMPLES, public_gradients, public_sample
from dpsb.config import RunConfig
from dpsb.data import Table, read_table, tokenize_classification
from dpsb.inputs import Inputs, read_inputs
from dpsb.mechanism import Mechanism
from dpsb.prepare import columns_of
from dpsb.probe import Example
from dpsb.sampling import length_buckets, microbatches, padded_lengths

DELTA = 1e-5
AUTOMATIC = Clip(l2_clip_norm=1.0, clipping="automatic", share=0.0)

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Stands where the private examples stand in a release: known clipped sums, and seeded noise. Charges nothing."""

    model: nn.Module
    layers: Mapping[str, Any]
    mechanism: Mechanism
    clean: Callable[[Mapping[str, Sketch], bool], Tensors]
    generator: torch.Generator
    released: Tensors = field(default_factory=dict)

    def release(self, sketches: Mapping[str, Sketch]) -> Tensors:
        clean = self.clean(sketches, not self.released)
        self.released.clear()
        self.released.update(noisy(clean, self.mechanism.noise_std, self.generator))
        return dict(self.released)


def noisy(totals: Mapping[str, torch.Tensor], noise_std: float, generator: torch.Generator) -> Tensors:
    """Each sum with seeded noise on every entry."""
    return {
        name: total + noise_std * torch.randn(total.shape, generator=generator, dtype=torch.float64)
        for name, total in totals.items()
    }


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One data set and model: what bases are made from and judged by."""

    inputs: Inputs
    layers: Mapping[str, Any]
    out: Path
    facts: dict[str, Any]
    draws: int

    @property
    def rank(self) -> int:
        return self.inputs.config.rank

    def kept(self, name: str, make: Callable[[], Tensors]) -> Tensors:
        """Tensors from a file, made first if they are not there."""
        file = self.out / f"{name}.safetensors"
        if not file.exists():
            say(f"making {file.name}")
            save_file({key: value.cpu().contiguous() for key, value in make().items()}, file)
        return load_file(file)

    def batches(self, examples: Sequence[Example]) -> Iterator[Batch]:
        """Microbatches padded as a run pads them."""
        lengths = padded_lengths(examples, length_buckets(self.inputs.prepared.max_length))
        for positions, length in microbatches(np.arange(len(examples)), lengths, self.inputs.config.token_budget):
            yield self.inputs.collate([examples[i] for i in positions], length)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def add_bench_options(parser: argparse.ArgumentParser, draws: int) -> None:
    """What :func:`read_bench` reads."""
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with NAME.parquet")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; a second start goes on there")
    parser.add_argument("--set", choices=[name for name, task in TASKS.items() if task.has_head], default="banking77")
    parser.add_argument("--targets", choices=list(TARGETS), default="top2", help="blocks that are adapted")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"private rows at most; default {ROWS}")
    parser.add_argument("--rank", type=int, default=16, help="default 16")
    parser.add_argument("--warm-head", action="store_true", help="the head of --warm-start on the near rows")
    parser.add_argument("--draws", type=int, default=draws, help=f"draws of the noise; default {draws}")


def read_bench(options: argparse.Namespace) -> tuple[Bench, dict[str, Tensors]]:
    """The set as `utility.py` cuts it, and gradients: near, far, leak and test, this one also of clipped rows."""
    task = TASKS[options.set]
    out = options.out / (f"{options.set}-{options.targets}-{options.rows}" + "-warm" * options.warm_head)
    parts = write_parts(task, options.data_dir, out / "data", options.rows)
    labels = sorted(set(pq.read_table(parts["private"])["label"].to_pylist()))
    config = RunConfig(
        model="minilm",
        data=str(parts["private"]),
        out=str(out),
        basis=f"public:{parts['near']},{parts['far']}",
        labels=",".join(labels),
        epsilon=3.0,
        delta=DELTA,
        steps=40,
        max_length=task.max_length,
        targets=TARGETS[options.targets],
        rank=options.rank,
        token_budget=2048,
        warm_start=str(parts["near"]) if options.warm_head else None,
    )
    inputs = read_inputs(config, warm=True)
    inputs.model.eval()
    facts = {"set": options.set, "targets": options.targets, "rows": len(inputs.prepared.examples)}
    facts["head"] = "warm" if options.warm_head else "random"
    bench = Bench(inputs=inputs, layers=lora_layers(inputs.model), out=out, facts=facts, draws=options.draws)
    return bench, gradients_of(bench, config, read_table(str(parts["test"])))


def gradients_of(bench: Bench, config: RunConfig, test: Table) -> dict[str, Tensors]:
    inputs, prepared = bench.inputs, bench.inputs.prepared
    rest = (inputs.collate, prepared.max_length, config.token_budget, config.head_init_std)

    def mean(examples: Sequence[Example]) -> Tensors:
        return mean_gradients(inputs.model, inputs.loss_fn, bench.batches(examples))

    held_out = tokenize_classification(test, columns_of(config), inputs.tokenizer, prepared.labels, prepared.max_length)

    def clipped() -> Tensors:
        whole = dict.fromkeys(bench.layers, WHOLE)
        totals = zeros_for(bench.layers, whole, torch.device("cpu"))
        for batch in bench.batches(held_out):
            mechanism = mechanism_of(AUTOMATIC, 1.0)
            add_clipped_sum(inputs.model, inputs.loss_fn, batch, bench.layers, whole, mechanism, totals)
        return {name: (total / len(held_out)).float() for name, total in totals.items()}

    found = {"test": bench.kept("gradient-test", lambda: mean(held_out))}
    found["test-clipped"] = bench.kept("gradient-test-clipped", clipped)
    found["leak"] = bench.kept("gradient-leak", lambda: mean(public_sample(prepared.examples, EXAMPLES)))
    for name, entry in zip(("near", "far"), prepared.public, strict=True):
        say(f"{name}: {entry.note}")
        found[name] = bench.kept(
            f"gradient-{name}", lambda entry=entry: public_gradients(inputs.model, inputs.loss_fn, entry, *rest)
        )
    return found


# --- the sums


def recorded(bench: Bench, batch: Batch) -> Batch:
    """What each target weight received of a microbatch, and the gradient of what it returned."""
    found: Tensors = {}

    def on_pair(name: str, x: torch.Tensor, g: torch.Tensor) -> None:
        found[f"{name} x"], found[f"{name} g"] = x, g

    with watched(bench.layers, bench.inputs.model, len(next(iter(batch.values())))) as watch:
        watch.on_pair = on_pair
        bench.inputs.loss_fn(bench.inputs.model, batch).sum().backward()
        watch.finish()
    return found


class _Replay(torch.autograd.Function):
    """A loss of 0 for each example, whose gradient in ``output`` is the recorded one."""

    @staticmethod
    def forward(context: Any, output: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(g)
        return output.new_zeros(len(output))

    @staticmethod
    def backward(context: Any, *_g: Any) -> Any:
        return context.saved_tensors[0], None


@contextmanager
def silent(layers: Mapping[str, Any]) -> Iterator[None]:
    """The frozen weights answer with zeros meanwhile: a replay needs only who received what."""
    bases = [layer.get_base_layer() for layer in layers.values()]
    for base in bases:
        base.forward = lambda x, width=base.out_features: x.new_zeros(()).expand(*x.shape[:-1], width)
    try:
        yield
    finally:
        for base in bases:
            del base.forward


def replayed(bench: Bench) -> Callable[[nn.Module, Batch], torch.Tensor]:
    """A loss whose gradients in every target weight's output are the recorded ones."""

    def loss_fn(_model: nn.Module, batch: Batch) -> torch.Tensor:
        outputs = {name: layer.get_base_layer()(batch[f"{name} x"]) for name, layer in bench.layers.items()}
        return torch.stack([_Replay.apply(out, batch[f"{name} g"]) for name, out in outputs.items()]).sum(dim=0)

    return loss_fn


def add_recorded(
    bench: Bench, record: Batch, sketches: Mapping[str, Sketch], mechanism: Mechanism, totals: Tensors
) -> None:
    with silent(bench.layers):
        add_clipped_sum(bench.inputs.model, replayed(bench), record, bench.layers, sketches, mechanism, totals)


@dataclass(frozen=True)
class Look:
    """What is summed of the private rows' gradients, and how each row is clipped."""

    sketches: Mapping[str, Sketch]
    clip: Clip

    @property
    def mechanism(self) -> Mechanism:
        return mechanism_of(self.clip, 1.0)


def mechanism_of(clip: Clip, noise_multiplier: float) -> Mechanism:
    return Mechanism(l2_clip_norm=clip.l2_clip_norm, noise_multiplier=noise_multiplier, clipping=clip.clipping)


def clipped_sums(bench: Bench, looks: Mapping[str, Look], keep: bool) -> tuple[dict[str, Tensors], list[Batch]]:
    """The sum of each look over the private rows, and with ``keep`` the records themselves."""
    files = {name: bench.out / f"sums-{name}.safetensors" for name in looks}
    missing = {name: look for name, look in looks.items() if not files[name].exists()}
    records = []
    totals = {name: zeros_for(bench.layers, look.sketches, torch.device("cpu")) for name, look in missing.items()}
    for number, batch in enumerate(bench.batches(bench.inputs.prepared.examples) if missing or keep else ()):
        if not number % 10:
            say(f"private rows, microbatch {number}, {len(missing)} sums")
        record = recorded(bench, batch)
        for name, look in missing.items():
            add_recorded(bench, record, look.sketches, look.mechanism, totals[name])
        if keep:
            records.append(record)
    for name, total in totals.items():
        save_file(total, files[name])
    return {name: load_file(file) for name, file in files.items()}, records


def median_norms(bench: Bench, looks: Mapping[str, Mapping[str, Sketch]]) -> dict[str, float]:
    """The median length of a near public row's gradient in each look: a clip norm that a user could name."""
    examples = bench.inputs.prepared.public[0].examples[:EXAMPLES]

    def norms() -> Tensors:
        model, loss_fn = bench.inputs.model, bench.inputs.loss_fn
        rows = [example_norms(model, loss_fn, b, bench.layers, list(looks.values())) for b in bench.batches(examples)]
        return {"median": torch.cat(rows).median(dim=0).values}

    return dict(zip(looks, bench.kept("norms", norms)["median"].tolist(), strict=True))
