"""Model (d): the server sees everything and adds the noise."""

from __future__ import annotations

from collections.abc import Sequence

from dpsb_accounting import _checks
from dpsb_accounting.events import NonPrivate
from dpsb_accounting.federated.persons import person_parts
from dpsb_accounting.federated.report import (
    FederatedReport,
    Party,
    bound,
    guarantee,
    incomplete_rounds,
    no_claim,
    row,
    worst,
)
from dpsb_accounting.federated.silo import Silo, common_terms, silos_of
from dpsb_accounting.ledger import LedgerRecord

_SAME = 1e-9
_ASSUMPTIONS = (
    "The server is trusted: it sees every silo's result without noise, and keeps it to itself.",
    "The program that wrote each ledger did what its lines say; the noise in the plans is the server's.",
    "Each unit's contribution is clipped to the stated norm before it is summed.",
    "What the silos send beside the sum (losses, counts, batch sizes) is nothing.",
)


def trusted_server(
    parties: Sequence[Silo | LedgerRecord],
    *,
    local_steps: int,
    silos_per_person: int = 1,
    delta: float | None = None,
) -> FederatedReport:
    """Reports a federation whose server collects sums without noise and publishes them with noise.

    Against everybody but the server this is a central run: independent Poisson draws in every silo are one Poisson
    draw of the union. A record is sampled with its own silo's probability, and the maximum over silos counts.

    Guarantees: for examples, several local steps between two aggregations are refused, because a clipped gradient
        then no longer bounds what one example changes; for whole clients, whose update is clipped, they are not.

    Args:
        parties: The ledger of the server, or one of each silo. Public.
        local_steps: Gradient steps between two aggregations. Public.
        silos_per_person: How many silos may hold a record of one person, one each. Public.
        delta: Recompute all of them at this delta; left out, they must agree.

    Raises:
        ValueError: If nothing can be claimed, with the reason.

    Example:
        >>> from dpsb_accounting import Phase, PoissonGaussian
        >>> step = PoissonGaussian(noise_multiplier=1, sampling_prob=0.02)
        >>> server = Silo(name="server", phases=(Phase("train", step, 500),), delta=1e-6)
        >>> f"{trusted_server([server], local_steps=1).epsilon.upper:.1f}"
        '3.2'
    """
    silos = silos_of(parties)
    terms = common_terms(silos, "trusted_server", delta)
    together = _checks.whole(at_least=1, silos_per_person=silos_per_person)
    if together > len(silos):
        raise ValueError(f"silos_per_person must be at most {len(silos)}, the number of silos, not {together!r}")
    if _checks.whole(at_least=1, local_steps=local_steps) > 1 and terms.unit != "client":
        raise ValueError(
            f"local_steps={local_steps!r} cannot be claimed for unit {terms.unit!r} with noise from the server: what "
            "one example changes in a silo's first step is in no way bounded after its second"
        )
    _check_one_noise(silos, local_steps)
    rows = tuple(row(silo, silo.phases, terms) for silo in silos)
    total = worst([entry.epsilon for entry in rows])
    person = terms.unit
    if total is not None and together > 1:
        total = bound(person_parts([silo.phases for silo in silos], together), terms)
        person = f"person with one {terms.unit} in up to {together} silos"
    statement = no_claim(rows)
    if total is not None:
        statement = f"What the server publishes is {guarantee(total, person)}. The server itself is trusted."
    return FederatedReport(
        model="trusted_server",
        epsilon=total,
        per_silo=rows,
        parties=(
            Party(name="server", sees="every silo's result without noise (trusted)", epsilon=None),
            Party(name="other silos", sees="what the server publishes", epsilon=total),
            Party(name="outsiders", sees="the final adapter", epsilon=total),
        ),
        incomplete_rounds=incomplete_rounds(silos),
        statement=statement,
        assumptions=_ASSUMPTIONS,
        terms=terms,
    )


def _check_one_noise(silos: Sequence[Silo], local_steps: int) -> None:
    """The server adds one noise to each sum, so all silos' plans must state that one."""
    first = silos[0]
    for silo in silos:
        for fact, value in (("local_steps", local_steps), ("noise_by", "server"), ("noise", "gaussian")):
            silo.says(fact, value)
        ours = [(phase.name, phase.count) for phase in first.phases]
        theirs = [(phase.name, phase.count) for phase in silo.phases]
        if ours != theirs:
            raise ValueError(f"silos {first.name!r} and {silo.name!r} plan different releases, {ours!r} and {theirs!r}")
        if any(isinstance(phase.event, NonPrivate) for phase in (first.train, silo.train)):
            continue
        stds = [getattr(one.train.event, "noise_multiplier", 0.0) * one.l2_clip_norm for one in (first, silo)]
        if abs(stds[0] - stds[1]) > _SAME * max(stds):
            raise ValueError(
                f"silos {first.name!r} and {silo.name!r} state different noise for the same sum: {stds[0]:.6g} and "
                f"{stds[1]:.6g} (noise multiplier times clip norm)"
            )
