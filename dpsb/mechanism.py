"""The private core: clip, sum, add noise. Read this file to check the guarantee of one step.

Sensitive rows come in, and :meth:`Mechanism.release` is the only way out. The steps of a run are counted in the
ledger *before* their data is drawn (``dpsb.train``), so nothing here needs to know about accounting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dpsb.randomness import Randomness
from dpsb_accounting import Plan

CLIPPINGS = ("flat", "automatic", "none")

# AUTO-S (Bu et al. 2022, arXiv:2206.07136): the constant that keeps the direction of very small rows.
AUTOMATIC_GAMMA = 0.01
# The noisy sum is rounded to a power of two about this far below the noise.
_GRID_BITS = 20
_SMALLEST_NOISE = 1e-100
_CHUNK_NUMBERS = 1 << 23


def clip_and_sum(rows: torch.Tensor, l2_clip_norm: float, clipping: str = "flat") -> torch.Tensor:
    r"""Scales every row into the L2 ball of radius ``l2_clip_norm`` and sums.

    With :math:`g_i` the i-th row and C the clip norm, ``"flat"`` returns :math:`\sum_i g_i \min(1, C/\|g_i\|_2)` and
    ``"automatic"`` :math:`\sum_i g_i\, C/(\|g_i\|_2 + \gamma)` with :math:`\gamma = 0.01`. ``"none"`` (for runs that
    claim nothing) returns the plain sum.

    Guarantees:
      * Adding or removing one row changes the result by at most ``l2_clip_norm`` in L2 norm, up to float64 rounding
        (not for ``"none"``).
      * A row with a NaN or an infinity contributes exactly zero; nothing is raised, logged or branched on.
      * The result does not depend on how the rows are split over calls, up to float64 rounding.

    Args:
      rows: Per-example gradients, shape ``(n, d)``, any float dtype; ``n`` may be 0. Sensitive.
      l2_clip_norm: Radius C > 0 in the units of the loss gradient (ignored for ``"none"``). Public.
      clipping: The rule above. Public.

    Returns:
      The sum, shape ``(d,)``, float64. Still sensitive.

    Raises:
      ValueError: If ``l2_clip_norm`` is not positive and finite, or ``clipping`` is unknown.

    References:
      Abadi et al. (2016), arXiv:1607.00133, Algorithm 1; Bu et al. (2022), arXiv:2206.07136, AUTO-S.

    Example:
      >>> rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [float("nan"), 1.0]])
      >>> clip_and_sum(rows, l2_clip_norm=1.0)
      tensor([0.9000, 1.2000], dtype=torch.float64)
    """
    clip_scale(torch.zeros(0), l2_clip_norm, clipping)  # refuses bad arguments also where there is no row
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for chunk in rows.split(max(1, _CHUNK_NUMBERS // max(1, rows.shape[1]))):
        exact = chunk.to(torch.float64)
        norms = exact.norm(dim=1)
        usable = torch.isfinite(norms)
        total += clip_scale(norms, l2_clip_norm, clipping) @ torch.where(usable[:, None], exact, 0.0)
    return total


def clip_scale(norms: torch.Tensor, l2_clip_norm: float, clipping: str) -> torch.Tensor:
    """The factor that brings a row of each norm into the ball, by the rules of :func:`clip_and_sum`.

    Guarantees:
      * Factor times norm is at most ``l2_clip_norm`` (not for ``"none"``); a norm that is not finite has factor 0, and
        whoever uses it must also leave that row's numbers out.

    Args:
      norms: L2 norms, shape ``(n,)``, float64. Sensitive.
      l2_clip_norm: C. Public.
      clipping: ``"flat"``, ``"automatic"`` or ``"none"``. Public.

    Returns:
      Factors, shape ``(n,)``. Sensitive.

    Raises:
      ValueError: As for :func:`clip_and_sum`.
    """
    if clipping not in CLIPPINGS:
        raise ValueError(f"Expected clipping={clipping!r} to be 'flat', 'automatic' or 'none'.")
    if clipping != "none" and not (0.0 < l2_clip_norm < math.inf):
        raise ValueError(f"Expected l2_clip_norm={l2_clip_norm!r} to be positive and finite.")
    if clipping == "flat":
        scale = (l2_clip_norm / norms).clamp(max=1.0)
    elif clipping == "automatic":
        scale = l2_clip_norm / (norms + AUTOMATIC_GAMMA)
    else:
        scale = torch.ones_like(norms)
    return torch.where(torch.isfinite(norms), scale, 0.0)


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """Gaussian mechanism on a clipped sum, as the plan fixes it.

    Args:
      l2_clip_norm: C, the largest change of the sum when one example is added or removed.
      noise_multiplier: Noise standard deviation divided by C; 0 for runs that claim nothing.
      clipping: Rule for :func:`clip_and_sum`.
    """

    l2_clip_norm: float
    noise_multiplier: float
    clipping: str

    def __post_init__(self) -> None:
        if self.clipping != "none" and not _SMALLEST_NOISE < self.noise_std < 1 / _SMALLEST_NOISE:
            raise ValueError(
                f"Expected noise_multiplier={self.noise_multiplier!r} times l2_clip_norm={self.l2_clip_norm!r} to be "
                "positive and of ordinary size."
            )

    @classmethod
    def from_plan(cls, plan: Plan) -> Mechanism:
        """The mechanism that ``plan`` accounts for: the same numbers, read from the same object."""
        return cls(
            l2_clip_norm=plan.l2_clip_norm,
            noise_multiplier=plan.noise_multiplier,
            clipping=plan.clipping,
        )

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on every coordinate of the sum, in gradient units."""
        return self.noise_multiplier * self.l2_clip_norm if self.noise_multiplier else 0.0

    def clip_and_sum(self, rows: torch.Tensor) -> torch.Tensor:
        """:func:`clip_and_sum` with this mechanism's clip norm and rule. Sensitive in, sensitive out."""
        return clip_and_sum(rows, self.l2_clip_norm, self.clipping)

    def scale(self, norms: torch.Tensor) -> torch.Tensor:
        """:func:`clip_scale` with this mechanism's clip norm and rule. Sensitive in, sensitive out."""
        return clip_scale(norms, self.l2_clip_norm, self.clipping)

    def release(self, total: torch.Tensor, randomness: Randomness) -> torch.Tensor:
        r"""Turns a sensitive sum into a released one: the only exit.

        Returns :math:`\mathrm{round}_\eta(t + N(0, (\sigma C)^2 I))` with grid :math:`\eta = 2^{\lfloor \log_2 \sigma C
        \rfloor - 20}`. Rounding is post-processing: it costs no privacy, and it removes the low-order bits in which a
        floating-point sum can betray its summands (Mironov 2012).

        Guarantees:
          * Gaussian noise of standard deviation ``noise_std``, drawn once, in float64, independently for every
            coordinate and call.
          * The caller has charged this step to the ledger before the data was drawn.

        Args:
          total: Clipped sum over all microbatches of the step, shape ``(d,)``, float64. Sensitive.
          randomness: Source of the noise.

        Returns:
          The noisy sum, shape ``(d,)``, float64, same device. Released.

        Raises:
          ValueError: If ``total`` is not a float64 vector.

        References:
          Dwork and Roth (2014), A.1; Mironov (2012), "On significance of the least significant bits".
        """
        if total.dim() != 1 or total.dtype != torch.float64:
            raise ValueError(f"Expected total of shape (d,) in float64, got {tuple(total.shape)} in {total.dtype}.")
        if self.clipping == "none":
            return total.clone()
        noisy = total + self.noise_std * randomness.normal(total.numel()).to(total.device)
        grid = 2.0 ** (math.floor(math.log2(self.noise_std)) - _GRID_BITS)
        return torch.round(noisy / grid) * grid
