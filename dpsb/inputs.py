"""What a run reads: its files and its model, ready to train; the same for every process of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dpsb.adapter import Adapter
from dpsb.baselines.build import add_method
from dpsb.baselines.methods import method_named
from dpsb.config import RunConfig
from dpsb.data import Collator, read_table
from dpsb.evaluate import evaluate
from dpsb.losses import LossFn
from dpsb.models import load_base
from dpsb.precondition import public_row_scale
from dpsb.prepare import Prepared, labels_of, loss_of, prepare, synthetic_of, targets_of
from dpsb.quantized import check_quantization, keep_gradients_exact
from dpsb.warm_start import warm_start


@dataclass(frozen=True)
class Inputs:
    """Settings, model and data of a run, read and checked.

    Args:
      config: Settings.
      base: The model without adapter.
      tokenizer: Its tokenizer.
      prepared: The data side.
      model: The model with what its method trains.
      collate: Examples to model inputs.
      loss_fn: Per-example loss.
    """

    config: RunConfig
    base: Any
    tokenizer: Any
    prepared: Prepared
    model: Any
    collate: Collator
    loss_fn: LossFn

    def synthetic(self) -> list[dict[str, Any]]:
        """Random examples for the probe. Public."""
        return synthetic_of(self.config, self.base, self.tokenizer, self.prepared)

    def row_scale(self, adapter: Adapter) -> torch.Tensor | None:
        """What rows are multiplied with before they are clipped; None where there is no public file for it."""
        public, prepared, budget = self.prepared.precondition, self.prepared, self.config.token_budget
        if not public:
            return None
        return public_row_scale(adapter, self.loss_fn, public, self.collate, prepared.max_length, budget)

    def metrics(self) -> dict[str, float]:
        """Metrics on held-out data, outside the guarantee; empty without such data."""
        held_out, config = self.prepared.held_out, self.config
        if held_out is None:
            return {}
        max_length = self.prepared.max_length
        return evaluate(self.model, held_out, config.task, self.collate, max_length, config.token_budget)


def read_inputs(config: RunConfig, *, warm: bool) -> Inputs:
    """Reads every file of a run and its model. Nothing is written.

    Args:
      config: Settings.
      warm: Fit the head to the public rows of ``config.warm_start``, if there are any; not where theta is on disk.

    Raises:
      DataError, ModelError, ValueError: If something cannot be used.
    """
    table = read_table(config.data)
    labels, origin = labels_of(config, table)
    base, tokenizer = load_base(
        config.model,
        config.task,
        labels,
        dtype=getattr(torch, config.dtype),
        pooling=config.pooling,
        head_init_std=config.head_init_std,
    )
    prepared = prepare(config, table, base, tokenizer, labels, origin)
    collate = Collator(tokenizer.pad_token_id, "cuda" if torch.cuda.is_available() else "cpu")
    model = _adapted(config, base.to(collate.device), prepared, collate, warm)
    return Inputs(config, base, tokenizer, prepared, model, collate, loss_of(config))


def _adapted(config: RunConfig, base: Any, prepared: Prepared, collate: Collator, warm: bool) -> Any:
    """The base model with what its method trains, its head warm if it is to be."""
    check_quantization(base)
    keep_gradients_exact(base)  # before its first pass: a warm start and a public basis come before the adapter
    if prepared.warm_start and warm and config.task == "classification":
        warm_start(base, prepared.warm_start, collate, prepared.max_length, config.token_budget)
    method, targets = method_named(config.method), targets_of(config.targets)
    return add_method(base, method, config.task, config.rank, targets).to(collate.device)
