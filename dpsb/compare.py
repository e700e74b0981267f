"""What each method's noise does to the weights, predicted and measured, and how much of the gradient stands above it.

Nothing private is read and nothing is trained: the noise is that of an empty draw, the gradients are of public data.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dpsb.adapter import Adapter, attach
from dpsb.baselines.build import adapt, add_method, lora_xs
from dpsb.baselines.measure import Signal, layers_of, measured_energies, predicted_energy, signal_of
from dpsb.baselines.methods import METHODS, Method, method_named
from dpsb.baselines.public_starts import public_start
from dpsb.basis import public as public_basis
from dpsb.basis.data_free import DATA_FREE
from dpsb.basis.sources import public_sample, read_public
from dpsb.capture import adapter_train_mode
from dpsb.config import TASKS, RunConfig
from dpsb.data import (
    Collator,
    Columns,
    DataError,
    read_table,
    tokenize_causal,
    tokenize_classification,
)
from dpsb.labels import declared_labels
from dpsb.losses import LossFn, causal_lm_loss, classification_loss
from dpsb.mechanism import Mechanism
from dpsb.models import HEAD_INIT_STD, HEAD_NAMES, add_lora, config_labels, load_base, longest_input
from dpsb.parts import same_data
from dpsb.probe import without_dropout
from dpsb.randomness import SystemRandomness

BASES = (*DATA_FREE, "public")
DEFAULT_METHODS = ("sb", "ffa-lora", "lora")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One method beside the others, all with the same noise multiplier and expected batch size.

    Args:
      method: Its name; for R-only with the basis.
      dimension: d, the head included.
      predicted: Expected squared length of the noise of one step's mean gradient, as it arrives on the target weights,
        at clip norm 1 for every method; None where there is no closed form.
      measured: The same, the mean over draws through the mechanism on the real adapter; None without target weights.
      standard_error: Of ``measured``, from the spread of the draws; None with fewer than two.
      signal: Rows of public examples; None without public data.
      snr: Length of the mean gradient over that of the noise in one step, each method with its own clip norm.
    """

    method: str
    dimension: int
    predicted: float | None
    measured: float | None
    standard_error: float | None
    signal: Signal | None
    snr: float | None

    def to_json(self) -> dict[str, Any]:
        facts = {
            "method": self.method,
            "dimension": self.dimension,
            "predicted_noise_energy": self.predicted,
            "measured_noise_energy": self.measured,
            "measured_noise_energy_standard_error": self.standard_error,
            "snr_per_step": self.snr,
        }
        if self.signal is not None:
            facts["median_row_norm"] = self.signal.median_norm
            facts["mean_row_norm"] = self.signal.mean_norm
            facts["clipped_mean_row_norm"] = self.signal.clipped_mean_norm
        return facts


