r"""A basis that all silos pay for: each releases a noisy clipped sum of gradients once, and the server averages them.

Every silo's plan begins with a phase "basis" of one release; the charge is on its disk before its data are read. What a
silo sends is released: its own noise protects it, whatever the server does. For a private basis it is whole gradients,
for a hybrid their cores in a wide public basis; all weights share one clip, and no guarantee rests on what that public
basis is beyond its being orthonormal, which the silo checks itself. The mean, its singular value decomposition and the
factors are post-processing. The factors go to all silos with the first round of training; each binds them to its ledger
by their hash, and rounds name them by their digest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from dpsb.adapter import Factors, Provenance
from dpsb.basis.hybrid import Frames, hybrid_provenance, turned
from dpsb.basis.private import factors_of, private_provenance
from dpsb.basis.release import Clip
from dpsb.federated.checks import FederatedError
from dpsb.federated.paid_layout import GRADIENT, LEFT, RIGHT, VALUES, A, B, Shapes, Wide
from dpsb.federated.spec import PaidBasis

State = Mapping[str, torch.Tensor]

_ORTHONORMAL = 1e-3  # how far from one and zero the products of a frame's columns may be; float32 gives 1e-5


def provenance_of(paid: PaidBasis) -> Provenance:
    """What every silo's plan states of the basis."""
    clip = Clip(l2_clip_norm=paid.l2_clip_norm, clipping=paid.clipping, share=paid.share)
    if not paid.width:
        return private_provenance(clip, 0)
    return hybrid_provenance(clip, paid.width, {"source": paid.source, "frames_sha256": paid.frames_sha256})


def frames_in(wide: Wide) -> dict[str, Frames]:
    """The wide public basis by weight."""
    names = [name.removesuffix(VALUES) for name in wide.tensors if name.endswith(VALUES)]
    return {name: Frames(*(wide.tensors[f"{name}{part}"] for part in (LEFT, VALUES, RIGHT))) for name in names}


def check_frames(wide: Wide, shapes: Shapes) -> None:
    """Refuses a wide basis that is no basis: the sums of a release are float32, and frames of another size than one
    could bring what is measured of an example below, or what is added of it above, what float32 can hold.

    Raises:
      FederatedError: If a weight has no frames, or they are not orthonormal float32 of the basis' width.
    """
    for name, (rows, columns, _) in shapes.items():
        parts = [wide.tensors.get(f"{name}{part}") for part in (LEFT, VALUES, RIGHT)]
        wanted = ((rows, wide.width), (wide.width,), (columns, wide.width))
        found = [each for each in parts if each is not None and each.dtype == torch.float32]
        if [tuple(each.shape) for each in found] != list(wanted):
            raise FederatedError(f"The wide public basis lacks frames of {name}, or they have another shape or type.")
        left, values, right = (each.double() for each in found)
        one = torch.eye(wide.width, dtype=torch.float64)
        close = all(bool(((side.T @ side - one).abs() <= _ORTHONORMAL).all()) for side in (left, right))
        if not close or not bool((torch.isfinite(values) & (values >= 0)).all()):
            raise FederatedError(f"The frames of {name} in the wide public basis are not orthonormal, or not finite.")


def wide_from(frames: Mapping[str, Frames], source: str) -> Wide:
    """The inverse of :func:`frames_in`."""
    tensors: dict[str, torch.Tensor] = {}
    for name, each in frames.items():
        parts = zip((LEFT, VALUES, RIGHT), (each.left, each.values, each.right), strict=True)
        tensors |= {f"{name}{part}": value.float().cpu().contiguous() for part, value in parts}
    return Wide(tensors, source)


def mean_noise_std(paid: Sequence[PaidBasis]) -> float:
    """Standard deviation of the noise on each number of the mean of such releases. Public."""
    return math.sqrt(sum((each.noise_multiplier * each.l2_clip_norm) ** 2 for each in paid)) / len(paid)


def basis_from(mean: State, shapes: Shapes, wide: Wide | None, paid: Sequence[PaidBasis]) -> dict[str, torch.Tensor]:
    """A and B of every weight from the silos' mean. Released.

    Args:
      mean: Of whole gradients: their leading singular directions are kept. Of cores: how to turn and cut ``wide``.
      shapes: Out, in and rank of each weight.
      wide: The wide public basis; None where whole gradients were released.
      paid: What the silos released whose mean it is.
    """
    ranks = {name: rank for name, (_, _, rank) in shapes.items()}
    released = {name: mean[f"{GRADIENT}{name}"].double() for name in shapes}
    if wide is None:
        factors = factors_of(released, ranks)
    else:
        factors = turned(released, frames_in(wide), mean_noise_std(paid), ranks)
    found = {f"{name}{A}": each.A.contiguous() for name, each in factors.items()}
    return found | {f"{name}{B}": each.B.contiguous() for name, each in factors.items()}


def factors_from(tensors: State, shapes: Shapes) -> dict[str, Factors]:
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
