"""Record and replay: ``fit`` on neighbouring data with equal randomness; only the sums may differ, by at most C.

The first run records what every release returned; the second, on a data set with one example less or another one in its
place, is given the same releases. Both therefore pass through the same states, and a sum that moves by more than C, a
ledger that reads differently, or a step more or less is a fault.

References:
  arXiv:2602.17454 (dp-recorder), where the idea is applied to libraries from outside.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpsb.mechanism import Mechanism
from dpsb.randomness import Randomness, SeededRandomness
from dpsb.selftest.noise import scale_check
from dpsb.selftest.result import Check, at_most
from dpsb_accounting import Ledger, Plan
from dpsb_accounting.ledger import LEDGER_NAME

_TOLERANCE = 2e-3
_UPDATE_TOLERANCE = 1e-4
_ROUNDING = 2.0**-23

Loop = Callable[[Path, Sequence[Any], Randomness, Callable[[], None]], Mapping[str, torch.Tensor]]
"""``(folder, dataset, randomness, on_step) -> theta``: trains by plain SGD with a constant rate, from one start."""


@dataclass
class Recording:
    """What one run did, in order."""

    totals: list[torch.Tensor] = field(default_factory=list)
    released: list[torch.Tensor] = field(default_factory=list)
    charged_at_draw: list[int] = field(default_factory=list)
    draws: list[tuple[int, float]] = field(default_factory=list)
    steps: int = 0
    theta: Mapping[str, torch.Tensor] = field(default_factory=dict)
    ledger: list[tuple[str, ...]] = field(default_factory=list)


def check_replay(
    loop: Loop,
    folder: Path,
    dataset: Sequence[Any],
    another: Any,
    *,
    plan: Plan,
    learning_rate: float,
    start: torch.Tensor,
) -> Iterator[Check]:
    """The checks of a whole training loop, on synthetic or public data.

    Args:
      loop: Runs or resumes training; the ledger is ``folder/ledger.jsonl``.
      folder: Empty; one folder per run is made in it.
      dataset: At least 3 examples.
      another: An example to put in the place of the last one, or after it.
      plan: What the loop trains under, example by example and with a fixed C.
      learning_rate: Of the SGD.
      start: theta before the first step, packed.
    """
    C, steps = plan.l2_clip_norm, plan.steps
    base = _record(loop, folder / "base", dataset)
    neighbours = {
        "remove": (dataset[:-1], 1.0),
        "add": ([*dataset, another], 1.0),
        "replace": ([*dataset[:-1], another], 2.0),
    }
    ledgers, flows = [base.ledger], [_flow(base)]
    for name, (data, limit) in neighbours.items():
        other = _record(loop, folder / name, data, replay=base.released)
        ledgers.append(other.ledger)
        flows.append(_flow(other))
        moved = [float((a - b).norm()) / C for a, b in zip(base.totals, other.totals, strict=False)]
        figure = max(moved, default=float("nan"))
        detail = f"a run on data that differ by one example ({name}): every sum moves by at most {limit:g} C"
        yield at_most(f"replay_{name}", figure, limit + _TOLERANCE, detail)
    same = all(one == ledgers[0] for one in ledgers)
    yield Check(
        name="replay_ledger",
        passed=same and len(base.released) > 0,
        figure=len({str(one) for one in ledgers}),
        limit="= 1",
        detail="runs on neighbouring data write the same ledger",
    )
    yield Check(
        name="replay_control_flow",
        passed=len(set(flows)) == 1,
        figure=len(set(flows)),
        limit="= 1",
        detail="runs on neighbouring data make the same draws, releases and steps",
    )
    charges = sum(line[0] == "charge" for line in base.ledger)
    counts = {len(base.draws), len(base.released), base.steps, charges, steps}
    detail = f"each of {steps} planned steps has one charge, one draw, one release and one update"
    once = len(counts) == 1
    yield Check(name="one_release_a_step", passed=once, figure=len(base.released), limit=f"= {steps}", detail=detail)
    late = sum(seen < number for number, seen in enumerate(base.charged_at_draw, start=1))
    drew = len(base.charged_at_draw) >= steps
    detail = "every step is in the ledger, on disk, before its draw"
    yield Check(name="charged_before_draw", passed=drew and late == 0, figure=late, limit="= 0", detail=detail)
    wanted = (len(dataset), plan.sampling_prob)
    odd = sum(draw != wanted for draw in base.draws)
    detail = "every draw is of all rows, with the plan's probability"
    yield at_most("replay_draws", odd if base.draws else float("nan"), 0, detail)
    yield _noise(base, plan.noise_std)
    yield _update(base, start, learning_rate / plan.expected_batch_size)
    yield _resumed(loop, folder / "resumed", dataset, steps)


def _flow(one: Recording) -> tuple[int, ...]:
    return len(one.totals), len(one.charged_at_draw), one.steps


def _noise(base: Recording, noise_std: float) -> Check:
    added = [b - a for a, b in zip(base.totals, base.released, strict=True)]
    found = torch.cat(added).numpy() / noise_std if added else np.full(1, np.nan)
    return scale_check("replay_noise", found, "noise of the releases of a whole run, divided by what the plan says")


def _update(base: Recording, start: torch.Tensor, factor: float) -> Check:
    """theta moved by exactly what was released, once, over the divisor."""
    end = torch.cat([value.flatten().double() for value in base.theta.values()])
    size = len(start)
    expected = start.double() - factor * sum((one[:size] for one in base.released), torch.zeros(size).double())
    change = float((expected - start.double()).norm())
    figure = float((end - expected).norm()) / change if change else float("nan")
    rounding = len(base.released) * _ROUNDING * float(start.norm() + end.norm()) / change if change else 0.0
    detail = "theta moved by the released sums over the public divisor, and by nothing else"
    return at_most("update", figure, _UPDATE_TOLERANCE + rounding, detail)


class _CutOff(BaseException):
    """Stands for a kill: nothing may catch it."""


def _resumed(loop: Loop, folder: Path, dataset: Sequence[Any], steps: int) -> Check:
    recording = Recording()
    half = max(1, steps // 2)
    with _watched(recording, None):
        for stop in (half, None):
            source = _Watching(recording, folder, 5 + (stop is None))
            done = [0]

            def on_step(stop: int | None = stop, done: list[int] = done) -> None:
                done[0] += 1
                if done[0] == stop:
                    raise _CutOff

            folder.mkdir(exist_ok=True)
            with suppress(_CutOff):
                loop(folder, dataset, source, on_step)
    charges = sum(line[0] == "charge" for line in _ledger_lines(folder))
    passed = len(recording.released) <= charges <= steps
    detail = f"a run that was cut off and resumed releases no more than it charges, and charges at most {steps}"
    return Check(name="resume", passed=passed, figure=len(recording.released) - charges, limit="<= 0", detail=detail)


class _Watching(SeededRandomness):
    """Seeded coins that note how many charges the ledger held when each draw was made."""

    def __init__(self, recording: Recording, folder: Path, seed: int = 5) -> None:
        super().__init__(seed)
        self._recording, self._folder = recording, folder

    def bernoulli(self, count: int, probability: float) -> Any:
        path = self._folder / LEDGER_NAME
        self._recording.draws.append((count, probability))
        self._recording.charged_at_draw.append(Ledger.read(path).charged("train") if path.exists() else 0)
        return super().bernoulli(count, probability)


def _record(
    loop: Loop, folder: Path, dataset: Sequence[Any], replay: Sequence[torch.Tensor] | None = None
) -> Recording:
    recording = Recording()
    folder.mkdir(parents=True)

    def on_step() -> None:
        recording.steps += 1

    with _watched(recording, replay):
        recording.theta = loop(folder, list(dataset), _Watching(recording, folder), on_step)
    recording.ledger = _ledger_lines(folder)
    return recording


@contextmanager
def _watched(recording: Recording, replay: Sequence[torch.Tensor] | None) -> Iterator[None]:
    """Notes what goes into and comes out of every release; with ``replay``, gives back those instead."""
    original = Mechanism.release

    def release(self: Mechanism, total: torch.Tensor, randomness: Randomness) -> torch.Tensor:
        number = len(recording.totals)
        recording.totals.append(total.detach().clone().double().cpu())
        released = original(self, total, randomness)
        if replay is not None and number < len(replay):
            released = replay[number].to(released)
        recording.released.append(released.detach().clone().double().cpu())
        return released

    Mechanism.release = release  # type: ignore[method-assign]
    try:
        yield
    finally:
        Mechanism.release = original  # type: ignore[method-assign]


def _ledger_lines(folder: Path) -> list[tuple[str, ...]]:
    """The ledger without hashes, times and run ids: what a run on other data must not change."""
    varying = {"hash", "prev", "run_id", "created_utc", "time", "created"}
    lines: list[tuple[str, ...]] = []
    for line in (folder / LEDGER_NAME).read_text().splitlines():
        content = json.loads(line)
        facts = json.dumps({k: v for k, v in content.items() if k not in varying}, sort_keys=True)
        lines.append((str(content.get("kind")), facts))
    return lines
