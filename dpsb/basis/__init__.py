"""The basis: which r x r window of each weight is trained. One file per way of choosing it.

A basis is a function of the weights, of public data or of a charged release, never of raw private gradients: whoever
sees the adapter sees A and B. Each function returns a :class:`Basis`, which carries where it came from.
"""

from dpsb.adapter import Basis, Provenance
from dpsb.basis._common import truncated_svd
from dpsb.basis.gradient import mean_gradients
from dpsb.basis.lora_sb import lora_sb
from dpsb.basis.public import public
from dpsb.basis.random import random
from dpsb.basis.weight_svd import weight_svd

__all__ = [
    "Basis",
    "Provenance",
    "lora_sb",
    "mean_gradients",
    "public",
    "random",
    "truncated_svd",
    "weight_svd",
]