def compare_methods(
    *,
    model: str,
    methods: Sequence[str] = DEFAULT_METHODS,
    task: str = "classification",
    public: str | None = None,
    labels: str | None = None,
    basis: str = "weight",
    rank: int = 16,
    targets: str | list[str] = "all-linear",
    noise_multiplier: float = 1.0,
    expected_batch_size: int = 256,
    max_length: int = 128,
    examples: int = 128,
    draws: int = 8,
) -> Iterator[Comparison]:
    """Compares methods on a model, one after the other, each where its training would start.

    Args:
      model: As for ``dpsb train``.
      methods: Names, see ``dpsb.baselines.methods``. A public file that one of them starts from is not ``public``.
      task: ``"classification"`` or ``"causal-lm"``.
      public: A **public** file for the gradients; without it only the noise is compared.
      labels: Public label set, or ``"from-data"``; by default what file or model declare.
      basis: Of ``sb``: a data-free one (``"weight"``, ``"random"``, ``"complementary"``, ``"hadamard"``), or
        ``"public"``: the gradient of the first half of the public examples, the signal being measured on the second.
      rank: r.
      targets: As for :func:`dpsb.models.add_lora`.
      noise_multiplier: sigma.
      expected_batch_size: b.
      max_length: Tokens per example.
      examples: How many public examples are used.
      draws: Of noise, whose energies are averaged.

    Yields:
      A :class:`Comparison` per method.

    Raises:
      ValueError: If an argument is out of range; :class:`dpsb.baselines.methods.MethodError`, ``DataError`` and
        ``ModelError`` are such.
    """
    _check_names(task, basis, public, labels)
    if not 0 < noise_multiplier < math.inf:
        raise ValueError(f"Expected noise_multiplier={noise_multiplier!r} to be positive and finite.")
    for name, value in (("rank", rank), ("expected_batch_size", expected_batch_size), ("draws", draws)):
        if value < 1:
            raise ValueError(f"Expected {name}={value!r} of at least 1.")
    if examples < 4:
        raise ValueError(f"Expected examples={examples!r} of at least 4.")
    if not methods:
        raise ValueError(f"Expected methods to name at least one of {', '.join(METHODS)}, got none.")
    chosen = [method_named(name) for name in methods]
    for method in chosen:
        if method.source is not None and public is not None and same_data(method.source, public):
            raise ValueError(
                f"methods: {method.name!r} starts from public={public!r}, on which its signal is measured: name "
                "another file."
            )
    loss_fn: LossFn = classification_loss if task == "classification" else causal_lm_loss
    for method in chosen:
        base, tokenizer, names, batches = _model_and_batches(model, task, public, labels, max_length, examples)
        half = len(batches) // 2 if basis == "public" else 0
        if method.source is None:
            adapter = _adapter(base, method, task, rank, targets, basis, batches[:half], loss_fn)
        else:
            added, longest = add_method(base, method, task, rank, targets), _longest(base, tokenizer, max_length)
            rows = read_public(method.source, task, Columns(), tokenizer, names, longest)
            collate, budget = Collator(tokenizer.pad_token_id), RunConfig.token_budget
            start = public_start(added, method, loss_fn, rows, collate, longest, budget, HEAD_INIT_STD)
            adapter = adapt(added, method, start)
        adapter.model.train()
        adapter_train_mode(adapter)
        yield _compared(method, adapter, basis, batches[half:], loss_fn, noise_multiplier, expected_batch_size, draws)


def _check_names(task: str, basis: str, public: str | None, labels: str | None) -> None:
    if task not in TASKS:
        raise ValueError(f"Expected task={task!r} to be one of {', '.join(TASKS)}.")
    if basis not in BASES or (basis == "public" and public is None):
        raise ValueError(f"Expected basis={basis!r} to be one of {', '.join(BASES)}, and public data for 'public'.")
    if public is None and labels is not None and len(set(labels.split(","))) < 2:
        raise ValueError(f"Expected labels={labels!r} to name at least two; 'from-data' needs a file of public data.")


def _compared(
    method: Method,
    adapter: Adapter,
    basis: str,
    batches: Sequence[dict[str, torch.Tensor]],
    loss_fn: LossFn,
    noise_multiplier: float,
    expected_batch_size: int,
    draws: int,
) -> Comparison:
    noise_std = noise_multiplier / expected_batch_size
    mean = Mechanism(l2_clip_norm=1.0 / expected_batch_size, noise_multiplier=noise_multiplier, clipping="flat")
    signal = None
    if batches:
        with without_dropout(adapter.model):
            signal = signal_of(adapter, loss_fn, batches)
    rank = adapter.factors()[adapter.cores[0].name].A.shape[0] if adapter.cores else 1
    layers = layers_of(adapter, rank)
    energies = measured_energies(adapter, mean, SystemRandomness(), draws) if layers else []
    return Comparison(
        method=f"sb ({basis})" if method.name == "sb" else method.label,
        dimension=adapter.dimension,
        predicted=predicted_energy(adapter, layers, noise_std),
        measured=statistics.fmean(energies) if energies else None,
        standard_error=statistics.stdev(energies) / math.sqrt(draws) if len(energies) > 1 else None,
        signal=signal,
        snr=None if signal is None else signal.snr(noise_multiplier, expected_batch_size),
    )


