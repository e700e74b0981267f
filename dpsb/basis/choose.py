"""Which of several public sets stands nearest: ranked without the private data, or by one small charged release."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from dpsb.adapter import Basis, Factors, Provenance, lora_layers
from dpsb.basis._common import public_generator, truncated_svd
from dpsb.basis.per_example import Sketch
from dpsb.basis.release import Clip, PrivateExamples
from dpsb.basis.sources import digests

Gradients = Mapping[str, torch.Tensor]


def gradient_basis(
    model: nn.Module, gradients: Gradients, provenance: Provenance, adapter_name: str = "default"
) -> Basis:
    """A and B from the truncated SVD of given gradients (out, in). R starts at 0. As sensitive as they are."""
    factors, generator = {}, public_generator()
    for name, layer in lora_layers(model, adapter_name).items():
        U, _, Vh = truncated_svd(gradients[name], layer.r[adapter_name], generator)
        factors[name] = Factors(A=Vh, B=U)
    return Basis(factors=factors, provenance=provenance)


def sketches_of(factors: Mapping[str, Factors], device: torch.device | None = None) -> dict[str, Sketch]:
    """What R sees of each gradient under a basis: B^T G A^T; on the factors' own device unless another is named."""
    sides = {name: (f.B.float(), f.A.T.float().contiguous()) for name, f in factors.items()}
    return {name: Sketch(left.to(device), right.to(device)) for name, (left, right) in sides.items()}


def held_energy(factors: Mapping[str, Factors], one: Gradients, other: Gradients | None = None) -> float:
    r"""The share of a gradient's energy that a basis holds, over all layers: :math:`\|B^\top G A^\top\|^2 / \|G\|^2`.

    With a second, independent estimate of the same gradient the products are taken between the two, so that their
    sampling noise cancels on average instead of counting as energy.

    Args:
      factors: A and B by layer.
      one: Gradient (out, in) by layer.
      other: Another estimate of it; ``one`` again if left out.
    """
    other = one if other is None else other
    held = whole = 0.0
    for name, sketch in sketches_of(factors).items():
        held += float((sketch.of(one[name].float()).double() * sketch.of(other[name].float()).double()).sum())
        whole += float((one[name].double() * other[name].double()).sum())
    return held / whole if whole else 0.0


def rank_public(factors: Sequence[Mapping[str, Factors]], gradients: Sequence[Gradients]) -> list[float]:
    r"""For each public set, how well its basis stands in for the *other* sets' own. Public.

    Set i gets the mean over :math:`j \ne i` of :math:`\|P_i g_j\|^2 / \|P_j g_j\|^2`. Some gradients are easier to hold
    than others, so each is measured by what a basis of its own holds of it; and that basis has not seen :math:`g_j`.

    Args:
      factors: A basis from one half of each set.
      gradients: The gradient of the other half of each set, in the same order.
    """
    own = [held_energy(basis, gradient) for basis, gradient in zip(factors, gradients, strict=True)]
    scores = []
    for i, basis in enumerate(factors):
        others = [held_energy(basis, gradients[j]) / own[j] for j in range(len(gradients)) if j != i and own[j] > 0]
        scores.append(sum(others) / len(others) if others else 1.0)
    return scores


def choice_provenance(clip: Clip, candidates: Mapping[str, str]) -> Provenance:
    """What the plan states of a public basis that private examples choose, before any of them is read.

    Args:
      clip: Of the release.
      candidates: Each public file, and what was done about its labels.
    """
    said = {f"labels_{i + 1}": note for i, note in enumerate(candidates.values())}
    named = {"choice": "private score", "candidates": ", ".join(candidates)}
    return Provenance(
        kind="public", access="released", detail={**clip.to_json(), **named, **said, **digests(candidates)}
    )


def choose_privately(
    examples: PrivateExamples, provenance: Provenance, factors: Mapping[str, Mapping[str, Factors]]
) -> Basis:
    """The public basis that holds most of the private gradients, by one charged noisy release.

    Args:
      examples: The private examples.
      provenance: What the plan states.
      factors: Each public file's basis, by the file's name.

    Returns:
      The basis; its provenance also says which file was chosen, and the noisy scores. Released.
    """
    device = next(examples.model.parameters()).device
    scores = examples.release_preferences([sketches_of(entry, device) for entry in factors.values()])
    chosen = list(factors)[int(scores.argmax())]
    listed = ", ".join(f"{name} {score:.6g}" for name, score in zip(factors, scores.tolist(), strict=True))
    said = {**provenance.detail, "chosen": chosen, "scores": listed}
    return Basis(factors=factors[chosen], provenance=replace(provenance, detail=said))
