"""The private core: clip, sum, add noise. Read this file to check the guarantee of one step.

Sensitive rows come in, and :meth:`Mechanism.release` is the only way out. The steps of a run are counted in the
ledger *before* their data is drawn (``dpsb.train``), so nothing here needs to know about accounting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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
_LARGEST_CLIP_NORM = 1e12
_ROUNDING = 2.0**-50


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
class AdaptiveClip:
    r"""How C follows a quantile of the rows' norms, at the price of a noisy count in every release.

    Each row i contributes, besides its clipped self, :math:`b_i = +\frac12` if :math:`\|g_i\| \le C` and
    :math:`-\frac12` if not, and 0 if the row is zero, which is what ``zero_out`` puts in its place, or not finite; the
    sum of the b gets noise of standard deviation :math:`\sigma_b`. One row then moves sum
    and count, measured in their own noise, by :math:`z^{-2} + (2\sigma_b)^{-2} = z_{\mathrm{eff}}^{-2}` squared, so
    both together are one Gaussian release with the noise multiplier :math:`z_{\mathrm{eff}}`, and that is the plan's
    event; the gradient's own z follows from it. Afterwards :math:`C \leftarrow C e^{-\eta(\tilde b/M + 1/2 - q)}`.

    Args:
      quantile: q, what share of the norms shall lie within C. Public.
      learning_rate: eta. Public.
      count_noise_std: sigma_b, more than half the plan's noise multiplier. Public.
      expected_batch_size: M. Public.

    References:
      Andrew et al. (2021), arXiv:1905.03871, Algorithm 1 and Theorem 1.
    """

    quantile: float
    learning_rate: float
    count_noise_std: float
    expected_batch_size: int

    @classmethod
    def from_plan(cls, plan: Plan) -> AdaptiveClip:
        facts: Mapping[str, Any] = plan.details.get("adaptive_clip", {})  # type: ignore[assignment]
        try:
            numbers = {name: float(facts[name]) for name in ("quantile", "learning_rate", "count_noise_std")}
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                "Expected the details of a plan with clipping='adaptive' to hold adaptive_clip with quantile, "
                f"learning_rate and count_noise_std, got {facts!r}."
            ) from None
        return cls(**numbers, expected_batch_size=plan.expected_batch_size)

    def gradient_noise_multiplier(self, effective: float) -> float:
        """z of the gradient, given the noise multiplier of sum and count together."""
        left = effective**-2 - (2 * self.count_noise_std) ** -2
        if not left > 0:
            raise ValueError(
                f"Expected count_noise_std={self.count_noise_std!r} to exceed half the noise multiplier {effective!r}."
            )
        return float(left**-0.5)

    def next_clip_norm(self, l2_clip_norm: float, noisy_count: float) -> float:
        """Where C goes after a release of ``noisy_count``, the noisy sum of the b."""
        share = min(1.0, max(0.0, noisy_count / self.expected_batch_size + 0.5))
        moved = l2_clip_norm * math.exp(-self.learning_rate * (share - self.quantile))
        return min(_LARGEST_CLIP_NORM, max(1 / _LARGEST_CLIP_NORM, moved))


def centred_count(rows: torch.Tensor, l2_clip_norm: float) -> torch.Tensor:
    """The sum of :class:`AdaptiveClip`'s b over the rows, shape ``(1,)``, float64; 0 for a row that does not count."""
    total = torch.zeros(1, dtype=torch.float64, device=rows.device)
    for chunk in rows.split(max(1, _CHUNK_NUMBERS // max(1, rows.shape[1]))):
        norms = chunk.to(torch.float64).norm(dim=1)
        counts = torch.isfinite(norms) & (norms > 0)
        total += torch.where(counts, torch.where(norms <= l2_clip_norm, 0.5, -0.5), 0.0).sum()
    return total


class ClipPart(NamedTuple):
    """Neighbouring numbers of a row that are clipped together: how many, and what share of C squared is theirs."""

    size: int
    share: float


def clip_and_sum_parts(
    rows: torch.Tensor, l2_clip_norm: float, clipping: str, parts: Sequence[ClipPart]
) -> torch.Tensor:
    r"""As :func:`clip_and_sum`, each part of a row in a ball of its own.

    Part k of a row is clipped to :math:`C\sqrt{s_k}`. With :math:`\sum_k s_k \le 1` the whole row then lies in the
    ball of radius C, whatever its parts are, so sensitivity and noise are those of :func:`clip_and_sum`.

    Args:
      rows: Shape ``(n, d)``. Sensitive.
      l2_clip_norm: C. Public.
      clipping: ``"flat"`` or ``"automatic"``, within each part. Public.
      parts: Sizes that sum to d and shares. Public.

    Returns:
      The sum, shape ``(d,)``, float64. Still sensitive. A row with a NaN or an infinity anywhere contributes zero.

    Raises:
      ValueError: If the sizes do not sum to d.

    References:
      McMahan et al. (2018), arXiv:1710.06963, Section 2.3 (per-layer clipping).
    """
    if sum(part.size for part in parts) != rows.shape[1]:
        raise ValueError(f"Expected the sizes of the clipped parts {list(parts)} to sum to {rows.shape[1]}.")
    rows = torch.where(torch.isfinite(rows).all(dim=1, keepdim=True), rows, 0.0)
    split = rows.split([part.size for part in parts], dim=1)
    return torch.cat(
        [
            clip_and_sum(piece, l2_clip_norm * math.sqrt(part.share), clipping)
            for piece, part in zip(split, parts, strict=True)
        ]
    )


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """Gaussian mechanism on a clipped sum, as the plan fixes it.

    Args:
      l2_clip_norm: C, the largest change of the sum when one example is added or removed.
      noise_multiplier: Noise standard deviation divided by C; 0 for runs that claim nothing.
      clipping: Rule for :func:`clip_and_sum`, or ``"adaptive"``.
      adaptive: For ``"adaptive"``: flat clipping at a C that moves; the vectors then have a count at their end.
      row_scale: Public positive constants, shape ``(d,)``: every row is multiplied by them *before* it is clipped, so
        what is released is a noisy sum of scaled rows, with the sensitivity and noise that it has without.
      parts: Numbers of a row that are clipped apart; none: the whole row at once.
    """

    l2_clip_norm: float
    noise_multiplier: float
    clipping: str
    adaptive: AdaptiveClip | None = None
    row_scale: torch.Tensor | None = None
    parts: tuple[ClipPart, ...] = ()

    def __post_init__(self) -> None:
        if self.row_scale is not None and not bool((torch.isfinite(self.row_scale) & (self.row_scale > 0)).all()):
            raise ValueError("Expected every number of row_scale to be positive and finite.")
        if (self.adaptive is not None) != (self.clipping == "adaptive"):
            raise ValueError(f"Expected adaptive={self.adaptive!r} to be given exactly for clipping 'adaptive'.")
        if self.parts and (
            self.clipping not in ("flat", "automatic")
            or not all(part.size > 0 and part.share > 0 for part in self.parts)
            or not math.fsum(part.share for part in self.parts) <= 1 + _ROUNDING
        ):
            raise ValueError(
                f"Expected parts={list(self.parts)} to have positive sizes and positive shares that sum to at most 1, "
                f"and clipping={self.clipping!r} to be 'flat' or 'automatic' beside them."
            )
        if self.clipping != "none" and not _SMALLEST_NOISE < self.noise_std < 1 / _SMALLEST_NOISE:
            raise ValueError(
                f"Expected noise_multiplier={self.noise_multiplier!r} times l2_clip_norm={self.l2_clip_norm!r} to be "
                "positive and of ordinary size."
            )

    @classmethod
    def from_plan(cls, plan: Plan) -> Mechanism:
        """The mechanism that ``plan`` accounts for: the same numbers, read from the same object."""
        adaptive = AdaptiveClip.from_plan(plan) if plan.clipping == "adaptive" else None
        noise_multiplier = plan.noise_multiplier
        return cls(
            l2_clip_norm=plan.l2_clip_norm,
            noise_multiplier=adaptive.gradient_noise_multiplier(noise_multiplier) if adaptive else noise_multiplier,
            clipping=plan.clipping,
            adaptive=adaptive,
            parts=_parts_of(plan),
        )

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on every coordinate of the sum, in gradient units."""
        return self.noise_multiplier * self.l2_clip_norm if self.noise_multiplier else 0.0

    def zeros(self, dimension: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """The sum over no rows of ``dimension`` numbers."""
        return torch.zeros(dimension + (self.adaptive is not None), dtype=torch.float64, device=device)

    def clip_and_sum(self, rows: torch.Tensor) -> torch.Tensor:
        """:func:`clip_and_sum` with this mechanism's clip norm and rule. Sensitive in, sensitive out.

        With ``adaptive`` the count stands at the end, in the unit in which ``noise_std`` is the noise it needs.
        """
        if self.row_scale is not None:
            rows = rows.to(torch.float64) * self.row_scale
        if self.parts:
            return clip_and_sum_parts(rows, self.l2_clip_norm, self.clipping, self.parts)
        if self.adaptive is None:
            return clip_and_sum(rows, self.l2_clip_norm, self.clipping)
        total = clip_and_sum(rows, self.l2_clip_norm, "flat")
        return torch.cat([total, centred_count(rows, self.l2_clip_norm) * self._count_unit])

    def scale(self, norms: torch.Tensor) -> torch.Tensor:
        """:func:`clip_scale` with this mechanism's clip norm and rule. Sensitive in, sensitive out."""
        return clip_scale(norms, self.l2_clip_norm, "flat" if self.adaptive is not None else self.clipping)

    def read(self, released: torch.Tensor) -> tuple[torch.Tensor, Mechanism]:
        """Splits a released vector: the noisy sum of the rows, and the mechanism of the next step."""
        if self.adaptive is None:
            return released, self
        count = float(released[-1]) / self._count_unit
        return released[:-1], replace(self, l2_clip_norm=self.adaptive.next_clip_norm(self.l2_clip_norm, count))

    @property
    def moving_clip_norm(self) -> float | None:
        """Where an adaptive C stands, a released number; None where C is fixed by the plan."""
        return self.l2_clip_norm if self.adaptive is not None else None

    @property
    def _count_unit(self) -> float:
        return self.noise_std / self.adaptive.count_noise_std if self.adaptive is not None else 0.0

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


def _parts_of(plan: Plan) -> tuple[ClipPart, ...]:
    facts: Any = plan.details.get("clip_parts", ())
    try:
        return tuple(ClipPart(int(fact["size"]), float(fact["share"])) for fact in facts)
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"Expected the plan's details to hold clip_parts with size and share each, got {facts!r}."
        ) from None
