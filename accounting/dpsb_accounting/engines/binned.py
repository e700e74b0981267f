r"""A lower bound by post-processing: each release is rounded to a grid of losses, and the sum is tested.

An attacker who sees each release only through a fixed function of it, here a grid cell of its privacy loss
:math:`L = \log(P/Q)`, sees no more than the whole. So with :math:`P_j, Q_j` the exact probabilities of cell j
under two neighbouring data sets, and S the sum of the cells over all releases, every threshold k gives a
valid bound: :math:`\delta(\epsilon) \ge P(S \ge k) - e^\epsilon Q(S \ge k)`. Any choice of cells is valid, so
the edges need not be exact; with cells of width h the bound falls short of the truth by :math:`O(T h^2)`
only.

The distributions of S are convolutions by FFT. Q is first tilted by :math:`e^{jh}`, which makes it as large
as P where it matters, so that float errors are small against delta; `float_guard` bounds what remains.

References:
    Data processing: Zhu, Dong and Wang (2022), arXiv:2106.08567. Tilting and the window: Koskela, Jälkö and
    Honkela (2020), arXiv:1906.03049.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import fft
from scipy.special import ndtr

from dpsb_accounting.composition import Composition
from dpsb_accounting.engines import atoms

Array = npt.NDArray[np.float64]
SMALLEST_NOISE = 0.05  # below this, probabilities of the cells underflow
_TAIL = 1e-17
_MANY = 1_000  # releases, from which on the float errors of doubles could be seen at small deltas
_MOST_LONG = 1 << 18  # cells that are composed in long doubles: some tenths of a second
_BLOCKS = 10_000  # of rare cells; cells where nearly all of the mass is are taken one by one
_RARE = 1e-7
_MARGIN = 10.0  # standard deviations beyond which everything falls into the last cells (mass 1e-23)


@dataclass(frozen=True, slots=True)
class _Cells:
    """Probabilities of consecutive cells `first`, `first` + 1, ... under P, and under Q times e^(jh)."""

    first: int
    p: Array
    tilted_q: Array
    count: int


@dataclass(frozen=True, slots=True)
class Tails:
    """P(S >= k), and Q(S >= k) e^shift with what float errors may add, for all thresholds k."""

    p: Array
    scaled_q: Array
    shift: float
    guard: float

    def epsilon(self, delta: float) -> float:
        """Returns the largest epsilon that some threshold certainly shows at this delta."""
        rest = self.p - self.guard - delta
        valid = rest > 0
        if not valid.any():
            return 0.0
        with np.errstate(all="ignore"):
            found = np.log(rest[valid]) - np.log(self.scaled_q[valid]) + self.shift
        return max(0.0, float(np.max(found[np.isfinite(found)], initial=0.0)))

    def delta(self, epsilon: float) -> float:
        """Returns the largest delta that some threshold certainly shows at this epsilon."""
        with np.errstate(all="ignore"):
            found = self.p - self.guard - np.exp(epsilon - self.shift) * self.scaled_q
        return max(0.0, float(np.max(found[np.isfinite(found)], initial=0.0)))


def float_guard(count: int) -> float:
    """Returns what float errors may do to a small tail after composing `count` distributions by FFT.

    Twice the most that was seen against long doubles, over random noise, sampling probabilities down to 1e-9, meshes
    and counts up to 1e5, in tails of at most 1 %.
    """
    return 3e-15 * math.sqrt(count) + 4e-16 * count


def _long(count: int, size: int) -> bool:
    """Whether to compose in long doubles: where float errors matter, if there are any that are finer than doubles."""
    return count >= _MANY and size <= _MOST_LONG and bool(np.finfo(np.longdouble).eps < 1e-18)


def _guard(count: int, size: int) -> float:
    """What float errors may do to the small tails of a composition here."""
    # The rounding of long doubles is 1/2048 of that of doubles; the result is rounded to these once.
    return 1e-15 + float_guard(count) / 500 if _long(count, size) else float_guard(count)


def tails(composition: Composition, neighboring: str, mesh: float, most_cells: int) -> list[Tails]:
    """Returns the tails for each direction of the relation; empty if they would need more than `most_cells`.

    Events of which no pair of distributions is known here are left out: the bound is then that of the others.
    """
    directions = ("replace",) if neighboring == "replace_one" else ("remove", "add")
    found = []
    for direction in directions:
        parts = _cells(composition, neighboring, direction, mesh)
        if parts:
            found.append(_tails(parts, mesh, most_cells))
    return [entry for entry in found if entry is not None]


def spans(composition: Composition, neighboring: str) -> tuple[float, float]:
    """Returns the widths, in loss, of the widest single release and of the composition (both roughly)."""
    direction = "replace" if neighboring == "replace_one" else "remove"
    widest, total = 0.0, 0.0
    for noise, prob, count in _parts(composition):
        grid = _grid(noise, direction)
        losses = _loss(grid, noise, prob, direction)
        span = float(losses[-1] - losses[0])
        mesh = max(span / 4000, 1e-12)
        p, _, _ = _probabilities(noise, prob, direction, mesh)
        # The window that dp-accounting's Chernoff bound will choose, with its orders.
        orders = np.concatenate((np.arange(-20, 0), np.arange(1, 21))) / len(p)
        low, high = _window([p], [count], orders, 1e-15)
        full = count * (len(p) - 1)
        total += mesh * (min(high, full) - max(low, 0) + 1)
        widest = max(widest, span)
    return widest, total


def _parts(composition: Composition) -> list[tuple[float, float, int]]:
    parts = [(part.noise_multiplier, part.sampling_prob, part.count) for part in composition.subsampled]
    if math.isfinite(composition.noise_multiplier):
        parts.append((composition.noise_multiplier, 1.0, 1))
    return parts


def _grid(noise: float, direction: str) -> Array:
    low = -1.0 if direction == "replace" else 0.0
    return np.linspace(low - _MARGIN * noise, 1 + _MARGIN * noise, 20001)


def _loss(x: Array, noise: float, prob: float, direction: str) -> Array:
    """The loss at output x, increasing in x; for "add" it is the loss of "remove", negated later."""
    up = _log_mixture(x, noise, prob)
    return up - _log_mixture(-x, noise, prob) if direction == "replace" else up


def _log_mixture(x: Array, noise: float, prob: float) -> Array:
    """log(1 - q + q e^((2x - 1) / (2 sigma^2))), the log ratio of the mixture to N(0, sigma^2)."""
    exponent = (2 * x - 1) / (2 * noise**2)
    if prob == 1:
        return exponent
    mixture: Array = np.logaddexp(math.log1p(-prob), math.log(prob) + exponent)
    return mixture


def _cells_of(noise: float, prob: float, count: int, direction: str, mesh: float) -> _Cells:
    p, q, first = _probabilities(noise, prob, direction, mesh)
    return _Cells(first, p, q * np.exp((first + np.arange(len(q))) * mesh), count)


def _probabilities(noise: float, prob: float, direction: str, mesh: float) -> tuple[Array, Array, int]:
    """Probability of each cell under P and under Q, and the number of the first cell."""
    grid = _grid(noise, direction)
    losses = _loss(grid, noise, prob, direction)
    first, last = round(float(losses[0]) / mesh), round(float(losses[-1]) / mesh)
    cells = np.arange(first, last + 1)
    inner = np.interp((cells[:-1] + 0.5) * mesh, losses, grid)
    edges = np.concatenate(([-np.inf], inner, [np.inf]))
    rest = _masses(edges, 0.0, noise)
    mixture = (1 - prob) * rest + prob * _masses(edges, 1.0, noise)
    if direction == "replace":
        rest = (1 - prob) * rest + prob * _masses(edges, -1.0, noise)
    if direction == "add":
        cells, mixture, rest = -cells[::-1], rest[::-1], mixture[::-1]
    return mixture, rest, int(cells[0])


def _masses(edges: Array, mean: float, noise: float) -> Array:
    """Probability of each interval under N(mean, noise^2), accurate also far out in both tails."""
    z = (edges - mean) / noise
    below, above = ndtr(z), ndtr(-z)
    masses: Array = np.where(z[:-1] > 0, above[:-1] - above[1:], below[1:] - below[:-1])
    return masses


def _cells(composition: Composition, neighboring: str, direction: str, mesh: float) -> list[_Cells]:
    sums = [(noise, prob, count, direction) for noise, prob, count in _parts(composition)]
    found = []
    for event, count in composition.others:
        simple = atoms.as_sum(event, neighboring)
        if simple is not None:
            sums.append((simple[0], simple[1], count, "remove" if simple[2] else direction))
            continue
        known = atoms.cells(event, neighboring, direction, mesh)
        if known is not None:
            first, p, q = known
            with np.errstate(over="ignore", invalid="ignore"):
                tilted = q * np.exp((first + np.arange(len(q))) * mesh)
            if np.all(np.isfinite(tilted)) and tilted.sum() > 0:
                found.append(_Cells(first, p, tilted, count))
    return found + [
        _cells_of(noise, prob, count, way, mesh) for noise, prob, count, way in sums if noise >= SMALLEST_NOISE
    ]


def _tails(parts: list[_Cells], mesh: float, most_cells: int) -> Tails | None:
    counts = [part.count for part in parts]
    scales = [float(part.tilted_q.sum()) for part in parts]
    tilted = [part.tilted_q / scale for part, scale in zip(parts, scales, strict=True)]
    variance = math.fsum(part.count * _variance(part.p) for part in parts)
    longest = max(len(part.p) for part in parts)
    strengths = np.geomspace(1 / longest, 16 / math.sqrt(max(variance, 1e-3)), 16)
    orders = np.concatenate((-strengths, strengths))
    p_low, p_high = _window([part.p for part in parts], counts, orders, _TAIL)
    q_low, q_high = _window(tilted, counts, orders, _TAIL)
    low, high = min(p_low, q_low), max(p_high, q_high)
    size = max(high - low + 1, *(len(part.p) for part in parts))
    if size > most_cells:
        return None
    size = fft.next_fast_len(size, real=True)
    p = _convolve([part.p for part in parts], counts, size, low)  # errors of either sign, which mostly cancel in tails
    q = np.maximum(_convolve(tilted, counts, size, low), 0.0)
    log_scale = math.fsum(part.count * math.log(scale) for part, scale in zip(parts, scales, strict=True))
    first = low + sum(part.count * part.first for part in parts)
    losses = (first + np.arange(size)) * mesh
    guard = _guard(sum(counts), size) + 2 * _TAIL
    p_tail = np.cumsum(p[::-1], dtype=np.longdouble)[::-1].astype(np.float64)
    top = int(np.max(np.nonzero(p_tail > 2 * guard)[0], initial=0))
    center = float(losses[top])
    with np.errstate(over="ignore", invalid="ignore"):  # far below `center`, where no threshold is of use
        weights = np.exp(center - losses)
        scaled_q = np.cumsum((q * weights)[::-1])[::-1] + guard * weights
    return Tails(p_tail, scaled_q, center - log_scale, guard)


def _variance(p: Array) -> float:
    index = np.arange(len(p))
    mean = float((p * index).sum())  # no `@`: threads that wait for each other cost more than these few numbers
    return float((p * (index - mean) ** 2).sum())


def _window(masses: list[Array], counts: list[int], orders: npt.NDArray[np.float64], tail: float) -> tuple[int, int]:
    """Chernoff bounds: the sum of the cell numbers, each from 0, lies in [low, high] but for mass `tail` a side.

    Rare cells are taken in blocks, each at its end on the side of the bound, which only widens the window.
    """
    low, high = 0.0, float(sum(count * (len(p) - 1) for p, count in zip(masses, counts, strict=True)))
    blocks = [_blocks(p) for p in masses]
    for order in orders:
        exponent = math.log(2 / tail)
        for (sums, firsts, lasts), count in zip(blocks, counts, strict=True):
            scaled = order * (lasts if order > 0 else firsts)
            peak = float(scaled.max())
            exponent += count * (peak + math.log(float((np.exp(scaled - peak) * sums).sum())))
        if order > 0:
            high = min(high, exponent / order)
        else:
            low = max(low, exponent / order)
    return math.floor(low), math.ceil(high)


def _blocks(p: Array) -> tuple[Array, Array, Array]:
    width = max(1, len(p) // _BLOCKS)
    total = np.cumsum(p)
    begin = int(np.searchsorted(total, _RARE))
    end = min(int(np.searchsorted(total, total[-1] - _RARE)), begin + 2 * _BLOCKS) + 1
    firsts = np.concatenate((np.arange(0, begin, width), np.arange(begin, end), np.arange(end, len(p), width)))
    sums: Array = np.add.reduceat(p, firsts)
    lasts: Array = np.append(firsts[1:] - 1, len(p) - 1).astype(np.float64)
    kept = sums > 0
    return sums[kept], firsts[kept].astype(np.float64), lasts[kept]


def _convolve(masses: list[Array], counts: list[int], size: int, low: int) -> Array:
    if counts == [1]:
        return np.roll(np.concatenate((masses[0], np.zeros(size - len(masses[0])))), -(low % size))
    long = _long(sum(counts), size)
    product: Any = np.ones(1)
    for p, count in zip(masses, counts, strict=True):
        product = product * _power(fft.rfft(p.astype(np.longdouble if long else np.float64), size), count)
    result: Array = np.roll(fft.irfft(product, size), -(low % size)).astype(np.float64)
    return result


def _power(values: Any, count: int) -> Any:
    """The `count`-th power; of long doubles by squaring, since numpy's own power of them is slow."""
    if values.dtype != np.clongdouble:
        return values**count
    found = np.ones(1, dtype=np.clongdouble)
    while count:
        if count & 1:
            found = found * values
        values, count = values * values, count >> 1
    return found
