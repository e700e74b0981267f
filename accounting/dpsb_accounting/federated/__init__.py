"""Federations: one report from every silo's ledger, in four models of who is trusted with what.

* `silo_local`: every silo adds its own noise; nobody is trusted. The default.
* `secagg`: noise in shares, one gradient sum per aggregation; the secure aggregation is trusted.
* `client_level`: whole clients are hidden; the server or the secure aggregation is trusted.
* `trusted_server`: the server sees everything and adds the noise.
"""

from __future__ import annotations

from dpsb_accounting.federated.client_level import NOISE_BY, PARTICIPATION, client_level
from dpsb_accounting.federated.report import FederatedReport, Party, SiloBound
from dpsb_accounting.federated.secagg import secagg
from dpsb_accounting.federated.shares import Losses
from dpsb_accounting.federated.silo import MODELS, NOISE_OF, Silo
from dpsb_accounting.federated.silo_local import silo_local
from dpsb_accounting.federated.trusted_server import trusted_server

__all__ = [
    "MODELS",
    "NOISE_BY",
    "NOISE_OF",
    "PARTICIPATION",
    "FederatedReport",
    "Losses",
    "Party",
    "Silo",
    "SiloBound",
    "client_level",
    "secagg",
    "silo_local",
    "trusted_server",
]
