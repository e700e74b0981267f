"""A basis from the private examples themselves, clipped, noised and charged to the ledger."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft.tuners.lora.layer import LoraLayer

from dpsb.adapter import Basis, Factors, Provenance
from dpsb.basis._common import base_weight, public_generator, truncated_svd
from dpsb.basis.per_example import WHOLE, Sketch
from dpsb.basis.release import Clip, Releases

WIDE = 1024
"""Where the smaller side of a weight is larger than this, sketches are released instead of whole gradients."""

_OVERSAMPLING = 8
_ROUNDS = 2
_SAMPLED = 0.5


def rounds_for(layers: Mapping[str, LoraLayer], rounds: int | None = None) -> int:
    """Rounds of subspace iteration: 0 (one release of whole gradients) unless a weight is wide. Public."""
    if rounds is not None:
        return rounds
    wide = any(min(layer.in_features, layer.out_features) > WIDE for layer in layers.values())
    return _ROUNDS if wide else 0


def releases_for(rounds: int) -> int:
    """How many releases a private basis makes: one of whole gradients, or two each round."""
    return 2 * rounds or 1


def sampling_prob_for(rounds: int) -> float:
    """The probability with which an example is in a release, if the user names none. Public.

    Each release of subspace iteration is a small part of the budget, where half the rows come with little more than
    half the noise: its four passes cost two, and hold nearly as much (docs/benchmarks/paid_bases.md).
    """
    return _SAMPLED if rounds else 1.0


def private_provenance(clip: Clip, rounds: int) -> Provenance:
    """What the plan states of a private basis before any data are read."""
    return Provenance(kind="private", access="released", detail={**clip.to_json(), "rounds": rounds})


def factors_of(released: dict[str, torch.Tensor], ranks: Mapping[str, int]) -> dict[str, Factors]:
    """The leading singular directions of noisy gradient sums; these are used up, layer by layer. Released."""
    generator, factors = public_generator(), {}
    for name in list(released):
        U, _, Vh = truncated_svd(released.pop(name), ranks[name], generator)
        factors[name] = Factors(A=Vh, B=U)
    return factors


def private(examples: Releases, provenance: Provenance, adapter_name: str = "default") -> Basis:
    r"""A and B from the truncated SVD of the noisy clipped gradient sum of every target weight. R starts at 0.

    With ``rounds`` 0: one release :math:`\hat G_l = \sum_i c_i G_{il} + N(0, (\sigma C)^2)`, then its SVD. Otherwise
    noisy subspace iteration: from the weight's own right frame V, each round releases :math:`\sum_i c_i G_{il} V_l`,
    orthonormalizes it to U, releases :math:`\sum_i c'_i G_{il}^\top U_l` and orthonormalizes that to V. Every sketch
    has its own draw, where the plan's event draws, and its own clip: what is bounded by C is the *sketched* gradient,
    so a frame that holds little of each example costs no signal.

    Guarantees:
      * The basis is post-processing of the releases that the ledger's phase "basis" charged, one joint clip over all
        layers each, with noise of the full :math:`\sigma C` in every layer.
      * R0 is 0: singular values, which are mostly noise, are thrown away; so are signs.

    Args:
      examples: Private examples and the ledger that pays. Sensitive.
      provenance: From :func:`private_provenance`; must be the one that the plan states.

    Returns:
      :class:`Basis` with access ``"released"``. Released.

    References:
      Hardt and Price (2014), arXiv:1311.2495 (noisy power method). BBP threshold: Benaych-Georges and Nadakuditi
      (2012), arXiv:1103.2221.
    """
    rounds = int(provenance.detail["rounds"])
    ranks = {name: layer.r[adapter_name] for name, layer in examples.layers.items()}
    if rounds == 0:
        released = examples.release(dict.fromkeys(examples.layers, WHOLE))
        return Basis(factors=factors_of(released, ranks), provenance=provenance)

    generator, factors = public_generator(), {}
    right = {}
    for name, layer in examples.layers.items():
        width = min(ranks[name] + _OVERSAMPLING, layer.in_features, layer.out_features)
        right[name] = truncated_svd(base_weight(layer), width, generator)[2].T.contiguous()
    left: dict[str, torch.Tensor] = {}
    for number in range(rounds):
        images = examples.release({name: Sketch(right=frame) for name, frame in right.items()})
        left = {name: torch.linalg.qr(image).Q.float() for name, image in images.items()}
        images = examples.release({name: Sketch(left=frame) for name, frame in left.items()})
        if number < rounds - 1:
            right = {name: torch.linalg.qr(image.T).Q.float() for name, image in images.items()}
    for name, image in images.items():
        inner, _, Vh = torch.linalg.svd(image, full_matrices=False)
        rank = ranks[name]
        B = torch.linalg.qr(left[name].double() @ inner[:, :rank]).Q
        factors[name] = Factors(A=Vh[:rank].float().contiguous(), B=B.float().contiguous())
    return Basis(factors=factors, provenance=provenance)
