"""Checks of the mechanism: how batches are drawn, what is clipped, and what is added to the sum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from dpsb_accounting.claims import recompute
from dpsb_accounting.claims.claim import Claim
from dpsb_accounting.claims.context import Subject, covers, fatal, uncharged
from dpsb_accounting.claims.findings import Finding, Range

_SAMPLERS = {
    "shuffle": ("shuffled-as-poisson", "The batches are those of a shuffled loader, not Poisson samples."),
    "fixed_order": ("fixed-order-as-poisson", "The batches come in a fixed order, not as Poisson samples."),
    "without_replacement": ("fixed-size-as-poisson", "The batches have a fixed size; they are not Poisson samples."),
}


def check_sampler(subject: Subject) -> Iterator[Finding]:
    """Says what batches that are not Poisson samples certainly leak, and what bound does hold for them."""
    claim = subject.claim
    if claim.sampler not in _SAMPLERS:
        return
    name, text = _SAMPLERS[claim.sampler]
    setting = subject.charged
    found = None if setting is None else recompute.attempt(replace(setting, sampler=claim.sampler))
    if found is not None and setting is not None and not covers(claim.epsilon, found):
        poisson = recompute.attempt(setting)
        evidence = {} if poisson is None else {"epsilon_if_poisson": poisson.upper}
        text += _compared(claim, found, poisson)
        yield Finding(
            id=name, severity="error", message=text, claimed=claim.epsilon, recomputed=found, evidence=evidence
        )
    elif found is None:
        yield uncharged(name, text, claim, None, "Poisson accounting does not hold for them.")
    if claim.neighboring == "add_or_remove_one":
        text = f"add_or_remove_one has no meaning for sampler {claim.sampler!r}; bounds are given for zero_out."
        yield Finding(id="relation-without-meaning", severity="warning", message=text)


def _compared(claim: Claim, found: Range, poisson: Range | None) -> str:
    text = "" if poisson is None else f" Poisson accounting says {poisson.upper:.4g};"
    text += f" the run certainly leaks {found.lower:.4g}" if found.lower else " no lower bound is known"
    text += f" and at most {found.upper:.4g} is proved ({found.neighboring})."
    if claim.epsilon is not None and claim.epsilon < found.lower:
        text += f" The claimed {claim.epsilon:.4g} is wrong by at least {found.lower - claim.epsilon:.4g}."
    else:
        text += " The claimed epsilon has no proof."
    return text


def check_draws(subject: Subject) -> Iterator[Finding]:
    """Capped batches, micro-batches with draws of their own, and empty draws."""
    claim, setting = subject.claim, subject.charged
    if claim.sampler in (None, "poisson", "unknown"):
        if claim.max_batch_size is not None:
            capped = None if setting is None else replace(setting, max_batch_size=claim.max_batch_size)
            found = recompute.attempt(capped)
            if not covers(claim.epsilon, found):
                text = f"Poisson batches were cut to {claim.max_batch_size} records."
                yield uncharged("poisson-batches-capped", text, claim, found)
        draws = claim.microbatches_drawn or 1
        if draws > 1:
            changed = None if setting is None else replace(setting, per_unit=setting.per_unit * draws)
            text = f"Each step sums {draws} micro-batches with a draw of their own."
            yield uncharged("microbatches-summed", text, claim, recompute.attempt(changed))
    if claim.empty_batches in ("skipped", "invented_example"):
        words = "skipped" if claim.empty_batches == "skipped" else "replaced by an invented example"
        text = f"Empty draws are {words}, so the mechanism is not the one that was accounted for."
        yield Finding(id="empty-batches", severity="error", message=text, claimed=claim.epsilon)
    elif claim.empty_batches == "unhandled":
        text = "Empty draws are not handled; they fail or give NaN."
        setting = subject.charged
        if setting is not None and setting.num_examples is not None and setting.sampling_prob < 1:
            chance = min(1.0, setting.steps * (1 - setting.sampling_prob) ** setting.num_examples)
            text += f" One occurs in the run with probability at most {chance:.2g}."
        yield Finding(id="empty-batches-unhandled", severity="warning", message=text)


def check_clipping(subject: Subject) -> Iterator[Finding]:
    """What is clipped, and whether a unit's contribution is bounded by it at all."""
    claim = subject.claim
    if claim.clipping in ("none", "whole_batch"):
        what = "Nothing is clipped" if claim.clipping == "none" else "Only the gradient of the whole batch is clipped"
        yield fatal("not-clipped", f"{what}: the contribution of a unit has no bound.", claim)
    if claim.clipping == "per_microbatch":
        setting = subject.charged
        halved = None if setting is None else replace(setting, noise_multiplier=setting.noise_multiplier / 2)
        text = "The gradients of micro-batches are clipped: one record can move the sum by twice the clip norm."
        yield uncharged("clipped-per-microbatch", text, claim, recompute.attempt(halved))
    if claim.loss in ("token_mean", "batch_coupled"):
        words = "a mean over all tokens of a batch" if claim.loss == "token_mean" else "coupled over the batch"
        text = f"The loss is {words}: removing a record changes the gradients of others before they are clipped."
        yield fatal("loss-couples-examples", text, claim)
    if claim.batch_norm:
        yield fatal("batch-statistics", "A layer uses statistics of the batch, which couple all its examples.", claim)
    if claim.trained is not None:
        yield from _parts(claim)


