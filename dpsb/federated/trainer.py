"""The model's side of a silo: loaded and checked once, then asked for local steps again and again."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from dpsb.adapter import Adapter, Basis, Factors, Provenance, attach, detach, lora_layers, set_gradient
from dpsb.basis.hybrid import sketches_of
from dpsb.basis.per_example import WHOLE, Sketch
from dpsb.basis.release import PrivateExamples
from dpsb.capture import adapter_train_mode
from dpsb.clipped_sums import charged_sum, clipped_sum
from dpsb.federated.canaries import SiloCanaries
from dpsb.federated.checks import FederatedError
from dpsb.federated.messages import SUM, basis_digest, theta_digest
from dpsb.federated.paid_basis import check_frames, factors_from, frames_in
from dpsb.federated.paid_layout import GRADIENT, Wide
from dpsb.federated.secure.whole_numbers import round_sum, share_mean, skellam
from dpsb.federated.spec import PaidBasis, PrivacyModel, RoundSpec
from dpsb.losses import LossFn
from dpsb.mechanism import Mechanism, clip_and_sum
from dpsb.models import HEAD_NAMES, in_head
from dpsb.modes import training_mode
from dpsb.probe import Collate, Example, without_dropout
from dpsb.randomness import Randomness
from dpsb.sampling import length_buckets, poisson_draw
from dpsb.selftest.start import check_before_run
from dpsb.train import probe_every_bucket, release_with
from dpsb.withheld import messages_withheld
from dpsb_accounting import Ledger


@dataclass(kw_only=True)
class Trainer:
    """A model with its adapter, and how examples become rows. Silos in one process may share one: it holds no data.

    One round at a time, whatever thread it is asked from: rows of two silos must never meet in one model.

    Args:
      adapter: What is trained; its present theta is the public start of the run.
      loss_fn: As for :func:`dpsb.train.fit`.
      collate: Likewise.
      synthetic: Synthetic or public examples to check the model on.
      max_length: Largest number of tokens.
      token_budget: Tokens per microbatch, where a silo's policy lets examples go together.
      details: Public facts of model and task for the silos' plans.
      wide: The wide public basis of a hybrid that silos pay for.
    """

    adapter: Adapter
    loss_fn: LossFn
    collate: Collate
    synthetic: Sequence[Example]
    max_length: int
    token_budget: int = 4096
    details: Mapping[str, Any] = field(default_factory=dict)
    wide: Wide | None = None

    def __post_init__(self) -> None:
        self.start = {name: tensor.cpu() for name, tensor in self.adapter.state().items()}
        self.basis_sha256 = basis_digest(self.adapter)
        self._checked = False
        self._paid: Mapping[str, torch.Tensor] = {}
        self._usable_wide: Wide | None = None
        self._turn = threading.Lock()

    def check(self) -> None:
        """Probes the model and tests its private step on synthetic examples, once, at the public start.

        Raises:
          ProbeError: If the model, collator or loss would couple examples, or sums, noise or draws are not right.
        """
        with self._turn:
            if not self._checked:
                self._check()
                self._checked = True

    def _check(self) -> None:
        adapter = self.adapter
        adapter.check_nothing_else_is_trained()
        adapter.load_state(self.start)
        buckets = length_buckets(self.max_length)
        with training_mode(adapter.model):
            adapter_train_mode(adapter)
            with without_dropout(adapter.model):
                probe_every_bucket(adapter, self.loss_fn, self.collate, self.synthetic, buckets, self.token_budget)
        check_before_run(adapter, self.loss_fn, self.collate, self.synthetic, self.max_length, self.token_budget)

    def work(
        self,
        theta: Mapping[str, torch.Tensor],
        dataset: Sequence[Example],
        ledger: Ledger,
        spec: RoundSpec,
        randomness: Randomness,
        canaries: SiloCanaries | None = None,
        *,
        together: bool = False,
    ) -> dict[str, torch.Tensor]:
        """One round: every step is charged before it is drawn, by the very function that :func:`dpsb.train.fit` uses.

        Args:
          theta: Where to start. Released.
          dataset: The silo's examples. Sensitive.
          ledger: The silo's, open; at least ``spec.local_steps`` charges are left.
          spec: What to do; its mechanism is that of the ledger's plan.
          randomness: Of draws and noise.
          canaries: Of an audit.
          together: Whether several examples go through the model at once; :class:`~dpsb.federated.spec.SiloPolicy`
            says what that rests on. Without it a row is a function of its example and theta alone, whatever theta is.

        Returns:
          In ``silo_local`` theta after the local steps: released. In the other models one float64 vector under the name
          :data:`~dpsb.federated.messages.SUM`, sensitive: in ``trusted_server`` the clipped sum of one step, in
          ``secagg`` the same with the silo's share of the noise, in ``client_level`` the clipped update.
        """
        adapter, token_budget = self.adapter, self.token_budget if together else 1
        with self._turn, training_mode(adapter.model):
            adapter.load_state(theta)
            adapter_train_mode(adapter)
            with without_dropout(adapter.model):
                if spec.model is PrivacyModel.CLIENT_LEVEL:
                    return {SUM: self._clipped_update(theta, dataset, ledger, spec, randomness, token_budget)}
                if spec.model is not PrivacyModel.SILO_LOCAL:
                    mechanism = Mechanism.from_plan(ledger.plan)
                    total, drawn = self._sum(dataset, ledger, mechanism, randomness, canaries, token_budget)
                    total = total if canaries is None else canaries.add(total, drawn, mechanism)
                    if spec.clip_steps:
                        return {SUM: noisy_whole_sum(total, spec, randomness)}
                    return {SUM: (total + noise_share(spec, total.numel(), randomness).to(total.device)).cpu()}
                self._private_steps(dataset, ledger, spec, randomness, canaries, token_budget)
            return {name: tensor.cpu() for name, tensor in adapter.state().items()}

    def release_gradients(
        self,
        dataset: Sequence[Example],
        ledger: Ledger,
        paid: PaidBasis,
        randomness: Randomness,
        *,
        together: bool = False,
    ) -> dict[str, torch.Tensor]:
        """The one charged release for a paid basis, of the weights' gradients at the public start; float32.

        ``together`` as for :meth:`work`: the start, whose head the gradients go through, comes from the server.

        Raises:
          FederatedError: If it is for another wide basis than the silo has; nothing is charged.
        """
        self.check_wide(paid)
        with self._turn:
            stand_in = self._basis()
            self.adapter.load_state(self.start)
            detach(self.adapter)
            try:
                examples = PrivateExamples(
                    model=self.adapter.model,
                    layers=lora_layers(self.adapter.model),
                    dataset=dataset,
                    loss_fn=self.loss_fn,
                    collate=self.collate,
                    synthetic=self.synthetic,
                    max_length=self.max_length,
                    token_budget=self.token_budget if together else 1,
                    ledger=ledger,
                    randomness=randomness,
                )
                released = examples.release(self._sketches(examples))
            finally:
                self._attach(stand_in)
        return {f"{GRADIENT}{name}": gradient.float().cpu().contiguous() for name, gradient in released.items()}

    def check_wide(self, paid: PaidBasis) -> None:
        """Refuses a paid basis that is made from another wide one than the silo has, or from none that can be used."""
        own = (0, "", "") if self.wide is None else (self.wide.width, self.wide.source, self.wide.sha256)
        if (paid.width, paid.source, paid.frames_sha256) != own:
            raise FederatedError("The silo's wide public basis is not the one that the round names.")
        if self.wide is not None and self.wide is not self._usable_wide:
            check_frames(self.wide, self.shapes)
            self._usable_wide = self.wide

    def _sketches(self, examples: PrivateExamples) -> dict[str, Sketch]:
        if self.wide is None:
            return dict.fromkeys(examples.layers, WHOLE)
        frames = frames_in(self.wide)
        return sketches_of({name: frames[name] for name in examples.layers}, examples.model)

    def rebase(self, tensors: Mapping[str, torch.Tensor], provenance: Provenance) -> None:
        """Puts the adapter on a basis that silos paid for.

        Raises:
          FederatedError: If it does not fit the adapter's weights.
        """
        factors = factors_from(tensors, self.shapes)
        with self._turn:
            detach(self.adapter)
            self._attach(Basis(factors=factors, provenance=provenance))
            self._paid, self.basis_sha256 = dict(tensors), theta_digest(tensors)

    @property
    def on_paid_basis(self) -> bool:
        """Whether the adapter is on a basis that silos paid for, not on a public one or what stands in for it."""
        return bool(self._paid)

    def basis_content(self) -> bytes:
        """The paid basis as it came, as a safetensors file. Released."""
        return bytes(save(dict(self._paid)))

    def _attach(self, basis: Basis) -> None:
        self.adapter = attach(self.adapter.model, basis, allow=HEAD_NAMES)
        self.adapter.load_state(self.start)

    def _basis(self) -> Basis:
        factors = {name: Factors(A=each.A, B=each.B) for name, each in self.adapter.factors().items()}
        return Basis(factors=factors, provenance=self.adapter.provenance)

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """Out, in and rank of each target weight. Public."""
        return {
            name: (each.B.shape[0], each.A.shape[1], each.A.shape[0]) for name, each in self.adapter.factors().items()
        }

    def _private_steps(
        self,
        dataset: Sequence[Example],
        ledger: Ledger,
        spec: RoundSpec,
        randomness: Randomness,
        canaries: SiloCanaries | None,
        token_budget: int,
    ) -> None:
        """Moves theta by the round's steps; each of them released before it is used."""
        adapter, plan = self.adapter, ledger.plan
        mechanism, optimizer = Mechanism.from_plan(plan), local_optimizer(adapter, spec)
        for _ in range(spec.local_steps):
            total, drawn = self._sum(dataset, ledger, mechanism, randomness, canaries, token_budget)
            rows = None if canaries is None else canaries.rows
            released = release_with(mechanism, total, rows, drawn, randomness)
            set_gradient(adapter, released / plan.expected_batch_size)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _sum(
        self,
        dataset: Sequence[Example],
        ledger: Ledger,
        mechanism: Mechanism,
        randomness: Randomness,
        canaries: SiloCanaries | None,
        token_budget: int,
    ) -> tuple[torch.Tensor, np.ndarray]:
        """The clipped sum of one charged step, and which canaries its draw took. Sensitive."""
        _, total, drawn = charged_sum(
            self.adapter,
            dataset,
            ledger,
            mechanism,
            self.loss_fn,
            self.collate,
            length_buckets(self.max_length),
            token_budget,
            randomness,
            others=0 if canaries is None else len(canaries.rows or ()),
        )
        return total, drawn

    def _clipped_update(
        self,
        theta: Mapping[str, torch.Tensor],
        dataset: Sequence[Example],
        ledger: Ledger,
        spec: RoundSpec,
        randomness: Randomness,
        token_budget: int,
    ) -> torch.Tensor:
        """One charge, then local steps without noise, then the update scaled into the ball of radius C. Sensitive.

        An update that is not finite is a zero update: nothing is raised, and the norm of the result is at most C.
        """
        adapter, buckets = self.adapter, length_buckets(self.max_length)
        optimizer, plain = (
            local_optimizer(adapter, spec),
            Mechanism(l2_clip_norm=math.inf, noise_multiplier=0.0, clipping="none"),
        )
        number = ledger.charge("train")
        with messages_withheld(f"Round {number}"):
            batch = max(1.0, spec.sampling_prob * len(dataset))
            for _ in range(spec.local_steps):
                draw = poisson_draw(len(dataset), spec.sampling_prob, randomness)
                drawn = [dataset[int(i)] for i in draw]
                total = clipped_sum(adapter, plain, self.loss_fn, self.collate, drawn, buckets, token_budget)
                set_gradient(adapter, total / batch)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            now = adapter.state()
            update = torch.cat([(now[name].cpu().double() - theta[name].double()).flatten() for name in now])
            return clip_and_sum(update[None, :], spec.l2_clip_norm)


