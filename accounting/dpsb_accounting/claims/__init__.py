"""Claims: somebody else's epsilon, read from a file, recomputed, and taken apart into findings."""

from __future__ import annotations

from dpsb_accounting.claims.catalog import CATALOG, Explanation, explain
from dpsb_accounting.claims.claim import Claim, ClaimError, Client, example
from dpsb_accounting.claims.findings import Finding, Range
from dpsb_accounting.claims.lint import Lint, lint
from dpsb_accounting.claims.reading import claim_from, read_claim

__all__ = [
    "CATALOG",
    "Claim",
    "ClaimError",
    "Client",
    "Explanation",
    "Finding",
    "Lint",
    "Range",
    "claim_from",
    "example",
    "explain",
    "lint",
    "read_claim",
]
