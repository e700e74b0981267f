"""A basis from a LoRA adapter that was trained on public rows without privacy."""

from __future__ import annotations

import torch
from torch import nn

from dpsb.adapter import Basis, Factors, Provenance, lora_layers
from dpsb.basis.exact_products import exact_products


@torch.no_grad()
def trained(model: nn.Module, provenance: Provenance, adapter_name: str = "default") -> Basis:
    r"""A, B and R0 from LoRA factors as they stand: :math:`B_l A_l = U \Sigma V^\top`, B = U, A = V^T, R0 = Sigma.

    The model computes the same before and after: R-only starts where LoRA ended, and moves within the directions that
    LoRA found to matter. Directions of a gradient are those of its first step only. R0 is *not* zero.

    Args:
      model: A PEFT LoRA model whose factors were trained. As sensitive as the rows that they were trained on.
      provenance: What the plan states of those rows.
      adapter_name: PEFT's name of the adapter.

    Returns:
      :class:`Basis`, orthonormal to fp32 rounding, also where a layer's B is still zero.
    """
    factors = {}
    for name, layer in lora_layers(model, adapter_name).items():
        down, up = (side[adapter_name].weight.float() for side in (layer.lora_A, layer.lora_B))
        with exact_products():
            left, right = torch.linalg.qr(up), torch.linalg.qr(down.T)
            U, S, Vh = torch.linalg.svd(left.R @ right.R.T)
            A, B = (Vh @ right.Q.T).contiguous(), (left.Q @ U).contiguous()
        factors[name] = Factors(A=A, B=B, R0=torch.diag(S))
    return Basis(factors=factors, provenance=provenance)
