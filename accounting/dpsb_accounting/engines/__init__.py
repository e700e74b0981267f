"""Engines: a composition in, bounds on epsilon or delta out. Which one answers is decided here and recorded.

* No subsampling: one Gaussian, exactly.
* Otherwise the upper bound is dp-accounting's pessimistic privacy loss distribution (PLD, connect the dots),
  with an adaptive mesh and a guard against its float errors; where delta is too small for the guard, Rényi
  divergences by quadrature (`renyi`).
* The lower bound is our own, by post-processing (`binned`): it shares no code with the upper one.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from dpsb_accounting import gaussian
from dpsb_accounting.composition import Composition
from dpsb_accounting.relations import resolved

_TOLERANCE = 1e-3  # of epsilon, at which the mesh is fine enough
_SMALLEST = 1e-5  # ... or this, where epsilon itself is tiny
_FIRST_SINGLE = 8_000  # cells of one release on the first mesh
_MOST_SINGLE = 150_000  # cells of one release: about a second
_MOST_COMPOSED = 1 << 22  # cells of the composition: about a second
_GUARD_SHARE = 0.05

Ends = tuple[float, float, str]


class ResourceLimit(Exception):
    """A bound would need more memory than is sensible, or more precision than floats have; says which."""


def epsilon(composition: Composition, delta: float, neighboring: str) -> Ends:
    """Returns (lower, upper, method) for epsilon at `delta`.

    Guarantees: lower ≤ true epsilon ≤ upper, also in floating point; deterministic.

    Raises:
        ResourceLimit: If no engine can answer; the message names the cause.
    """
    closed = _closed_form(composition)
    if closed is not None:
        return closed
    composition = resolved(composition, neighboring)
    _refuse_others(composition)
    if not composition.subsampled:
        low, high = gaussian.epsilon(_gaussian_noise(composition, neighboring), delta)
        return low, high, "exact Gaussian"
    high, mesh, method = upper_epsilon(composition, delta, neighboring)
    low = max((tail.epsilon(delta) for tail in _lower_tails(composition, neighboring, mesh)), default=0.0)
    # If float errors ever put them in the wrong order, the looser one is the upper bound.
    return min(low, high), max(low, high), f"{method}; lower bound by binned losses"


def delta(composition: Composition, epsilon: float, neighboring: str) -> Ends:
    """Returns (lower, upper, method) for delta at `epsilon`; see `epsilon`."""
    closed = _closed_form(composition)
    if closed is not None:
        return 0.0, min(closed[1], 1.0), closed[2]
    composition = resolved(composition, neighboring)
    _refuse_others(composition)
    if not composition.subsampled:
        low, high = gaussian.delta(_gaussian_noise(composition, neighboring), epsilon)
        return low, high, "exact Gaussian"
    from dpsb_accounting.engines import binned

    guard = binned.float_guard(composition.count)
    best, mesh = 1.0, _first_mesh(composition, neighboring)
    while True:
        found = float(_pld(composition, neighboring, mesh).get_delta_for_epsilon(epsilon)) + guard
        gain, best = best - found, min(best, found)
        finer = mesh / 4
        if gain <= 15 * max(_TOLERANCE * best, guard) or not _affordable(composition, neighboring, finer):
            break
        mesh = finer
    low = max((tail.delta(epsilon) for tail in _lower_tails(composition, neighboring, mesh)), default=0.0)
    return min(low, best), max(low, best), f"pld, mesh {mesh:.2g}; lower bound by binned losses"


@functools.lru_cache(maxsize=256)
def upper_epsilon(composition: Composition, delta: float, neighboring: str) -> tuple[float, float, str]:
    """Returns (upper bound on epsilon, mesh, method) of a composition that has subsampled parts."""
    from dpsb_accounting.engines import binned

    _refuse_others(composition)
    guard = binned.float_guard(composition.count)
    mesh = _first_mesh(composition, neighboring)
    if guard > _GUARD_SHARE * delta:
        from dpsb_accounting.engines import renyi

        found = renyi.epsilon(composition, delta, neighboring)
        if math.isinf(found):
            raise ResourceLimit(f"delta={delta!r} is too small for {composition.count} steps with so little noise")
        return found, mesh, "rdp, as delta is too small for pld"
    best = math.inf
    while True:
        found = float(_pld(composition, neighboring, mesh).get_epsilon_for_delta(delta - guard))
        gain, best = best - found, min(best, found)
        finer = mesh / 4
        # The error is O(h^2), so a mesh four times finer gains 15/16 of it.
        if gain <= 15 * max(_TOLERANCE * best, _SMALLEST) or not _affordable(composition, neighboring, finer):
            return best, mesh, f"pld, mesh {mesh:.2g}"
        mesh = finer


def _closed_form(composition: Composition) -> Ends | None:
    if composition.non_private:
        return math.inf, math.inf, "non-private release"
    if not composition.subsampled and not composition.others and math.isinf(composition.noise_multiplier):
        return 0.0, 0.0, "nothing was released"
    return None


def _refuse_others(composition: Composition) -> None:
    if composition.others:
        raise ResourceLimit(f"no engine computes {composition.others[0][0]!r} yet")


def _gaussian_noise(composition: Composition, neighboring: str) -> float:
    """Noise divided by the sensitivity: under replace_one the sum moves by up to twice the clip norm."""
    return composition.noise_multiplier / (2 if neighboring == "replace_one" else 1)


def _first_mesh(composition: Composition, neighboring: str) -> float:
    widest, _ = _spans(composition, neighboring)
    mesh = max(min(1e-2, 0.3 / math.sqrt(composition.count)), widest / _FIRST_SINGLE)
    while not _affordable(composition, neighboring, mesh):
        if mesh > 0.1:
            _, total = _spans(composition, neighboring)
            raise ResourceLimit(
                f"the privacy loss of {composition.count} releases spreads over {total:.3g}, too much to compute; "
                "the noise is too small for so many steps to give a meaningful epsilon"
            )
        mesh *= 2
    return mesh


def _affordable(composition: Composition, neighboring: str, mesh: float) -> bool:
    widest, total = _spans(composition, neighboring)
    return widest / mesh <= _MOST_SINGLE and total / mesh <= _MOST_COMPOSED


@functools.lru_cache(maxsize=256)
def _spans(composition: Composition, neighboring: str) -> tuple[float, float]:
    from dpsb_accounting.engines import binned

    return binned.spans(composition, neighboring)


@functools.lru_cache(maxsize=16)
def _lower_tails(composition: Composition, neighboring: str, mesh: float) -> tuple[Any, ...]:
    from dpsb_accounting.engines import binned

    return tuple(binned.tails(composition, neighboring, mesh, 4 * _MOST_COMPOSED))


def _pld(composition: Composition, neighboring: str, mesh: float) -> Any:
    """dp-accounting's pessimistic distribution of the composition; floats and flat events only."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    relation = {
        "add_or_remove_one": NeighboringRelation.ADD_OR_REMOVE_ONE,
        "zero_out": NeighboringRelation.REPLACE_SPECIAL,
        "replace_one": NeighboringRelation.REPLACE_ONE,
    }[neighboring]
    total = None
    parts = [(part.noise_multiplier, part.sampling_prob, part.count) for part in composition.subsampled]
    if math.isfinite(composition.noise_multiplier):
        parts.append((composition.noise_multiplier, 1.0, 1))
    for noise, prob, count in parts:
        part = privacy_loss_distribution.from_gaussian_mechanism(
            noise,
            value_discretization_interval=mesh,
            sampling_prob=prob,
            use_connect_dots=True,
            neighboring_relation=relation,
        )
        part = part.self_compose(count) if count > 1 else part
        total = part if total is None else total.compose(part)
    return total
