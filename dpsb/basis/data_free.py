"""The bases that need nothing but the weights, by the names that users give them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from dpsb.adapter import Basis
from dpsb.basis.complementary import complementary
from dpsb.basis.hadamard import hadamard
from dpsb.basis.random import random
from dpsb.basis.weight_svd import weight_svd
from dpsb.basis_spec import DATA_FREE_KINDS

DATA_FREE: dict[str, Callable[[nn.Module], Basis]] = dict(
    zip(DATA_FREE_KINDS, (weight_svd, random, complementary, hadamard), strict=True)
)
