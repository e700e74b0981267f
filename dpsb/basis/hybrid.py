"""A wide public basis, turned and cut by one cheap private release of its cores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from dpsb.adapter import Basis, Factors, Provenance
from dpsb.basis._common import base_weight, public_generator, truncated_svd
from dpsb.basis.per_example import Sketch
from dpsb.basis.release import Clip, Releases

TIMES_RANK = 6
"""The public basis' width K is so many times the rank, unless the user names it."""

_SMALLEST = 1e-30
_STANDS_OUT = 2.0
"""How many standard deviations above noise alone a release must be to move the public directions."""


class WidthError(ValueError):
    """A width of the public basis that cannot be used; the message says what can."""


@dataclass(frozen=True)
class Frames:
    """A wide public basis of one weight: the leading singular triples of a public matrix.

    Args:
      left: Shape ``(out, K)``, orthonormal columns. Public.
      values: Shape ``(K,)``, the singular values. Public.
      right: Shape ``(in, K)``, orthonormal columns. Public.
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor


def check_width(layers: Mapping[str, LoraLayer], rank: int, width: int | None) -> int:
    """K: the one asked for, or six times the rank as far as the smallest weight allows.

    Raises:
      WidthError: If K is below the rank or larger than a weight's smaller side.
    """
    smallest, name = min((min(layer.in_features, layer.out_features), name) for name, layer in layers.items())
    if width is None:
        return min(TIMES_RANK * rank, smallest)
    if width < rank:
        raise WidthError(f"Expected basis_width={width!r} of at least the rank, {rank}; 2 to 8 times it is usual.")
    if width > smallest:
        raise WidthError(f"basis_width={width!r} exceeds the smaller side of {name}, which is {smallest}.")
    return width


def frames_of(
    layers: Mapping[str, LoraLayer], width: int, gradients: Mapping[str, torch.Tensor] | None = None
) -> dict[str, Frames]:
    """The leading singular triples of public gradients or, without them, of the weights. Public."""
    generator = public_generator()
    frames = {}
    for name, layer in layers.items():
        matrix = base_weight(layer) if gradients is None else gradients[name]
        U, S, Vh = truncated_svd(matrix, width, generator)
        frames[name] = Frames(U, S, Vh.T.contiguous())
    return frames


def hybrid_provenance(clip: Clip, width: int, source: Mapping[str, str | int | float]) -> Provenance:
    """What the plan states of a hybrid basis before any private data are read."""
    return Provenance(kind="hybrid", access="released", detail={**clip.to_json(), "width": width, **source})


def hybrid(
    examples: Releases, provenance: Provenance, frames: Mapping[str, Frames], adapter_name: str = "default"
) -> Basis:
    r"""A and B from a public basis of width K, turned by a private release of its K x K cores. R starts at 0.

    One release of :math:`\hat C_l = \sum_i c_i U_l^\top G_{il} V_l + N(0, (\sigma C)^2)`, each example's cores bounded
    jointly over the layers; then :func:`turn` says which r directions of either side are kept.

    Guarantees:
      * The basis is post-processing of public frames and of one release charged to the ledger's phase "basis".

    Args:
      examples: Private examples and the ledger that pays. Sensitive.
      provenance: From :func:`hybrid_provenance`; must be the one that the plan states.
      frames: From :func:`frames_of`. Public.

    Returns:
      :class:`Basis` with access ``"released"``. Released.
    """
    cores = {name: core.cpu() for name, core in examples.release(sketches_of(frames, examples.model)).items()}
    ranks = {name: layer.r[adapter_name] for name, layer in examples.layers.items()}
    factors = turned(cores, frames, examples.mechanism.noise_std, ranks)
    return Basis(factors=factors, provenance=provenance)


def sketches_of(frames: Mapping[str, Frames], model: nn.Module) -> dict[str, Sketch]:
    """What a release of cores takes of each weight's gradient, on the model's device."""
    device = next(model.parameters()).device
    return {name: Sketch(f.left.to(device), f.right.to(device)) for name, f in frames.items()}


def turned(
    cores: Mapping[str, torch.Tensor], frames: Mapping[str, Frames], noise_std: float, ranks: Mapping[str, int]
) -> dict[str, Factors]:
    """A and B of each weight from noisy cores and the frames that these are of; arguments as for :func:`turn`."""
    values = {name: f.values.double().cpu() for name, f in frames.items()}
    factors = {}
    for name, (left, right) in turn(cores, values, noise_std, ranks).items():
        f = frames[name]
        B, A = f.left.cpu().double() @ left, f.right.cpu().double() @ right
        factors[name] = Factors(A=A.T.float().contiguous(), B=B.float().contiguous())
    return factors


def turn(
    cores: Mapping[str, torch.Tensor],
    values: Mapping[str, torch.Tensor],
    noise_std: float,
    ranks: Mapping[str, int],
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    r"""The directions to keep of each frame, from noisy cores and the public singular values.

    The public set predicts :math:`\alpha\,\mathrm{diag}(S_l)`, with one :math:`\alpha` of either sign for all layers
    fitted to the noisy cores. What lies beyond the prediction is taken for Gaussian of variance :math:`\kappa w_{ij}`,
    larger between directions that are strong in the public set (:math:`w_{ij} \propto \sqrt{S_i S_j}`), with one
    :math:`\kappa` for all layers from its moments. It is 0 unless they exceed what noise alone gives by two of their
    standard deviations: :math:`\sum w (x^2 - (\sigma C)^2) > 2 (\sigma C)^2 \sqrt{2 \sum w^2}`. Each noisy entry of the
    difference is multiplied by :math:`\kappa w_{ij} / (\kappa w_{ij} + (\sigma C)^2)`, its best linear guess, and the r
    leading singular directions of prediction plus shrunk difference are kept. So where the release does not stand out
    of its noise the public directions stay exactly as they are, and where it is far above, it alone decides.

    Args:
      cores: Noisy cores by layer, shape ``(K, K)``, float64. Released.
      values: Public singular values by layer, shape ``(K,)``.
      noise_std: Standard deviation of the noise on each entry. Public.
      ranks: r by layer.

    Returns:
      By layer, left and right, each ``(K, r)`` with orthonormal columns. Released.

    References:
      Empirical Bayes in the sense of Efron and Morris (1973), with moments instead of likelihoods.
    """
    values = {name: torch.where(value.max() > 0, value, torch.ones_like(value)) for name, value in values.items()}
    fit = sum(float((cores[name].diagonal() * values[name]).sum()) for name in cores)
    alpha = fit / sum(float(values[name].square().sum()) for name in cores)
    weights, above, scale = {}, 0.0, 0.0
    for name, core in cores.items():
        spread = values[name].sqrt() / values[name].sqrt().mean()
        weights[name] = torch.outer(spread, spread)
        beyond = core - alpha * torch.diag(values[name])
        above += float(((beyond.square() - noise_std**2) * weights[name]).sum())
        scale += float(weights[name].square().sum())
    by_chance = noise_std**2 * (2 * scale) ** 0.5
    kappa = above / scale if above > _STANDS_OUT * by_chance else 0.0
    kept = {}
    for name, core in cores.items():
        expected = kappa * weights[name]
        order = torch.diag(values[name] / values[name].max())
        beyond = (core - alpha * torch.diag(values[name])) * expected / (expected + noise_std**2 + _SMALLEST)
        tie = 1e-9 * (noise_std + _SMALLEST) * order  # keeps the public order where nothing else decides
        left, _, right = torch.linalg.svd(alpha * torch.diag(values[name]) + beyond + tie)
        kept[name] = (left[:, : ranks[name]], right[: ranks[name]].T)
    return kept
