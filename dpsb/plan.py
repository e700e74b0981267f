"""From what a user asks for to the frozen plan of a run. Reads no data and needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dpsb_accounting import NonPrivate, Phase, Plan, PoissonGaussian, noise_multiplier_for
from dpsb_accounting import epsilon as epsilon_of

# Andrew et al. (2021): the count's noise is M/20, the logarithm of C moves by at most 0.2 a step. Noise on the count of
# at least 5 times the noise multiplier keeps the gradient's own noise within 0.6 % of what it were without the count.
_COUNT_NOISE_SHARE, _ADAPTIVE_RATE = 20, 0.2
DEFAULT_BASIS = {"kind": "weight_svd", "access": "data_free"}


def make_plan(
    *,
    epsilon: float,
    delta: float,
    num_examples: int,
    expected_batch_size: int,
    steps: int | None = None,
    epochs: float | None = None,
    num_examples_declared: bool = True,
    neighboring: str | None = None,
    l2_clip_norm: float = 1.0,
    clipping: str = "flat",
    adaptive_quantile: float = 0.5,
    unit: str = "example",
    basis: Mapping[str, Any] = DEFAULT_BASIS,
    released_before: Sequence[Phase] = (),
    noise_multiplier: float | None = None,
    details: Mapping[str, Any] | None = None,
) -> Plan:
    r"""The plan of a private run: sampler, clip norm, noise and accounting events in one frozen object.

    q = ``expected_batch_size / num_examples``; T = ``steps``, or ``ceil(epochs / q)``; the noise multiplier is the
    smallest (to 0.1 %) for which the upper bound of epsilon at ``delta`` over T Poisson-subsampled Gaussian releases
    and everything in ``released_before`` does not exceed ``epsilon``.

    Args:
      epsilon: Target, > 0; ``math.inf`` makes a run without clipping and noise that claims nothing.
      delta: Probability parameter, below ``1 / num_examples``.
      num_examples: N. Declared: a public number, never compared with the data. Otherwise: the true number of
        examples, which then counts as public.
      expected_batch_size: Public; the divisor of the noisy sum, and q * N.
      steps: T. Give this or ``epochs``.
      epochs: Expected passes over the data.
      num_examples_declared: Whether N was declared.
      neighboring: ``"add_or_remove_one"`` (default if N is declared), ``"zero_out"`` (default otherwise) or
        ``"replace_one"``.
      l2_clip_norm: C.
      clipping: ``"flat"``, ``"automatic"`` (AUTO-S) or ``"adaptive"``: C then starts at ``l2_clip_norm`` and follows a
        quantile of the norms. The noise multiplier is that of clipped sum and count *together*, so the epsilon is the
        same and the gradient's own noise a little larger.
      adaptive_quantile: For ``"adaptive"``: what share of the norms shall lie within C.
      unit: ``"example"``, or ``"user"``: N, M and q are then of people.
      basis: Provenance of the basis.
      released_before: Charged releases that come before training, such as a private basis. A non-private one is not
        calibrated for: the plan's epsilon is infinite whatever the noise.
      noise_multiplier: Use this instead of calibrating; the plan's epsilon, which is what is claimed, is then whatever
        it comes to, above or below ``epsilon``.
      details: Further public facts for the ledger.

    Raises:
      ValueError: If an argument is out of range; the message names it and shows the value.
      CalibrationInfeasible: If no noise multiplier reaches the target.

    Example:
      >>> plan = make_plan(epsilon=3, delta=1e-5, num_examples=4000, expected_batch_size=256, epochs=5)
      >>> plan.steps, plan.sampling_prob, round(plan.noise_multiplier, 2)
      (79, 0.064, 1.1...)
    """
    if (steps is None) == (epochs is None):
        raise ValueError(f"Expected exactly one of steps={steps!r} and epochs={epochs!r}.")
    if not 1 <= expected_batch_size <= num_examples:
        raise ValueError(
            f"Expected expected_batch_size={expected_batch_size!r} between 1 and num_examples={num_examples!r}: "
            "it is how many of them a step draws on average (256 unless you say otherwise)."
        )
    if epochs is not None:
        if not epochs > 0:
            raise ValueError(f"Expected epochs={epochs!r} > 0.")
        steps = math.ceil(epochs * num_examples / expected_batch_size - 1e-9)
    total_steps = steps if steps is not None else 0
    if total_steps < 1:
        raise ValueError(f"Expected steps={steps!r} of at least 1.")
    relation = relation_for(neighboring, num_examples_declared)
    sampling_prob = expected_batch_size / num_examples
    if math.isinf(epsilon):
        event: NonPrivate | PoissonGaussian = NonPrivate(reason="trained without clipping and noise (epsilon=inf)")
        l2_clip_norm, clipping = math.inf, "none"
    else:
        if noise_multiplier is None:
            noise_multiplier = noise_multiplier_for(
                target_epsilon=epsilon,
                delta=delta,
                sampling_prob=sampling_prob,
                steps=total_steps,
                neighboring=relation,
                before=tuple(phase for phase in released_before if not isinstance(phase.event, NonPrivate)),
            )
        event = PoissonGaussian(noise_multiplier=noise_multiplier, sampling_prob=sampling_prob)
    facts = dict(details or {})
    if clipping == "adaptive":
        if not 0 < adaptive_quantile < 1:
            raise ValueError(f"Expected adaptive_quantile={adaptive_quantile!r} between 0 and 1.")
        count_noise_std = max(expected_batch_size / _COUNT_NOISE_SHARE, 5 * float(noise_multiplier or 0.0))
        facts["adaptive_clip"] = {
            "quantile": adaptive_quantile,
            "learning_rate": _ADAPTIVE_RATE,
            "count_noise_std": count_noise_std,
            "event": "the clipped sum and a centred count of the rows within the clip norm, released together",
        }
    return Plan(
        phases=(*released_before, Phase("train", event, total_steps)),
        delta=delta,
        target_epsilon=epsilon,
        neighboring=relation,
        unit=unit,
        num_examples=num_examples,
        num_examples_declared=num_examples_declared,
        expected_batch_size=expected_batch_size,
        sampling_prob=sampling_prob,
        l2_clip_norm=l2_clip_norm,
        clipping=clipping,
        basis=dict(basis),
        details=facts,
    )


def differing(one: Plan, other: Plan) -> list[str]:
    """The names of the fields in which two plans differ."""
    mine, theirs = one.to_json(), other.to_json()
    return sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key))


def relation_for(neighboring: str | None, num_examples_declared: bool) -> str:
    """The relation of a plan: the one asked for, or the strongest that holds."""
    return neighboring or ("add_or_remove_one" if num_examples_declared else "zero_out")


def plan_summary(plan: Plan) -> dict[str, Any]:
    """The numbers of a plan that a user asks for first, as JSON."""
    bound = epsilon_of(plan)
    return {
        "epsilon": {"lower": _json_number(bound.lower), "upper": _json_number(bound.upper)},
        "target_epsilon": _json_number(plan.target_epsilon),
        "delta": plan.delta,
        "unit": plan.unit,
        "neighboring": plan.neighboring,
        "num_examples": plan.num_examples,
        "expected_batch_size": plan.expected_batch_size,
        "sampling_prob": plan.sampling_prob,
        "steps": plan.steps,
        "noise_multiplier": plan.noise_multiplier,
        "l2_clip_norm": _json_number(plan.l2_clip_norm),
        "method": bound.method,
    }


def cost_table(plan: Plan, factors: Sequence[float] = (0.5, 1.0, 2.0, 4.0)) -> list[dict[str, float]]:
    """What other batch sizes would cost at the same epsilon and the same number of passes over the data.

    Returns:
      A row per batch size: ``expected_batch_size``, ``steps``, ``noise_multiplier``, and ``noise_per_step``, the
      standard deviation of the noise on each coordinate of the *mean* gradient in units of C (noise_multiplier / M).
    """
    rows = []
    for factor in factors:
        batch = round(plan.expected_batch_size * factor)
        if not 1 <= batch <= plan.num_examples:
            continue
        same = factor == 1.0
        other = (
            plan
            if same
            else make_plan(
                epsilon=plan.target_epsilon,
                delta=plan.delta,
                num_examples=plan.num_examples,
                num_examples_declared=plan.num_examples_declared,
                expected_batch_size=batch,
                steps=math.ceil(plan.steps / factor),
                neighboring=plan.neighboring,
            )
        )
        rows.append(
            {
                "expected_batch_size": batch,
                "steps": other.steps,
                "noise_multiplier": other.noise_multiplier,
                "noise_per_step": other.noise_multiplier / batch,
            }
        )
    return rows


def _json_number(value: float) -> float | str:
    return "inf" if math.isinf(value) else value
