"""Model (c): a whole client's update is clipped, and the sum over clients gets noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dpsb_accounting import _checks
from dpsb_accounting.bound import Bound
from dpsb_accounting.events import Event, Gaussian, NonPrivate, PoissonGaussian, PoissonSkellam
from dpsb_accounting.federated.report import (
    FederatedReport,
    Party,
    bound_if_computable,
    guarantee,
    incomplete_rounds,
    no_claim,
    row,
    worst,
)
from dpsb_accounting.federated.shares import Losses, require_plain, scaled
from dpsb_accounting.federated.silo import Silo, Terms, common_terms, silos_of
from dpsb_accounting.ledger import LedgerRecord
from dpsb_accounting.plan import Phase

PARTICIPATION = ("every_round", "poisson", "fixed_cohort")
NOISE_BY = ("server", "shares")

_ASSUMPTIONS = (
    "The program that wrote each ledger did what its lines say.",
    "Each client's whole update is clipped to the stated norm before it is summed, however it was computed.",
    "The sum is not weighted, and its divisor is public.",
    "What clients send beside their update (losses, counts) is nothing.",
)
_PARTICIPATION = {
    "every_round": "Every client may take part in every round.",
    "poisson": "Each client takes part in each round independently with the stated probability, and nobody but the "
    "server learns who does.",
    "fixed_cohort": "Each round takes a cohort of a fixed size. That is not Poisson sampling, and no amplification is "
    "claimed for it: a client is counted as if it took part in every round.",
}


def client_level(
    parties: Sequence[Silo | LedgerRecord],
    *,
    participation: str,
    noise_by: str = "server",
    clients: int | None = None,
    dropouts: int = 0,
    colluders: int = 1,
    noise_of: str = "sum",
    delta: float | None = None,
) -> FederatedReport:
    r"""Reports a federation that hides whether a whole client took part at all.

    In each round the clients' updates, of any number of local steps, are clipped to norm C and added up, with noise
    of standard deviation :math:`\sigma C`. A round is one Gaussian release in which the unit is the client. Where
    each client takes part with probability q, independently and unknown to the adversary, it is a Poisson-subsampled
    one; a server that knows who takes part gets no such protection.

    Guarantees: amplification is claimed only for `participation="poisson"` and against those who see the results
        alone; a cohort of fixed size gets none. Missing clients make the sum smaller and change nothing where the
        server adds the noise; where clients add it in shares, t missing and k known shares count for nothing.

    Args:
        parties: The ledger of the coordinator, or one of each client; their unit is "client" or "user". Public.
        participation: "every_round", "poisson" or "fixed_cohort" (not under add_or_remove_one, where another client
            would take the place of the missing one).
        noise_by: "server" (which then is trusted) or "shares" (through secure aggregation).
        clients: With shares: K, how many shares a round has at least before any is lost. Public.
        dropouts: With shares: t. Public.
        colluders: With shares: k, at least 1. Public.
        noise_of: With shares: what the stated noise multiplier is that of; see `secagg`.
        delta: Recompute all of them at this delta; left out, they must agree.

    Raises:
        ValueError: If nothing can be claimed, with the reason.

    References:
        McMahan et al. (2018), arXiv:1710.06963.

    Example:
        >>> round_ = PoissonGaussian(noise_multiplier=1, sampling_prob=0.05)
        >>> server = Silo(name="server", phases=(Phase("train", round_, 200),), delta=1e-4, unit="client")
        >>> report = client_level([server], participation="poisson")
        >>> f"{report.epsilon.upper:.1f}"
        '4.0'
    """
    silos = silos_of(parties)
    terms = common_terms(silos, "client_level", delta)
    _checks.one_of(choices=PARTICIPATION, participation=participation)
    _checks.one_of(choices=NOISE_BY, noise_by=noise_by)
    _check(silos, terms, participation, noise_by)
    factor = 1.0
    if noise_by == "shares":
        if clients is None:
            raise ValueError("clients must be given where the clients add the noise in shares")
        tainted = sum(bool(silo.taints) for silo in silos)  # their noise may be known
        losses = Losses(clients=clients, dropouts=dropouts, colluders=colluders)
        left = Losses(clients=clients, dropouts=dropouts, colluders=colluders + tainted)
        for silo in silos:
            for fact, value in (("clients", clients), ("dropouts", dropouts), ("noise_of", noise_of)):
                silo.says(fact, value)
            if noise_of == "guaranteed":
                silo.says("colluders", colluders)
        factor = losses.factor(noise_of) * math.sqrt(left.honest / losses.honest)
    hidden = participation == "poisson"
    results = [_schedule(silo, factor, amplified=hidden) for silo in silos]
    known = [_schedule(silo, factor, amplified=False) for silo in silos]
    # Where the noise comes in shares the server is an adversary, and it knows who takes part.
    claimed = results if noise_by == "server" else known
    rows = tuple(row(silo, schedule, terms) for silo, schedule in zip(silos, claimed, strict=True))
    total = worst([entry.epsilon for entry in rows])
    return FederatedReport(
        model="client_level",
        epsilon=total,
        per_silo=rows,
        parties=_parties(noise_by, total, results, known, terms, colluders),
        incomplete_rounds=incomplete_rounds(silos),
        statement=_statement(total, noise_by, terms) if total is not None else no_claim(rows),
        assumptions=(*_ASSUMPTIONS, _PARTICIPATION[participation]),
        terms=terms,
    )


def _check(silos: Sequence[Silo], terms: Terms, participation: str, noise_by: str) -> None:
    if terms.unit == "example":
        raise ValueError(
            "client_level needs ledgers whose unit is 'client' or 'user', not 'example': clipping single examples "
            "does not bound what a whole client contributes"
        )
    if participation == "fixed_cohort" and terms.neighboring == "add_or_remove_one":
        raise ValueError(
            "neighboring='add_or_remove_one' does not fit cohorts of a fixed size: without one client another one "
            "takes its place; use 'zero_out' or 'replace_one'"
        )
    for silo in silos:
        silo.says("participation", participation)
        silo.says("noise_by", noise_by)
        silo.says("noise", "gaussian")
        for phase in silo.phases:
            event = phase.event
            if isinstance(event, PoissonSkellam):
                raise ValueError(f"phase {phase.name!r} adds integer noise, which is accounted for by secagg only")
            if not isinstance(event, NonPrivate):
                require_plain(event, phase.name)
            sampled = isinstance(event, PoissonGaussian) and event.sampling_prob < 1
            if sampled and participation == "every_round":
                raise ValueError(
                    f"silo {silo.name!r} samples clients in phase {phase.name!r}, which is not participation="
                    "'every_round'; say 'poisson' if the draw is independent and secret, else 'fixed_cohort'"
                )


def _schedule(silo: Silo, factor: float, *, amplified: bool) -> tuple[Phase, ...]:
    """The silo's phases with the noise that is certainly there, sampled or not."""
    found = []
    for phase in silo.phases:
        if factor != 1:
            phase = scaled(phase, factor if phase.name == "train" else min(1.0, factor))
        found.append(phase if amplified else Phase(phase.name, _unsampled(phase.event), phase.count))
    return tuple(found)


