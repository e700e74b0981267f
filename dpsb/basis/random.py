"""A data-free reference: random orthonormal directions."""

from __future__ import annotations

import torch
from torch import nn

from dpsb.adapter import Basis, Factors, Provenance, lora_layers
from dpsb.basis._common import public_generator


def random(model: nn.Module, adapter_name: str = "default", generator: torch.Generator | None = None) -> Basis:
    """A and B uniformly random orthonormal frames (QR of a Gaussian matrix). R starts at 0.

    Args:
      model: A PEFT LoRA model; the rank is the one of its config. Public.
      generator: Source of the frames; by default a fixed one, so the basis is the same every time. Public.
    """
    generator = generator or public_generator()
    factors = {}
    for name, layer in lora_layers(model, adapter_name).items():
        rank = layer.r[adapter_name]
        A = torch.linalg.qr(torch.randn(layer.in_features, rank, generator=generator)).Q.T
        B = torch.linalg.qr(torch.randn(layer.out_features, rank, generator=generator)).Q
        factors[name] = Factors(A=A.contiguous(), B=B.contiguous())
    return Basis(factors=factors, provenance=Provenance(kind="random", access="data_free"))
