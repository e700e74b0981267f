"""Head and adapter clipped apart: which numbers of a row are whose, and what each may keep."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from dpsb.adapter import Adapter
from dpsb.models import in_head


def clip_parts(adapter: Adapter, head_share: float) -> list[dict[str, Any]]:
    """The parts of a row, in its order, for the plan's details; :class:`dpsb.mechanism.ClipPart` is made from them.

    A row's squared norm is divided as ``head_share`` to the head and the rest to all else. Clipped as a whole, a row
    keeps the ratio that it has: where the adapter's gradient is ten times the head's, the head learns next to nothing.

    Args:
      adapter: What is trained.
      head_share: Between 0 and 1. Public.

    Raises:
      ValueError: If no head or nothing else is trained, or the head's numbers do not stand together.
    """
    owned = [("head" if in_head(name) else "adapter", p.numel()) for name, p in adapter.named_parameters()]
    runs = [(whose, sum(size for _, size in run)) for whose, run in groupby(owned, key=lambda pair: pair[0])]
    if sorted(whose for whose, _ in runs) != ["adapter", "head"]:
        raise ValueError(
            f"head_share={head_share!r} needs a head and an adapter whose numbers stand together; what is trained here "
            f"is {', '.join(f'{whose} ({size})' for whose, size in runs)}."
        )
    shares = {"head": head_share, "adapter": 1.0 - head_share}
    return [{"what": whose, "size": size, "share": shares[whose]} for whose, size in runs]