def noisy_whole_sum(total: torch.Tensor, spec: RoundSpec, randomness: Randomness) -> torch.Tensor:
    """A clipped sum in whole numbers with the silo's own share of Skellam noise, int64. Secret until it is masked."""
    rounded = round_sum(total, spec.l2_clip_norm, spec.clip_steps, spec.clients)
    return torch.from_numpy(rounded + skellam(len(rounded), share_mean(spec), randomness))


def noise_share(spec: RoundSpec, dimension: int, randomness: Randomness) -> torch.Tensor:
    r"""A silo's own share of the noise of a sum: :math:`N(0, \sigma^2 C^2 / (K - t - k))`, zero in ``trusted_server``.

    The K - t - k shares that are certainly in an opened sum and unknown to the server add up to :math:`N(0, (\sigma
    C)^2)`. They are added as they are: rounding each of them would make the sum another mechanism than the one that is
    accounted for. Float64, shape ``(d,)``. Secret.
    """
    if spec.model is not PrivacyModel.SECAGG:
        return torch.zeros(dimension, dtype=torch.float64)
    std = spec.noise_multiplier * spec.l2_clip_norm / math.sqrt(spec.honest)
    return std * randomness.normal(dimension)


def local_optimizer(adapter: Adapter, spec: RoundSpec) -> torch.optim.Optimizer:
    """The optimizer of one round's local steps, its state new: post-processing of released gradients."""
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in adapter.named_parameters():
        rate = spec.head_learning_rate if in_head(name) else spec.learning_rate
        groups.setdefault(rate, []).append(parameter)
    parameters: Any = [{"params": members, "lr": rate} for rate, members in groups.items()]
    if spec.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=spec.momentum)
    return torch.optim.Adam(parameters)
