"""The default, data-free basis: the leading singular directions of the frozen weight itself."""

from __future__ import annotations

from torch import nn

from dpsb.adapter import Basis, Factors, Provenance, lora_layers
from dpsb.basis._common import base_weight, public_generator, truncated_svd


def weight_svd(model: nn.Module, adapter_name: str = "default") -> Basis:
    r"""A and B from the truncated SVD of every target weight: :math:`W_0 \approx U S V^\top`, B = U, A = V^T.

    LoRA-XS keeps the singular values in A; here both factors are orthonormal, so that clipping and noise mean the
    same in every direction of R. R starts at 0.

    Args:
      model: A PEFT LoRA model; the rank is the one of its config. Public.

    Returns:
      :class:`Basis` with access ``"data_free"``.

    References:
      Balazy et al. (2024), arXiv:2405.17604.
    """
    factors, generator = {}, public_generator()
    for name, layer in lora_layers(model, adapter_name).items():
        U, _, Vh = truncated_svd(base_weight(layer), layer.r[adapter_name], generator)
        factors[name] = Factors(A=Vh, B=U)
    return Basis(factors=factors, provenance=Provenance(kind="weight_svd", access="data_free"))
