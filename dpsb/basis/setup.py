"""What a basis may be computed from before a run has a plan, and training on the public part of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from dpsb.basis.sources import PublicSet, batches_of, sha256_of
from dpsb.config import RunConfig
from dpsb.frozen_prefix import remember_frozen_prefix
from dpsb.losses import LossFn
from dpsb.modes import evaluation_mode
from dpsb.probe import Collate, Example
from dpsb.warm_start import train_on_public


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a basis may be computed from before the run has a plan. Only ``examples`` is sensitive.

    Args:
      config: Settings.
      model: With PEFT LoRA layers, before :func:`dpsb.attach`.
      loss_fn: Per-example loss.
      collate: Examples to model inputs.
      examples: Private examples; read only for a basis that makes every epsilon infinite.
      public: The public sets that ``config.basis`` names, in order.
      warm_start: The public rows of ``config.warm_start``.
      max_length: Largest number of tokens.
      delta: Of the run.
      neighboring: Of the run.
    """

    config: RunConfig
    model: nn.Module
    loss_fn: LossFn
    collate: Collate
    examples: Sequence[Example]
    public: Sequence[PublicSet]
    warm_start: Sequence[Example] = ()
    max_length: int
    delta: float
    neighboring: str


def train_on_public_rows(setup: Setup, parameters: Sequence[nn.Parameter]) -> None:
    """Trains these tensors of the model on the public rows of ``config.warm_start``, without privacy and dropout.

    Raises:
      DataError: If no row is usable, or the loss does not come out lower.
      PrefixError: With ``config.remember_frozen_blocks``, if there are none.
    """
    config = setup.config
    remembered = remember_frozen_prefix(setup.model) if config.remember_frozen_blocks else nullcontext()
    with evaluation_mode(setup.model), remembered:
        train_on_public(
            parameters,
            partial(setup.loss_fn, setup.model),
            setup.warm_start,
            lambda rows: batches_of(rows, setup.collate, setup.max_length, config.token_budget),
            source=str(config.warm_start),
            epochs=config.warm_start_epochs,
            learning_rate=config.warm_start_learning_rate,
        )


def from_public_rows(config: RunConfig) -> dict[str, str | int | float]:
    """What a plan states of a start that was trained on public rows."""
    source = str(config.warm_start)
    return {"source": Path(source).name, **sha256_of(source), "epochs": config.warm_start_epochs}
