"""The protocol of a self-test: what it has to be able to do with somebody's private training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

ClippedSum = Callable[[Sequence[Any]], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A private training step, taken apart as far as its owner can: ours, Opacus' or anybody's.

    Only ``clipped_sum`` and ``l2_clip_norm`` are needed; what is left out is not tested, and the result says so. All of
    it must act on one fixed state of the model. Give it synthetic or public examples.

    Args:
      name: What is tested.
      l2_clip_norm: C, the most that one example may contribute to the sum.
      clipped_sum: Sum over these examples of their clipped gradients, shape ``(d,)``, before noise and division. Must
        accept an empty sequence.
      unclipped: The same sum with a C so large that nothing is clipped: it shows that an example rescales the others
        even where clipping hides it.
      otherwise: The same sum under other memory settings, such as another microbatch size.
      poisoned: Turns an example into one whose loss is NaN.
      noise_multiplier: Noise standard deviation divided by C.
      release: Adds noise to a sum; new noise at every call.
      fresh_release: Makes a ``release`` as a new run would have it, seeding and all.
      sampling_prob: q.
      draw: The rows of one step out of ``n``, for a given ``n``.
      fresh_draw: Makes a ``draw`` as a new run, or another process of the same run, would have it.
    """

    name: str
    l2_clip_norm: float
    clipped_sum: ClippedSum
    unclipped: ClippedSum | None = None
    otherwise: ClippedSum | None = None
    poisoned: Callable[[Any], Any] | None = None
    noise_multiplier: float | None = None
    release: Callable[[torch.Tensor], torch.Tensor] | None = None
    fresh_release: Callable[[], Callable[[torch.Tensor], torch.Tensor]] | None = None
    sampling_prob: float | None = None
    draw: Callable[[int], Sequence[int]] | None = None
    fresh_draw: Callable[[], Callable[[int], Sequence[int]]] | None = None
