"""A wide public basis, turned and cut by one cheap private release of its cores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft.tuners.lora.layer import LoraLayer

from dpsb.adapter import Basis, Factors, Provenance
from dpsb.basis._common import base_weight, public_generator, truncated_svd
from dpsb.basis.per_example import Sketch
from dpsb.basis.release import PrivateExamples

TIMES_RANK = 3
"""The public basis' width K is so many times the rank, unless the user names it."""


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
    """K: the one asked for, or three times the rank as far as the smallest weight allows.

    Raises:
      WidthError: If K is below the rank or larger than a weight's smaller side.
    """
    smallest, name = min((min(layer.in_features, layer.out_features), name) for name, layer in layers.items())
    if width is None:
        return min(TIMES_RANK * rank, smallest)
    if width < rank:
        raise WidthError(f"Expected basis_width={width!r} of at least the rank, {rank}; 2 to 4 times it is usual.")
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


def hybrid_provenance(
    *, width: int, l2_clip_norm: float, clipping: str, share: float, source: Mapping[str, str | int | float]
) -> Provenance:
    """What the plan states of a hybrid basis before any private data are read."""
    facts = {"l2_clip_norm": l2_clip_norm, "clipping": clipping, "share": share, "width": width}
    return Provenance(kind="hybrid", access="released", detail={**facts, **source})


def hybrid(
    examples: PrivateExamples, provenance: Provenance, frames: Mapping[str, Frames], adapter_name: str = "default"
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
    device = next(examples.model.parameters()).device
    sketches = {name: Sketch(f.left.to(device), f.right.to(device)) for name, f in frames.items()}
    cores = {name: core.cpu() for name, core in examples.release(sketches).items()}
    values = {name: f.values.double().cpu() for name, f in frames.items()}
    ranks = {name: layer.r[adapter_name] for name, layer in examples.layers.items()}
    factors = {}
    for name, (left, right) in turn(cores, values, examples.mechanism.noise_std, ranks).items():
        f = frames[name]
        B, A = f.left.cpu().double() @ left, f.right.cpu().double() @ right
        factors[name] = Factors(A=A.T.float().contiguous(), B=B.float().contiguous())
    return Basis(factors=factors, provenance=provenance)


def turn(
    cores: Mapping[str, torch.Tensor],
    values: Mapping[str, torch.Tensor],
    noise_std: float,
    ranks: Mapping[str, int],
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    r"""The directions to keep of each frame, from noisy cores and the public singular values.

    The public set predicts :math:`\alpha\,\mathrm{diag}(S_l)`, with one :math:`\alpha \ge 0` for all layers fitted to
    the noisy cores. What the cores say beyond that is shrunk: a singular value of the difference that does not rise
    above the noise edge :math:`2\sigma C\sqrt K` becomes 0, a larger one what is best in mean square under white noise.
    The r leading singular directions of the prediction plus the shrunk difference are kept. So where the release is
    below its noise the public directions stay as they are.

    Args:
      cores: Noisy cores by layer, shape ``(K, K)``, float64. Released.
      values: Public singular values by layer, shape ``(K,)``.
      noise_std: Standard deviation of the noise on each entry. Public.
      ranks: r by layer.

    Returns:
      By layer, left and right, each ``(K, r)`` with orthonormal columns. Released.

    References:
      Gavish and Donoho (2017), arXiv:1405.7511, equation 7 for square matrices.
    """
    fit = sum(float((cores[name].diagonal() * values[name]).sum()) for name in cores)
    size = sum(float(values[name].square().sum()) for name in cores)
    if not size > 0:
        alpha, predicted = 0.0, {name: torch.ones_like(values[name]) for name in cores}
    else:
        alpha, predicted = max(0.0, fit / size), dict(values)
    kept = {}
    for name, core in cores.items():
        order = torch.diag(predicted[name])
        U, S, Vh = torch.linalg.svd(core - alpha * order)
        beyond = (U * shrunk(S, noise_std * math.sqrt(len(core)))) @ Vh
        tie = (
            1e-9 * noise_std / max(float(predicted[name].max()), 1e-30)
        )  # keeps the public order where nothing else decides
        left, _, right = torch.linalg.svd((alpha + tie) * order + beyond)
        kept[name] = (left[:, : ranks[name]], right[: ranks[name]].T)
    return kept


def shrunk(values: torch.Tensor, noise_scale: float) -> torch.Tensor:
    r"""Singular values of signal plus white noise, each set to its best guess: :math:`\sqrt{y^2 - 4 s^2}`, 0 below 2s.

    Args:
      values: y, singular values of a square noisy matrix.
      noise_scale: s, the noise's standard deviation times the square root of the width.
    """
    return (values.square() - 4 * noise_scale**2).clamp(min=0.0).sqrt()
