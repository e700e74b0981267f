"""The bases that need nothing but the weights, by the names that users give them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from dpsb.adapter import Basis
from dpsb.basis.complementary import complementary
from dpsb.basis.hadamard import hadamard
from dpsb.basis.random import random
from dpsb.basis.weight_svd import weight_svd

DATA_FREE: dict[str, Callable[[nn.Module], Basis]] = {
    "weight": weight_svd,
    "random": random,
    "complementary": complementary,
    "hadamard": hadamard,
}
