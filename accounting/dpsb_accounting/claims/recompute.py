"""Recomputation: the bounds on epsilon that hold for a run as a claim describes it, or with one fact changed."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

from dpsb_accounting import accountant
from dpsb_accounting.claims import shuffle, tails
from dpsb_accounting.claims.claim import Claim
from dpsb_accounting.claims.findings import Range
from dpsb_accounting.engines import ResourceLimit
from dpsb_accounting.events import (
    Composed,
    Event,
    Gaussian,
    NonPrivate,
    PoissonGaussian,
    RandomSelection,
    Repeated,
    SampledWithoutReplacementGaussian,
    TruncatedPoissonGaussian,
    UserMixture,
)

SAMPLERS = ("poisson", "shuffle", "fixed_order", "without_replacement")
_NEGLIGIBLE = 1e-18
_MOST_PARTICIPATIONS = 200
_NO_NOISE = 1e-50  # the least that an event can state
_LEAST_NOISE = 0.05  # below, probabilities underflow in the engines
_STEPS_SEEN = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A run in the numbers that decide its epsilon.

    Args:
        noise_multiplier: Noise standard deviation divided by the clip norm.
        sampling_prob: Of each record in each step; for batches that partition the data, batch / records.
        steps: Noisy steps of one run.
        sampler: One of `SAMPLERS`.
        batches_per_epoch: Records / batch size.
        epoch_steps: Steps in an epoch of batches that partition the data.
        delta: In (0, 1).
        neighboring: The relation.
        num_examples: Number of records, if known.
        max_batch_size: Cap of a Poisson batch, if any.
        per_unit: Records of one unit times micro-batches that are drawn independently.
        records: Records of one unit alone.
        basis: The release of a basis before training and how often, if any; None for none.
        runs: Training runs on the same records.
        reshuffled: Whether each epoch of shuffled batches has a new order.
    """

    noise_multiplier: float
    sampling_prob: float
    steps: int
    sampler: str
    batches_per_epoch: float
    epoch_steps: int
    delta: float
    neighboring: str
    num_examples: int | None = None
    max_batch_size: int | None = None
    per_unit: int = 1
    records: int = 1
    basis: tuple[Event, int] | None = None
    runs: int = 1
    reshuffled: bool = True


def sampling_prob_of(claim: Claim) -> float | None:
    """The rate of the sampler: as stated, else batch size / records."""
    if claim.sampling_prob is not None:
        return claim.sampling_prob
    if claim.batch_size is not None and claim.num_examples is not None:
        return min(1.0, claim.batch_size / claim.num_examples)
    return None


def batches_of(claim: Claim) -> float | None:
    """Records / batch size, as far as known."""
    if claim.batch_size is not None and claim.num_examples is not None:
        return max(1.0, claim.num_examples / claim.batch_size)
    if claim.sampling_prob is None:
        return None
    batches = 1 / claim.sampling_prob  # 1 / (1 / 93) is not 93
    return float(round(batches)) if abs(batches - round(batches)) < 1e-9 * batches else batches


def epoch_steps_of(claim: Claim, batches: float, steps: int) -> int:
    """Steps in an epoch: full batches, and a smaller last one unless it is dropped; the fewer where that is open."""
    least, most = max(1, math.floor(batches)), max(1, math.ceil(batches))
    if claim.drop_last is not None:
        return least if claim.drop_last else most
    in_epochs = claim.epochs is not None and steps <= math.ceil(claim.epochs) * most
    return most if steps % most == 0 or in_epochs else least


def steps_of(claim: Claim) -> int | None:
    """The noisy steps charged: as stated, else epochs times batches in an epoch, rounded up; then all rounds."""
    batches = batches_of(claim)
    if claim.steps is not None:
        steps = claim.steps
    elif claim.epochs is not None and batches is not None:
        # 1 / (1 / 235) is not 235 exactly: what is within rounding of a whole number is that number
        in_epoch = max(1, math.floor(batches)) if claim.drop_last else batches
        steps = max(1, math.ceil(claim.epochs * in_epoch * (1 - 1e-12) - 1e-9))
    else:
        return None
    if claim.rounds is not None and claim.rounds_charged is not None and claim.rounds > claim.rounds_charged:
        steps = math.ceil(steps * claim.rounds / claim.rounds_charged)
    return steps


def noise_of(claim: Claim) -> float | None:
    """Noise standard deviation divided by the clip norm."""
    if claim.noise_multiplier is not None:
        return claim.noise_multiplier
    if claim.noise_std is not None and claim.l2_clip_norm is not None:
        return claim.noise_std / claim.l2_clip_norm
    return None


def basis_event(claim: Claim) -> tuple[Event, int] | None:
    """The release that made the basis, with its count, where the claim gives its noise."""
    if not claim.basis_noise_multiplier:
        return None
    prob = claim.basis_sampling_prob or 1.0
    noise, count = min(claim.basis_noise_multiplier, 1 / _NO_NOISE), claim.basis_count or 1
    if noise < _NO_NOISE:
        return NonPrivate(reason="a basis with next to no noise"), count
    if prob < 1:
        return PoissonGaussian(noise_multiplier=noise, sampling_prob=prob), count
    return Gaussian(noise_multiplier=noise), count


