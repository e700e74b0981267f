r"""Noise in shares: how much of it certainly is in a sum that nobody sees more of.

Each of K parties adds an independent share to its own contribution, and only the sum is opened. What counts against
an adversary is what is left when the t parties that may drop out, and the k parties that help the adversary and so
know their own shares, are those with the largest shares. The party whose unit is protected took part in the sum and
did not help the adversary, so its own share is always there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from dpsb_accounting import _checks
from dpsb_accounting.events import Event, Gaussian, NonPrivate, PoissonGaussian, PoissonSkellam
from dpsb_accounting.federated.silo import NOISE_OF, Silo
from dpsb_accounting.plan import Phase

_SAME = 1e-9  # relative difference up to which two standard deviations count as equal


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """How many shares an adversary may know or find missing.

    Args:
        clients: K, the parties of a sum. Public.
        dropouts: t, how many may be missing before the sum is thrown away. Public.
        colluders: k, how many help the adversary; at least 1, since every insider knows its own share. Public.

    Example:
        >>> round(Losses(clients=10, dropouts=3, colluders=2).factor("sum"), 6)
        0.707107
    """

    clients: int
    dropouts: int
    colluders: int

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "clients", _checks.whole(at_least=2, clients=self.clients))
        put(self, "dropouts", _checks.whole(at_least=0, dropouts=self.dropouts))
        if _checks.whole(at_least=0, colluders=self.colluders) < 1:
            raise ValueError(
                f"colluders must be at least 1, not {self.colluders!r}: an insider knows its own share of the noise"
            )
        put(self, "colluders", int(self.colluders))
        if self.honest < 1:
            raise ValueError(
                f"of clients={self.clients!r} none is left that certainly adds noise, with dropouts="
                f"{self.dropouts!r} and colluders={self.colluders!r}"
            )

    @property
    def honest(self) -> int:
        """K - t - k: how many shares are certainly there and unknown."""
        return self.clients - self.dropouts - self.colluders

    def factor(self, noise_of: str) -> float:
        r"""Returns the noise certainly there divided by the stated noise, for equal shares.

        Args:
            noise_of: "sum": the stated noise is that of all K shares together, :math:`\sqrt{(K-t-k)/K}`; "share":
                that of one share, :math:`\sqrt{K-t-k}`; "guaranteed": shares were made so large that the stated noise
                is there with t and k lost, 1.
        """
        _checks.one_of(choices=NOISE_OF, noise_of=noise_of)
        if noise_of == "guaranteed":
            return 1.0
        return math.sqrt(self.honest / (self.clients if noise_of == "sum" else 1))


def share_factors(silos: Sequence[Silo], losses: Losses, noise_of: str, phase: str) -> list[tuple[float, float, float]]:
    """Returns for each silo the noise in a phase's sums, divided by the noise that its own plan states there.

    Args:
        silos: All K of them. A tainted one's share is not counted on by anybody.
        losses: With `clients` equal to the number of silos.
        noise_of: See `Losses.factor`. For "sum" and "guaranteed" all silos must state the same noise.
        phase: Name of the phase, in every plan.

    Returns:
        Per silo: against a colluding server, against an outsider (no colluder), and of its own share alone.

    Raises:
        ValueError: If silos state different noise for one sum.
    """
    _checks.one_of(choices=NOISE_OF, noise_of=noise_of)
    stds = [silo.l2_clip_norm * _noise(silo, phase) for silo in silos]
    if noise_of != "share" and max(stds) > min(stds) * (1 + _SAME):
        low, high = silos[stds.index(min(stds))].name, silos[stds.index(max(stds))].name
        raise ValueError(
            f"silos {low!r} and {high!r} state different noise for the same sum in phase {phase!r}: "
            f"{min(stds):.6g} and {max(stds):.6g} (noise multiplier times clip norm)"
        )
    scale = {"sum": 1 / losses.clients, "share": 1.0, "guaranteed": 1 / losses.honest}[noise_of]
    variances = [scale * std**2 for std in stds]
    found = []
    for i in range(len(silos)):
        others = sorted(v for j, v in enumerate(variances) if j != i and not silos[j].taints)
        tainted = len(silos) - 1 - len(others)
        # A tainted silo's noise may be known: it is lost whatever happens, and t + k of the others are lost besides.
        kept = others[: max(0, losses.clients - 1 - losses.dropouts - losses.colluders - tainted)]
        outside = others[: max(0, losses.clients - 1 - losses.dropouts - tainted)]
        own = variances[i]
        found.append(
            (
                math.sqrt(own + math.fsum(kept)) / stds[i],
                math.sqrt(own + math.fsum(outside)) / stds[i],
                math.sqrt(own) / stds[i],
            )
        )
    return found


def scaled(phase: Phase, factor: float) -> Phase:
    """Returns the phase with its noise multiplied by `factor`.

    Raises:
        ValueError: If its event is not a plain sum with Gaussian or Skellam noise, whose noise could be shared.
    """
    event = phase.event
    if isinstance(event, NonPrivate):
        return phase
    require_plain(event, phase.name)
    return Phase(phase.name, _with_noise(event, factor), phase.count)


def require_plain(event: Event, phase: str) -> None:
    """Raises ValueError unless it is a sum with Gaussian or Skellam noise, of all or of Poisson-sampled units."""
    if not isinstance(event, (Gaussian, PoissonGaussian, PoissonSkellam)):
        raise ValueError(
            f"phase {phase!r} releases a {type(event).__name__}; in this model each release must be a Gaussian or a "
            "PoissonGaussian, or in secagg a PoissonSkellam"
        )


def _with_noise(event: Event, factor: float) -> Event:
    if isinstance(event, (Gaussian, PoissonGaussian, PoissonSkellam)):
        return dataclasses.replace(event, noise_multiplier=event.noise_multiplier * factor)
    return event


def _noise(silo: Silo, phase: str) -> float:
    event = next(entry.event for entry in silo.phases if entry.name == phase)
    if isinstance(event, NonPrivate):
        raise ValueError(f"silo {silo.name!r} adds no noise in phase {phase!r}: {event.reason}")
    require_plain(event, phase)
    return event.noise_multiplier if isinstance(event, (Gaussian, PoissonGaussian, PoissonSkellam)) else 0.0
