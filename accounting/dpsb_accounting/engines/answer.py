"""Answer: what one engine says of one composition, and Unavailable: that it says nothing, and why."""

from __future__ import annotations

from dataclasses import dataclass


class Unavailable(Exception):
    """An engine does not answer; the message says why, in words that fit into a report."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """An interval from one engine.

    Args:
        engine: Its name: "gaussian", "pld", "binned", "rdp", "prv", "quadrature" or "gdp_clt".
        lower: Lower end; 0 where the engine bounds only from above.
        upper: Upper end; infinite where it bounds only from below.
        rigorous: Whether the ends are bounds, in floating point too; an estimate can never become a claim.
        method: How, in a few words (mesh, order, guard).
    """

    engine: str
    lower: float
    upper: float
    rigorous: bool
    method: str
