"""What every check is given: the claim, its numbers, and ways to judge the claimed epsilon against a recomputed one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from dpsb_accounting.claims import recompute
from dpsb_accounting.claims.claim import Claim
from dpsb_accounting.claims.findings import Finding, Range
from dpsb_accounting.claims.recompute import Setting

ROUNDING = 5e-3  # a claim that is lower by no more than this may have been rounded
_EXACT = 1e-6
_MOST_CLIENTS = 12


@dataclass(frozen=True, slots=True)
class Subject:
    """Whose facts are checked: the whole claim (name "") or one client.

    Args:
        name: "" or the name of the client.
        claim: The claim as it stands for it.
        charged: The run as it was accounted for; None where facts are missing.
    """

    name: str
    claim: Claim
    charged: Setting | None

    @property
    def of(self) -> str:
        """ "" or " of client 'name'", to put behind a noun."""
        return f" of client {self.name!r}" if self.name else ""


Check: TypeAlias = Callable[[Subject], Iterator[Finding]]


def subjects(claim: Claim) -> tuple[Subject, ...]:
    """Returns the claim itself and each client's, those of equal facts only once."""
    found = [Subject("", claim, recompute.as_charged(claim))]
    seen: set[tuple[object, ...]] = set()
    for client in claim.clients:
        own = claim.of_client(client)
        setting = recompute.as_charged(own)
        facts = (own.delta, own.num_examples, own.epsilon, setting)
        if facts not in seen:
            seen.add(facts)
            found.append(Subject(client.name, own, setting))
    return tuple(found)


def riskiest(clients: tuple[Subject, ...]) -> tuple[list[Subject], bool]:
    """Returns the clients that can have the largest epsilon, and whether others were left out."""

    def risk(subject: Subject) -> float:
        setting = subject.charged
        return 0.0 if setting is None else setting.steps * setting.sampling_prob**2 / setting.noise_multiplier**2

    known = sorted((subject for subject in clients if subject.charged is not None), key=risk, reverse=True)
    return known[:_MOST_CLIENTS], len(known) > _MOST_CLIENTS or len(known) < len(clients)


def covers(claimed: float | None, found: Range | None) -> bool:
    """Whether the claimed epsilon is certainly enough, but for rounding."""
    return claimed is not None and found is not None and claimed >= found.upper * (1 - ROUNDING)


def covers_exactly(claimed: float, found: Range) -> bool:
    """Whether the claimed epsilon is certainly enough without any rounding."""
    return claimed >= found.upper * (1 - _EXACT)


def uncharged(
    name: str,
    message: str,
    claim: Claim,
    found: Range | None,
    unknown: str = "What it costs cannot be computed from the facts that are stated.",
) -> Finding:
    """A finding about something that costs privacy: an error unless the claimed epsilon covers it all the same."""
    if found is not None and covers(claim.epsilon, found):
        message += f" The claimed epsilon covers it: recomputed {found}."
        return Finding(id=name, severity="info", message=message, claimed=claim.epsilon, recomputed=found)
    if found is not None:
        message += f" Recomputed with it: epsilon {found}."
    else:
        message += f" {unknown}"
    return Finding(id=name, severity="error", message=message, claimed=claim.epsilon, recomputed=found)


def fatal(name: str, message: str, claim: Claim) -> Finding:
    """A finding that leaves no finite epsilon."""
    delta, relation = claim.delta or 0.0, claim.neighboring or "add_or_remove_one"
    infinite = Range(float("inf"), float("inf"), delta, relation, "no guarantee")
    return Finding(id=name, severity="error", message=message, claimed=claim.epsilon, recomputed=infinite)
