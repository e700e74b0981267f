"""Model (b): the server sees only a sum, and every party's share of the noise is in it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dpsb_accounting import _checks, skellam
from dpsb_accounting.bound import Bound
from dpsb_accounting.events import Gaussian, NonPrivate, PoissonGaussian, PoissonSkellam
from dpsb_accounting.federated.persons import person_parts
from dpsb_accounting.federated.report import (
    FederatedReport,
    Party,
    bound,
    bound_if_computable,
    guarantee,
    incomplete_rounds,
    make_bound,
    no_claim,
    row,
    row_of,
    worst,
)
from dpsb_accounting.federated.shares import Losses, scaled, share_factors
from dpsb_accounting.federated.silo import Silo, Terms, common_terms, silos_of
from dpsb_accounting.ledger import LedgerRecord
from dpsb_accounting.plan import Phase

_ASSUMPTIONS = (
    "The program that wrote each ledger did what its lines say, and every share of the noise is drawn in secret.",
    "The secure aggregation shows the server the sum and nothing else, whatever it does.",
    "Each aggregation opens the sum of one gradient step per party; nothing of the steps in between exists.",
    "A sum with fewer parties than clients - dropouts is never opened; the charges for it stay.",
    "What the parties send beside the sum (losses, counts, batch sizes) is nothing.",
)
_REAL_NUMBERS = (
    "The noisy vectors are added as they are. Rounding each of them for a sum of whole numbers is another mechanism, "
    "for which the plans must state integer noise."
)
_WHOLE_NUMBERS = (
    "Each party's sum is rounded to whole numbers, and its share of Skellam noise is added in whole numbers; the "
    "bound is that of Skellam noise, with sensitivity after rounding."
)


def secagg(
    parties: Sequence[Silo | LedgerRecord],
    *,
    local_steps: int,
    dropouts: int,
    colluders: int,
    clients: int | None = None,
    noise_of: str = "sum",
    silos_per_person: int = 1,
    delta: float | None = None,
) -> FederatedReport:
    r"""Reports a federation whose gradient sums are opened only in total, with every party's share of the noise.

    In each release the K parties' clipped sums and noise shares are added up. Against a server that is helped by k
    parties, with t parties missing, :math:`K - t - k` equal shares are left: the noise of the sum is
    :math:`\sigma\sqrt{(K-t-k)/K}`. Each party draws its own examples by Poisson sampling, so a record is sampled with
    its own silo's probability, and the federation's epsilon is the maximum over silos.

    Guarantees: noise that a dropped, colluding or tainted party may have added counts for nothing; phases other than
        "train" count with the smaller of the stated and the shared noise; several local steps between two
        aggregations are refused, because the second step shows the first one's result, which only one share protects.
        Integer (Skellam) noise has its own bound: that of the event `PoissonSkellam`, or, where plans with another
        event state it beside that event, one without amplification by sampling.

    Args:
        parties: All K of them, or all but some that were in no sum. Public.
        local_steps: Gradient steps between two aggregations; must be 1. Public.
        dropouts: t, how many parties may be missing in a sum that is opened. Public.
        colluders: k, at least 1. Public.
        clients: K, where ledgers of up to t parties are not there because these were in no sum. Public.
        noise_of: What the plans' noise multiplier stands for: "sum" (of all K shares, the default and always safe),
            "share" (each party's own) or "guaranteed" (what t and k lost shares leave).
        silos_per_person: How many parties may hold a record of one person, one each. Public.
        delta: Recompute all of them at this delta; left out, they must agree.

    Raises:
        ValueError: If nothing can be claimed, with the reason.

    References:
        Sums of Gaussian shares: Dong, Roth and Su (2022), arXiv:1905.02383. Skellam: Agarwal, Kairouz and Liu (2021),
        arXiv:2110.04995.

    Example:
        >>> step = PoissonGaussian(noise_multiplier=1, sampling_prob=0.01)
        >>> silos = [Silo(name=f"silo {i}", phases=(Phase("train", step, 1000),), delta=1e-5) for i in range(10)]
        >>> report = secagg(silos, local_steps=1, dropouts=3, colluders=2)
        >>> f"{report.epsilon.upper:.3f}"
        '4.48...'
    """
    silos = silos_of(parties)
    terms = common_terms(silos, "secagg", delta)
    if terms.unit == "client":
        raise ValueError("unit 'client' is accounted for by client_level, not by secagg")
    losses = Losses(clients=len(silos) if clients is None else clients, dropouts=dropouts, colluders=colluders)
    if not 0 <= losses.clients - len(silos) <= losses.dropouts:
        raise ValueError(
            f"clients={clients!r} must be {len(silos)}, the number of ledgers, or more by at most dropouts={dropouts!r}"
        )
    _check_stated(silos, losses, local_steps, noise_of)
    together = _checks.whole(at_least=1, silos_per_person=silos_per_person)
    if together > len(silos):
        raise ValueError(f"silos_per_person must be at most {len(silos)}, the number of silos, not {together!r}")
    whole = _check_kind(silos)
    if whole and not isinstance(silos[0].train.event, PoissonSkellam):
        return _integer(silos, terms, losses, noise_of, together)
    views = _views(silos, losses, noise_of)
    rows = tuple(row(silo, inside, terms) for silo, (inside, _, _) in zip(silos, views, strict=True))
    total = worst([entry.epsilon for entry in rows])
    if total is not None and together > 1:
        total = bound(person_parts([inside for inside, _, _ in views], together), terms)
    seen = f"the sum of at least {losses.clients - losses.dropouts} parties"
    alone = [own for *_, own in views]
    return FederatedReport(
        model="secagg",
        epsilon=total,
        per_silo=rows,
        parties=(
            Party(name=f"server with {losses.colluders} colluding", sees=f"{seen}, less their shares", epsilon=total),
            _party("outsiders", seen, [outside for _, outside, _ in views], terms, together),
            _bare(_worst_of(alone, terms), together),
        ),
        incomplete_rounds=incomplete_rounds(silos),
        statement=_statement(total, losses, together, terms) if total is not None else no_claim(rows),
        assumptions=(
            *_ASSUMPTIONS,
            _WHOLE_NUMBERS if whole else _REAL_NUMBERS,
            f"The noise multiplier in the plans is that of the {noise_of}.",
        ),
        terms=terms,
    )


def _check_kind(silos: Sequence[Silo]) -> bool:
    """Whether the noise is in whole numbers; refuses plans of which only some say so, or round differently."""
    events = [silo.train.event for silo in silos]
    kinds = {
        str(silo.stated.get("noise", "skellam" if isinstance(event, PoissonSkellam) else "gaussian"))
        for silo, event in zip(silos, events, strict=True)
    }
    if len(kinds) > 1 or not kinds <= {"gaussian", "skellam"}:
        named = ", ".join(sorted(map(repr, kinds)))
        raise ValueError(f"all silos must add the same kind of noise, 'gaussian' or 'skellam', not {named}")
    grids = {(event.clip_steps, event.dimension) if isinstance(event, PoissonSkellam) else None for event in events}
    if len(grids) > 1 or (kinds == {"gaussian"} and grids != {None}):
        raise ValueError("all silos must round a sum to the same whole numbers, and say that its noise is 'skellam'")
    return kinds == {"skellam"}


def _party(name: str, sees: str, schedules: Sequence[tuple[Phase, ...]], terms: Terms, together: int) -> Party:
    if together > 1:
        return Party(name=name, sees=sees, epsilon=bound_if_computable(person_parts(schedules, together), terms))
    return Party(name=name, sees=sees, epsilon=_worst_of(schedules, terms))


def _bare(epsilon: Bound | None, together: int) -> Party:
    """The server where the secure aggregation fails; a person in several silos has no bound here."""
    return Party(
        name="server, without secure aggregation",
        sees="each party's own result",
        epsilon=epsilon if together == 1 else None,
    )


def _worst_of(schedules: Sequence[tuple[Phase, ...]], terms: Terms) -> Bound | None:
    return worst([bound_if_computable(schedule, terms) for schedule in dict.fromkeys(schedules)])


def _check_stated(silos: Sequence[Silo], losses: Losses, local_steps: int, noise_of: str) -> None:
    if _checks.whole(at_least=1, local_steps=local_steps) > 1:
        raise ValueError(
            f"local_steps={local_steps!r} cannot be claimed under secure aggregation: what a party computes in its "
            "second step depends on its first one's result, which only its own share of the noise protects; "
            "aggregate every step, or account for it as silo_local with each party's own share"
        )
    first = silos[0]
    for silo in silos:
        silo.says("local_steps", local_steps)
        silo.says("clients", losses.clients)
        silo.says("dropouts", losses.dropouts)
        silo.says("noise_of", noise_of)
        if noise_of == "guaranteed":
            silo.says("colluders", losses.colluders)
        ours = [(phase.name, phase.count) for phase in first.phases]
        theirs = [(phase.name, phase.count) for phase in silo.phases]
        if ours != theirs:
            raise ValueError(
                f"silos {first.name!r} and {silo.name!r} plan different releases, {ours!r} and {theirs!r}; "
                "a sum needs every party's share in every release"
            )
        if len(ours) > 1 and silo.l2_clip_norm != first.l2_clip_norm:
            raise ValueError(
                f"silos {first.name!r} and {silo.name!r} clip to different norms, {first.l2_clip_norm!r} and "
                f"{silo.l2_clip_norm!r}; with phases beside 'train' all norms must be equal, since plans "
                "tell only that of 'train'"
            )


_View = tuple[tuple[Phase, ...], tuple[Phase, ...], tuple[Phase, ...]]


def _views(silos: Sequence[Silo], losses: Losses, noise_of: str) -> list[_View]:
    """Per silo, its schedule as a colluding server, an outsider, and a server without secure aggregation see it."""
    views: list[list[tuple[Phase, ...]]] = [[(), (), ()] for _ in silos]
    for index, name in enumerate(phase.name for phase in silos[0].phases):
        if any(isinstance(silo.phases[index].event, NonPrivate) for silo in silos):
            factors = [(1.0, 1.0, 1.0)] * len(silos)
        else:
            factors = share_factors(silos, losses, noise_of, name)
        for i, silo in enumerate(silos):
            for view, factor in enumerate(factors[i]):
                # Whether another phase was summed or released alone is not known: the smaller noise holds for both.
                used = factor if name == "train" else min(1.0, factor)
                views[i][view] = (*views[i][view], scaled(silo.phases[index], used))
    return [(view[0], view[1], view[2]) for view in views]


def _integer(silos: Sequence[Silo], terms: Terms, losses: Losses, noise_of: str, together: int) -> FederatedReport:
    """The report for integer noise: Skellam shares, sensitivity after rounding, no amplification."""
    first = silos[0]
    scale, dimension = _fact(first, "scale"), _fact(first, "dimension")
    for silo in silos:
        silo.says("scale", scale)
        silo.says("dimension", dimension)
    shares = [_fact(silo, "share_variance") for silo in silos]
    views = _views(silos, losses, noise_of)
    bounds, alone = [], []
    for i, silo in enumerate(silos):
        others = sorted(share for j, share in enumerate(shares) if j != i and not silos[j].taints)
        tainted = len(silos) - 1 - len(others)
        kept = others[: max(0, losses.honest - 1 - tainted)]
        inside, _, own = views[i]
        found = None if silo.taints else _skellam(silo, inside, shares[i] + math.fsum(kept), terms, together)
        bounds.append(found)
        alone.append(_skellam(silo, own, shares[i], terms, 1))
    rows = tuple(row_of(silo, found) for silo, found in zip(silos, bounds, strict=True))
    total = worst([entry.epsilon for entry in rows])
    helped = f"server with {losses.colluders} colluding"
    return FederatedReport(
        model="secagg",
        epsilon=total,
        per_silo=rows,
        parties=(
            Party(name=helped, sees="the integer sum, less their shares", epsilon=total),
            _bare(worst(alone), together),
        ),
        incomplete_rounds=incomplete_rounds(silos),
        statement=_statement(total, losses, together, terms) if total is not None else no_claim(rows),
        assumptions=(
            *_ASSUMPTIONS,
            "The noise is Skellam on whole numbers; no amplification by sampling is claimed for it.",
        ),
        terms=terms,
    )


def _skellam(silo: Silo, schedule: Sequence[Phase], variance: float, terms: Terms, together: int) -> Bound:
    method = "skellam rdp, sensitivity after rounding, no amplification"
    if any(isinstance(phase.event, NonPrivate) for phase in schedule):
        return make_bound(math.inf, math.inf, terms, "non-private release")
    once = skellam.sensitivity_after_rounding(
        l2_clip_norm=silo.l2_clip_norm,
        scale=_fact(silo, "scale"),
        dimension=_checks.whole(at_least=1, dimension=_fact(silo, "dimension")),
        neighboring=terms.neighboring,
    )
    # Each of a person's silos rounds by itself, so that the differences add up.
    found = skellam.Sensitivity(l1=together * once.l1, l2_squared=together**2 * once.l2_squared)
    move = (2 if terms.neighboring == "replace_one" else 1) * together
    gaussians = [
        (phase.event.noise_multiplier / move, phase.count)
        for phase in schedule
        if phase.name != "train" and isinstance(phase.event, (Gaussian, PoissonGaussian))
    ]
    upper = skellam.epsilon(
        variance=variance, sensitivity=found, count=silo.train.count, delta=terms.delta, gaussians=gaussians
    )
    return make_bound(0.0, upper, terms, method)


def _fact(silo: Silo, fact: str) -> float:
    """A positive number that the silo states of its integer noise."""
    if silo.stated.get(fact) is None:
        raise ValueError(f"silo {silo.name!r} states integer noise but no {fact!r}")
    named: dict[str, object] = {fact: silo.stated[fact]}
    return _checks.positive(infinite=False, **named)


def _statement(total: Bound, losses: Losses, together: int, terms: Terms) -> str:
    person = terms.unit if together == 1 else f"person with one {terms.unit} in up to {together} silos"
    return (
        f"What the sums show is {guarantee(total, person)}, against a server that is helped by up to "
        f"{losses.colluders} of the {losses.clients} parties, for whoever is not among these, with up to "
        f"{losses.dropouts} parties missing. This rests on the secure aggregation."
    )
