"""Which of several public sets stands nearest: ranked without the private data, or by one small charged release."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from dpsb.adapter import Basis, Factors, Provenance, lora_layers
from dpsb.basis._common import public_generator, truncated_svd
from dpsb.basis.per_example import Sketch
from dpsb.basis.release import Clip, PrivateExamples

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


def sketches_of(factors: Mapping[str, Factors]) -> dict[str, Sketch]:
    """What R sees of each gradient under a basis: B^T G A^T."""
    return {name: Sketch(left=f.B.float(), right=f.A.T.float().contiguous()) for name, f in factors.items()}


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
    """For each public set, the mean share of the *other* sets' gradients that its basis holds. Public.

    The set that stands nearest to all others is the best guess where nothing of the private data may be asked.

    Args:
      factors: A basis from each set.
      gradients: The gradient of each set, in the same order.
    """
    scores = []
    for i, basis in enumerate(factors):
        others = [held_energy(basis, gradient) for j, gradient in enumerate(gradients) if j != i]
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
    return Provenance(kind="public", access="released", detail={**clip.to_json(), **named, **said})


def choose_privately(
    examples: PrivateExamples, provenance: Provenance, factors: Sequence[Mapping[str, Factors]]
) -> tuple[Basis, int]:
    """The public basis that holds most of the private gradients, by one charged noisy release.

    Returns:
      The basis and its position among ``factors``. Released.
    """
    device = next(examples.model.parameters()).device
    candidates = [
        {name: Sketch(*(side.to(device) for side in sketch if side is not None)) for name, sketch in entry.items()}
        for entry in map(sketches_of, factors)
    ]
    scores = examples.release_preferences(candidates)
    best = int(scores.argmax())
    return Basis(factors=factors[best], provenance=provenance), best
