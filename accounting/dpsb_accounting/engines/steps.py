"""Several changes of one unit: what a bound for one change says of them, whatever the mechanism."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

_MOST_ROUNDS = 60
_DEEPEST = 690.0  # -log of the smallest delta that floats hold

Found = TypeVar("Found", bound=tuple[object, ...])


def log_growth(epsilon: float, steps: int) -> float:
    r"""Returns :math:`\log \sum_{i<k} e^{i\epsilon}`, rounded up: by how much delta grows in k steps.

    (epsilon, delta) for one step is :math:`(k\epsilon, \delta\sum_{i<k} e^{i\epsilon})` for k of them.

    References:
        Vadhan (2017), The Complexity of Differential Privacy, Lemma 2.2 (whose proof has this sharper sum).
    """
    if epsilon == 0:
        return math.log(steps) + 1e-12
    ratio = -math.expm1(-steps * epsilon) / -math.expm1(-epsilon)
    return (steps - 1) * epsilon + math.log(ratio) + 1e-9


def least(upper: Callable[[float], tuple[float, Found]], delta: float, steps: int) -> tuple[float, Found] | None:
    """Returns (epsilon of `steps` changes, what was found) by sharing out delta; None if nothing finite is reached.

    Args:
        upper: delta of one change to (upper bound on its epsilon, anything to hand back).
        delta: For all changes together.
        steps: How many changes.
    """
    depth = -math.log(delta)  # of the share of each change, on a logarithmic scale
    for round_ in range(_MOST_ROUNDS):
        if depth > _DEEPEST:
            return None
        epsilon, found = upper(math.exp(-depth))
        if math.isinf(epsilon):
            return None
        needed = -math.log(delta) + log_growth(epsilon, steps)
        if depth >= needed:
            return steps * epsilon, found
        depth = needed + 1e-3 * round_ * (needed - depth)  # rises to the fixed point from below, then past it
    return None
