r"""Sensitivity of a strategy matrix over the patterns in which one unit takes part: for tree, banded, DP-FTRL noise.

With a lower-triangular Toeplitz matrix of coefficients :math:`c_0, c_1, \dots` and a unit that takes part in at most
k of n steps, at least b steps apart, the released vector moves by :math:`\|\sum_{i<k} C e_{t_i} u_i\|` with
:math:`\|u_i\| \le 1`. Where the coefficients are non-negative and do not increase, the largest is at
:math:`t_i = i b` with all :math:`u_i` equal.

References:
    Choquette-Choo, Ganesh, McKenna, McMahan, Rush, Thakurta and Xu (2023), arXiv:2306.08153, Section 3; Kalinin and
    Lampert (2024), arXiv:2405.13763, Theorem 2. Tree: Kairouz et al. (2021), arXiv:2103.00039, Appendix D.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from dpsb_accounting import _checks

_MOST_STEPS = 10_000_000


def tree_sensitivity(steps: int) -> float:
    """Returns the sensitivity of binary tree aggregation in which a unit takes part in one of `steps` steps.

    The leaf of a step is under at most ceil(log2(steps + 1)) released nodes.

    Example:
        >>> round(tree_sensitivity(1024) ** 2)
        11
    """
    return math.sqrt(_checks.whole(at_least=1, steps=steps).bit_length())


def toeplitz_sensitivity(
    coefficients: Sequence[float], *, steps: int, participations: int = 1, min_separation: int | None = None
) -> float:
    """Returns the sensitivity of a lower-triangular Toeplitz strategy matrix.

    Args:
        coefficients: First column, non-negative and not increasing; shorter than `steps` means zeros (a band). Public.
        steps: n, at least 1. Public.
        participations: k, the most steps in which one unit takes part. Public.
        min_separation: b, the least distance between two of them; needed for more than one. Public.

    Raises:
        ValueError: If the coefficients are of another kind, for which the pattern here need not be the worst.

    Example:
        >>> toeplitz_sensitivity([1, 1], steps=10, participations=4, min_separation=2) ** 2
        8.0000...
    """
    column = [_checks.nonnegative(coefficients=value) for value in coefficients]
    steps = _checks.whole(at_least=1, steps=steps)
    most = _checks.whole(at_least=1, participations=participations)
    apart = steps if min_separation is None else _checks.whole(at_least=1, min_separation=min_separation)
    if not column or any(later > earlier for earlier, later in itertools.pairwise(column)):
        raise ValueError("coefficients must be a list that is not empty and does not increase")
    if most > 1 and min_separation is None:
        raise ValueError(f"min_separation must be given for participations={participations!r}")
    if steps > _MOST_STEPS:
        raise ValueError(f"steps must be at most {_MOST_STEPS}, not {steps!r}")
    import numpy as np

    moved = np.zeros(steps)
    for start in range(0, min(steps, most * apart), apart):
        part = column[: steps - start]
        moved[start : start + len(part)] += part
    return float(np.linalg.norm(moved)) * (1 + 1e-12)


def square_root_coefficients(steps: int) -> list[float]:
    r"""Returns the first column of the square root of the matrix of prefix sums, :math:`4^{-j} \binom{2j}{j}`.

    References:
        Fichtenberger, Henzinger and Upadhyay (2023), arXiv:2202.11205.
    """
    steps = _checks.whole(at_least=1, steps=steps)
    if steps > _MOST_STEPS:
        raise ValueError(f"steps must be at most {_MOST_STEPS}, not {steps!r}")
    column = [1.0]
    for j in range(1, steps):
        column.append(column[-1] * (2 * j - 1) / (2 * j))
    return column
