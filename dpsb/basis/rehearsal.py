"""A paid basis rehearsed on public examples: what a budget would find if the private data were like them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from dpsb.basis._common import public_generator
from dpsb.basis.budget import BudgetError, basis_phase, default_share
from dpsb.basis.per_example import Batch, Sketch, add_clipped_sum, zeros_for
from dpsb.basis.private import releases_for, rounds_for, sampling_prob_for
from dpsb.losses import LossFn
from dpsb.mechanism import Mechanism
from dpsb.plan import make_plan, relation_for
from dpsb_accounting import Gaussian, Phase, PoissonGaussian


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a run would be allowed; arguments as for :func:`dpsb.plan.make_plan`. Public."""

    epsilon: float
    delta: float
    num_examples: int
    expected_batch_size: int
    steps: int | None = None
    epochs: float | None = None
    neighboring: str | None = None


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The noise multipliers of a run with a basis of one kind.

    Args:
      train: Of each step.
      share: Of the budget that the basis takes; None where it is free.
      basis: Of each release for the basis; 0 where it is free.
      rounds: Of subspace iteration, for a private basis.
      sampling_prob: With which an example is in a release.
    """

    train: float
    share: float | None = None
    basis: float = 0.0
    rounds: int = 0
    sampling_prob: float = 1.0


def noise_of(budget: Budget, layers: Mapping[str, LoraLayer]) -> dict[str, Noise]:
    """The noise of a run whose basis is ``"free"``, ``"private"`` or ``"hybrid"``, all within the same budget.

    Raises:
      BudgetError, ValueError: If the budget cannot be spent.
    """
    if not 0 < budget.epsilon < float("inf"):
        raise BudgetError(f"Expected epsilon={budget.epsilon!r} to be positive and finite.")
    relation = relation_for(budget.neighboring, True)

    def train_noise(phases: tuple[Phase, ...]) -> float:
        plan = make_plan(
            epsilon=budget.epsilon,
            delta=budget.delta,
            num_examples=budget.num_examples,
            expected_batch_size=budget.expected_batch_size,
            steps=budget.steps,
            epochs=budget.epochs,
            neighboring=relation,
            released_before=phases,
        )
        return float(plan.noise_multiplier or 0.0)

    found = {"free": Noise(train=train_noise(()))}
    for kind, rounds in (("private", rounds_for(layers)), ("hybrid", 0)):
        share, prob = default_share(kind, budget.epsilon), sampling_prob_for(rounds)
        phase = basis_phase(
            epsilon=budget.epsilon,
            delta=budget.delta,
            share=share,
            releases=releases_for(rounds),
            sampling_prob=prob,
            neighboring=relation,
        )
        noise = phase.event.noise_multiplier if isinstance(phase.event, (Gaussian, PoissonGaussian)) else 0.0
        found[kind] = Noise(train=train_noise((phase,)), share=share, basis=noise, rounds=rounds, sampling_prob=prob)
    return found


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    r"""Stands where private examples stand in a release: the sum over n *public* examples times N/n, and the noise.

    Nothing is charged and nothing is private, so the noise comes from a fixed public generator and a rehearsal says
    the same every time. The mean over n examples has a sampling error that N would not have: where the noise is small,
    a rehearsal errs downwards.

    Args:
      model: With PEFT LoRA layers.
      layers: Its target layers by name.
      loss_fn: Per-example loss.
      batches: **Public** examples.
      num_examples: N, how many private examples a release will read, on average. Public.
      mechanism: How each example is clipped, and the noise of one release.
      visible: Filled by each release: in what share of the layers the strongest direction stands above the noise.
    """

    model: nn.Module
    layers: Mapping[str, LoraLayer]
    loss_fn: LossFn
    batches: Sequence[Batch]
    num_examples: int
    mechanism: Mechanism
    visible: list[float] = field(default_factory=list)
    _generator: torch.Generator = field(default_factory=public_generator)

    def release(self, sketches: Mapping[str, Sketch]) -> dict[str, torch.Tensor]:
        """What :meth:`dpsb.basis.release.PrivateExamples.release` would return for N such examples. Public."""
        device = next(self.model.parameters()).device
        moved = {name: Sketch(*(None if s is None else s.to(device) for s in sk)) for name, sk in sketches.items()}
        totals = zeros_for(self.layers, moved, device)
        for batch in self.batches:
            add_clipped_sum(self.model, self.loss_fn, batch, self.layers, moved, self.mechanism, totals)
        count = sum(len(next(iter(batch.values()))) for batch in self.batches)
        released, seen = {}, 0
        for name in list(totals):
            total = totals.pop(name).cpu() * (self.num_examples / count)
            seen += is_visible(total, self.mechanism.noise_std)
            noise = torch.randn(total.shape, generator=self._generator, dtype=torch.float64)
            released[name] = total + self.mechanism.noise_std * noise
        self.visible.append(seen / len(released))
        return released


def is_visible(total: torch.Tensor, noise_std: float) -> bool:
    r"""Whether the strongest direction of a sum would be found in noise: :math:`s_1 > \sigma C\,(mn)^{1/4}`.

    References:
      Benaych-Georges and Nadakuditi (2012), arXiv:1103.2221: below that the leading singular vectors of the noisy
      matrix say nothing of those of the sum.
    """
    threshold = noise_std * (total.shape[0] * total.shape[1]) ** 0.25
    return float(torch.linalg.matrix_norm(total, 2)) > threshold
