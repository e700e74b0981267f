"""The server rules on an adapter, for `federated_run.py`: aggregates, their errors, their bytes and their noise."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dpsb.adapter import Adapter, lora_layers
from dpsb.federated import aggregate
from dpsb.federated.messages import Receipt, RoundMessage, Update, theta_digest
from dpsb.federated.spec import RoundSpec
from dpsb.federated.wire import pack
from dpsb.mechanism import Mechanism
from dpsb.models import in_head
from dpsb.randomness import Randomness, SystemRandomness
from dpsb_accounting import Ledger, Plan
from dpsb_accounting.noise import amplification
from dpsb_accounting.shapes import Layer

SEED = 20261125
State = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Combined:
    """What the server makes of the replies: the next factors, what goes into base weights, what is sent down."""

    factors: State
    into_base: State = field(default_factory=dict)
    stacked: State = field(default_factory=dict)


def combine(method: str, states: Sequence[State], turn: int) -> Combined:
    """The server rule on tensors named ``WEIGHT.A`` and ``WEIGHT.B``, or ``WEIGHT.R``.

    FLoRA's stacked product goes into the base weights, and the silos start again from B = 0 and a new public A.
    """
    if method == "fedex_lora":
        means, residual = aggregate.fedex_lora(states)
        return Combined(factors=means, into_base=residual)
    if method != "flora":
        return Combined(factors=getattr(aggregate, method)(states))
    stacked = aggregate.flora(states)
    names = [key.removesuffix(".A") for key in stacked if key.endswith(".A")]
    merged = {name: stacked[name + ".B"].double() @ stacked[name + ".A"].double() for name in names}
    generator, factors = torch.Generator().manual_seed(SEED + turn), {}
    for name in names:
        A, B = states[0][name + ".A"], states[0][name + ".B"]
        factors[name + ".A"] = ((torch.rand(A.shape, generator=generator) * 2 - 1) / A.shape[1] ** 0.5).to(A.dtype)
        factors[name + ".B"] = torch.zeros_like(B)
    return Combined(factors=factors, into_base=merged, stacked=stacked)


@dataclass(kw_only=True)
class Silo:
    """A silo's plan, ledger, optimizer and its private steps, which wait between rounds."""

    plan: Plan
    ledger: Ledger
    optimizer: torch.optim.Optimizer
    steps: Iterator[Any]

    @property
    def noise_std(self) -> float:
        """Of the noise on every entry of one step's mean gradient."""
        return self.plan.noise_std / self.plan.expected_batch_size

    def empty_release(self, dimension: int, randomness: Randomness) -> torch.Tensor:
        """What one step's mean gradient is for an empty draw, fp64: noise alone."""
        zeros = torch.zeros(dimension, dtype=torch.float64)
        return Mechanism.from_plan(self.plan).release(zeros, randomness) / self.plan.expected_batch_size


