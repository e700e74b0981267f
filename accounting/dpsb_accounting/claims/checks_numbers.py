"""Checks of the numbers: epsilon, delta, rate, steps, relation, accountant."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from dpsb_accounting.claims import recompute
from dpsb_accounting.claims.claim import Claim
from dpsb_accounting.claims.context import ROUNDING, Subject, covers, covers_exactly, uncharged
from dpsb_accounting.claims.findings import Finding, Range
from dpsb_accounting.claims.recompute import Setting

_DELTA_MATCH = 0.01


def check_stated(claim: Claim) -> Iterator[Finding]:
    """Whether there is a claim at all."""
    missing = [name for name in ("epsilon", "delta") if getattr(claim, name) is None]
    if missing:
        text = f"{' and '.join(missing)} not stated: nothing is claimed."
        yield Finding(id="not-a-claim", severity="error", message=text)
    if claim.epsilon == math.inf or claim.makes_claim is False:
        text = "The claimed epsilon is infinite." if claim.epsilon == math.inf else "The report makes no claim."
        yield Finding(id="no-guarantee", severity="error", message=text, claimed=claim.epsilon)
    if claim.delta == 0:
        text = "delta is 0, where Gaussian noise gives no finite epsilon."
        yield Finding(id="delta-zero", severity="error", message=text, claimed=0.0)


def check_missing(claim: Claim) -> Iterator[Finding]:
    """Names each fact that is not stated, and what cannot be checked without it."""
    client = claim.clients[0] if claim.clients else None
    for names, without in _NEEDED:
        if all(getattr(claim, name) is None and getattr(client, name, None) is None for name in names):
            text = f"{' or '.join(names)} is not stated: {without}."
            yield Finding(id="missing-fact", severity="warning", message=text)
    if claim.sampler == "unknown":
        text = "sampler is unknown: whether amplification by Poisson sampling holds cannot be checked."
        yield Finding(id="missing-fact", severity="warning", message=text)
    if claim.unit in ("user", "client") and claim.examples_per_unit is None:
        text = f"examples_per_unit is not stated: whether epsilon covers all that a {claim.unit} has cannot be checked."
        yield Finding(id="missing-fact", severity="warning", message=text)
    if claim.stopped == "data_dependent" and claim.planned_steps is None:
        text = "planned_steps is not stated, but the data decided when to stop: epsilon of the plan cannot be computed."
        yield Finding(id="missing-fact", severity="warning", message=text)


_NEEDED: tuple[tuple[tuple[str, ...], str], ...] = (
    (("noise_multiplier", "noise_std"), "epsilon cannot be recomputed"),
    (("num_examples",), "delta cannot be held against 1/n, nor the sampling probability against the batch size"),
    (("sampling_prob", "batch_size"), "epsilon cannot be recomputed"),
    (("steps", "epochs"), "epsilon cannot be recomputed"),
    (("sampler",), "whether amplification by Poisson sampling holds cannot be checked"),
    (("neighboring",), "epsilon under replace_one may be twice that under add_or_remove_one"),
    (("unit",), "what is protected, an example or a person with many, is unknown"),
    (("clipping",), "whether each unit's contribution is bounded cannot be checked"),
    (("noise_source", "seed"), "noise from a known seed would void everything"),
    (("basis",), "factors made from raw private data would make epsilon infinite"),
    (("trained",), "a part that is trained and not clipped would make epsilon infinite"),
    (("loss",), "a loss that couples examples would break the clip norm as sensitivity"),
    (("tuning_runs",), "other training runs on the same data would have to be charged"),
    (("raw_metrics",), "un-noised metrics that were published would be outside epsilon"),
)


def check_epsilon(subject: Subject) -> Iterator[Finding]:
    """Holds the claimed epsilon against the one of the stated noise, rate, steps and delta."""
    claim = subject.claim
    if claim.epsilon is None or claim.epsilon == math.inf or not claim.delta:
        return
    if recompute.noise_of(claim) == 0 or claim.sampler in ("shuffle", "fixed_order", "without_replacement"):
        return  # these have findings of their own
    found = recompute.attempt(subject.charged)
    if found is None:
        known = "no engine here gives an upper bound for these numbers" if subject.charged else "facts are missing"
        least = None if subject.charged is None else recompute.certain(subject.charged)
        if least is not None and claim.epsilon < least.lower:
            text = f"claimed{subject.of} {claim.epsilon:.6g}: the run certainly leaks {least.lower:.4g}."
            yield Finding(
                id="epsilon-understated", severity="error", message=text, claimed=claim.epsilon, recomputed=least
            )
            return
        text = f"epsilon{subject.of} could not be recomputed: {known}."
        yield Finding(id="not-recomputable", severity="warning", message=text, claimed=claim.epsilon)
        return
    name, severity, text = _judged(claim.epsilon, found)
    if name and (name != "epsilon-overstated" or not subject.name):
        yield Finding(
            id=name,
            severity=severity,
            message=f"claimed{subject.of} {claim.epsilon:.6g}: {text} (delta {found.delta:.4g}, {found.neighboring}).",
            claimed=claim.epsilon,
            recomputed=found,
        )


def _judged(claimed: float, found: Range) -> tuple[str, str, str]:
    short = found.upper - claimed
    if claimed > found.upper * 1.05 + 0.01:
        return "epsilon-overstated", "info", f"{found.upper:.4g} would hold"
    if covers_exactly(claimed, found):
        return "", "", ""
    if claimed >= found.upper * (1 - ROUNDING):
        return "epsilon-rounded-down", "warning", f"recomputed {found.upper:.6g}, more by {short:.2g}"
    if claimed < found.lower or found.upper - found.lower <= 0.01 * found.upper:
        return (
            "epsilon-understated",
            "error",
            f"recomputed {found}, more by {short:.4g} ({short / found.upper:.0%} of it)",
        )
    return "epsilon-not-confirmed", "warning", f"recomputed {found}"


def check_delta(subject: Subject) -> Iterator[Finding]:
    """Holds delta against 1/n, against 1/number of batches, and against the delta that the noise was chosen for."""
    claim = subject.claim
    if claim.delta and claim.num_examples is not None and claim.num_examples > 1:
        records, ratio = claim.num_examples, claim.delta * claim.num_examples
        if ratio >= 1:
            found, evidence = _at_smaller_delta(subject, records)
            text = f"delta{subject.of} = {claim.delta:.4g} is {ratio:.3g} / n with n = {records}."
            if found is not None:
                text += (
                    f" The same run has epsilon {evidence['epsilon_at_1_over_n']:.4g} at delta 1/n and "
                    f"{found.upper:.4g} at n^-1.1."
                )
            yield Finding(
                id="delta-too-large",
                severity="error",
                message=text,
                claimed=claim.delta,
                recomputed=found,
                evidence=evidence,
            )
        elif claim.delta > records**-1.1:
            text = f"delta{subject.of} = {claim.delta:.4g} is {ratio:.3g} / n, above n^-1.1 = {records**-1.1:.3g}."
            yield Finding(id="delta-near-one-over-n", severity="info", message=text, claimed=claim.delta)
    yield from _delta_of_batches(subject)


def _at_smaller_delta(subject: Subject, records: int) -> tuple[Range | None, dict[str, float]]:
    if subject.charged is None:
        return None, {}
    first = recompute.attempt(replace(subject.charged, delta=1 / records))
    second = recompute.attempt(replace(subject.charged, delta=records**-1.1))
    if first is None or second is None:
        return None, {}
    return second, {"epsilon_at_1_over_n": first.upper, "epsilon_at_n_to_minus_1.1": second.upper}


def _delta_of_batches(subject: Subject) -> Iterator[Finding]:
    claim, batches = subject.claim, recompute.batches_of(subject.claim)
    size = claim.batch_size
    if size is None and claim.num_examples is not None and claim.sampling_prob is not None:
        size = claim.num_examples * claim.sampling_prob
    if not claim.delta or batches is None or batches < 2 or (size is not None and size <= 1):
        return
    at = claim.delta
    for count in sorted({math.floor(batches), math.ceil(batches)}, key=lambda number: abs(at * number - 1)):
        if abs(claim.delta * count - 1) < _DELTA_MATCH:
            text = f"delta{subject.of} = {claim.delta:.4g} is 1 / {count}, the number of batches"
            text += ", not of records." if size is None else f": {size:.4g} times 1/n."
            yield Finding(id="delta-one-over-batches", severity="error", message=text, claimed=claim.delta)
            return


def check_delta_changed(subject: Subject) -> Iterator[Finding]:
    """Whether epsilon is stated at the delta for which the noise was chosen."""
    claim, calibrated = subject.claim, subject.claim.calibrated_delta
    if not calibrated or not claim.delta or math.isclose(claim.delta, calibrated, rel_tol=1e-3):
        return
    found = before = None
    if subject.charged is not None:
        found = recompute.attempt(replace(subject.charged, delta=claim.delta))
        before = recompute.attempt(replace(subject.charged, delta=calibrated))
    text = f"The noise was chosen at delta {calibrated:.4g}, the claim is at {claim.delta:.4g}."
    if before is not None:
        text += f" At the former, epsilon is {before.upper:.4g}."
    finding = uncharged("delta-changed", text, claim, found)
    # Even where the number holds at the claimed delta, the run did not keep to its target there.
    yield replace(finding, severity="warning") if finding.severity == "info" else finding


def check_noise(claim: Claim) -> Iterator[Finding]:
    """Whether noise multiplier, noise and clip norm agree, and whether there is noise."""
    stated, std, clip = claim.noise_multiplier, claim.noise_std, claim.l2_clip_norm
    if recompute.noise_of(claim) == 0 or std == 0:
        yield Finding(id="no-noise", severity="error", message="The noise is 0.", claimed=claim.epsilon)
    elif (
        stated is not None
        and std is not None
        and clip is not None
        and not math.isclose(stated, std / clip, rel_tol=ROUNDING)
    ):
        text = f"noise_std / l2_clip_norm = {std / clip:.4g}, but noise_multiplier = {stated:.4g}."
        found = None
        setting = recompute.as_charged(claim)
        if setting is not None:
            found = recompute.attempt(replace(setting, noise_multiplier=min(stated, std / clip)))
        yield uncharged("noise-multiplier-mismatch", text, claim, found)


def check_rate(subject: Subject) -> Iterator[Finding]:
    """Holds the stated rate against batch size / n, and against the number of batches."""
    claim = subject.claim
    if claim.sampling_prob is None or claim.batch_size is None or claim.num_examples is None:
        return
    stated, true = claim.sampling_prob, min(1.0, claim.batch_size / claim.num_examples)
    if _rounds_to(true, stated):
        return
    batches = claim.num_examples / claim.batch_size
    found = None if subject.charged is None else recompute.attempt(replace(subject.charged, sampling_prob=true))
    text = f"sampling_prob{subject.of} = {stated:.5g}, but batch_size / num_examples = {true:.5g}"
    if (stated < true and _rounds_to(1 / math.ceil(batches), stated)) or _rounds_to(
        1 / max(1, math.floor(batches)), stated
    ):
        text += f": it is 1 / {round(1 / stated)}, from the rounded number of batches"
        if stated > true:
            yield Finding(id="sampling-prob-from-batches", severity="info", message=text + ", on the safe side.")
        elif claim.sampler == "poisson" and claim.drop_last is not True:
            text += ". Right only if the sampler itself draws with it."
            yield Finding(
                id="sampling-prob-from-batches", severity="warning", message=text, claimed=stated, recomputed=found
            )
        else:
            yield uncharged("sampling-prob-from-batches", text + ".", claim, found)
    elif stated < true:
        yield uncharged("sampling-prob-too-small", text + ".", claim, found)


def check_steps(subject: Subject) -> Iterator[Finding]:
    """Holds steps, epochs and rate against each other."""
    claim, prob = subject.claim, recompute.sampling_prob_of(subject.claim)
    if claim.steps is None or claim.epochs is None or prob is None:
        return
    wanted, batches = claim.epochs / prob, recompute.batches_of(claim) or 1 / prob
    if claim.sampling_prob is None:
        wanted = claim.epochs * batches
    least = claim.epochs * math.floor(batches * (1 + 1e-9)) if claim.drop_last is not False else wanted
    least = min(least, round(wanted)) if batches >= 2 else wanted
    if not 0.8 <= claim.steps / wanted <= 1.25:
        pairs = ((prob, math.ceil(wanted)), (min(1.0, claim.epochs / claim.steps), claim.steps))
        text = (
            f"sampling_prob {prob:.5g} times {claim.steps} steps{subject.of} are {prob * claim.steps:.4g} epochs, not "
            f"{claim.epochs:g}: the rate belongs to another number of steps."
        )
        yield uncharged("sampling-prob-of-other-steps", text, claim, _worst(subject.charged, pairs))
    elif (
        claim.steps == int(claim.epochs / prob)
        and round(wanted) == claim.steps + 1
        and abs(wanted - round(wanted)) < 1e-6
    ):
        found = _worst(subject.charged, ((prob, claim.steps + 1),))
        text = f"steps{subject.of} = {claim.steps} = int(epochs / rate), one less than {claim.steps + 1}."
        enough = claim.epsilon is not None and found is not None and covers(claim.epsilon, found)
        severity = "warning" if enough else "error"
        yield Finding(id="steps-one-short", severity=severity, message=text, claimed=claim.steps, recomputed=found)
    elif claim.steps < math.floor(least - 1e-6):
        found = _worst(subject.charged, ((prob, math.ceil(wanted - 1e-6)),))
        text = f"steps{subject.of} = {claim.steps}, but {claim.epochs:g} epochs have {wanted:.6g}."
        yield uncharged("steps-too-few", text, claim, found)


def _worst(setting: Setting | None, pairs: tuple[tuple[float, int], ...]) -> Range | None:
    if setting is None:
        return None
    found = [recompute.attempt(replace(setting, sampling_prob=prob, steps=steps)) for prob, steps in pairs]
    known = [entry for entry in found if entry is not None]
    return max(known, key=lambda entry: entry.upper) if len(known) == len(pairs) else None


def _rounds_to(exact: float, stated: float) -> bool:
    """Whether `stated` is `exact` written with fewer digits, at least two."""
    if math.isclose(exact, stated, rel_tol=1e-6):
        return True
    mantissa = f"{stated:.15g}".partition("e")[0].replace(".", "").replace("-", "").lstrip("0")
    return float(f"{exact:.{max(2, len(mantissa))}g}") == stated


def check_accountant(subject: Subject) -> Iterator[Finding]:
    """Whether what computed epsilon is a bound under the stated relation."""
    claim = subject.claim
    found = recompute.attempt(subject.charged)
    if claim.accountant == "gdp_clt":
        text = "The accountant is a central-limit estimate, which is not a bound."
        yield uncharged("gdp-clt-as-bound", text, claim, found)
    if claim.neighboring != "replace_one" or subject.charged is None or claim.epsilon is None:
        return
    if claim.accountant in ("rdp", "moments"):
        text = "Rényi accounting under replace_one is known to take half the sensitivity."
        yield Finding(id="rdp-replace-one", severity="warning", message=text, claimed=claim.epsilon, recomputed=found)
    removed = recompute.attempt(replace(subject.charged, neighboring="add_or_remove_one"))
    if found is not None and removed is not None and not covers(claim.epsilon, found):
        near = abs(claim.epsilon - removed.upper) <= 0.15 * removed.upper
        # Rényi bounds lie above the tight one, by a tenth or so: hence the wide margin.
        if near:
            text = (
                f"The claimed {claim.epsilon:.4g} fits add_or_remove_one ({removed.upper:.4g}); the claim says "
                f"replace_one, where it is {found.upper:.4g}."
            )
            yield Finding(
                id="replace-one-factor-two",
                severity="error",
                message=text,
                claimed=claim.epsilon,
                recomputed=found,
                evidence={"epsilon_add_or_remove_one": removed.upper},
            )
