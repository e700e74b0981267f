"""dpsb_accounting: the epsilon of a differentially private training run, for whoever has to check it.

Torch-free. Start with `epsilon` (a ledger, a plan or events in, a `Bound` out), `Ledger.read` and `verify`.
"""

from __future__ import annotations

from dpsb_accounting.accountant import (
    delta,
    epsilon,
    spent,
)
from dpsb_accounting.agreement import CrossCheck, cross_check
from dpsb_accounting.bound import Bound
from dpsb_accounting.calibrate import Calibration, CalibrationInfeasible, calibrate, noise_multiplier_for
from dpsb_accounting.dp_event import event_from_dp_json, event_to_dp_json, from_dp_event, to_dp_event
from dpsb_accounting.engines import ResourceLimit
from dpsb_accounting.events import (
    ApproximateDP,
    Composed,
    DiscreteLaplace,
    Event,
    Gaussian,
    Laplace,
    MatrixMechanism,
    NonPrivate,
    Parallel,
    PoissonGaussian,
    PoissonLaplace,
    PoissonSkellam,
    PureEpsilon,
    RandomizedResponse,
    RandomSelection,
    Repeated,
    SampledWithoutReplacementGaussian,
    TruncatedPoissonGaussian,
    UserMixture,
    Zcdp,
    event_from_json,
    event_to_json,
    user_mixture,
)
from dpsb_accounting.group import group_epsilon
from dpsb_accounting.ledger import BudgetSpent, Ledger, LedgerError, LedgerRecord, Taint
from dpsb_accounting.participation import square_root_coefficients, toeplitz_sensitivity, tree_sensitivity
from dpsb_accounting.plan import Phase, Plan
from dpsb_accounting.report import Report, make_report
from dpsb_accounting.verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "ApproximateDP",
    "Bound",
    "BudgetSpent",
    "Calibration",
    "CalibrationInfeasible",
    "Composed",
    "CrossCheck",
    "DiscreteLaplace",
    "Event",
    "Gaussian",
    "Laplace",
    "Ledger",
    "LedgerError",
    "LedgerRecord",
    "MatrixMechanism",
    "NonPrivate",
    "Parallel",
    "Phase",
    "Plan",
    "PoissonGaussian",
    "PoissonLaplace",
    "PoissonSkellam",
    "PureEpsilon",
    "RandomSelection",
    "RandomizedResponse",
    "Repeated",
    "Report",
    "ResourceLimit",
    "SampledWithoutReplacementGaussian",
    "Taint",
    "TruncatedPoissonGaussian",
    "UserMixture",
    "Verification",
    "Zcdp",
    "__version__",
    "calibrate",
    "cross_check",
    "delta",
    "epsilon",
    "event_from_dp_json",
    "event_from_json",
    "event_to_dp_json",
    "event_to_json",
    "from_dp_event",
    "group_epsilon",
    "make_report",
    "noise_multiplier_for",
    "spent",
    "square_root_coefficients",
    "to_dp_event",
    "toeplitz_sensitivity",
    "tree_sensitivity",
    "user_mixture",
    "verify",
]
