"""Model (a): every silo adds its own noise to its own training; nobody else has to be trusted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from dpsb_accounting import _checks
from dpsb_accounting.bound import Bound
from dpsb_accounting.events import Event, Gaussian, PoissonGaussian
from dpsb_accounting.federated.report import (
    FederatedReport,
    Party,
    bound,
    guarantee,
    incomplete_rounds,
    make_bound,
    no_claim,
    row,
    worst,
)
from dpsb_accounting.federated.silo import Silo, Terms, common_terms, silos_of
from dpsb_accounting.ledger import LedgerRecord

_MOST_CHOICES = 32  # of silos that a person may be in, composed one by one; beyond, basic composition
_MOST_LOOKED_AT = 100_000

_ASSUMPTIONS = (
    "The program that wrote each ledger did what its lines say.",
    "Each silo trains with its own noise and releases nothing else: no losses, counts or batch sizes.",
    "What the server sends back is computed from earlier releases only.",
    "The basis that the silos share is data-free, public or charged in their ledgers.",
)


def silo_local(
    parties: Sequence[Silo | LedgerRecord], *, silos_per_person: int = 1, delta: float | None = None
) -> FederatedReport:
    r"""Reports a federation in which every silo runs private training by itself and shares only its results.

    One person's record lies in one silo, and the releases of the others do not depend on it, adaptively chosen as
    they may be. So against anybody who sees everything, the person's epsilon is that of the own silo's ledger, and
    the federation's is the maximum (parallel composition). With a record in each of k silos it is that of the k
    ledgers composed, for the worst choice of k.

    Guarantees: the bounds are of every ledger's whole plan, whatever was charged; a tainted or non-private silo
        leaves itself and the federation without a claim, and the others with theirs.

    Args:
        parties: Every silo's ledger, its record, or a `Silo`. Public.
        silos_per_person: k, in how many silos one person may have a record (one in each). Public.
        delta: Recompute all of them at this delta; left out, they must agree.

    Raises:
        ValueError: If relations, units or deltas differ, a ledger is there twice, or k exceeds the number of silos.

    References:
        McSherry (2009), Theorem 4 (parallel composition); Zhu, Dong and Wang (2022), arXiv:2106.08567.

    Example:
        >>> from dpsb_accounting import Phase
        >>> def silo(name, prob):
        ...     step = PoissonGaussian(noise_multiplier=1, sampling_prob=prob)
        ...     return Silo(name=name, phases=(Phase("train", step, 1000),), delta=1e-5)
        >>> report = silo_local([silo("north", 0.01), silo("south", 0.004)])
        >>> [f"{entry.name} {entry.epsilon.upper:.2f}" for entry in report.per_silo]
        ['north 1.83', 'south 0.68']
        >>> f"{report.epsilon.upper:.2f}"
        '1.83'
    """
    silos = silos_of(parties)
    terms = common_terms(silos, "silo_local", delta)
    for silo in silos:  # a plan that counts the noise of others, or another noise, says too much for one silo alone
        silo.says("noise_of", "share")
        silo.says("noise", "gaussian")
    together = _checks.whole(at_least=1, silos_per_person=silos_per_person)
    if together > len(silos):
        raise ValueError(f"silos_per_person must be at most {len(silos)}, the number of silos, not {together!r}")
    rows = tuple(row(silo, silo.parts, terms) for silo in silos)
    claim = all(entry.claim for entry in rows)
    total: Bound | None = None
    if claim:
        total = worst([entry.epsilon for entry in rows])
        if together > 1:
            total = _composed(silos, [entry.epsilon for entry in rows if entry.epsilon], together, terms)
    return FederatedReport(
        model="silo_local",
        epsilon=total,
        per_silo=rows,
        parties=(
            Party(name="server", sees="what every silo releases, every round", epsilon=total),
            Party(name="other silos", sees="the averages, and the server's view if it colludes", epsilon=total),
            Party(name="outsiders", sees="the final adapter", epsilon=total),
        ),
        incomplete_rounds=incomplete_rounds(silos),
        statement=_statement(total, together, terms) if total is not None else no_claim(rows),
        assumptions=(*_ASSUMPTIONS, _person(together, terms)),
        terms=terms,
    )


def _composed(silos: Sequence[Silo], bounds: Sequence[Bound], together: int, terms: Terms) -> Bound | None:
    """The worst composition of `together` silos' schedules."""
    choices = _undominated(silos, together)
    if choices is not None:
        schedules = {tuple(sorted((part for silo in choice for part in silo.parts), key=repr)) for choice in choices}
        return worst([bound(schedule, terms) for schedule in schedules])
    shared = Terms(delta=terms.delta / together, neighboring=terms.neighboring, unit=terms.unit)
    upper = sorted((bound(silo.parts, shared).upper for silo in silos), reverse=True)
    return make_bound(
        max(entry.lower for entry in bounds),
        sum(upper[:together]) * (1 + 1e-12),
        terms,
        f"sum of the {together} largest epsilons at delta / {together}: too many choices of silos to compose each",
    )


def _undominated(silos: Sequence[Silo], together: int) -> list[tuple[Silo, ...]] | None:
    """The choices of silos that can be worst: those that leave out no silo for a less costly one. None if too many."""
    above: list[set[int]] = [
        {j for j, other in enumerate(silos) if j != i and _covers(other, silo) and (j < i or not _covers(silo, other))}
        for i, silo in enumerate(silos)
    ]
    candidates = [i for i in range(len(silos)) if len(above[i]) < together]
    if math.comb(len(candidates), together) > _MOST_LOOKED_AT:
        return None
    choices = [
        tuple(silos[i] for i in choice)
        for choice in itertools.combinations(candidates, together)
        if all(above[i] <= set(choice) for i in choice)
    ]
    return choices if len(choices) <= _MOST_CHOICES else None


def _covers(one: Silo, other: Silo) -> bool:
    """Whether `one` certainly costs at least as much as `other`, phase by phase."""
    return len(one.parts) == len(other.parts) and all(
        count >= fewer and _event_covers(event, weaker)
        for (event, count), (weaker, fewer) in zip(one.parts, other.parts, strict=True)
    )


def _event_covers(event: Event, weaker: Event) -> bool:
    """Less noise or more sampling costs more: the other follows by adding noise, or by mixing with a fixed law."""
    if event == weaker:
        return True
    if not isinstance(event, (Gaussian, PoissonGaussian)) or not isinstance(weaker, (Gaussian, PoissonGaussian)):
        return False
    return event.noise_multiplier <= weaker.noise_multiplier and _prob(event) >= _prob(weaker)


def _prob(event: Gaussian | PoissonGaussian) -> float:
    return event.sampling_prob if isinstance(event, PoissonGaussian) else 1.0


def _person(together: int, terms: Terms) -> str:
    stays = ", and one that is replaced stays in its silo" if terms.neighboring == "replace_one" else ""
    if together == 1:
        return f"One person contributes one {terms.unit}, in one silo{stays}."
    return f"One person contributes to at most {together} silos, one {terms.unit} in each{stays}."


def _statement(total: Bound, together: int, terms: Terms) -> str:
    person = terms.unit if together == 1 else f"person with one {terms.unit} in up to {together} silos"
    return (
        f"What the silos release is {guarantee(total, person)}, whoever sees all of it: no server and no other silo "
        "is trusted."
    )
