"""How much of the budget a private basis takes: its noise, and the share that it comes to. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dpsb.basis_spec import PHASE, BasisSpecError, check_share
from dpsb_accounting import Event, Gaussian, Phase, Plan, PoissonGaussian, gaussian, noise_multiplier_for
from dpsb_accounting import epsilon as epsilon_of

_SHARES = {"private": (0.10, 0.05), "hybrid": (0.02, 0.02), "choice": (0.01, 0.01)}
_LESS_FROM_EPSILON = 3.0


class BudgetError(ValueError):
    """A share of the budget that cannot be spent as asked; the message says why."""


def default_share(kind: str, epsilon: float) -> float:
    """The share of the budget for ``"private"``, ``"hybrid"`` or ``"choice"`` if the user names none."""
    below, above = _SHARES[kind]
    return below if epsilon < _LESS_FROM_EPSILON else above


def gaussian_level(epsilon: float, delta: float) -> float:
    r"""The :math:`\mu` for which one Gaussian of noise multiplier :math:`1/\mu` is exactly (epsilon, delta)-private.

    References:
      Dong, Roth and Su (2022), arXiv:1905.02383, Corollary 2.13; Balle and Wang (2018), arXiv:1805.06530.
    """
    if epsilon <= 0:
        return 0.0
    return 1.0 / gaussian.noise_multiplier(epsilon, delta)


def basis_noise_multiplier(
    *,
    epsilon: float,
    delta: float,
    share: float,
    releases: int = 1,
    sampling_prob: float = 1.0,
    neighboring: str = "add_or_remove_one",
) -> float:
    r"""The noise of each of k releases that together take the share f of a budget.

    Squared Gaussian levels add up under composition, so :math:`k/\sigma^2 = f\mu^2`, that is
    :math:`\sigma = \sqrt k / (\sqrt f\,\mu)`; twice that for replace_one, where a sum moves by 2C. With Poisson
    sampling, the noise for which the k releases alone cost the epsilon of that Gaussian.

    Args:
      epsilon: Target of the whole run, finite.
      delta: Of the whole run.
      share: f, from 0.0001 to 0.9.
      releases: k.
      sampling_prob: q; 1 reads every example.
      neighboring: Relation of the plan.

    Returns:
      Noise standard deviation divided by the clip norm. Public.

    Raises:
      BudgetError: If the share is out of range.

    Example:
      >>> round(basis_noise_multiplier(epsilon=3, delta=1e-5, share=0.1), 1)
      4.4
    """
    try:
        check_share(share)
    except BasisSpecError as error:
        raise BudgetError(str(error)) from None
    if math.isinf(epsilon):
        raise BudgetError("A private basis needs a finite epsilon to take its share of; without one use 'lora-sb'.")
    squared = share * gaussian_level(epsilon, delta) ** 2 / releases
    if neighboring == "replace_one":
        squared /= 4
    if sampling_prob == 1.0:
        return 1 / math.sqrt(squared)
    alone = gaussian.epsilon(1 / (math.sqrt(share) * gaussian_level(epsilon, delta)), delta)[1]
    if alone <= 0:
        raise BudgetError(f"basis_share={share!r} is too small to be accounted for at delta={delta!r}.")
    return noise_multiplier_for(
        target_epsilon=alone, delta=delta, sampling_prob=sampling_prob, steps=releases, neighboring=neighboring
    )


def basis_phase(
    *,
    epsilon: float,
    delta: float,
    share: float,
    releases: int = 1,
    sampling_prob: float = 1.0,
    neighboring: str = "add_or_remove_one",
) -> Phase:
    """The phase that pays for a private basis; arguments as for :func:`basis_noise_multiplier`."""
    noise = basis_noise_multiplier(
        epsilon=epsilon,
        delta=delta,
        share=share,
        releases=releases,
        sampling_prob=sampling_prob,
        neighboring=neighboring,
    )
    event: Event = (
        Gaussian(noise_multiplier=noise)
        if sampling_prob == 1.0
        else PoissonGaussian(noise_multiplier=noise, sampling_prob=sampling_prob)
    )
    return Phase(PHASE, event, releases)


def realised_share(plan: Plan) -> dict[str, Any] | None:
    r"""What the phases before training came to: :math:`\mu_b^2 / (\mu_b^2 + \mu_t^2)` from the exact epsilons.

    Returns:
      ``basis_epsilon`` and ``train_epsilon`` (upper bounds of either alone, which do not add up to the total) and
      ``share``; None if nothing private comes before training. Public.
    """
    before = [phase for phase in plan.phases if phase.name != "train"]
    if not before or not plan.is_private:
        return None
    ends = [_upper(part, plan) for part in (before, [plan.train])]
    levels = [gaussian_level(end, plan.delta) ** 2 for end in ends]
    return {"basis_epsilon": ends[0], "train_epsilon": ends[1], "share": levels[0] / sum(levels)}


def _upper(phases: Sequence[Phase], plan: Plan) -> float:
    return epsilon_of(phases, delta=plan.delta, neighboring=plan.neighboring).upper
