"""The default upper bound: dp-accounting's pessimistic privacy loss distributions, wrapped.

* An adaptive mesh: coarse first, then four times finer until that gains less than 1e-3 of epsilon.
* A guard against float errors: its pessimistic values lose up to 3e-16 of delta per composed release, so they are
  asked for a delta that is smaller by more than that (`binned.float_guard`).
* A size check before anything is allocated.
* One mesh for all parts, equal parts composed at once; floats and single releases only, since dp-accounting miscounts
  some nested ones.

References:
    Doroshenko et al. (2022), arXiv:2207.04380; composition: Zhu, Dong and Wang (2022), arXiv:2106.08567, Theorem 10.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from dpsb_accounting.composition import Composition
from dpsb_accounting.engines import binned, profiles
from dpsb_accounting.engines.answer import Unavailable
from dpsb_accounting.events import (
    DiscreteLaplace,
    Event,
    Laplace,
    PoissonLaplace,
    PureEpsilon,
    TruncatedPoissonGaussian,
)

_TOLERANCE = 1e-3  # of epsilon, at which the mesh is fine enough
_CHEAP_TOLERANCE = 1e-4  # ... where a mesh four times finer has no more than _CHEAP_CELLS
_CHEAP_CELLS = 1 << 17
_SMALLEST = 1e-5  # ... or this, where epsilon itself is tiny
_FIRST_SINGLE = 8_000  # cells of one release on the first mesh
_MOST_SINGLE = 600_000  # cells of one release: some tenths of a second
_MOST_COMPOSED = 1 << 21  # cells of the composition: some tenths of a second
_MOST_ALLOCATED = 1 << 24  # cells: some hundreds of MB, beyond which the estimate of the spread was wrong
_GUARD_SHARE = 0.1  # of delta, that the guard against float errors may take
_LARGEST = 700.0  # beyond, exp(-loss) underflows inside dp-accounting
_MOST_SENSITIVITY = 10_000  # of an integer sum; beyond, its pure epsilon is used
_TRIAL_CELLS = 500
_TAIL = 1e-15  # mass that a composition may leave outside its window
_BLOCKS = 10_000
_MOST_EXACT = 20_000  # cells that are not taken in blocks, where nearly all of the mass is
_RARE = 1e-7
_MARGIN = 10.0  # standard deviations that dp-accounting keeps


def epsilon(composition: Composition, delta: float, neighboring: str) -> tuple[float, float]:
    """Returns (upper bound on epsilon, mesh) of a resolved composition; Unavailable where it would not be a bound."""
    mesh = first_mesh(composition, neighboring)
    guard = binned.float_guard(composition.count)
    if guard > _GUARD_SHARE * delta:
        raise Unavailable("delta is too small for pld")
    best, ratio = math.inf, 4.0
    while True:
        found = _epsilon_of(distribution(composition, neighboring, mesh), delta - guard)
        if math.isnan(found):
            raise Unavailable("pld found no number")
        gain, best = best - found, min(best, found)
        if best > _LARGEST:
            raise Unavailable(f"epsilon is above {_LARGEST:g}, where the floats of pld fail")
        share = _CHEAP_TOLERANCE if _cheap(composition, neighboring, mesh / 4) else _TOLERANCE
        finer = _finer(mesh, ratio, gain, max(share * best, _SMALLEST))
        if finer is None or not _affordable(composition, neighboring, finer):
            return best, mesh
        mesh, ratio = finer, mesh / finer


def delta(composition: Composition, epsilon: float, neighboring: str) -> tuple[float, float]:
    """Returns (upper bound on delta, mesh) of a resolved composition at `epsilon`."""
    mesh = first_mesh(composition, neighboring)
    guard = binned.float_guard(composition.count)
    if epsilon > _LARGEST:
        raise Unavailable(f"epsilon is above {_LARGEST:g}, where the floats of pld fail")
    best, ratio = 1.0, 4.0
    while True:
        found = float(distribution(composition, neighboring, mesh).get_delta_for_epsilon(epsilon)) + guard
        if math.isnan(found):
            raise Unavailable("pld found no number")
        gain, best = best - found, min(best, found)
        finer = _finer(mesh, ratio, gain, max(_TOLERANCE * best, guard))
        if finer is None or not _affordable(composition, neighboring, finer):
            return best, mesh
        mesh, ratio = finer, mesh / finer


def _finer(mesh: float, ratio: float, gain: float, allowed: float) -> float | None:
    """The next mesh, None if this one is fine enough: the error is O(h^2), of which the last step has gained a part."""
    error = gain / (ratio**2 - 1)
    if error <= allowed:
        return None
    return mesh * max(0.25, min(0.7, math.sqrt(0.7 * allowed / error)))


def _epsilon_of(distribution: Any, delta: float) -> float:
    """The larger of the epsilons of both sides, as dp-accounting finds it but without a loop over the losses."""
    sides = [distribution._pmf_remove, *([] if distribution._symmetric else [distribution._pmf_add])]
    found = []
    for side in sides:
        cells = side.to_dense_pmf()
        if cells._infinity_mass > delta:
            return math.inf
        start = max(0, -int(cells._lower_loss))  # losses of 0 and more decide whether epsilon is more than 0
        probs = np.asarray(cells._probs)[start:][::-1]
        losses = (cells._lower_loss + start + np.arange(len(probs)))[::-1] * cells._discretization
        if len(probs) == 0:
            found.append(0.0)
            continue
        upper = cells._infinity_mass + np.cumsum(probs)
        with np.errstate(all="ignore"):
            lower = np.cumsum(probs * np.exp(-losses))
            at = np.log((upper - delta) / lower)
        reached = np.nonzero((upper[:-1] > delta) & (at[:-1] >= losses[1:]))[0]
        best = at[reached[0]] if len(reached) else at[-1]
        found.append(max(0.0, float(best)) if best == best else 0.0)
    return max(found)


def first_mesh(composition: Composition, neighboring: str) -> float:
    """Returns the mesh to begin with; Unavailable if none is affordable, or an event has no distribution here."""
    widest, total = _spans(composition, neighboring)
    mesh = max(min(1e-2, 0.3 / math.sqrt(composition.count)), widest / _FIRST_SINGLE)
    if mesh > _LARGEST:
        raise Unavailable(f"the privacy loss of one release spreads over {widest:.3g}, too much for pld")
    while not _affordable(composition, neighboring, mesh):
        if mesh > 0.1:
            raise Unavailable(
                f"the privacy loss of {composition.count} releases spreads over {total:.3g}, too much for pld"
            )
        mesh *= 2
    return mesh


def _cheap(composition: Composition, neighboring: str, mesh: float) -> bool:
    widest, total = _spans(composition, neighboring)
    return widest / mesh <= _CHEAP_CELLS and total / mesh <= _CHEAP_CELLS


def _affordable(composition: Composition, neighboring: str, mesh: float) -> bool:
    widest, total = _spans(composition, neighboring)
    return widest / mesh <= _MOST_SINGLE and total / mesh <= _MOST_COMPOSED


@functools.lru_cache(maxsize=256)
def _spans(composition: Composition, neighboring: str) -> tuple[float, float]:
    """The widths, in loss, of the widest single release and of the composition (both roughly)."""
    widest, total = binned.spans(composition, neighboring)
    for event, count in composition.others:
        mesh, masses = trial(event, neighboring)
        low, high = _window(masses, count)
        total += mesh * (high - low + 1)
        widest = max(widest, mesh * len(masses))
    return widest, total


def _self_composed(part: Any, count: int) -> Any:
    """`count` times the same distribution, as dp-accounting composes it but by a real FFT and a quicker window."""
    from dp_accounting.pld import pld_pmf, privacy_loss_distribution
    from scipy import fft

    composed = []
    for side in [part._pmf_remove, *([] if part._symmetric else [part._pmf_add])]:
        cells = side.to_dense_pmf()
        masses = np.asarray(cells._probs, dtype=np.float64)
        low, high = _window(masses, count)
        size = fft.next_fast_len(max(high - low + 1, len(masses)), real=True)
        if size > _MOST_ALLOCATED:
            raise Unavailable(f"{count} releases would need {size:.2g} cells in pld")
        found = fft.irfft(fft.rfft(masses, size) ** count, size)
        found = np.roll(found, -(low % size))[: high - low + 1]
        # What lies outside the window may have wrapped around into it, and is counted as an infinite loss as well.
        infinite = cells._infinity_mass
        lost = 1.0 if infinite >= 1 else _TAIL - math.expm1(count * math.log1p(-infinite))
        composed.append(
            pld_pmf.DensePLDPmf(cells._discretization, cells._lower_loss * count + low, found, min(lost, 1.0), True)
        )
    return privacy_loss_distribution.PrivacyLossDistribution(*composed)


def _window(masses: Any, count: int) -> tuple[int, int]:
    """Chernoff bounds: `count` cell numbers add up to one in [low, high] but for mass `_TAIL`.

    Rare neighbouring cells are taken together, at the end of the block that makes the bound larger.
    """
    size = len(masses)
    reached = np.cumsum(masses)
    if reached[-1] <= 2 * _RARE:  # nearly every loss is infinite
        return 0, (size - 1) * count
    first = int(np.searchsorted(reached, _RARE))
    last = int(np.searchsorted(reached, reached[-1] - _RARE))
    block = max(1, size // _BLOCKS)
    exact = np.arange(first, min(last, first + _MOST_EXACT) + 1)
    starts = np.concatenate((np.arange(0, first, block), exact, np.arange(exact[-1] + 1, size, block)))
    sums = np.add.reduceat(masses, starts)
    ends = np.append(starts[1:], size) - 1
    kept = sums > 0
    sums, starts, ends = np.log(sums[kept]), starts[kept], ends[kept]
    low, high = 0.0, float((size - 1) * count)
    for order in np.concatenate((np.arange(1, 21), 20 * 1.5 ** np.arange(1, 13))) / size:
        bound = math.log(2 / _TAIL)
        high = min(high, (count * float(np.logaddexp.reduce(sums + order * ends)) + bound) / order)
        low = max(low, -(count * float(np.logaddexp.reduce(sums - order * starts)) + bound) / order)
    return max(0, math.floor(low) - 1), min((size - 1) * count, math.ceil(high) + 1)


def trial(event: Event, neighboring: str) -> tuple[float, Any]:
    """A coarse mesh on which the losses of one release fill some cells, and their probabilities."""
    mesh = 0.5
    while True:
        cells = single(event, neighboring, mesh)._pmf_remove.to_dense_pmf()
        if cells.size >= _TRIAL_CELLS or mesh < 1e-9:
            return mesh, np.asarray(cells._probs)
        mesh /= 8


@functools.lru_cache(maxsize=4)
def distribution(composition: Composition, neighboring: str, mesh: float) -> Any:
    """Returns dp-accounting's pessimistic distribution of the composition."""
    parts: list[tuple[Any, int]] = []
    for part in composition.subsampled:
        parts.append((_gaussian(part.noise_multiplier, part.sampling_prob, neighboring, mesh), part.count))
    if math.isfinite(composition.noise_multiplier):
        parts.append((_gaussian(composition.noise_multiplier, 1.0, neighboring, mesh), 1))
    for event, count in composition.others:
        parts.append((single(event, neighboring, mesh), count))
    total = None
    for part, count in parts:
        composed = _self_composed(part, count) if count > 1 else part
        total = composed if total is None else total.compose(composed)
    return total