def as_charged(claim: Claim) -> Setting | None:
    """The run as the claim accounts for it: Poisson sampling, and only what it says it charged; None if unknown."""
    noise, prob, steps, batches = noise_of(claim), sampling_prob_of(claim), steps_of(claim), batches_of(claim)
    if not noise or prob is None or steps is None or batches is None or not claim.delta:
        return None
    if claim.rounds is not None and claim.rounds_charged is not None and claim.rounds > claim.rounds_charged:
        steps = steps_of(replace(claim, rounds=None)) or steps
    grouped = claim.group_charged is True and claim.examples_per_unit is not None
    return Setting(
        noise_multiplier=noise,
        sampling_prob=prob,
        steps=steps,
        sampler="poisson",
        batches_per_epoch=batches,
        epoch_steps=epoch_steps_of(claim, batches, steps),
        delta=claim.delta,
        neighboring=claim.neighboring or "add_or_remove_one",
        num_examples=claim.num_examples,
        per_unit=(claim.examples_per_unit or 1) if grouped else 1,
        records=(claim.examples_per_unit or 1) if grouped else 1,
        basis=basis_event(claim) if claim.basis_charged else None,
        runs=(claim.tuning_runs or 1) if claim.tuning_charged else 1,
        reshuffled=claim.reshuffled is not False,
    )


def as_run(claim: Claim) -> Setting | None:
    """The run as the claim describes it, with everything that touched the data; None if unknown."""
    setting = as_charged(claim)
    if setting is None:
        return None
    records = (claim.examples_per_unit or 1) if claim.unit in ("user", "client") else 1
    steps = max(steps_of(claim) or setting.steps, planned_of(claim) or 0)
    noise = setting.noise_multiplier / 2 if claim.clipping == "per_microbatch" else setting.noise_multiplier
    return replace(
        setting,
        noise_multiplier=noise,
        steps=steps,
        sampler=claim.sampler if claim.sampler in SAMPLERS else "poisson",
        max_batch_size=claim.max_batch_size,
        records=records,
        per_unit=records * (claim.microbatches_drawn or 1),
        basis=basis_event(claim),
        runs=(claim.tuning_runs or 1),
    )


def planned_of(claim: Claim) -> int | None:
    """The planned steps of a run that the data stopped: a data-dependent stop is not covered by less."""
    return claim.planned_steps if claim.stopped == "data_dependent" else None


@functools.lru_cache(maxsize=256)
def bounds(setting: Setting) -> Range:
    """Returns rigorous bounds on epsilon of a setting.

    Guarantees: the upper bound holds for every run that the setting describes; the lower one is reached by some data.
        Where the relation makes no sense for the sampler (batches that partition the data have no add_or_remove_one),
        the bounds are for zero_out, and the range says so.

    Raises:
        ResourceLimit: If no bound can be computed; the message says why.
    """
    if setting.sampler in ("shuffle", "fixed_order"):
        return _partitioned(setting)
    if setting.noise_multiplier < _LEAST_NOISE:
        raise ResourceLimit(f"noise_multiplier={setting.noise_multiplier!r} is too little to compute with")
    step, relation, rest = _step(setting)
    parts = [*_basis(setting), (step, setting.steps * setting.runs)]
    found = accountant.epsilon(parts, setting.delta - rest, relation)
    lower, method = found.lower, found.method
    if setting.sampler == "without_replacement":
        lower = shuffle.fixed_size_lower_epsilon(
            noise_multiplier=setting.noise_multiplier,
            sampling_prob=setting.sampling_prob,
            steps=setting.steps * setting.runs,
            delta=setting.delta,
            neighboring=relation,
        )
        lower, method = max(lower, found.lower), f"{method}; lower bound by one sum"
    elif rest:
        lower = accountant.epsilon(parts, setting.delta, relation).lower
    return Range(min(lower, found.upper), found.upper, setting.delta, relation, method)


def _step(setting: Setting) -> tuple[Event, str, float]:
    """The event of one step, the relation that it has, and what of delta is set aside for what it leaves out."""
    noise, prob = setting.noise_multiplier, setting.sampling_prob
    several = setting.per_unit > 1
    if setting.sampler == "without_replacement" or setting.max_batch_size is not None:
        if setting.num_examples is None:
            raise ResourceLimit("batches of a fixed or bounded size need num_examples")
        if several:
            raise ResourceLimit("no bound is known here for several records of a unit in such batches")
        relation = _fixed_relation(setting)
        if setting.sampler == "without_replacement":
            size = min(setting.num_examples, max(1, math.ceil(prob * setting.num_examples - 1e-9)))
            event: Event = SampledWithoutReplacementGaussian(
                noise_multiplier=noise, batch_size=size, num_examples=setting.num_examples
            )
            return event, relation, 0.0
        event = TruncatedPoissonGaussian(
            noise_multiplier=noise,
            sampling_prob=prob,
            max_batch_size=setting.max_batch_size or 1,
            num_examples=setting.num_examples,
        )
        return event, relation, 0.0
    if several and prob < 1:
        event, rest = _mixture(setting)
        return event, setting.neighboring, rest
    event = PoissonGaussian(noise_multiplier=noise / setting.per_unit, sampling_prob=prob)
    return event, setting.neighboring, 0.0


