"""A data-free reference: directions in which the frozen weight does least."""

from __future__ import annotations

import torch
from torch import nn

from dpsb.adapter import Basis, Factors, Provenance, lora_layers
from dpsb.basis._common import base_weight, public_generator, truncated_svd

_TIMES_RANK = 8


def complementary(model: nn.Module, adapter_name: str = "default") -> Basis:
    """A and B are random orthonormal frames in the complement of the weight's leading singular space. R starts at 0.

    The leading space of width 8 r is cut out, or of half of what the smaller side leaves beside r if that is less:
    what the frozen model uses most stays untouched.

    Args:
      model: A PEFT LoRA model; the rank is the one of its config. Public.

    Returns:
      :class:`Basis` with access ``"data_free"``.
    """
    factors, generator = {}, public_generator()
    for name, layer in lora_layers(model, adapter_name).items():
        rank, weight = layer.r[adapter_name], base_weight(layer).cpu()
        top = min(_TIMES_RANK * rank, (min(weight.shape) - rank) // 2)
        U, Vh = torch.zeros(weight.shape[0], 0), torch.zeros(0, weight.shape[1])
        if top:
            U, _, Vh = truncated_svd(weight, top, generator)
        B = _frame_outside(U, rank, generator)
        A = _frame_outside(Vh.T, rank, generator).T
        factors[name] = Factors(A=A.contiguous(), B=B)
    return Basis(factors=factors, provenance=Provenance(kind="complementary", access="data_free"))


def _frame_outside(frame: torch.Tensor, rank: int, generator: torch.Generator) -> torch.Tensor:
    """A random orthonormal frame (rows, rank) orthogonal to the columns of ``frame``."""
    drawn = torch.randn(frame.shape[0], rank, generator=generator)
    for _ in range(2):  # once leaves rounding behind
        drawn = torch.linalg.qr(drawn - frame @ (frame.T @ drawn)).Q
    return drawn.contiguous()
