"""Empirical lower bounds on epsilon: scores of an attack in, a bound with its confidence and assumptions out.

A lower bound that exceeds a claimed epsilon refutes the claim. The reverse proves nothing.
"""

from __future__ import annotations

from dpsb_accounting.auditing.bounds import UNSTATED, Counts, LowerBound, clopper_pearson, from_counts, gdp_from_counts
from dpsb_accounting.auditing.one_run import one_run, one_run_fdp, one_run_p_value
from dpsb_accounting.auditing.reading import read_scores, write_scores
from dpsb_accounting.auditing.roc import Roc, RocPoint, roc
from dpsb_accounting.auditing.scores import (
    METHODS,
    CanaryScores,
    FixedThresholds,
    SplitThreshold,
    Thresholds,
    audit,
    default_guesses,
    gaussian_distance,
)

__all__ = [
    "METHODS",
    "UNSTATED",
    "CanaryScores",
    "Counts",
    "FixedThresholds",
    "LowerBound",
    "Roc",
    "RocPoint",
    "SplitThreshold",
    "Thresholds",
    "audit",
    "clopper_pearson",
    "default_guesses",
    "from_counts",
    "gaussian_distance",
    "gdp_from_counts",
    "one_run",
    "one_run_fdp",
    "one_run_p_value",
    "read_scores",
    "roc",
    "write_scores",
]
