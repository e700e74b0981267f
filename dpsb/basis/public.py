"""A basis from the gradient of a public data set: LoRA-SB's idea without its leak."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from dpsb.adapter import Basis, Factors, Provenance, lora_layers
from dpsb.basis._common import public_generator, truncated_svd
from dpsb.basis.gradient import mean_gradients
from dpsb.losses import LossFn


def public(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    source: str,
    adapter_name: str = "default",
) -> Basis:
    """A and B from the truncated SVD of the mean gradient on public examples. R starts at 0.

    The gradient itself is decomposed, not its sign: the sign gives every noisy entry the same weight. With a head of
    zeros the body has no gradient, so the head must start at random or be trained on the public examples.

    Args:
      model: A PEFT LoRA model; the rank is the one of its config.
      loss_fn: Per-example loss.
      batches: Examples that are public. **The caller vouches for that**: A and B reveal them.
      source: What the examples are, for the report.

    Returns:
      :class:`Basis` with access ``"public"``.
    """
    gradients = mean_gradients(model, loss_fn, batches, adapter_name)
    factors, generator = {}, public_generator()
    for name, layer in lora_layers(model, adapter_name).items():
        U, _, Vh = truncated_svd(gradients[name], layer.r[adapter_name], generator)
        factors[name] = Factors(A=Vh, B=U)
    return Basis(factors=factors, provenance=Provenance(kind="public", access="public", detail={"source": source}))
