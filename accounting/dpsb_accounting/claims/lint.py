"""Linting: all checks over a claim, and the bounds on epsilon that hold with everything taken into account."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from dpsb_accounting.claims import checks_data, checks_mechanism, checks_numbers, recompute
from dpsb_accounting.claims.catalog import CATALOG
from dpsb_accounting.claims.claim import Claim
from dpsb_accounting.claims.context import Check, Subject, riskiest, subjects
from dpsb_accounting.claims.findings import SEVERITIES, Finding, Range

_OF_EACH: tuple[Check, ...] = (  # for each client, if there are any
    checks_numbers.check_epsilon,
    checks_numbers.check_rate,
    checks_numbers.check_steps,
)
_OF_ALL: tuple[Check, ...] = (  # with the numbers of the riskiest client, if there are any
    checks_numbers.check_delta_changed,
    checks_numbers.check_accountant,
    checks_mechanism.check_sampler,
    checks_mechanism.check_draws,
    checks_mechanism.check_clipping,
    checks_mechanism.check_noise_added,
    checks_data.check_unit,
    checks_data.check_rounds,
    checks_data.check_basis,
    checks_data.check_runs,
)
_NO_BOUND = frozenset(
    {
        "divisor-drawn-size",
        "empty-batches",
        "noise-per-microbatch",
        "selection-on-private-data",
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lint:
    """The outcome of `lint`.

    Args:
        claim: The claim that was checked.
        findings: What was found, the gravest first.
        recomputed: Bounds on epsilon with every fault of the claim taken into account; None where facts are missing
            or no bound is known.
    """

    claim: Claim
    findings: tuple[Finding, ...]
    recomputed: Range | None

    @property
    def ok(self) -> bool:
        """Whether no finding is an error."""
        return not any(finding.severity == "error" for finding in self.findings)

    def strict(self) -> Lint:
        """Returns the outcome with every warning as an error."""
        turned = tuple(
            replace(finding, severity="error") if finding.severity == "warning" else finding
            for finding in self.findings
        )
        return replace(self, findings=turned)

    def to_json(self) -> dict[str, object]:
        """Returns the outcome as a JSON object."""
        return {
            "ok": self.ok,
            "title": self.claim.title,
            "claimed": {"epsilon": _number(self.claim.epsilon), "delta": self.claim.delta},
            "recomputed": None if self.recomputed is None else self.recomputed.to_json(),
            "findings": [finding.to_json() for finding in self.findings],
        }


def lint(claim: Claim) -> Lint:
    """Recomputes a claim and lists what is wrong with it, what cannot be confirmed, and what is missing.

    Guarantees: every number in a finding is a rigorous bound, or says that it is not; a fault for which no bound is
        known never ends in a smaller number; a claim without an error is not thereby proved, since a claim can hide
        what it does not say.

    Args:
        claim: The claim, as `read_claim` returns it.

    Returns:
        The findings, the gravest first, and the bounds with all faults taken together.

    Example:
        >>> outcome = lint(Claim(epsilon=0.2, delta=1e-5, noise_multiplier=1, sampling_prob=0.01, steps=1000,
        ...     num_examples=10000, sampler="poisson"))
        >>> outcome.ok, outcome.findings[0].id, f"{outcome.recomputed.upper:.2f}"
        (False, 'epsilon-understated', '1.83')
    """
    whole, *clients = subjects(claim)
    found = list(_findings(claim, whole, tuple(clients)))
    order = {severity: index for index, severity in enumerate(SEVERITIES)}
    kinds = {kind: index for index, kind in enumerate(CATALOG)}
    found.sort(key=lambda finding: (order[finding.severity], kinds[finding.id]))
    return Lint(claim=claim, findings=tuple(found), recomputed=_everything(claim, tuple(clients), found))


def _findings(claim: Claim, whole: Subject, clients: tuple[Subject, ...]) -> Iterator[Finding]:
    yield from checks_numbers.check_stated(claim)
    yield from checks_numbers.check_missing(claim)
    yield from checks_numbers.check_noise(claim)
    chosen = _chosen(clients)
    # What a federated claim states for all of its clients together is no run of its own.
    overall = Subject("", claim, None) if clients else whole
    for subject in (overall, *chosen):
        yield from checks_numbers.check_delta(subject)
    for each in _OF_EACH:
        for subject in chosen or [whole]:
            yield from each(subject)
    typical = Subject("", claim, chosen[0].charged) if chosen else whole
    for check in _OF_ALL:
        yield from check(typical)
    yield from checks_data.check_clients(claim, clients)


def _chosen(clients: tuple[Subject, ...]) -> list[Subject]:
    """The riskiest clients, and the one with the largest delta for its number of records."""
    chosen, _ = riskiest(clients)
    weak = max(clients, key=lambda s: (s.claim.delta or 0) * (s.claim.num_examples or 0), default=None)
    return [*chosen, *([weak] if weak is not None and weak not in chosen else [])]


def _everything(claim: Claim, clients: tuple[Subject, ...], found: list[Finding]) -> Range | None:
    """The bounds with all faults together; infinite if one alone leaves no guarantee."""
    for finding in found:
        if finding.recomputed is not None and finding.recomputed.upper == math.inf and finding.severity == "error":
            return finding.recomputed
        if finding.id in _NO_BOUND:
            return None
    if recompute.noise_of(claim) == 0:
        return Range(math.inf, math.inf, claim.delta or 0.0, claim.neighboring or "add_or_remove_one", "no noise")
    if claim.basis == "private_release" and recompute.basis_event(claim) is None:
        return None  # what it costs is not known, charged or not
    unknown = [f for f in found if f.severity == "error" and f.recomputed is None and f.id in _COSTS]
    if unknown or (claim.silos_per_person or 1) > 1:
        return None
    chosen, left_out = riskiest(clients)
    if not clients:
        return _assuming(claim, recompute.attempt(_worst_reading(claim, found)))
    ranges = []
    for subject in chosen:
        own = replace(subject.claim, delta=claim.delta) if claim.delta else subject.claim
        ranges.append(recompute.attempt(_worst_reading(own, found)))
    known = [entry for entry in ranges if entry is not None]
    if left_out or not known or len(known) < len(ranges):
        return None
    return _assuming(claim, max(known, key=lambda entry: entry.upper))


def _assuming(claim: Claim, found: Range | None) -> Range | None:
    """Says what the bounds rest on where the claim does not say it."""
    if found is None or claim.sampler in recompute.SAMPLERS:
        return found
    return replace(found, method=f"{found.method}; only if batches are Poisson samples, which is not stated")


_COSTS = frozenset(
    {
        "basis-not-charged",
        "tuning-not-charged",
        "stopped-by-data",
        "unit-mismatch",
        "rounds-not-charged",
        "microbatches-summed",
        "poisson-batches-capped",
        "clipped-per-microbatch",
        "noise-multiplier-mismatch",
    }
)


def _worst_reading(claim: Claim, found: list[Finding]) -> recompute.Setting | None:
    """The run as described; where stated facts contradict each other, the reading that costs more."""
    setting = recompute.as_run(claim)
    if setting is None:
        return None
    kinds = {finding.id for finding in found}
    if claim.noise_std is not None and claim.l2_clip_norm is not None and claim.noise_multiplier is not None:
        ratio = min(claim.noise_multiplier, claim.noise_std / claim.l2_clip_norm) / claim.noise_multiplier
        setting = replace(setting, noise_multiplier=setting.noise_multiplier * ratio)
    wrong_rate = kinds & {"sampling-prob-too-small", "sampling-prob-from-batches"}
    if wrong_rate and claim.batch_size is not None and claim.num_examples is not None:
        true = min(1.0, claim.batch_size / claim.num_examples)
        setting = replace(setting, sampling_prob=max(true, setting.sampling_prob))
    if kinds & {"steps-too-few", "steps-one-short", "sampling-prob-of-other-steps"} and claim.epochs is not None:
        wanted = math.ceil(claim.epochs / setting.sampling_prob - 1e-6)
        setting = replace(setting, steps=max(setting.steps, wanted))
    return setting


def _number(value: float | None) -> float | str | None:
    return "inf" if value == math.inf else value
