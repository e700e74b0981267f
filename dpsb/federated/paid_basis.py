r"""A basis that all silos pay for: each releases the noisy clipped sum of its gradients once, the server averages them.

Every silo's plan begins with a phase "basis" of one release; the charge is on its disk before its data are read. What a
silo sends is released: its own noise protects it, whatever the server does. The mean, its singular value decomposition
and the factors are post-processing. The factors go to all silos with the first round of training; each binds them to
its ledger by their hash, and rounds name them by their digest.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dpsb.adapter import Factors, Provenance
from dpsb.basis.private import factors_of, private_provenance
from dpsb.basis.release import Clip
from dpsb.federated.paid_layout import GRADIENT, A, B
from dpsb.federated.spec import FederatedError, PaidBasis

State = Mapping[str, torch.Tensor]


def provenance_of(paid: PaidBasis) -> Provenance:
    """What every silo's plan states of the basis."""
    clip = Clip(l2_clip_norm=paid.l2_clip_norm, clipping=paid.clipping, share=paid.share)
    return private_provenance(clip, 0)


def basis_from(mean: State, shapes: Mapping[str, tuple[int, int, int]]) -> dict[str, torch.Tensor]:
    """A and B of every weight from the silos' mean: the leading singular directions. Released."""
    ranks = {name: rank for name, (_, _, rank) in shapes.items()}
    factors = factors_of({name: mean[f"{GRADIENT}{name}"].double() for name in shapes}, ranks)
    found = {f"{name}{A}": each.A.contiguous() for name, each in factors.items()}
    return found | {f"{name}{B}": each.B.contiguous() for name, each in factors.items()}


def factors_from(tensors: State, shapes: Mapping[str, tuple[int, int, int]]) -> dict[str, Factors]:
    """The factors that a message or a file holds.

    Raises:
      FederatedError: If they are not those of this adapter's weights, or not finite.
    """
    wanted = {f"{name}{A}": (rank, columns) for name, (_, columns, rank) in shapes.items()}
    wanted |= {f"{name}{B}": (rows, rank) for name, (rows, _, rank) in shapes.items()}
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != wanted:
        raise FederatedError("The basis of the message is not one of this adapter's weights.")
    if not all(tensor.dtype == torch.float32 and bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise FederatedError("The basis of the message holds numbers that are not finite or of another type.")
    return {name: Factors(A=tensors[f"{name}{A}"], B=tensors[f"{name}{B}"]) for name in shapes}
