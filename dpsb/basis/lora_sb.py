"""LoRA-SB's start as published, for public gradients and for runs that claim nothing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from dpsb.adapter import Basis, Factors, Provenance, lora_layers
from dpsb.basis._common import public_generator, truncated_svd


def lora_sb(
    model: nn.Module,
    gradients: Mapping[str, torch.Tensor],
    *,
    step_size: float,
    access: str,
    source: str = "",
    allow_non_private_basis: bool = False,
    adapter_name: str = "default",
) -> Basis:
    r"""The first full fine-tuning step, cut to rank r: :math:`-\eta\,\mathrm{sign}(G) \approx U\Sigma V^\top`.

    B = U, A = V^T and R0 = Sigma / s with s = 1, so the model starts at the best rank-r approximation of
    W0 - eta sign(G) (the sign stands for Adam's first step). R0 is *not* zero: it is as sensitive as ``gradients``.

    Args:
      model: A PEFT LoRA model; the rank is the one of its config.
      gradients: Gradient (out, in) of every target, e.g. from :func:`mean_gradients`.
      step_size: eta > 0. Public.
      access: ``"public"``, or ``"non_private"`` when the gradients are of private examples.
      source: What the examples are, for the report.
      allow_non_private_basis: Must be True for ``access="non_private"``; the run's epsilon is then infinite.

    Raises:
      ValueError: If the gradients are private and that was not explicitly allowed.

    References:
      Ponkshe et al. (2024), arXiv:2411.19557, the initialization algorithm and Theorem 6.
    """
    if access not in ("public", "non_private"):
        raise ValueError(f"Expected access={access!r} to be 'public' or 'non_private'.")
    if access == "non_private" and not allow_non_private_basis:
        raise ValueError(
            "A basis from raw private gradients publishes them through A, B and R0, whatever noise the training adds. "
            "Use basis 'weight' or 'public:FILE', or train with epsilon=inf (allow_non_private_basis=True)."
        )
    if not step_size > 0:
        raise ValueError(f"Expected step_size={step_size!r} > 0.")
    factors, generator = {}, public_generator()
    for name, layer in lora_layers(model, adapter_name).items():
        update = -step_size * torch.sign(gradients[name])
        U, S, Vh = truncated_svd(update, layer.r[adapter_name], generator)
        factors[name] = Factors(A=Vh, B=U, R0=torch.diag(S))
    return Basis(
        factors=factors,
        provenance=Provenance(kind="lora_sb", access=access, detail={"step_size": step_size, "source": source}),
    )