class Rule:
    """A server rule on the weights of one adapter.

    Args:
      method: One of ``TRAINED_AS`` in `federated_run.py`.
      adapter: Global adapter; the rule reads its shapes and frozen factors, and :meth:`put` moves it.
    """

    def __init__(self, method: str, adapter: Adapter) -> None:
        self.method, self.adapter = method, adapter
        self.layers, self.frozen = lora_layers(adapter.model), adapter.factors()

    def pairs(self, state: State) -> dict[str, torch.Tensor]:
        """The adapter's part of theta by the names of `aggregate`, with the frozen A where it is frozen."""
        if self.frozen:
            return {name: value for name, value in state.items() if not in_head(name)}
        found = {}
        for name, layer in self.layers.items():
            for part, factor in (("A", layer.lora_A), ("B", layer.lora_B)):
                now = state.get(f"{name}.lora_{part}.default.weight", factor["default"].weight)
                found[f"{name}.{part}"] = now.detach().clone()
        return found

    def _products(self, state: State) -> dict[str, torch.Tensor]:
        """Delta W by weight, fp64."""
        if self.frozen:
            both = self.frozen.items()
            return {n: f.B.double() @ state[f"{n}.R"].double() @ f.A.double() for n, f in both}
        return {n: state[f"{n}.B"].double() @ state[f"{n}.A"].double() for n in self.layers}

    def effect(self, combined: Combined) -> dict[str, torch.Tensor]:
        """What the aggregate adds to each weight, through the factors and through the base."""
        products = self._products(combined.factors)
        return {n: value + combined.into_base[n] if combined.into_base else value for n, value in products.items()}

    def _mean_product(self, states: Sequence[State]) -> dict[str, torch.Tensor]:
        products = [self._products(state) for state in states]
        return {name: sum(each[name] for each in products) / len(products) for name in self.layers}

    def error(self, states: Sequence[State], combined: Combined) -> float:
        """Norm of (aggregate - mean of the silos' Delta W), relative to the latter."""
        exact = self._mean_product(states)
        return (_distance(self.effect(combined), exact) / max(_energy(exact), 1e-300)) ** 0.5

    def put(self, combined: Combined, head: State) -> None:
        """Makes the aggregate the global adapter."""
        trained = {name: value for name, value in combined.factors.items() if name.endswith(".R")}
        with torch.no_grad():
            for name, layer in self.layers.items():
                if not self.frozen:
                    layer.lora_A["default"].weight.copy_(combined.factors[f"{name}.A"])
                    layer.lora_B["default"].weight.copy_(combined.factors[f"{name}.B"])
                if combined.into_base:
                    weight = layer.get_base_layer().weight
                    weight.add_(combined.into_base[name].to(weight.dtype))
        self.adapter.load_state({**self.adapter.state(), **trained, **head})

    def measured(self, silos: Sequence[Silo], replies: Sequence[State], combined: Combined) -> dict[str, Any]:
        """Bytes and noise of the last round."""
        states = [self.pairs(reply) for reply in replies]
        exact, update = _energy(self._mean_product(states)), _energy(self.effect(combined))
        up, down = self._wire(silos[0], replies[0], states, combined)
        head = 4 * sum(value.numel() for value in head_of_state(replies[0]).values())
        sent = amplification(self.method, self._shapes(states), noise_std=1.0, clients=len(states))
        return {
            "bytes_up": up,
            "bytes_up_formula": sent.bytes_released + head,
            "bytes_down": down,
            "bytes_down_formula": sent.bytes_received + head,
            "bytes_head": head,
            "noise_energy": self._drawn_energy(silos, replies),
            "noise_energy_formula": self._energy_formula(states, [silo.noise_std for silo in silos]),
            "noise_std": [silo.noise_std for silo in silos],
            "mean_update_energy": exact,
            "update_energy": update,
        }

    def _wire(self, silo: Silo, reply: State, states: Sequence[State], combined: Combined) -> tuple[int, int]:
        """One round's messages in the library's wire format."""
        digest = theta_digest(reply)
        spec = RoundSpec(
            run_id=digest[:32],
            round=0,
            rounds=1,
            theta_sha256=digest,
            basis_sha256=hashlib.sha256(self.method.encode()).hexdigest(),
            local_steps=silo.plan.steps,
            sampling_prob=silo.plan.sampling_prob,
            noise_multiplier=float(silo.plan.noise_multiplier or 1.0),
        )
        ledger = silo.ledger
        receipt = Receipt(ledger_id=ledger.run_id, length=ledger.length, head=ledger.head, round=spec.round)
        update = Update(
            silo="silo-1",
            run_id=spec.run_id,
            round=spec.round,
            theta_sha256=digest,
            tensors=reply,
            receipt=receipt,
            follows=ledger.head,
        )
        theta = {**self._down(states, combined), **head_of_state(reply)}
        message = RoundMessage(silo="silo-1", spec=spec, theta=theta, receipt=receipt)
        return len(pack(update)), len(pack(message))

    def _down(self, states: Sequence[State], combined: Combined) -> dict[str, torch.Tensor]:
        """What a silo needs of the aggregate, fp32: FedEx-LoRA's residual whole or as factors, whichever is smaller."""
        if self.method == "ffa_lora":
            return {name: value for name, value in combined.factors.items() if name.endswith(".B")}
        sent = dict(combined.stacked or combined.factors)
        for name, residual in combined.into_base.items() if self.method == "fedex_lora" else ():
            rank = (len(states) - 1) * states[0][f"{name}.A"].shape[0]
            if rank * sum(residual.shape) >= residual.numel():
                sent[f"{name}.E"] = residual.float()
                continue
            u, s, vh = torch.linalg.svd(residual, full_matrices=False)
            sent[f"{name}.EB"], sent[f"{name}.EA"] = (u * s)[:, :rank].float(), vh[:rank].float()
        return sent

    def _shapes(self, states: Sequence[State]) -> list[Layer]:
        """The weights with the norms that the silos' factors have."""
        found = []
        for name, layer in self.layers.items():
            weight = layer.get_base_layer().weight
            if self.frozen:
                shape = {"rank": self.frozen[name].A.shape[0]}
                found.append(Layer(out_features=weight.shape[0], in_features=weight.shape[1], **shape))
                continue
            norms: dict[str, float] = {}
            for part in "AB":
                stack = torch.stack([state[f"{name}.{part}"].double() for state in states])
                size = norms[f"norm_{part.lower()}"] = float(stack.square().sum(dim=(1, 2)).mean().sqrt())
                norms[f"norm_of_mean_{part.lower()}"] = min(size, float(stack.mean(dim=0).norm()))
            rank = states[0][f"{name}.A"].shape[0]
            found.append(Layer(out_features=weight.shape[0], in_features=weight.shape[1], rank=rank, **norms))
        return found

    def _energy_formula(self, states: Sequence[State], stds: Sequence[float]) -> float:
        """Expected energy of one release's noise in the average, by closed forms; silos may differ in noise."""
        if self.method in ("fedex_lora", "flora"):
            each = (
                amplification(self.method, self._shapes([s]), noise_std=t) for s, t in zip(states, stds, strict=True)
            )
            return sum(one.energy for one in each) / len(states) ** 2
        mean = math.sqrt(sum(std**2 for std in stds) / len(stds))
        return amplification(self.method, self._shapes(states), noise_std=mean, clients=len(states)).energy

    def _drawn_energy(self, silos: Sequence[Silo], replies: Sequence[State]) -> float:
        """The same by drawing: each silo's mechanism releases an empty draw, and the server rule combines the noise."""
        draws, randomness, dimension = (48 if self.frozen else 4), SystemRandomness(), self.adapter.dimension
        doubles = [{name: value.double() for name, value in reply.items()} for reply in replies]
        before = self.effect(combine(self.method, [self._double(state) for state in doubles], 0))
        total = 0.0
        for _ in range(draws):
            noised = []
            for silo, state in zip(silos, doubles, strict=True):
                parts = silo.empty_release(dimension, randomness).split([value.numel() for value in state.values()])
                both = zip(state.items(), parts, strict=True)
                noised.append(self._double({n: value + part.view_as(value) for (n, value), part in both}))
            total += _distance(self.effect(combine(self.method, noised, 0)), before)
        return total / draws

    def _double(self, state: State) -> dict[str, torch.Tensor]:
        return {name: value.double() for name, value in self.pairs(state).items()}


def head_of_state(state: State) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if in_head(name)}


def _energy(weights: State) -> float:
    return sum(float(value.square().sum()) for value in weights.values())


def _distance(one: State, other: State) -> float:
    return sum(float((one[name] - other[name]).square().sum()) for name in one)
