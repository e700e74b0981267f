"""Canaries of a basis release: gradients of nobody, added to what the release sums, to audit it by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from dpsb.basis_spec import PHASE
from dpsb.canaries import STRETCH, log_ratio
from dpsb.mechanism import Mechanism
from dpsb.randomness import Randomness, SystemRandomness
from dpsb_accounting import Phase, Plan, PoissonGaussian
from dpsb_accounting.auditing import CanaryScores

WHITE_BOX = (
    "white box: sees every released sum that the basis is made from, knows the plan, the model, every other row and "
    "when it was drawn; chooses the canary's gradient; does not know when the canary was drawn"
)


class BasisCanaries:
    r"""Gradients of one run's basis release that belong to no example, each put in by a fair coin.

    A canary's gradient is ten times C long and lies in one coordinate of one layer, another in every release; no two
    share one. It takes part in the draw and is clipped by the release's own mechanism, jointly over all layers as any
    example is: it alone fills its norm. Its score is the sum over the releases of the log-likelihood ratio of what was
    released in its coordinate, less what the others added.

    Args:
      count: Number of canaries, at least 2.
      randomness: Source of coins, coordinates and signs.
    """

    def __init__(self, count: int, randomness: Randomness | None = None) -> None:
        if count < 2:
            raise ValueError(f"Expected count={count!r} of at least 2.")
        self._source = randomness or SystemRandomness()
        self.included = self._source.bernoulli(count, 0.5)
        self.observed = False
        self._placed = 0
        self._members = np.flatnonzero(self.included)
        self._ratios = np.zeros(count)
        self._places: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._signs = np.ones(count)
        self._sizes: dict[str, int] = {}

    def __len__(self) -> int:
        """How many take part in the draws."""
        return len(self._members)

    def place(self, sizes: Mapping[str, int]) -> None:
        """Chooses a coordinate and a sign for every canary, for one release of vectors of these sizes by layer.

        Where there are fewer coordinates than canaries, the first get them; one that never got any has no score.
        """
        size = sum(sizes.values())
        count = min(len(self._ratios), size)
        self._placed = max(self._placed, count)
        chosen = np.empty(0, dtype=np.uint64)
        while len(chosen) < count:
            more = self._source.words(2 * count) % np.uint64(size)
            both = np.concatenate([chosen, more])
            chosen = both[np.sort(np.unique(both, return_index=True)[1])]
        positions = chosen[:count].astype(np.int64)
        self._signs = np.where(self._source.bernoulli(len(self._ratios), 0.5), 1.0, -1.0)
        self._sizes, self._places, start = dict(sizes), {}, 0
        for name, length in sizes.items():
            here = np.flatnonzero((positions >= start) & (positions < start + length))
            self._places[name] = here, positions[here] - start
            start += length

    def part(self, name: str, drawn: np.ndarray, mechanism: Mechanism) -> torch.Tensor:
        """What the canaries of a draw add to a layer's sum, as a vector, float64; ``drawn`` is below ``len(self)``."""
        here, positions = self._places[name]
        norm = torch.tensor([STRETCH * mechanism.l2_clip_norm], dtype=torch.float64)
        length = float(mechanism.scale(norm) * norm)
        inside = np.isin(here, self._members[drawn])
        found = torch.zeros(self._sizes[name], dtype=torch.float64)
        found[torch.from_numpy(positions[inside])] = torch.from_numpy(length * self._signs[here[inside]])
        return found

    def observe(self, name: str, released: torch.Tensor, mechanism: Mechanism, sampling_prob: float) -> None:
        """Takes in what was released of a layer, less what the examples added; a vector."""
        here, positions = self._places[name]
        products = released.detach().cpu().numpy()[positions] * self._signs[here]
        self._ratios[here] += log_ratio(products, mechanism.l2_clip_norm, mechanism.noise_std, sampling_prob)
        self.observed = True

    def scores(self) -> CanaryScores:
        """The scores of all canaries that had a coordinate, those left out included."""
        return CanaryScores(self._ratios[: self._placed], self.included[: self._placed], WHITE_BOX)


def plan_of_release(plan: Plan) -> Plan:
    """A plan that consists of the basis release alone: what its canaries are held against.

    Args:
      plan: Of a run whose basis is a charged Gaussian release.
    """
    phase, facts = plan.phase(PHASE), plan.basis
    event = phase.event
    return replace(
        plan,
        phases=(Phase("train", event, phase.count),),
        sampling_prob=event.sampling_prob if isinstance(event, PoissonGaussian) else 1.0,
        l2_clip_norm=float(str(facts["l2_clip_norm"])),
        clipping=str(facts["clipping"]),
        basis={"kind": "none before it", "access": "data_free"},
    )
