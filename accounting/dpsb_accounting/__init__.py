"""dpsb_accounting: the epsilon of a differentially private training run, for whoever has to check it.

Torch-free. Start with `epsilon` (a ledger, a plan or events in, a `Bound` out), `Ledger.read` and `verify`.
"""

from __future__ import annotations

from dpsb_accounting.accountant import (
    delta,
    epsilon,
    spent,
)
from dpsb_accounting.bound import Bound
from dpsb_accounting.calibrate import CalibrationInfeasible, noise_multiplier_for
from dpsb_accounting.engines import ResourceLimit
from dpsb_accounting.events import (
    Event,
    Gaussian,
    NonPrivate,
    PoissonGaussian,
    event_from_json,
    event_to_json,
)
from dpsb_accounting.ledger import BudgetSpent, Ledger, LedgerError, LedgerRecord, Taint
from dpsb_accounting.plan import Phase, Plan
from dpsb_accounting.report import Report, make_report
from dpsb_accounting.verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "Bound",
    "BudgetSpent",
    "CalibrationInfeasible",
    "Event",
    "Gaussian",
    "Ledger",
    "LedgerError",
    "LedgerRecord",
    "NonPrivate",
    "Phase",
    "Plan",
    "PoissonGaussian",
    "Report",
    "ResourceLimit",
    "Taint",
    "Verification",
    "__version__",
    "delta",
    "epsilon",
    "event_from_json",
    "event_to_json",
    "make_report",
    "noise_multiplier_for",
    "spent",
    "verify",
]
