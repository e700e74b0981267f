"""The frozen base cut over the processes, by torch's FSDP2; what is trained stays whole on each of them."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dpsb.adapter import Adapter
from dpsb.distributed.team import Team, TeamError
from dpsb.models import block_lists


def shard_base(adapter: Adapter, team: Team) -> int:
    """Cuts the frozen parameters of every block over the team; they are whole only while their block computes.

    Theta, A and B (buffers) are left alone: theta's gradients are those of :mod:`dpsb.capture`, and the leader's sum is
    the only one that crosses processes. Embeddings and the head stay whole too: losses in chunks of the vocabulary
    reach them without a forward pass of their module. From here on every pass through the model is one that all
    processes make.

    Returns:
      How many blocks are cut.

    Raises:
      TeamError: If the model has no list of blocks.

    References:
      Zhao et al. (2023), arXiv:2304.11277 (FSDP); torch's ``fully_shard``.
    """
    mesh = init_device_mesh(team.device.type, (team.size,))
    own: set[nn.Parameter] = set(adapter.parameters())
    blocks = [block for blocks in block_lists(adapter.model) for block in blocks]
    if not blocks:
        raise TeamError("shard_base finds no list of blocks in this model to cut over the processes; leave it out.")
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=own & set(block.parameters()))
    return len(blocks)
