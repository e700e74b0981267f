"""The only way from private examples to a basis: charge, one pass over the data, clip jointly, noise in every layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn, Protocol

import numpy as np
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from dpsb.adapter import attach, detach
from dpsb.basis.canaries import BasisCanaries
from dpsb.basis.per_example import PartlyAdded, Sketch, add_clipped_sum, preferences, zeros_for
from dpsb.basis.random import random
from dpsb.basis_spec import PHASE
from dpsb.capture import adapter_train_mode
from dpsb.losses import LossFn
from dpsb.mechanism import Mechanism
from dpsb.models import HEAD_NAMES
from dpsb.modes import training_mode
from dpsb.probe import Collate, Example, without_dropout
from dpsb.randomness import SEEDED, Randomness
from dpsb.sampling import bucket_of, length_buckets, microbatches, padded_lengths, poisson_draw
from dpsb.train import probe_every_bucket
from dpsb.withheld import StepMemoryError, is_out_of_memory, messages_withheld
from dpsb_accounting import Gaussian, Ledger, PoissonGaussian

_REHEARSED_AT_LEAST = 3


@dataclass(frozen=True, kw_only=True)
class Clip:
    """How each example is bounded in a release for the basis, and the share of the budget that pays; for the plan.

    Args:
      l2_clip_norm: C.
      clipping: ``"flat"``, or ``"automatic"``: every example is scaled to almost exactly C.
      share: Of the budget, as it was asked for.
    """

    l2_clip_norm: float
    clipping: str
    share: float

    def to_json(self) -> dict[str, str | int | float]:
        return {"l2_clip_norm": self.l2_clip_norm, "clipping": self.clipping, "share": self.share}


def pass_budget(token_budget: int) -> int:
    """Tokens per microbatch of a pass for a basis: an eighth less than in training.

    Where a plain backward pass is at its peak, this one still keeps what the topmost layers received, for their sums:
    up to 2 % more in all, measured. So it stays below the memory of a plain microbatch with its sums.
    """
    return max(1, token_budget - token_budget // 8)


class Releases(Protocol):
    """What a basis is made from: noisy clipped sums of sketched gradients, whoever makes them."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def layers(self) -> Mapping[str, LoraLayer]: ...

    @property
    def mechanism(self) -> Mechanism: ...

    def release(self, sketches: Mapping[str, Sketch]) -> dict[str, torch.Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class PrivateExamples:
    """A model, the private examples, and the ledger that pays for looking at them.

    Args:
      model: With PEFT LoRA layers as ``add_lora`` makes them; the head as training will begin with it.
      layers: Its target layers by name.
      dataset: Examples of at most ``max_length`` tokens. Sensitive.
      loss_fn: Per-example loss.
      collate: Examples to model inputs of a given padded length.
      synthetic: Synthetic or public examples to probe with, as for ``fit``.
      max_length: Largest number of tokens. Public.
      token_budget: Tokens per microbatch of training; see :func:`pass_budget`. Memory and speed only.
      ledger: Open for writing; its plan has a phase "basis" and says in ``plan.basis`` how examples are clipped.
      randomness: Of the draw and of the noise; a seeded one taints the run.
      canaries: Gradients that belong to no example, to audit the release; they taint the run.
      on_pass: Told the number of each pass and how many there are.
    """

    model: nn.Module
    layers: Mapping[str, LoraLayer]
    dataset: Sequence[Example]
    loss_fn: LossFn
    collate: Collate
    synthetic: Sequence[Example]
    max_length: int
    token_budget: int
    ledger: Ledger
    randomness: Randomness
    canaries: BasisCanaries | None = None
    on_pass: Callable[[int, int], None] = lambda _number, _of: None
    _rehearsed: list[bool] = field(default_factory=list)

    @property
    def mechanism(self) -> Mechanism:
        """The mechanism of a basis release, read from the plan that accounts for it."""
        plan = self.ledger.plan
        event, facts = plan.phase(PHASE).event, plan.basis
        if plan.unit != "example":
            raise ValueError(f"A basis is released per example, so it does not protect a {plan.unit}, the plan's unit.")
        if not isinstance(event, (Gaussian, PoissonGaussian)):
            raise ValueError(f"Expected the plan's phase {PHASE!r} to be a Gaussian release, got {event!r}.")
        clip_norm, clipping = facts.get("l2_clip_norm"), facts.get("clipping")
        if not isinstance(clip_norm, (int, float)) or clipping not in ("flat", "automatic"):
            raise ValueError(f"Expected the plan's basis to state l2_clip_norm and clipping, got {dict(facts)!r}.")
        return Mechanism(l2_clip_norm=float(clip_norm), noise_multiplier=event.noise_multiplier, clipping=str(clipping))

    def release(self, sketches: Mapping[str, Sketch]) -> dict[str, torch.Tensor]:
        r"""One charged release of :math:`\sum_i c_i L^\top G_i R + N(0, (\sigma C)^2)` for every layer together.

        Guarantees:
          * The charge is on disk before any example is drawn or read; a failure afterwards leaves it spent.
          * All layers are one vector with one joint clip C, and every coordinate of every layer gets noise of standard
            deviation :math:`\sigma C` (not C times a layer's share of it), once, in float64.
          * Model, loss and collator have passed the isolation probe and a rehearsal on synthetic examples before the
            first charge.

        Args:
          sketches: What of each target weight's gradient is released. Public or released.

        Returns:
          Noisy sums by layer, float64. Released.

        Raises:
          ProbeError: If the examples are coupled; nothing has been charged.
          BudgetSpent: If the plan allows no further release.
          StepError, MemoryError: If the pass fails; the release is spent.
        """
        totals = zeros_for(self.layers, sketches, next(self.model.parameters()).device)

        def add(examples: Sequence[Example], length: int) -> None:
            self._add(examples, length, sketches, totals)

        canaries = self.canaries
        if canaries is not None:
            canaries.place({name: total.numel() for name, total in totals.items()})
        planted = self._charged_pass(add, totals, others=len(canaries or ()))
        mechanism, released = self.mechanism, {}
        for name in list(totals):  # layer by layer, so that the noise of one layer is all that is held besides
            total = totals.pop(name)
            flat = total.flatten()
            if canaries is None:
                released[name] = mechanism.release(flat, self.randomness).view_as(total)
                continue
            noisy = mechanism.release(flat + canaries.part(name, planted, mechanism).to(flat.device), self.randomness)
            canaries.observe(name, noisy - flat, mechanism, self._sampling_prob)  # the attacker knows all other rows
            released[name] = noisy.view_as(total)
        return released

    def release_preferences(self, candidates: Sequence[Mapping[str, Sketch]]) -> torch.Tensor:
        r"""One charged release of how much of the examples' gradients each of m bases holds.

        Row i is :math:`e_{ij} = \|P_j g_i\|^2 / \|g_i\|^2` less its mean over the m candidates; rows are clipped,
        summed and noised like gradients. The largest sum is the basis that the examples prefer.

        Guarantees: as for :meth:`release`.

        Args:
          candidates: One collection of sketches for each basis. Public.

        Returns:
          Noisy sums, shape ``(m,)``, float64. Released.
        """
        total = torch.zeros(len(candidates), dtype=torch.float64)
        mechanism = self.mechanism

        def add(examples: Sequence[Example], length: int) -> None:
            batch = self.collate(examples, length)
            total.add_(mechanism.clip_and_sum(preferences(self.model, self.loss_fn, batch, self.layers, candidates)))

        self._charged_pass(add, {"total": total})
        return mechanism.release(total, self.randomness)

    @property
    def _sampling_prob(self) -> float:
        event = self.ledger.plan.phase(PHASE).event
        return event.sampling_prob if isinstance(event, PoissonGaussian) else 1.0

    def _charged_pass(
        self,
        add: Callable[[Sequence[Example], int], None],
        totals: Mapping[str, torch.Tensor],
        others: int = 0,
    ) -> np.ndarray:
        """Probe and rehearsal on synthetic examples, the charge, and only then ``add`` for every microbatch.

        Returns:
          Which of ``others`` rows that stand for no example were drawn besides. Sensitive as any draw.
        """
        if self.randomness.tainted:
            self.ledger.taint(*SEEDED)
        if others:
            self.ledger.taint("basis_canaries", "gradients that belong to no example were put in to audit the release")
        with training_mode(self.model), without_dropout(self.model):
            if not self._rehearsed:
                self._check_isolation()
                self._rehearsed.append(True)
            add(*self._largest_microbatch())
            for total in totals.values():
                total.zero_()
            phase = self.ledger.plan.phase(PHASE)
            number = self.ledger.charge(PHASE)
            self.on_pass(number + 1, phase.count)
            with messages_withheld("The pass for the basis"):
                size = len(self.dataset)
                draw = poisson_draw(size + others, self._sampling_prob, self.randomness)
                drawn = [self.dataset[int(i)] for i in draw if i < size]
                lengths = padded_lengths(drawn, length_buckets(self.max_length))
                for positions, length in microbatches(np.arange(len(drawn)), lengths, pass_budget(self.token_budget)):
                    add([drawn[i] for i in positions], length)
        planted: np.ndarray = draw[draw >= size] - size
        return planted

    def _check_isolation(self) -> None:
        """The probe that ``fit`` runs, on cores with a random basis that are taken off again."""
        adapter = attach(self.model, random(self.model), allow=HEAD_NAMES)
        try:
            adapter_train_mode(adapter)
            buckets = length_buckets(self.max_length)
            probe_every_bucket(adapter, self.loss_fn, self.collate, self.synthetic, buckets, self.token_budget)
        finally:
            detach(adapter)

    def _largest_microbatch(self) -> tuple[list[Example], int]:
        """Synthetic examples to rehearse with, so that what can fail does so before anything is charged."""
        buckets = length_buckets(self.max_length)
        longest = max(bucket_of(len(example["input_ids"]), buckets) for example in self.synthetic)
        size = max(_REHEARSED_AT_LEAST, pass_budget(self.token_budget) // longest)
        return [self.synthetic[i % len(self.synthetic)] for i in range(size)], longest

    def _add(
        self,
        examples: Sequence[Example],
        length: int,
        sketches: Mapping[str, Sketch],
        totals: Mapping[str, torch.Tensor],
    ) -> None:
        """Adds a microbatch; halves it while memory runs out."""
        add = partial(add_clipped_sum, layers=self.layers, sketches=sketches, mechanism=self.mechanism, totals=totals)
        try:
            add(self.model, self.loss_fn, self.collate(examples, length))
            return
        except PartlyAdded as error:
            _give_up(error.__cause__ or error)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(examples) == 1:
                _give_up(error)
        half = len(examples) // 2
        for part in (examples[:half], examples[half:]):
            self._add(part, length, sketches, totals)


def _give_up(error: BaseException) -> NoReturn:
    if not is_out_of_memory(error):
        raise error
    raise StepMemoryError("Out of memory in the pass for the basis. Lower token_budget or max_length.") from None
