"""How surely one self-test finds a statistical fault, and how often it accuses a correct implementation.

    python tests/benchmarks/selftest_power.py power --repetitions 50
    python tests/benchmarks/selftest_power.py clean --models 100

`power` prints, for each fault, the share of self-tests that the named check fails; for a wrong scale or rate also the
exact probability, from the test's own law. `clean` runs the short self-test on random small models.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from common import LABELS
from scipy.stats import binom, chi2

from dpsb import basis as bases
from dpsb.adapter import attach
from dpsb.data import Collator, synthetic_examples
from dpsb.losses import causal_lm_loss, classification_loss
from dpsb.models import HEAD_NAMES, add_lora
from dpsb.selftest import ERROR_RATE, Step, selftest_model
from dpsb.selftest.draws import check_draws
from dpsb.selftest.noise import check_noise

STD, Q = 1.3, 0.1
NUMBERS, DRAWN = 1 << 16, 400 * 400
Release = Callable[[torch.Tensor], torch.Tensor]
Draw = Callable[[int], Sequence[int]]


def exact_scale(factor: float, numbers: int = NUMBERS) -> float:
    """Probability that `noise_scale` fails a standard deviation that is off by `factor`."""
    low, high = chi2.ppf([ERROR_RATE / 2, 1 - ERROR_RATE / 2], numbers)
    return float(chi2.cdf(low / factor**2, numbers) + chi2.sf(high / factor**2, numbers))


def exact_rate(factor: float, numbers: int = DRAWN) -> float:
    """Probability that `draw_rate` fails an inclusion probability that is off by `factor`."""
    low, high = binom.ppf(ERROR_RATE / 2, numbers, Q), binom.isf(ERROR_RATE / 2, numbers, Q)
    return float(binom.cdf(low - 1, numbers, factor * Q) + binom.sf(high, numbers, factor * Q))


# --- noises


def gaussian(source: np.random.Generator, std: float = STD) -> Release:
    return lambda total: total + std * torch.from_numpy(source.standard_normal(total.numel()))


def partly_reused(share: float) -> Callable[[np.random.Generator], Release]:
    """The first `share` of every noise vector is the same in all steps."""

    def make(source: np.random.Generator) -> Release:
        kept: dict[int, np.ndarray] = {}

        def release(total: torch.Tensor) -> torch.Tensor:
            size = total.numel()
            noise = source.standard_normal(size)
            old = kept.setdefault(size, noise.copy())
            noise[: round(share * size)] = old[: round(share * size)]
            return total + STD * torch.from_numpy(noise)

        return release

    return make


def one_repeat(source: np.random.Generator) -> Release:
    """One of the steps, and only one, has the noise of the step before."""
    kept: list[np.ndarray] = []

    def release(total: torch.Tensor) -> torch.Tensor:
        repeat = len(kept) == 3
        kept.append(kept[-1] if repeat else source.standard_normal(total.numel()))
        return total + STD * torch.from_numpy(kept[-1])

    return release


def shifted(share: float) -> Callable[[np.random.Generator], Release]:
    return lambda source: lambda total: gaussian(source)(total) + share * STD


def student(freedom: float) -> Callable[[np.random.Generator], Release]:
    """Student's t with the right variance: heavier tails."""
    scale = STD / math.sqrt(freedom / (freedom - 2))
    return lambda source: lambda total: total + scale * torch.from_numpy(source.standard_t(freedom, total.numel()))


def laplace(source: np.random.Generator) -> Release:
    return lambda total: total + STD / math.sqrt(2) * torch.from_numpy(source.laplace(size=total.numel()))


NOISES: dict[str, tuple[Callable[[np.random.Generator], Release], str]] = {
    "none (a correct one)": (gaussian, "noise_scale"),
    "noise reused in all steps": (partly_reused(1.0), "noise_reuse"),
    "a tenth of the noise reused": (partly_reused(0.1), "noise_reuse"),
    "a hundredth of the noise reused": (partly_reused(0.01), "noise_repeats"),
    "a thousandth of the noise reused": (partly_reused(0.001), "noise_repeats"),
    "one step of 8 repeats another": (one_repeat, "noise_reuse"),
    "noise off centre by 0.05 std": (shifted(0.05), "noise_mean"),
    "noise off centre by 0.02 std": (shifted(0.02), "noise_mean"),
    "Laplace noise": (laplace, "noise_law"),
    "Student noise, 5 degrees of freedom": (student(5.0), "noise_law"),
    "Student noise, 20 degrees of freedom": (student(20.0), "noise_law"),
}


# --- draws


def poisson(source: np.random.Generator, q: float = Q) -> Draw:
    return lambda n: np.flatnonzero(source.random(n) < q).tolist()


def shuffled(source: np.random.Generator) -> Draw:
    left: dict[int, list[int]] = {}

    def draw(n: int) -> list[int]:
        size = max(1, round(Q * n))
        if len(left.get(n, [])) < size:
            left[n] = source.permutation(n).tolist()
        found, left[n] = left[n][:size], left[n][size:]
        return found

    return draw


def nonempty(source: np.random.Generator) -> Draw:
    honest = poisson(source)

    def draw(n: int) -> Sequence[int]:
        while not (found := honest(n)):
            pass
        return found

    return draw


