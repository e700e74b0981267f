"""What the bases share: the frozen weight, and a truncated SVD that owns its randomness."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from dpsb.basis.exact_products import exact_products

_EXACT_UP_TO = 1024
_OVERSAMPLING = 16
_POWER_ITERATIONS = 4


def base_weight(layer: LoraLayer) -> torch.Tensor:
    """The frozen weight of a LoRA layer as (out, in) in fp32, dequantized if need be. Public."""
    weight = dequantize_module_weight(layer.get_base_layer()).detach().to(torch.float32)
    return weight.T if getattr(layer, "fan_in_fan_out", False) else weight


@torch.no_grad()
def add_to_base(layer: LoraLayer, up: torch.Tensor, down: torch.Tensor) -> None:
    """Moves the frozen weight of a LoRA layer from W0 to W0 + up down, to the rounding of its type.

    The moved weight is a new tensor, so that whatever shares the old one (a tied embedding) keeps it.

    Args:
      layer: With a plain floating-point weight.
      up: Shape ``(out, k)``.
      down: Shape ``(k, in)``.
    """
    base: Any = layer.get_base_layer()
    with exact_products():
        change = up.float() @ down.float()
    change = change.T if getattr(layer, "fan_in_fan_out", False) else change
    moved = (base.weight.float() + change).to(base.weight.dtype).contiguous()
    base.weight = nn.Parameter(moved, requires_grad=False)


def truncated_svd(
    matrix: torch.Tensor, rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The leading singular triples: U (out, r), S (r,), Vh (r, in), fp32, orthonormal to fp32 rounding.

    Exact up to 1,024 rows or columns; beyond that randomized subspace iteration with 16 extra directions and 4
    rounds, each re-orthonormalized by QR.

    Args:
      matrix: Shape ``(out, in)``.
      rank: r, at most ``min(out, in)``.
      generator: Source of the random start. Torch's global generator is not touched.

    Raises:
      ValueError: If ``rank`` is not between 1 and ``min(out, in)``.

    References:
      Halko, Martinsson and Tropp (2011), arXiv:0909.4061, Algorithm 4.4.
    """
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(
            f"Expected rank={rank!r} between 1 and {min(matrix.shape)} for a {tuple(matrix.shape)} weight."
        )
    exact = matrix.to(torch.float32)
    if min(matrix.shape) <= _EXACT_UP_TO:
        U, S, Vh = torch.linalg.svd(exact, full_matrices=False)
        return U[:, :rank].contiguous(), S[:rank], Vh[:rank].contiguous()
    width = min(rank + _OVERSAMPLING, min(matrix.shape))
    start = torch.randn(matrix.shape[1], width, generator=generator).to(exact.device)
    Q = torch.linalg.qr(exact @ start).Q
    for _ in range(_POWER_ITERATIONS):
        Q = torch.linalg.qr(exact @ torch.linalg.qr(exact.T @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ exact, full_matrices=False)
    return (Q @ U)[:, :rank].contiguous(), S[:rank], Vh[:rank].contiguous()


def public_generator(number: int = 0) -> torch.Generator:
    """A fixed generator for *public* choices (a random basis, the start of an SVD); it never touches noise.

    Args:
      number: Which of them, where a choice is made more than once.
    """
    return torch.Generator().manual_seed(number)