def single(event: Event, neighboring: str, mesh: float) -> Any:
    """Returns the distribution of one release that is no plain Gaussian sum; Unavailable if it has none here."""
    from dp_accounting.pld import privacy_loss_distribution

    steps = 2 if neighboring == "replace_one" else 1
    if _rough_span(event, steps) > _MOST_SINGLE * mesh:
        raise Unavailable(f"the losses of {type(event).__name__} spread too far for pld")
    if _largest_loss(event, steps) > _LARGEST:
        raise Unavailable(f"the losses of {type(event).__name__} are above {_LARGEST:g}, where the floats of pld fail")
    if isinstance(event, TruncatedPoissonGaussian):
        return privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
            event.num_examples,
            event.sampling_prob,
            event.max_batch_size,
            event.noise_multiplier,
            value_discretization_interval=mesh,
            neighboring_relation=_relation(neighboring),
        )
    if isinstance(event, Laplace) or (isinstance(event, PoissonLaplace) and steps == 1):
        return privacy_loss_distribution.from_laplace_mechanism(
            event.noise_multiplier / steps,
            value_discretization_interval=mesh,
            sampling_prob=event.sampling_prob if isinstance(event, PoissonLaplace) else 1.0,
        )
    if isinstance(event, DiscreteLaplace):
        if steps * event.sensitivity > _MOST_SENSITIVITY:
            event = PureEpsilon(epsilon=event.noise_parameter * event.sensitivity)
        else:
            return privacy_loss_distribution.from_discrete_laplace_mechanism(
                event.noise_parameter,
                steps * event.sensitivity,
                value_discretization_interval=mesh,
                use_connect_dots=True,
            )
    found = profiles.of(event, neighboring)
    if found is None:
        raise Unavailable(f"{type(event).__name__} has only a bound by Rényi divergences")
    pmfs = [_connected(profile, mesh) for profile in found]
    return privacy_loss_distribution.PrivacyLossDistribution(*pmfs)


