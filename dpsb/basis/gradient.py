"""Gradients of the target weights themselves, for bases that are computed from *public* examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from dpsb.adapter import lora_layers
from dpsb.losses import LossFn, check_losses
from dpsb.modes import evaluation_mode


def mean_gradients(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Mapping[str, torch.Tensor]],
    adapter_name: str = "default",
) -> dict[str, torch.Tensor]:
    r"""The mean over examples of the gradient of each target weight, :math:`\frac1n\sum_i \nabla_{W_0}\ell_i`.

    Works with frozen and quantized weights, because it multiplies what the layer received with the gradient of what
    it returned: :math:`\nabla_{W_0}\ell = \sum_t g_t x_t^\top`.

    Args:
      model: A PEFT LoRA model as ``get_peft_model`` returns it (its factors contribute nothing yet).
      loss_fn: Per-example loss.
      batches: **Public** examples, or any examples in a run that claims nothing: the result is not private.

    Returns:
      Gradient (out, in), fp32, by target name. Exactly as sensitive as the examples.
    """
    layers = lora_layers(model, adapter_name)
    sums = {
        name: torch.zeros(layer.out_features, layer.in_features, device=layer.lora_A[adapter_name].weight.device)
        for name, layer in layers.items()
    }
    handles = [layer.register_forward_hook(_accumulate_into(sums[name])) for name, layer in layers.items()]
    count = 0
    try:
        with evaluation_mode(model):
            for batch in batches:
                size = len(next(iter(batch.values())))
                check_losses(loss_fn(model, batch), size).sum().backward()
                model.zero_grad(set_to_none=True)
                count += size
    finally:
        for handle in handles:
            handle.remove()
    if count == 0:
        raise ValueError("Expected at least one public example to compute a basis from, got none.")
    return {name: total / count for name, total in sums.items()}


def _accumulate_into(total: torch.Tensor):  # type: ignore[no-untyped-def]
    def forward_hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x = inputs[0].detach().flatten(0, -2).float()

        def backward_hook(g: torch.Tensor) -> None:
            total.add_(g.flatten(0, -2).float().T @ x)

        output.register_hook(backward_hook)

    return forward_hook
