"""The model's side of a silo: loaded and checked once, then asked for local steps again and again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dpsb.adapter import Adapter, set_gradient
from dpsb.capture import adapter_train_mode
from dpsb.federated.messages import SUM, basis_digest
from dpsb.federated.spec import PrivacyModel, RoundSpec
from dpsb.losses import LossFn
from dpsb.mechanism import Mechanism
from dpsb.models import HEAD_NAMES
from dpsb.probe import Collate, Example, without_dropout
from dpsb.randomness import Randomness
from dpsb.sampling import length_buckets
from dpsb.selftest.start import check_before_run
from dpsb.train import charged_sum, probe_every_bucket, training_mode
from dpsb_accounting import Ledger


@dataclass(kw_only=True)
class Trainer:
    """A model with its adapter, and how examples become rows. Silos in one process may share one: it holds no data.

    Args:
      adapter: What is trained; its present theta is the public start of the run.
      loss_fn: As for :func:`dpsb.train.fit`.
      collate: Likewise.
      synthetic: Synthetic or public examples to check the model on.
      max_length: Largest number of tokens.
      token_budget: Tokens per microbatch.
      details: Public facts of model and task for the silos' plans.
    """

    adapter: Adapter
    loss_fn: LossFn
    collate: Collate
    synthetic: Sequence[Example]
    max_length: int
    token_budget: int = 4096
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.start = {name: tensor.cpu() for name, tensor in self.adapter.state().items()}
        self.basis_sha256 = basis_digest(self.adapter)
        self._checked = False

    def check(self) -> None:
        """Probes the model and tests its private step on synthetic examples, once, at the public start.

        Raises:
          ProbeError: If the model, collator or loss would couple examples, or sums, noise or draws are not right.
        """
        if self._checked:
            return
        adapter = self.adapter
        adapter.check_nothing_else_is_trained()
        adapter.load_state(self.start)
        buckets = length_buckets(self.max_length)
        with training_mode(adapter.model):
            adapter_train_mode(adapter)
            with without_dropout(adapter.model):
                probe_every_bucket(adapter, self.loss_fn, self.collate, self.synthetic, buckets, self.token_budget)
        check_before_run(adapter, self.loss_fn, self.collate, self.synthetic, self.max_length, self.token_budget)
        self._checked = True

    def work(
        self,
        theta: Mapping[str, torch.Tensor],
        dataset: Sequence[Example],
        ledger: Ledger,
        spec: RoundSpec,
        randomness: Randomness,
    ) -> dict[str, torch.Tensor]:
        """One round: every step is charged before it is drawn, by the very function that :func:`dpsb.train.fit` uses.

        Args:
          theta: Where to start. Released.
          dataset: The silo's examples. Sensitive.
          ledger: The silo's, open; at least ``spec.local_steps`` charges are left.
          spec: What to do; its mechanism is that of the ledger's plan.
          randomness: Of draws and noise.

        Returns:
          In ``silo_local`` theta after the local steps: released. In ``trusted_server`` the clipped sum of one step
          under the name :data:`~dpsb.federated.messages.SUM`, float64, without noise: sensitive.
        """
        adapter, plan = self.adapter, ledger.plan
        mechanism, buckets = Mechanism.from_plan(plan), length_buckets(self.max_length)
        adapter.load_state(theta)
        optimizer = local_optimizer(adapter, spec)
        with training_mode(adapter.model):
            adapter_train_mode(adapter)
            with without_dropout(adapter.model):
                for _ in range(spec.local_steps):
                    _, total, _ = charged_sum(
                        adapter,
                        dataset,
                        ledger,
                        mechanism,
                        self.loss_fn,
                        self.collate,
                        buckets,
                        self.token_budget,
                        randomness,
                    )
                    if spec.model is PrivacyModel.TRUSTED_SERVER:
                        return {SUM: total.cpu()}
                    released = mechanism.release(total, randomness)
                    set_gradient(adapter, released / plan.expected_batch_size)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
        return {name: tensor.cpu() for name, tensor in adapter.state().items()}


def local_optimizer(adapter: Adapter, spec: RoundSpec) -> torch.optim.Optimizer:
    """The optimizer of one round's local steps, its state new: post-processing of released gradients."""
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in adapter.named_parameters():
        rate = spec.head_learning_rate if set(name.split(".")) & set(HEAD_NAMES) else spec.learning_rate
        groups.setdefault(rate, []).append(parameter)
    parameters: Any = [{"params": members, "lr": rate} for rate, members in groups.items()]
    if spec.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=spec.momentum)
    return torch.optim.Adam(parameters)
