"""Engines: a composition in, bounds on epsilon or delta out. Which one answers is decided here and recorded.

* Gaussians only: one Gaussian, exactly.
* Otherwise the upper bound is dp-accounting's pessimistic privacy loss distribution (`pld`: adaptive mesh, guarded
  against its float errors). Where it cannot answer (delta too small, epsilon too large, too many cells, an event
  for which only Rényi divergences are known), the least of `rdp` and `plain`, with the reason in `method`.
* The lower bound is our own, by post-processing (`binned`): it shares no code with the upper one.
* `answers` asks every engine, for the cross-check and the report.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from dpsb_accounting import gaussian
from dpsb_accounting.composition import Composition
from dpsb_accounting.engines import steps
from dpsb_accounting.engines.answer import Answer, Unavailable
from dpsb_accounting.relations import needs_two_steps, resolved

__all__ = ["Answer", "Ends", "ResourceLimit", "Unavailable", "answers", "delta", "epsilon", "upper_epsilon"]

_MOST_LOWER_CELLS = 1 << 23
_COARSE_MESH = 1e-2  # of the lower bound, where the upper one has none

Ends = tuple[float, float, str]


class ResourceLimit(Exception):
    """A bound would need more memory than is sensible, or more precision than floats have; says which."""


class _Upper(NamedTuple):
    """An upper bound, the mesh for the lower one, and how it was found."""

    value: float
    mesh: float
    method: str


def epsilon(composition: Composition, delta: float, neighboring: str) -> Ends:
    """Returns (lower, upper, method) for epsilon at `delta`.

    Guarantees: lower ≤ true epsilon ≤ upper, also in floating point; deterministic.

    Raises:
        ValueError: If an event has no meaning under the relation.
        ResourceLimit: If no engine can answer; the message names the cause.
    """
    closed = _closed_form(composition)
    if closed is not None:
        return closed
    parts = resolved(composition, neighboring)
    if _is_gaussian(parts):
        low, high = gaussian.epsilon(_gaussian_noise(parts, neighboring), delta)
        return low, high, "exact Gaussian"
    high, mesh, method = upper_epsilon(composition, delta, neighboring)
    low = max((tail.epsilon(delta) for tail in _tails(composition, neighboring, mesh)), default=0.0)
    # If float errors ever put them in the wrong order, the looser one is the upper bound.
    return min(low, high), max(low, high), _with_lower(method, low)


def delta(composition: Composition, epsilon: float, neighboring: str) -> Ends:
    """Returns (lower, upper, method) for delta at `epsilon`; see `epsilon`."""
    closed = _closed_form(composition)
    if closed is not None:
        return 0.0 if closed[0] == 0 else 1.0, min(closed[1], 1.0), closed[2]
    parts = resolved(composition, neighboring)
    if _is_gaussian(parts):
        low, high = gaussian.delta(_gaussian_noise(parts, neighboring), epsilon)
        return low, high, "exact Gaussian"
    high, mesh, method = _upper_delta(composition, epsilon, neighboring)
    low = max((tail.delta(epsilon) for tail in _tails(composition, neighboring, mesh)), default=0.0)
    return min(low, high), max(low, high), _with_lower(method, low)


def _with_lower(method: str, low: float) -> str:
    return f"{method}; lower bound by binned losses" if low else f"{method}; no lower bound"


def _tails(composition: Composition, neighboring: str, mesh: float) -> tuple[Any, ...]:
    """Tails for the lower bound; zeroing a unit is one way to replace it, so zero_out bounds replace_one below."""
    relation = "zero_out" if needs_two_steps(composition, neighboring) else neighboring
    return _lower_tails(resolved(composition, relation), relation, mesh)


@functools.lru_cache(maxsize=256)
def upper_epsilon(composition: Composition, delta: float, neighboring: str) -> tuple[float, float, str]:
    """Returns (upper bound on epsilon, mesh, method); the same upper end as `epsilon`, without the lower one."""
    closed = _closed_form(composition)
    if closed is not None:
        return closed[1], _COARSE_MESH, closed[2]
    if needs_two_steps(composition, neighboring):
        return _two_steps_epsilon(composition, delta)
    parts = resolved(composition, neighboring)
    if _is_gaussian(parts):
        return gaussian.epsilon(_gaussian_noise(parts, neighboring), delta)[1], _COARSE_MESH, "exact Gaussian"
    return _least("epsilon", parts, delta, neighboring, math.inf)


@functools.lru_cache(maxsize=256)
def _upper_delta(composition: Composition, epsilon: float, neighboring: str) -> _Upper:
    if needs_two_steps(composition, neighboring):
        half = epsilon / 2
        found = delta(composition, half, "zero_out")
        value = min(1.0, found[1] * math.exp(min(steps.log_growth(half, 2), 700.0)))
        return _Upper(value, _COARSE_MESH, f"two steps of zero_out (group privacy): {found[2]}")
    return _least("delta", resolved(composition, neighboring), epsilon, neighboring, 1.0)


def _least(what: str, parts: Composition, at: float, neighboring: str, nothing: float) -> _Upper:
    """The least upper bound on epsilon or delta that an engine certifies."""
    from dpsb_accounting.engines import plain, pld, rdp

    pairs: list[tuple[float, str]] = []
    mesh, reason = _COARSE_MESH, ""
    try:
        value, mesh = getattr(pld, what)(parts, at, neighboring)
        pairs.append((value, f"pld, mesh {mesh:.2g}"))
    except Unavailable as error:
        reason = str(error)
        mesh = _lower_mesh(parts, neighboring)
        pairs.append((getattr(rdp, what)(parts, at, neighboring), f"rdp, as {reason}"))
    if reason or parts.others:
        pairs.append((getattr(plain, what)(parts, at, neighboring), "without amplification by sampling"))
    value, method = min(pairs)
    if reason and method.startswith("without"):
        method += f", as {reason}"
    if not value < nothing and what == "epsilon":
        raise ResourceLimit(f"no finite bound on epsilon can be computed at delta={at!r}: {reason or method}")
    return _Upper(value, mesh, method)


def _two_steps_epsilon(composition: Composition, delta: float) -> tuple[float, float, str]:
    """replace_one as two steps of zero_out: one unit out, another in."""

    def upper(at: float) -> tuple[float, tuple[object, ...]]:
        found = upper_epsilon(composition, at, "zero_out")
        return found[0], found

    found = steps.least(upper, delta, 2)
    if found is None:
        raise ResourceLimit(f"replace_one costs too much to be bounded by two steps of zero_out at delta={delta!r}")
    return found[0], _COARSE_MESH, f"two steps of zero_out (group privacy): {found[1][2]}"


def answers(composition: Composition, delta: float, neighboring: str) -> list[Answer | tuple[str, str]]:
    """Returns what every engine says of epsilon at `delta`: its Answer, or its name and why it has none.

    Guarantees: nothing is raised for an engine that fails; of the engines that are marked rigorous, every interval
        holds the true value.
    """
    known: list[tuple[str, Callable[[Composition, float, str], Answer]]] = [
        ("gaussian", _gaussian_answer),
        ("pld", _pld_answer),
        ("binned", _binned_answer),
        ("rdp", _rdp_answer),
        *((name, functools.partial(_further, module)) for name, module in _FURTHER),
    ]
    found: list[Answer | tuple[str, str]] = []
    for name, engine in known:
        try:
            if composition.non_private:
                raise Unavailable("something was released with no guarantee")
            if needs_two_steps(composition, neighboring):
                raise Unavailable("replace_one is bounded by two steps of zero_out here")
            found.append(engine(resolved(composition, neighboring), delta, neighboring))
        except (Unavailable, ResourceLimit) as error:
            found.append((name, str(error)))
        except (ArithmeticError, RuntimeError, MemoryError) as error:
            found.append((name, f"failed: {type(error).__name__}"))
    return found


_FURTHER = (("prv", "prv"), ("quadrature", "quadrature"), ("gdp_clt", "clt"))


def _further(module: str, parts: Composition, delta: float, neighboring: str) -> Answer:
    """An engine that knows Gaussian sums only."""
    if parts.others:
        raise Unavailable(f"it does not know {type(parts.others[0][0]).__name__}")
    try:
        engine = importlib.import_module(f"dpsb_accounting.engines.{module}")
    except ImportError:
        raise Unavailable("it is not installed") from None
    found: Answer = engine.epsilon(parts, delta, neighboring)
    return found


def _gaussian_answer(parts: Composition, delta: float, neighboring: str) -> Answer:
    if not _is_gaussian(parts):
        raise Unavailable("not a Gaussian alone")
    low, high = gaussian.epsilon(_gaussian_noise(parts, neighboring), delta)
    return Answer(engine="gaussian", lower=low, upper=high, rigorous=True, method="closed form (Balle and Wang)")


def _pld_answer(parts: Composition, delta: float, neighboring: str) -> Answer:
    from dpsb_accounting.engines import pld

    high, mesh = pld.epsilon(parts, delta, neighboring)
    return Answer(engine="pld", lower=0.0, upper=high, rigorous=True, method=f"mesh {mesh:.2g}, float guard")


def _binned_answer(parts: Composition, delta: float, neighboring: str) -> Answer:
    mesh = _lower_mesh(parts, neighboring)
    if not _is_gaussian(parts):
        mesh = upper_epsilon(parts, delta, neighboring)[1]
    tails = _lower_tails(parts, neighboring, mesh)
    if not tails:
        raise Unavailable("no pair of distributions of these events is known to it, or too many cells")
    low = max(tail.epsilon(delta) for tail in tails)
    return Answer(engine="binned", lower=low, upper=math.inf, rigorous=True, method=f"mesh {mesh:.2g}")


def _rdp_answer(parts: Composition, delta: float, neighboring: str) -> Answer:
    from dpsb_accounting.engines import rdp

    high = rdp.epsilon(parts, delta, neighboring)
    if math.isinf(high):
        raise Unavailable("no order gives a finite bound")
    return Answer(engine="rdp", lower=0.0, upper=high, rigorous=True, method="best Rényi order")


def _closed_form(composition: Composition) -> Ends | None:
    if composition.non_private:
        return math.inf, math.inf, "non-private release"
    if not composition.subsampled and not composition.others and math.isinf(composition.noise_multiplier):
        return 0.0, 0.0, "nothing was released"
    return None


def _is_gaussian(parts: Composition) -> bool:
    return not parts.subsampled and not parts.others


def _gaussian_noise(composition: Composition, neighboring: str) -> float:
    """Noise divided by the sensitivity: under replace_one the sum moves by up to twice the clip norm."""
    return composition.noise_multiplier / (2 if neighboring == "replace_one" else 1)


def _lower_mesh(parts: Composition, neighboring: str) -> float:
    """A mesh for the lower bound where the upper one was found without."""
    from dpsb_accounting.engines import binned

    _, total = binned.spans(parts, neighboring)
    return max(min(_COARSE_MESH, 0.1 / math.sqrt(max(parts.count, 1))), total / _MOST_LOWER_CELLS)


@functools.lru_cache(maxsize=16)
def _lower_tails(parts: Composition, neighboring: str, mesh: float) -> tuple[Any, ...]:
    from dpsb_accounting.engines import binned

    for width in (mesh, 4 * mesh, 16 * mesh, 64 * mesh):
        found = tuple(binned.tails(parts, neighboring, width, _MOST_LOWER_CELLS))
        if found:
            return found
    return ()
