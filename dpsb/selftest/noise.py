"""Checks of the noise: its scale, its law, and that no part of it is used twice."""

from __future__ import annotations

import math
import os
import random
import select
import signal
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch

from dpsb.selftest.result import ERROR_RATE, Check, at_most, not_tested
from dpsb.selftest.step import Step

_NUMBERS = 1 << 16
_RELEASES = 8
_PATIENCE = 20.0
_SAME = 2.0**-19  # of the standard deviation; a released sum is rounded to a grid of 2**-20
_NAMES = ("noise_scale", "noise_mean", "noise_law", "noise_repeats", "noise_reuse", "noise_rerun", "noise_fork")


def check_noise(step: Step, numbers: int = _NUMBERS, *, forks: bool = True) -> Iterator[Check]:
    """The checks of ``release``: each fails a correct one with probability ``ERROR_RATE``.

    With the default number of draws a standard deviation that is off by 3 % fails (docs/auditing.md).

    Args:
      step: What is tested.
      numbers: How many noise values are drawn in all.
      forks: Whether this process may be forked.
    """
    if step.release is None or step.noise_multiplier is None:
        for name in _NAMES:
            yield not_tested(name, "the step gives no release")
        return
    std = step.noise_multiplier * step.l2_clip_norm
    dimension = max(2, numbers // _RELEASES)
    offset = torch.linspace(-2, 2, dimension, dtype=torch.float64) * step.l2_clip_norm
    found = np.concatenate([_noise(step.release, offset) for _ in range(_RELEASES)]) / std
    yield scale_check("noise_scale", found, "standard deviation of the noise, divided by what the plan says")
    yield _between("noise_mean", float(found.mean()) * math.sqrt(len(found)), "the noise is centred at the sum")
    yield _law(found)
    yield _repeats(found.reshape(_RELEASES, dimension))
    yield _reuse("noise_reuse", found, "no stretch of noise occurs twice, within a release or in two of them")
    if step.fresh_release is None:
        yield not_tested("noise_rerun", "the step gives no way to make a new run")
    else:
        runs = [_noise(_seeded_alike(step.fresh_release), offset) / std for _ in range(2)]
        yield _reuse("noise_rerun", np.concatenate(runs), "two runs under the same global seeds have different noise")
    if not forks or not hasattr(os, "fork"):
        yield not_tested("noise_fork", "this process is not forked")
    else:
        child, parent = _in_child(step.release, offset), _noise(step.release, offset)
        if child is None:
            yield Check(
                name="noise_fork", passed=True, figure=None, limit="", detail="a forked process is refused noise"
            )
        else:
            both = np.concatenate([child, parent]) / std
            yield _reuse("noise_fork", both, "a forked process does not repeat its parent's noise")


def _noise(release: Callable[[torch.Tensor], torch.Tensor], total: torch.Tensor) -> np.ndarray:
    return np.asarray((release(total.clone()).double() - total).cpu().numpy())


def scale_check(name: str, found: np.ndarray, detail: str) -> Check:
    """Whether the root mean square of noise values, in units of what it should be, is one; by the chi-square law."""
    from scipy.stats import chi2

    low, high = (math.sqrt(chi2.ppf(p, len(found)) / len(found)) for p in (ERROR_RATE / 2, 1 - ERROR_RATE / 2))
    ratio = math.sqrt(float(np.mean(found**2)))
    return Check(name=name, passed=low <= ratio <= high, figure=ratio, limit=f"{low:.4f} to {high:.4f}", detail=detail)


def _law(found: np.ndarray) -> Check:
    from scipy.stats import kstest

    p_value = float(kstest(found, "norm").pvalue)
    return Check(
        name="noise_law",
        passed=p_value >= ERROR_RATE,
        figure=p_value,
        limit=f">= {ERROR_RATE:g}",
        detail="p-value of the noise against the normal law (Kolmogorov and Smirnov)",
    )


def _reuse(name: str, found: np.ndarray, detail: str) -> Check:
    """The largest correlation of the sequence with itself, over all shifts; repeated noise correlates with itself."""
    from scipy.stats import norm

    size = len(found)
    spectrum = np.fft.rfft(found, 2 * size)
    products = np.fft.irfft(np.abs(spectrum) ** 2, 2 * size)[1:size]
    overlap = size - np.arange(1, size)
    enough = overlap >= 64  # sums over fewer products are not near enough to normal
    figures = np.abs(products[enough]) / np.sqrt(overlap[enough])
    limit = float(norm.isf(ERROR_RATE / 2 / len(figures))) + 1.5  # products of normals have slightly heavier tails
    return at_most(name, float(figures.max()), limit, detail)


def _repeats(found: np.ndarray) -> Check:
    """How often a coordinate has the same noise in two releases; independent noise does so by chance only."""
    from scipy.stats import binom

    pairs = [(i, j) for i in range(len(found)) for j in range(i)]
    same = sum(int((np.abs(found[i] - found[j]) < _SAME).sum()) for i, j in pairs)
    by_chance = 2 * _SAME / math.sqrt(4 * math.pi)  # the density at 0 of the difference of two standard normals
    limit = float(binom.isf(ERROR_RATE, len(pairs) * found.shape[1], by_chance))
    return at_most("noise_repeats", same, limit, "no coordinate has the same noise in two steps")


def _between(name: str, z: float, detail: str) -> Check:
    from scipy.stats import norm

    return at_most(name, abs(z), float(norm.isf(ERROR_RATE / 2)), detail)


def _seeded_alike(
    make: Callable[[], Callable[[torch.Tensor], torch.Tensor]],
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A new release under the same global seeds every time; the seeds before are put back."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        release = make()
        state = torch.get_rng_state()
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])

    def under_that_seed(total: torch.Tensor) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            return release(total)

    return under_that_seed


def _in_child(release: Callable[[torch.Tensor], torch.Tensor], total: torch.Tensor) -> np.ndarray | None:
    """The noise that a forked copy of this process makes; None if it is refused, or does not come."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():  # newer Pythons warn of forks beside threads; the child does next to nothing
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:  # nothing of the parent's may run on
        try:
            os.close(reading)
            content = _noise(release, total).astype(np.float64).tobytes()
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(content)
        finally:
            os._exit(0)
    os.close(writing)
    content = b""
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], _PATIENCE)[0] and (part := pipe.read(1 << 16)):
            content += part
    os.kill(child, signal.SIGKILL)  # it may be waiting for a lock that a thread of the parent held
    os.waitpid(child, 0)
    return np.frombuffer(content) if len(content) == 8 * total.numel() else None