def _mixture(setting: Setting) -> tuple[Event, float]:
    """One unit takes part Binomial(k, q) times; more often than is ever seen is left out, at a price in delta."""
    from scipy.stats import binom

    most, prob = setting.per_unit, setting.sampling_prob
    high = min(most, int(binom.isf(_NEGLIGIBLE, most, prob)) + 1)
    if high > _MOST_PARTICIPATIONS:
        raise ResourceLimit(f"a unit that takes part up to {high} times in a step is too much to compute")
    rest = float(binom.sf(high, most, prob)) * setting.steps * setting.runs
    if rest > 0.01 * setting.delta:
        raise ResourceLimit(f"delta={setting.delta!r} is too small for {setting.steps} steps of several records")
    probs = [float(binom.pmf(number, most, prob)) for number in range(high)]
    probs.append(max(0.0, 1 - math.fsum(probs)))
    event = UserMixture(
        noise_multiplier=setting.noise_multiplier,
        sensitivities=tuple(float(number) for number in range(high + 1)),
        probabilities=tuple(probs),
    )
    return event, rest


def random_runs_epsilon(setting: Setting, mean: float) -> float:
    """Returns an upper bound for the best of a geometric number of runs with this mean, drawn before any of them.

    References:
        Papernot and Steinke (2022), arXiv:2110.03620, Theorem 2.
    """
    step, relation, rest = _step(setting)
    run = Composed(events=(*(Repeated(event=e, count=n) for e, n in [*_basis(setting), (step, setting.steps)]),))
    selection = RandomSelection(event=run, mean_runs=mean, shape=1.0)
    return accountant.epsilon([(selection, 1)], setting.delta - rest, relation).upper


def _partitioned(setting: Setting) -> Range:
    relation = _fixed_relation(setting)
    often = shuffle.participations(setting.steps, setting.epoch_steps)
    noise = setting.noise_multiplier / setting.records
    event = Gaussian(noise_multiplier=noise)
    found = accountant.epsilon([*_basis(setting), (event, often * setting.runs)], setting.delta, relation)
    if setting.sampler == "fixed_order":
        return Range(found.lower, found.upper, setting.delta, relation, f"fixed order, {found.method}")
    lower = shuffle.lower_epsilon(
        noise_multiplier=setting.noise_multiplier,
        steps=setting.steps,
        batches_per_epoch=setting.batches_per_epoch,
        delta=setting.delta,
        neighboring=relation,
        reshuffled=setting.reshuffled,
        runs=setting.runs,
    )
    method = f"one Gaussian an epoch, {often * setting.runs} in all; lower bound by the largest coordinate"
    return Range(min(lower, found.upper), found.upper, setting.delta, relation, method)


def _fixed_relation(setting: Setting) -> str:
    return "replace_one" if setting.neighboring == "replace_one" else "zero_out"


def _basis(setting: Setting) -> list[tuple[Event, int]]:
    if setting.basis is None:
        return []
    event, count = setting.basis
    if setting.records == 1:
        return [(event, count)]
    return [(Gaussian(noise_multiplier=_one_gaussian(event) / setting.records), count)]


def _one_gaussian(event: Event) -> float:
    if isinstance(event, (Gaussian, PoissonGaussian)):
        return event.noise_multiplier
    raise ResourceLimit(f"no bound is known here for a basis made by {event!r}")


def attempt(setting: Setting | None) -> Range | None:
    """The bounds, or None where no engine can give them."""
    if setting is None:
        return None
    try:
        return bounds(setting)
    except (ResourceLimit, ValueError, MemoryError, ArithmeticError):
        return None


def certain(setting: Setting) -> Range:
    """Returns what the first steps of a setting certainly leak, where nothing better can be computed.

    More noise than there is and fewer steps than there are can only lower it; a record that contributes nothing is
    one of the values by which a record may be replaced, so it holds under every relation.
    """
    prob, noise = setting.sampling_prob, max(setting.noise_multiplier, 2 * _LEAST_NOISE)
    mixture = ((prob, 1.0), (1 - prob, 0.0)) if prob < 1 else ((1.0, 1.0),)
    count = min(setting.steps, _STEPS_SEEN)
    seen = tails.Observation(p=mixture, q=((1.0, 0.0),), others=0, noise=noise, count=count)
    lower = tails.lower_epsilon((seen,), setting.delta)
    return Range(lower, math.inf, setting.delta, setting.neighboring, f"lower bound from {count} steps; no upper bound")
