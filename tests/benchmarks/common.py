"""What the benchmarks share: models, examples, machine facts, and interleaved timing."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from dpsb import basis as bases
from dpsb.adapter import Adapter, attach
from dpsb.basis.stage import Planned, plan_basis
from dpsb.beginning import basis_setup
from dpsb.config import RunConfig
from dpsb.inputs import Inputs
from dpsb.losses import LossFn, causal_lm_loss, classification_loss, measure_head
from dpsb.models import HEAD_NAMES, add_lora, load_base
from dpsb.sampling import bucket_of, length_buckets, own_length

RANK = 16
LABELS = ("ham", "spam")


@dataclass(frozen=True)
class Workload:
    """A model and the shape of the batch that it is timed on."""

    name: str
    task: str
    batch_size: int
    tokens: int
    base: Callable[[torch.dtype], nn.Module]
    ghost: bool = False
    """Whether it is timed under Opacus' ghost clipping too."""

    @property
    def loss_fn(self) -> LossFn:
        """dpsb's own per-example loss for the task."""
        return classification_loss if self.task == "classification" else causal_lm_loss

    def lora(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model with a plain PEFT LoRA adapter of rank 16 on every linear layer, without dropout."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            base = without_dropout(self.base(dtype))
            measure_head(base)  # as where dpsb loads a model
            return add_lora(base, self.task, RANK)

    def adapter(self, dtype: torch.dtype = torch.float32, scatter: float = 0.0) -> Adapter:
        """The same model with R-only adapters, in train mode; R = 0, or Gaussian of size ``scatter``."""
        model = self.lora(dtype)
        adapter = attach(model, bases.random(model), allow=HEAD_NAMES)
        model.train()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for core in adapter.cores:
                drawn = scatter * torch.randn(RANK, RANK, generator=generator)
                core.up.core.weight.add_(drawn.to(core.up.core.weight.device))
        return adapter

    def examples(self, count: int, lengths: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Random token sequences, by default all of ``tokens`` tokens."""
        rng = np.random.default_rng(0)
        made = []
        for index in range(count):
            ids = rng.integers(5, 8000, self.tokens if lengths is None else lengths[index]).tolist()
            made.append({"input_ids": ids, "labels": index % 2 if self.task == "classification" else ids})
        return made


def without_dropout(model: nn.Module) -> nn.Module:
    """Sets the dropout of every layer to 0, for good; returns the model."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _minilm(dtype: torch.dtype) -> nn.Module:
    return load_base("minilm", "classification", LABELS, dtype=dtype, pooling="native")[0]


def _random_llama(dtype: torch.dtype, **shape: Any) -> nn.Module:
    """A Llama with random weights; ``shape`` are fields of its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**shape, pad_token_id=0, use_cache=False)).to(dtype)


def smollm2(dtype: torch.dtype) -> nn.Module:
    """SmolLM2-135M's shape with random weights: 135 million parameters, a vocabulary of 49,152, tied embeddings."""
    return _random_llama(
        dtype,
        hidden_size=576,
        num_hidden_layers=30,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )


def llama(dtype: torch.dtype, hidden: int = 512, layers: int = 8, intermediate: int = 1408) -> nn.Module:
    """A Llama-shaped model with random weights; 34 million parameters as it stands."""
    return _random_llama(
        dtype,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=8192,
        max_position_embeddings=1024,
    )


def llama_1b(dtype: torch.dtype) -> nn.Module:
    """The shape of Llama-3.2-1B with random weights: 1.24 billion parameters, a vocabulary of 128,256."""
    with torch.device(DEVICE):
        return _random_llama(
            dtype,
            hidden_size=2048,
            num_hidden_layers=16,
            intermediate_size=8192,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128_256,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MINILM = Workload("minilm", "classification", 32, 64, _minilm)
LLAMA = Workload("llama", "causal-lm", 8, 128, llama)
SMOLLM2 = Workload("smollm2", "causal-lm", 1, 512, smollm2, ghost=True)
GPU_WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("smollm2-gpu", "causal-lm", 16, 512, smollm2, ghost=True),
        Workload("llama-1b", "causal-lm", 8, 512, llama_1b),
    )
}
SMALL_LLAMA = Workload("small-llama", "causal-lm", 4, 128, lambda dtype: llama(dtype, 256, 4, 704))
WORKLOADS = {workload.name: workload for workload in (MINILM, LLAMA)}


def arguments(description: str | None, **defaults: int) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has; ``defaults`` become integer options."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    return parser


def quiet() -> None:
    """Silences the libraries' notices, so that --json prints JSON only."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def machine() -> dict[str, Any]:
    """Facts without which a timing means nothing, the load of the machine among them."""
    packages = ("torch", "transformers", "peft", "opacus", "numpy")
    return {
        "cpu": _cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def quartiles(values: Sequence[float]) -> list[float]:
    """First quartile, median and third quartile."""
    return [float(f"{value:.4g}") for value in np.percentile(values, [25, 50, 75])]


class Elapsed(NamedTuple):
    """Seconds on the clock, and of processor time of this process, which other programs disturb less.

    ``gpu_mib`` is the most memory of the GPU that was in use at a time, beyond what was when the clock started.
    """

    wall: float
    cpu: float
    gpu_mib: float = 0.0


class Stopwatch:
    """Starts when it is made; waits for the GPU, where there is one, before it looks at the clock."""

    def __init__(self) -> None:
        self._memory = 0
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._memory = torch.cuda.memory_allocated()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def elapsed(self) -> Elapsed:
        """The time since it was made."""
        most = 0
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            most = torch.cuda.max_memory_allocated()
        now = time.perf_counter(), time.process_time()
        return Elapsed(now[0] - self._wall, now[1] - self._cpu, (most - self._memory) / 2**20)


def timed(function: Callable[[], object]) -> Elapsed:
    """The time of one call."""
    watch = Stopwatch()
    function()
    return watch.elapsed()


Round = dict[str, Elapsed]


def interleaved(arms: Mapping[str, Callable[[], object]], repetitions: int) -> Iterator[Round]:
    """The time of every arm, round by round; in a round the arms run once each, in random order.

    On a shared machine the load drifts. Arms of one round see about the same load, so compare within rounds.
    """
    order = random.Random(0)
    for _ in range(repetitions):
        yield {name: timed(arms[name]) for name in order.sample(list(arms), len(arms))}


def paired_ratio(rounds: Sequence[Round], numerator: str, denominator: str, clock: str = "wall") -> list[float]:
    """Quartiles of the ratio of two arms, taken within each round."""
    return quartiles([getattr(r[numerator], clock) / getattr(r[denominator], clock) for r in rounds])


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Python's collector runs before the block and not inside it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def show(result: Mapping[str, Any], as_json: bool) -> None:
    """Prints one result, as a line of JSON or as an indented list."""
    if as_json:
        print(json.dumps(result), flush=True)
        return
    _show_indented(result, "")
    print(flush=True)


def _show_indented(result: Mapping[str, Any], indent: str) -> None:
    width = max(len(name) for name in result)
    for name, value in result.items():
        if isinstance(value, Mapping):
            print(f"{indent}{name}:")
            _show_indented(value, indent + "  ")
        else:
            print(f"{indent}{name:<{width}}  {value}")


def planned_basis(inputs: Inputs, config: RunConfig, delta: float) -> Planned:
    """The basis that ``config`` names, or how it is released; ``inputs`` may have been read for another epsilon."""
    return plan_basis(replace(basis_setup(inputs, delta), config=config))


def shortest(synthetic: Sequence[Any], max_length: int) -> list[Any]:
    """Of the examples to probe with, those of the smallest bucket: for a model that was probed whole before."""
    buckets = length_buckets(max_length)
    places = [bucket_of(own_length(example), buckets) for example in synthetic]
    return [example for example, place in zip(synthetic, places, strict=True) if place == min(places)]