def _model_and_batches(
    model: str, task: str, public: str | None, labels: str | None, max_length: int, count: int
) -> tuple[torch.nn.Module, Any, tuple[str, ...], list[dict[str, torch.Tensor]]]:
    """A fresh base model, its tokenizer, labels, and public examples in batches of 8; the head starts as in a run."""
    names: tuple[str, ...] = ("a", "b") if labels is None else tuple(labels.split(","))
    table = None if public is None else replace(read_table(public), names_are_public=True)
    if table is not None and task == "classification":
        names, _ = declared_labels(labels, table, Columns(), config_labels(model))
    base, tokenizer = load_base(model, task, names if task == "classification" else ())
    if table is None:
        return base, tokenizer, names, []
    longest = _longest(base, tokenizer, max_length)
    if task == "classification":
        tokenized = tokenize_classification(table, Columns(), tokenizer, names, longest)
    else:
        tokenized = tokenize_causal(table, Columns(), tokenizer, longest)
    chosen = public_sample(tokenized, count)
    if len(chosen) < 4:
        raise DataError(f"{public} holds {len(chosen)} rows; at least 4 are needed.")
    collate = Collator(tokenizer.pad_token_id)
    padded = max(len(example["input_ids"]) for example in chosen)
    size = min(8, len(chosen) // 2)
    return base, tokenizer, names, [collate(chosen[i : i + size], padded) for i in range(0, len(chosen), size)]


def _longest(base: torch.nn.Module, tokenizer: Any, max_length: int) -> int:
    return min(max_length, longest_input(base, tokenizer) or max_length)


def _adapter(
    base: torch.nn.Module,
    method: Method,
    task: str,
    rank: int,
    targets: str | list[str],
    basis: str,
    batches: Sequence[dict[str, torch.Tensor]],
    loss_fn: LossFn,
) -> Adapter:
    if method.kind == "cores":
        model = add_lora(base, task, rank, targets)
        if method.name == "lora-xs":
            found = lora_xs(model)
        elif basis == "public":
            found = public_basis(model, loss_fn, batches, source="public")
        else:
            found = DATA_FREE[basis](model)
        return attach(model, found, allow=HEAD_NAMES)
    return adapt(add_method(base, method, task, rank, targets), method)


def plot(rows: Sequence[Comparison], path: Path) -> None:
    """Draws the comparison: noise on the weights, predicted beside measured; signal over noise, where measured.

    Args:
      path: Ends in ``.svg`` or ``.png``.

    Raises:
      ValueError: If it ends otherwise, or matplotlib is not installed.
    """
    check_plot(path)
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    names = [row.method for row in rows]
    places = range(len(rows))
    both = any(row.snr is not None for row in rows)
    figure = Figure(figsize=(9.0 if both else 5.0, 0.45 * len(rows) + 1.6), layout="constrained")
    axes = figure.subplots(1, 2 if both else 1, squeeze=False)[0]
    for offset, height, label, colour in ((-0.2, 0.36, "predicted", "#9aa5b1"), (0.2, 0.36, "measured", "#1f5f8b")):
        values = [row.predicted if label == "predicted" else row.measured for row in rows]
        known = [(place + offset, value) for place, value in zip(places, values, strict=True) if value]
        bars = axes[0].barh([y for y, _ in known], [value for _, value in known], height, label=label, color=colour)
        axes[0].bar_label(bars, fmt=" {:.3g}", fontsize="small")
    axes[0].set_xscale("log")
    axes[0].margins(x=0.15)
    axes[0].xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes[0].xaxis.set_major_formatter("{x:g}")
    axes[0].xaxis.set_minor_formatter("")
    axes[0].set_xlabel("noise energy on the target weights, one step\n(clip norm 1 for every method)")
    axes[0].legend(frameon=False)
    if both:
        known = [(place, row.snr) for place, row in zip(places, rows, strict=True) if row.snr is not None]
        bars = axes[1].barh([y for y, _ in known], [value for _, value in known], 0.6, color="#1f5f8b")
        axes[1].bar_label(bars, fmt=" {:.2g}", fontsize="small")
        axes[1].margins(x=0.12)
        axes[1].set_xlabel("mean gradient / noise, one step\n(each method at its own clip norm)")
    for axis in axes:
        axis.set_yticks(list(places), names if axis is axes[0] else [""] * len(rows))
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def check_plot(path: Path) -> None:
    """Raises ValueError if :func:`plot` could not write ``path``."""
    from importlib.util import find_spec

    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"Expected plot={str(path)!r} to end in .svg or .png.")
    if find_spec("matplotlib") is None:
        raise ValueError("A plot needs matplotlib: pip install '.[demo]' in a checkout.")