def _unsampled(event: Event) -> Event:
    if isinstance(event, PoissonGaussian):
        return Gaussian(noise_multiplier=event.noise_multiplier)
    return event


def _parties(
    noise_by: str,
    total: Bound | None,
    results: Sequence[tuple[Phase, ...]],
    known: Sequence[tuple[Phase, ...]],
    terms: Terms,
    colluders: int,
) -> tuple[Party, ...]:
    public = worst([bound_if_computable(schedule, terms) for schedule in dict.fromkeys(results)])
    taking_part = worst([bound_if_computable(schedule, terms) for schedule in dict.fromkeys(known)])
    if total is None:
        public = taking_part = None
    if noise_by == "server":
        return (
            Party(name="server", sees="each client's clipped update before the noise (trusted)", epsilon=None),
            Party(name="who learns who takes part", sees="the noisy sums and the cohorts", epsilon=taking_part),
            Party(name="other clients and outsiders", sees="the noisy sums", epsilon=public),
        )
    helped = f"server with {colluders} colluding"
    return (
        Party(name=helped, sees="the sums, the cohorts, and the colluders' shares", epsilon=taking_part),
        Party(name="outsiders", sees="the sums, not who took part", epsilon=public),
    )


def _statement(total: Bound, noise_by: str, terms: Terms) -> str:
    if noise_by == "server":
        return f"What the server publishes is {guarantee(total, terms.unit)}. The server itself is trusted."
    return (
        f"What the sums show is {guarantee(total, terms.unit)}, against the server and its helpers too. This rests on "
        "the secure aggregation."
    )
