"""Canaries of a federation in one process: rows of nobody at one silo, scored by what it, or the server, releases."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dpsb.canaries import GradientCanaries
from dpsb.federated.spec import PrivacyModel
from dpsb.mechanism import Mechanism
from dpsb_accounting import Plan
from dpsb_accounting.auditing import CanaryScores

WHOLE_SUM = (
    "white box: sees the opened sum of every round, knows the plan, the basis, what every other row of every silo "
    "added and when it was drawn; chooses the canary's gradient; does not know when the canary was drawn"
)


class FederationCanaries:
    """The canaries of an audit of one federation, all at one silo; simulations only, where one process sees every sum.

    In ``silo_local`` they are scored by the silo's own releases: whatever the server averages is made from those. In
    ``trusted_server`` and ``secagg`` by the aggregate: the sums as the coordinator opens them.

    Args:
      host: The silo that holds them.
      count: Number of canaries; at most the length of theta are used.
    """

    def __init__(self, host: str, count: int) -> None:
        self.host = host
        self.rows: GradientCanaries | None = None
        self._count = count
        self._others: torch.Tensor | float = 0.0
        self._summed = False

    def at(self, silo: str) -> SiloCanaries:
        """What a silo is given."""
        return SiloCanaries(federation=self, hosts=silo == self.host)

    def begin(self, plan: Plan, dimension: int, model: PrivacyModel) -> None:
        """Makes the canaries for the host's plan, once."""
        if self.rows is None:
            self.rows = GradientCanaries(dimension, plan, min(self._count, dimension))
            self._summed = model is not PrivacyModel.SILO_LOCAL

    def contributed(self, total: torch.Tensor) -> None:
        """Notes what a silo's own rows add to the sum of the open round."""
        self._others = total.cpu() + self._others

    def opened(self, total: torch.Tensor) -> None:
        """Takes in the sum that the coordinator opened; a sum without the host's shows nothing of the canaries."""
        if self.rows is not None and self._summed:
            self.rows.observe(total.cpu() - self._others)
        self._others = 0.0

    def scores(self) -> CanaryScores:
        """The scores of all canaries.

        Raises:
          ValueError: If the host took part in no round.
        """
        if self.rows is None:
            raise ValueError(f"Silo {self.host!r} took part in no round, so nothing was audited.")
        found = self.rows.scores()
        return CanaryScores(found.values, found.included, WHOLE_SUM) if self._summed else found


@dataclass(frozen=True, kw_only=True)
class SiloCanaries:
    """The canaries as one silo sees them: rows that are drawn with its own, or none of them.

    Args:
      federation: All of them.
      hosts: Whether they are at this silo.
    """

    federation: FederationCanaries
    hosts: bool

    def begin(self, plan: Plan, dimension: int, model: PrivacyModel) -> None:
        """See :meth:`FederationCanaries.begin`; a silo without canaries makes none."""
        if self.hosts:
            self.federation.begin(plan, dimension, model)

    @property
    def rows(self) -> GradientCanaries | None:
        """The rows that take part in this silo's draws."""
        return self.federation.rows if self.hosts else None

    def add(self, total: torch.Tensor, drawn: np.ndarray, mechanism: Mechanism) -> torch.Tensor:
        """A silo's sum with the canaries of its draw, clipped as its own rows are. Sensitive."""
        self.federation.contributed(total)
        if self.rows is None:
            return total
        return total + mechanism.clip_and_sum(self.rows.rows(drawn)).to(total.device)