def blocks(size: int) -> Callable[[np.random.Generator], Draw]:
    return lambda source: lambda n: np.flatnonzero(np.repeat(source.random(-(-n // size)) < Q, size)[:n]).tolist()


def repeated(share: float) -> Callable[[np.random.Generator], Draw]:
    """With this probability a step draws what the step before drew."""

    def make(source: np.random.Generator) -> Draw:
        honest, last = poisson(source), {}

        def draw(n: int) -> Sequence[int]:
            if n not in last or source.random() >= share:
                last[n] = honest(n)
            return last[n]

        return draw

    return make


DRAWS: dict[str, tuple[Callable[[np.random.Generator], Draw], str]] = {
    "none (a correct one)": (poisson, "draw_rate"),
    "shuffled instead of Poisson": (shuffled, "draw_sizes"),
    "empty draws dropped": (nonempty, "draw_empty"),
    "one coin for 2 rows": (blocks(2), "draw_sizes"),
    "one coin for 10 rows": (blocks(10), "draw_sizes"),
    "every second draw repeated": (repeated(0.5), "draw_repeats"),
    "every tenth draw repeated": (repeated(0.1), "draw_same"),
    "every hundredth draw repeated": (repeated(0.01), "draw_same"),
}


def power(repetitions: int) -> None:
    """Prints one JSON line for each fault."""
    for factor in (0.9, 0.95, 0.97, 0.98, 0.985, 0.99, 1.02):
        print(json.dumps({"fault": f"sigma times {factor:g}", "check": "noise_scale", "exact": exact_scale(factor)}))
    for factor in (0.8, 0.9, 0.95, 1.05, 1.1, 1.2):
        print(json.dumps({"fault": f"q times {factor:g}", "check": "draw_rate", "exact": exact_rate(factor)}))
    for name, (make_release, check) in NOISES.items():
        found = []
        for seed in range(repetitions):
            step = _step(release=make_release(np.random.default_rng(seed)), noise_multiplier=STD)
            found.append({one.name for one in check_noise(step) if one.passed is False})
        _tell(name, check, found)
    for name, (make_draw, check) in DRAWS.items():
        found = []
        for seed in range(repetitions):
            step = _step(draw=make_draw(np.random.default_rng(seed)), sampling_prob=Q)
            found.append({one.name for one in check_draws(step) if one.passed is False})
        _tell(name, check, found)


def _step(**given: object) -> Step:
    return Step(name="power", l2_clip_norm=1.0, clipped_sum=lambda _: torch.zeros(1), **given)  # type: ignore[arg-type]


def _tell(name: str, check: str, found: Sequence[set[str]]) -> None:
    ours = [one - {"noise_fork"} for one in found]  # numpy's generators do repeat themselves in forked processes
    facts = {
        "fault": name,
        "check": check,
        "found": sum(check in one for one in ours) / len(ours),
        "by any": sum(bool(one) for one in ours) / len(ours),
        "repetitions": len(ours),
    }
    print(json.dumps(facts), flush=True)


def small_model(seed: int) -> tuple[str, torch.nn.Module]:
    """A BERT classifier, Llama or GPT-2 of random width, depth and weights, with its task."""
    import transformers

    source = random.Random(seed)
    heads, layers = source.choice([1, 2, 4]), source.choice([1, 2, 3])
    width = 8 * heads * source.choice([1, 2])
    torch.manual_seed(seed)
    kind = source.choice(["bert", "llama", "gpt2"])
    tokens = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 2 * width,
    }
    if kind == "bert":
        config = transformers.BertConfig(**tokens, **sizes, max_position_embeddings=64, num_labels=len(LABELS))
        model = transformers.BertForSequenceClassification(config)
    elif kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tokens, **sizes, max_position_embeddings=64))
    else:
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**tokens, n_embd=width, n_layer=layers, n_head=heads, n_positions=64)
        )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(source.choice([1.0, 3.0]))
    return "classification" if kind == "bert" else "causal-lm", model


def clean(models: int) -> None:
    """Prints one JSON line: how many self-tests of correct models there were, and how many failed."""
    failed, checks, times = [], 0, []
    for seed in range(models):
        task, base = small_model(seed)
        source = random.Random(seed)
        model = add_lora(base, task, source.choice([1, 2, 4, 8]))
        adapter = attach(model, source.choice([bases.random, bases.weight_svd])(model), allow=HEAD_NAMES)
        started = time.perf_counter()
        found = selftest_model(
            adapter,
            classification_loss if task == "classification" else causal_lm_loss,
            Collator(0),
            synthetic_examples(task, 61, len(LABELS), 16),
            16,
        )
        times.append(time.perf_counter() - started)
        checks += sum(check.passed is not None for check in found.checks)
        failed += [[seed, check.name, check.figure, check.limit] for check in found.failures]
    print(json.dumps({"self-tests": models, "checks": checks, "failed": failed, "seconds each": np.median(times)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["power", "clean"])
    parser.add_argument("--repetitions", type=int, default=50)
    parser.add_argument("--models", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "power":
        power(options.repetitions)
    else:
        clean(options.models)


if __name__ == "__main__":
    main()
