"""A data-free reference: fixed rows of a Walsh-Hadamard matrix."""

from __future__ import annotations

import torch
from torch import nn

from dpsb.adapter import Basis, Factors, Provenance, lora_layers


def hadamard(model: nn.Module, adapter_name: str = "default") -> Basis:
    """A and B from the first r Walsh functions, cut to the width of the layer and re-orthonormalized. R starts at 0.

    The same every time, with no generator. For a width that is no power of two the rows are cut and made orthonormal
    by QR, since the pieces of orthogonal rows are not orthogonal.

    Args:
      model: A PEFT LoRA model; the rank is the one of its config. Public.

    Returns:
      :class:`Basis` with access ``"data_free"``.
    """
    factors = {}
    for name, layer in lora_layers(model, adapter_name).items():
        rank = layer.r[adapter_name]
        A, B = (walsh_frame(width, rank) for width in (layer.in_features, layer.out_features))
        factors[name] = Factors(A=A.T.contiguous(), B=B)
    return Basis(factors=factors, provenance=Provenance(kind="hadamard", access="data_free"))


def walsh_frame(width: int, rank: int) -> torch.Tensor:
    r"""r orthonormal columns of length ``width``; where that is a power of two, Walsh functions over its square root.

    Entry (i, j) of the Walsh matrix is -1 to the number of ones in the binary form of i & j. Its leading square parts
    are invertible, so the first r columns stay independent when they are cut to any width of at least r.

    Example:
      >>> walsh_frame(4, 2).T
      tensor([[ 0.5000,  0.5000,  0.5000,  0.5000],
              [ 0.5000, -0.5000,  0.5000, -0.5000]])
    """
    rows, columns = torch.arange(width)[:, None], torch.arange(rank)[None]
    common = rows & columns
    parity = torch.zeros_like(common)
    for bit in range(width.bit_length()):
        parity ^= (common >> bit) & 1
    signs = 1.0 - 2.0 * parity
    Q, triangle = torch.linalg.qr(signs.double())
    return (Q * triangle.diagonal().sign()).float().contiguous()