def _rough_span(event: Event, steps: int) -> float:
    """At least the width of the losses of one release that dp-accounting would put on the mesh."""
    if isinstance(event, TruncatedPoissonGaussian):
        noise = event.noise_multiplier / 2
        return (1 + 2 * _MARGIN * noise) / noise**2
    if isinstance(event, (Laplace, PoissonLaplace)):
        return 2 * steps / event.noise_multiplier
    if isinstance(event, DiscreteLaplace) and steps * event.sensitivity <= _MOST_SENSITIVITY:
        return 2 * steps * event.sensitivity * event.noise_parameter
    return 0.0


def _largest_loss(event: Event, steps: int) -> float:
    """Of the events whose distribution dp-accounting builds with exponentials of the loss."""
    if isinstance(event, (Laplace, PoissonLaplace)):
        return steps / event.noise_multiplier
    if isinstance(event, DiscreteLaplace) and steps * event.sensitivity <= _MOST_SENSITIVITY:
        return steps * event.sensitivity * event.noise_parameter
    return 0.0


def _connected(profile: profiles.Profile, mesh: float) -> Any:
    from dp_accounting.pld import pld_pmf

    first, last = math.floor(profile.low / mesh), math.ceil(profile.high / mesh)
    if last - first > _MOST_SINGLE:
        raise Unavailable(f"one release would need {last - first:.2g} cells in pld")
    if first == last:
        first, last = first - 1, last + 1
    deltas = profile.deltas(np.asarray(np.arange(first, last + 1) * mesh, dtype=np.float64))
    deltas = np.minimum.accumulate(np.clip(deltas, 0.0, 1.0))
    # Algorithm 1 of Doroshenko et al. in the form for an even grid.
    steps, growth = np.diff(deltas), math.expm1(mesh)
    probs = np.empty_like(deltas)
    probs[0] = 1 - deltas[0] + steps[0] / growth
    probs[1:-1] = (steps[1:] - steps[:-1] * math.exp(mesh)) / growth
    probs[-1] = steps[-1] / math.expm1(-mesh)
    return pld_pmf.DensePLDPmf(mesh, first, np.maximum(probs, 0.0), float(deltas[-1]), True)


def _gaussian(noise: float, prob: float, neighboring: str, mesh: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    pmfs = [_connected(profile, mesh) for profile in profiles.gaussian_sum(noise, prob, neighboring)]
    return privacy_loss_distribution.PrivacyLossDistribution(*pmfs)


def _relation(neighboring: str) -> Any:
    from dp_accounting import NeighboringRelation

    return {
        "add_or_remove_one": NeighboringRelation.ADD_OR_REMOVE_ONE,
        "zero_out": NeighboringRelation.REPLACE_SPECIAL,
        "replace_one": NeighboringRelation.REPLACE_ONE,
    }[neighboring]
