"""Checks of everything else that touched the data: the basis, other runs, people with many records, clients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from dpsb_accounting import accountant
from dpsb_accounting.claims import recompute
from dpsb_accounting.claims.claim import Claim
from dpsb_accounting.claims.context import Subject, covers, fatal, riskiest, uncharged
from dpsb_accounting.claims.findings import Finding, Range
from dpsb_accounting.engines import ResourceLimit
from dpsb_accounting.events import Event, PoissonGaussian


def check_basis(subject: Subject) -> Iterator[Finding]:
    """Where the initial factors come from, and whether that is in epsilon."""
    claim = subject.claim
    if claim.basis == "private_raw" or (claim.basis == "private_release" and claim.basis_noise_multiplier == 0):
        text = "The basis was computed from raw private records: what it says about them has no bound."
        yield fatal("basis-from-private-data", text, claim)
    elif claim.basis == "private_release" and not claim.basis_charged:
        setting, basis = subject.charged, recompute.basis_event(claim)
        found = None if setting is None or basis is None else recompute.attempt(replace(setting, basis=basis))
        said = "is not charged" if claim.basis_charged is False else "is not said to be charged"
        yield uncharged("basis-not-charged", f"The noisy release that made the basis {said}.", claim, found)
    elif claim.basis == "private_release" and claim.basis_noise_multiplier is None:
        text = "basis_noise_multiplier is not stated: what the charged release of the basis costs cannot be checked."
        yield Finding(id="missing-fact", severity="warning", message=text)
    if claim.basis_computed_by == "server_on_pooled_data" and claim.basis not in ("none", "data_free", "public"):
        yield fatal("federated-data-pooled", "The server computed the basis on the clients' pooled raw data.", claim)


def check_runs(subject: Subject) -> Iterator[Finding]:
    """Other training runs and choices on the same data, metrics without noise, and how the run ended."""
    claim, setting = subject.claim, subject.charged
    runs = claim.tuning_runs or 1
    if runs > 1 and not claim.tuning_charged:
        found = None if setting is None else recompute.attempt(replace(setting, runs=runs))
        text = f"{runs} runs were made on these data and one is charged."
        finding = uncharged("tuning-not-charged", text, claim, found)
        drawn = _random_number(subject, runs)
        if drawn is not None:
            text = (
                f"{finding.message} (Had their number been drawn at random beforehand, geometrically with mean {runs}, "
                f"the best of them would cost {drawn:.4g}: Papernot and Steinke.)"
            )
            finding = replace(finding, message=text, evidence={"epsilon_random_number_of_runs": drawn})
        yield finding
    if claim.model_selection == "training_data":
        text = "Settings or checkpoints were chosen by looking at the training data, which is not in epsilon."
        yield Finding(id="selection-on-private-data", severity="error", message=text, claimed=claim.epsilon)
    elif claim.model_selection == "held_out_private":
        text = "Settings or checkpoints were chosen on other private people, of whom the claim says nothing."
        yield Finding(id="selection-on-held-out", severity="warning", message=text)
    if claim.raw_metrics == "released":
        text = "Training metrics without noise were handed out; together with them there is no finite epsilon."
        yield fatal("raw-metrics-released", text, claim)
    planned = recompute.planned_of(claim)
    if claim.stopped == "data_dependent":
        longer = setting is not None and planned is not None and planned > setting.steps
        found = recompute.attempt(replace(setting, steps=planned)) if longer and setting and planned else None
        if longer or planned is None:
            text = "The data decided when to stop."
            if planned is not None:
                text = f"The data stopped the run; {planned} steps were planned and count."
            yield uncharged("stopped-by-data", text, claim, found)


def _random_number(subject: Subject, runs: int) -> float | None:
    if subject.charged is None or subject.charged.runs > 1:
        return None
    try:
        found = recompute.random_runs_epsilon(subject.charged, float(runs))
    except (ResourceLimit, ValueError, ArithmeticError):
        return None
    return found if math.isfinite(found) else None


def check_unit(subject: Subject) -> Iterator[Finding]:
    """Whether epsilon is that of all records that a protected unit has."""
    claim, records = subject.claim, subject.claim.examples_per_unit or 1
    if records == 1 or claim.unit not in ("user", "client") or claim.group_charged:
        return
    setting = subject.charged
    found = None
    if setting is not None:
        found = recompute.attempt(replace(setting, per_unit=records, records=records))
    text = f"The unit is a {claim.unit} with up to {records} examples, but epsilon is that of one example."
    yield uncharged("unit-mismatch", text, claim, found)


def check_rounds(subject: Subject) -> Iterator[Finding]:
    """Whether all rounds are charged."""
    claim, setting = subject.claim, subject.charged
    if claim.rounds is None or claim.rounds_charged is None or claim.rounds <= claim.rounds_charged:
        return
    steps = recompute.steps_of(claim)
    found = None if setting is None or steps is None else recompute.attempt(replace(setting, steps=steps))
    text = f"{claim.rounds} rounds were run and {claim.rounds_charged} are charged."
    yield uncharged("rounds-not-charged", text, claim, found)


def check_clients(claim: Claim, clients: tuple[Subject, ...]) -> Iterator[Finding]:
    """Whether the claim holds for every client: one delta, the maximum, and people in several clients."""
    if not clients:
        return
    yield from _deltas(claim)
    worst, name, complete = largest_client(claim, clients)
    which = claim.reported_client
    if which is not None and which != "maximum" and not (which == name and covers(claim.epsilon, worst)):
        shown = f"the {which} client" if which in ("last", "first") else f"client {which!r}"
        text = f"Only the epsilon of {shown} is reported, of {len(claim.clients)}."
        kind = "last-client-only"
        if which == "mean":
            kind, text = "clients-averaged", f"The epsilons of {len(claim.clients)} clients were averaged."
        yield _client_finding(kind, text, claim, worst, name)
    elif worst is not None and not covers(claim.epsilon, worst):
        text = f"Client {name!r} spends epsilon {worst} at the claimed delta {worst.delta:.4g}."
        yield Finding(id="client-above-claim", severity="error", message=text, claimed=claim.epsilon, recomputed=worst)
    elif which is None and claim.epsilon is not None and any(_above(claim, client.epsilon) for client in claim.clients):
        text = "A client states a larger epsilon than the claim."
        yield Finding(id="client-above-claim", severity="error", message=text, claimed=claim.epsilon)
    if not complete:
        text = "Not every client's epsilon could be recomputed, or only the riskiest ones were."
        yield Finding(id="not-recomputable", severity="warning", message=text)
    if (claim.silos_per_person or 1) > 1:
        found = _several_silos(claim)
        text = f"A person may be in {claim.silos_per_person} clients, whose losses add up."
        yield uncharged("person-in-several-silos", text, claim, found)


def _above(claim: Claim, stated: float | None) -> bool:
    return stated is not None and claim.epsilon is not None and stated > claim.epsilon * (1 + 1e-6)


def _deltas(claim: Claim) -> Iterator[Finding]:
    stated = [client.delta for client in claim.clients if client.delta is not None]
    stated += [] if claim.delta is None else [claim.delta]
    if stated and not math.isclose(min(stated), max(stated), rel_tol=1e-3):
        text = f"Deltas from {min(stated):.4g} to {max(stated):.4g} are mixed; epsilon must be stated at one of them."
        yield Finding(id="client-deltas-mixed", severity="error", message=text, claimed=claim.delta)


def _client_finding(kind: str, text: str, claim: Claim, worst: Range | None, name: str) -> Finding:
    """Always an error: even a number that happens to cover was not shown to."""
    if worst is not None:
        text += f" The largest is that of client {name!r}: {worst} at the claimed delta {worst.delta:.4g}."
    stated = [client.epsilon for client in claim.clients if client.epsilon is not None]
    evidence = {"largest_stated_epsilon": max(stated)} if stated else {}
    return Finding(id=kind, severity="error", message=text, claimed=claim.epsilon, recomputed=worst, evidence=evidence)


def largest_client(claim: Claim, clients: tuple[Subject, ...]) -> tuple[Range | None, str, bool]:
    """The largest epsilon of a client at the delta of the claim, whose it is, and whether all were computed."""
    chosen, left_out = riskiest(clients)
    best, name, complete = None, "", not left_out
    for subject in chosen:
        if subject.charged is None:
            continue
        setting = replace(subject.charged, delta=claim.delta) if claim.delta else subject.charged
        found = recompute.attempt(setting)
        if found is None:
            complete = False
        elif best is None or found.upper > best.upper:
            best, name = found, subject.name
    return best, name, complete


def _several_silos(claim: Claim) -> Range | None:
    """Epsilon of the k riskiest clients composed, Poisson sampling; each client counts once, twins included."""
    count = min(claim.silos_per_person or 1, len(claim.clients))
    settings = [recompute.as_charged(claim.of_client(client)) for client in claim.clients]
    known = [setting for setting in settings if setting is not None]
    if len(known) < len(settings) or any(s.per_unit > 1 or s.basis or s.runs > 1 for s in known) or not claim.delta:
        return None
    parts: list[tuple[Event, int]] = [
        (PoissonGaussian(noise_multiplier=setting.noise_multiplier, sampling_prob=setting.sampling_prob), setting.steps)
        for setting in known
    ]
    if count < len(parts) and len(set(parts)) > 1:
        return None  # which k are worst is not obvious, and trying all may take for ever
    try:
        found = accountant.epsilon(parts[:count], claim.delta, known[0].neighboring)
    except ResourceLimit:
        return None
    return Range(found.lower, found.upper, claim.delta, known[0].neighboring, found.method)
