"""Starts of LoRA that are computed from public rows: EVA and LoRA-GA."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from dpsb.adapter import Provenance, lora_layers
from dpsb.baselines.methods import Method, MethodError
from dpsb.basis._common import add_to_base, public_generator, truncated_svd
from dpsb.basis.sources import EXAMPLES, PublicSet, batches_of, public_gradients, stated
from dpsb.data import DataError
from dpsb.layers import is_plain
from dpsb.losses import LossFn
from dpsb.models import peft_part
from dpsb.modes import evaluation_mode
from dpsb.probe import Collate

LORA_GA = "lora_ga"
_GAMMA = 16.0
"""gamma of LoRA-GA's "stable" scale; the paper's."""


def public_start(
    model: nn.Module,
    method: Method,
    loss_fn: LossFn,
    public_set: PublicSet,
    collate: Collate,
    max_length: int,
    token_budget: int,
    head_std: float,
) -> Provenance:
    """Puts A and B where ``peft:eva:FILE`` or ``peft:lora_ga:FILE`` starts them. Costs no epsilon.

    Args:
      model: From :func:`dpsb.baselines.build.add_method`. Changed in place.
      method: One with a source.
      loss_fn: Per-example loss; EVA reads no labels.
      public_set: Rows that are **public; the caller vouches for that**: A and B reveal them. The first 512 are used.
      collate: Examples to model inputs.
      max_length: Largest number of tokens.
      token_budget: Tokens per microbatch.
      head_std: Of a random head, where the rows have labels of their own.

    Returns:
      What the plan states: access ``"public"``, the source, and what was done about its labels.

    Raises:
      DataError: If the rows are too few, or give no gradient.
    """
    layers = lora_layers(model)
    if method.peft == LORA_GA:
        gradients = public_gradients(model, loss_fn, public_set, collate, max_length, token_budget, head_std)
        factors = {name: lora_ga_factors(gradients[name], layer.r["default"]) for name, layer in layers.items()}
        labels = public_set.note
    else:
        batches = batches_of(public_set.examples[:EXAMPLES], collate, max_length, token_budget)
        directions = input_directions(model, batches, source=public_set.name)
        factors = {name: (A, torch.zeros_like(layers[name].lora_B["default"].weight)) for name, A in directions.items()}
        labels = "not used: EVA reads what the layers receive"
    with torch.no_grad():
        for name, (A, B) in factors.items():
            layers[name].lora_A["default"].weight.copy_(A)
            layers[name].lora_B["default"].weight.copy_(B)
    if method.peft == LORA_GA:
        move_base(model)
    return Provenance(kind=f"peft:{method.peft}", access="public", detail=stated(str(method.source), labels))


@torch.no_grad()
def input_directions(
    model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]], *, source: str
) -> dict[str, torch.Tensor]:
    r"""EVA's A: the leading right singular vectors of all that a layer receives, one row for each token.

    They are the leading eigenvectors of :math:`\sum_t x_t x_t^\top`, accumulated in float64 over the tokens that the
    attention mask does not call padding; a layer that sees no single tokens (a pooler) counts each of its inputs. They
    are not centred (PEFT subtracts their mean), and the rank is the same in each layer (PEFT's ``rho = 1``). Meanwhile
    each layer takes 8 f² bytes for its f input features.

    Args:
      model: With plain LoRA layers whose B is 0.
      batches: **Public** examples.
      source: Their name, for an error.

    Returns:
      A (r, f) of every target, fp32, orthonormal rows, the leading one first. As public as the examples.

    Raises:
      DataError: If a layer receives fewer than r inputs, which do not span r directions.

    References:
      Paischer et al. (2024), arXiv:2410.07170.
    """
    layers = lora_layers(model)
    moments = {
        name: torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64, device=_device(layer))
        for name, layer in layers.items()
    }
    counts = dict.fromkeys(layers, 0)
    with evaluation_mode(model):
        for batch in batches:
            handles = [
                layer.register_forward_pre_hook(_add_moments(name, batch["attention_mask"].bool(), moments, counts))
                for name, layer in layers.items()
            ]
            try:
                model(**{name: value for name, value in batch.items() if name != "labels"})
            finally:
                for handle in handles:
                    handle.remove()
    found = {}
    for name, layer in layers.items():
        rank = layer.r["default"]
        if counts[name] < rank:
            raise DataError(
                f"{source} has too few rows for rank={rank}: {name} receives {counts[name]} inputs from them; take a "
                "larger public file or a smaller rank."
            )
        leading = torch.linalg.eigh(moments[name]).eigenvectors[:, -rank:]
        found[name] = leading.flip(1).T.float().contiguous()
    return found


def lora_ga_factors(gradient: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    r"""LoRA-GA's A (r, in) and B (out, r), from the singular vectors of a gradient :math:`G = U S V^\top`.

    :math:`A = \zeta V_{1:r}^\top` and :math:`B = \zeta U_{r+1:2r}` with :math:`\zeta = m^{1/4}/\sqrt\gamma`, m outputs
    and γ = 16: the scale "stable". To first order a gradient step then moves B A by :math:`-\eta\zeta^2` times the part
    of G of rank 2r. PEFT also multiplies B by its singular values; here the scale is the paper's, and s = 1.

    Args:
      gradient: G (out, in), of **public** examples.
      rank: r, at most half of the smaller side.

    References:
      Wang, Yu and Li (2024), arXiv:2407.05000.
    """
    U, _, Vh = truncated_svd(gradient, 2 * rank, public_generator())
    scale = gradient.shape[0] ** 0.25 / _GAMMA**0.5
    return scale * Vh[:rank], scale * U[:, rank:]


def move_base(model: nn.Module) -> None:
    """Moves every target weight from W0 to W0 - B A, A and B as they stand: the model computes what the base computes.

    That holds to the rounding of W0's type. The adapter's config then says ``init_lora_weights="lora_ga"``, as for the
    other starts that move the base.
    """
    for layer in lora_layers(model).values():
        add_to_base(layer, -layer.lora_B["default"].weight, layer.lora_A["default"].weight)
    peft_part(model).peft_config["default"].init_lora_weights = LORA_GA  # type: ignore[union-attr]


def check_lora_ga(model: nn.Module) -> None:
    """Raises MethodError if a target is too small for two times the rank, or its weight cannot be moved."""
    for name, layer in lora_layers(model).items():
        rank, shape = layer.r["default"], (layer.out_features, layer.in_features)
        if 2 * rank > min(shape):
            raise MethodError(
                f"method='peft:lora_ga' takes two times rank={rank} directions of each gradient, more than {name} has "
                f"({shape[0]} x {shape[1]})."
            )
        weight: Any = layer.get_base_layer().weight
        if not (is_plain(weight) and weight.dtype.is_floating_point):
            raise MethodError(
                f"method='peft:lora_ga' moves the base weights, and {name} is quantized ({type(weight).__name__})."
            )


def _device(layer: Any) -> torch.device:
    return layer.lora_A["default"].weight.device  # type: ignore[no-any-return]


def _add_moments(
    name: str, mask: torch.Tensor, moments: dict[str, torch.Tensor], counts: dict[str, int]
) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    """A hook that adds a batch's inputs of one layer, without those of padding tokens."""

    def forward_pre_hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0]
        if x.dim() == 2 and len(x) == mask.numel():  # a block that puts its tokens in one row (OPT)
            x = x.unflatten(0, mask.shape)
        kept = (x[mask] if x.shape[:-1] == mask.shape else x.flatten(0, -2)).double()
        moments[name].addmm_(kept.T, kept)
        counts[name] += len(kept)

    return forward_pre_hook