def _parts(claim: Claim) -> Iterator[Finding]:
    trained = claim.trained or ()
    if claim.clipped is None:
        if len(trained) > 1:
            text = f"clipped is not stated, but {', '.join(trained)} are trained: whether all are clipped is unknown."
            yield Finding(id="missing-fact", severity="warning", message=text)
    else:
        left = [part for part in trained if part not in claim.clipped and "whole_model" not in claim.clipped]
        if left:
            text = f"{', '.join(left)} trained on private data, but not clipped and noised."
            yield fatal("part-not-counted", text, claim)
    further = [part for part in trained if part != "adapter"]
    if "adapter" in trained and further:
        text = f"Besides the adapter, {', '.join(further)} is trained: counts of released numbers must include it."
        yield Finding(id="head-trained", severity="info", message=text)


def check_noise_added(subject: Subject) -> Iterator[Finding]:
    """How noise is made and added, and what the noisy sum is divided by."""
    claim = subject.claim
    if claim.noise_source == "seeded" or (claim.seed is not None and claim.noise_source != "operating_system"):
        seed = "" if claim.seed is None else f" {claim.seed}"
        text = f"Noise or draws come from the seed{seed}: whoever knows it can take the noise off."
        yield fatal("noise-seeded", text, claim)
    if claim.noise_source == "global_generator":
        text = "Noise comes from a framework's default generator, which is not cryptographic."
        yield Finding(id="generator-not-secure", severity="warning", message=text)
    if claim.noise_shared_between_clients:
        yield fatal("noise-shared", "Clients drew the same noise: the difference of two updates has none.", claim)
    if claim.noise_added == "none":
        yield fatal("no-noise", "No noise is added.", claim)
    if claim.noise_added == "per_microbatch":
        text = "Noise is added in every micro-batch, so the noise of a step's sum is not the one that is stated."
        yield Finding(id="noise-per-microbatch", severity="warning", message=text)
    if claim.divisor == "drawn_size":
        text = "The noisy sum is divided by the drawn batch size, which depends on the records."
        yield Finding(id="divisor-drawn-size", severity="error", message=text, claimed=claim.epsilon)
    if claim.divisor == "num_examples" and claim.neighboring != "zero_out" and claim.neighboring != "replace_one":
        text = "The divisor is made from the true number of records, which add_or_remove_one keeps secret."
        yield Finding(id="divisor-num-examples", severity="warning", message=text)
    for taint in claim.taints or ():
        yield fatal("run-tainted", f"The report says that the run is tainted by {taint!r}.", claim)
