"""One private federation with a chosen server rule, for `federated.py`: what it reaches, sends and adds in noise.

In every round each silo starts from the global adapter and makes `local_steps` private steps by
:func:`dpsb.train.private_steps` under a ledger of its own (privacy model ``silo_local``); the server combines the
replies with :mod:`dpsb.federated.aggregate`. Everything the server does is post-processing of released tensors.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import planned_basis, shortest
from federated_rule import SEED, Combined, Rule, Silo, State, combine, head_of_state

from dpsb.adapter import Adapter, attach
from dpsb.baselines.build import adapt
from dpsb.baselines.methods import method_named
from dpsb.config import RunConfig
from dpsb.data import read_table, tokenize_classification
from dpsb.evaluate import evaluate
from dpsb.federated import aggregate
from dpsb.frozen_prefix import remember_frozen_prefix
from dpsb.inputs import read_inputs
from dpsb.models import HEAD_NAMES
from dpsb.optimizers import make_optimizer
from dpsb.plan import make_plan, noise_multiplier_for
from dpsb.prepare import columns_of
from dpsb.train import private_steps
from dpsb_accounting import Ledger, epsilon

TRAINED_AS = {
    "fed_sb": "sb",
    "fed_sb_public": "sb",
    "fedit": "lora",
    "ffa_lora": "ffa-lora",
    "fedex_lora": "lora",
    "flora": "lora",
    "fedsvd": "ffa-lora",
}
"""By method: what the silos train. FFA-LoRA and FedSVD start from the same random orthonormal A."""
PUBLIC = "_public"
"""Ends the name of a method whose basis is from public rows; without it, it is from the weights."""
LEAST_ROWS = 40


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run. ``repeat`` also seeds the split into silos, so that methods are compared on the same silos."""

    method: str
    silos: int
    split: str
    epsilon: float
    learning_rate: float
    repeat: int
    tuning: bool = False


def split_rows(labels: Sequence[Any], silos: int, split: str, seed: int) -> list[np.ndarray]:
    """Which rows are whose. ``iid``: equal parts of a permutation; ``dirichlet-X``: label shares from Dirichlet(X).

    Dirichlet shares are drawn again until every silo has ``LEAST_ROWS`` rows, or half its equal part.
    """
    rng, values = np.random.default_rng(seed), np.asarray(labels)
    if split == "iid":
        return [np.sort(part) for part in np.array_split(rng.permutation(len(values)), silos)]
    kind, _, parameter = split.partition("-")
    if kind != "dirichlet":
        raise ValueError(f"Expected split={split!r} to be 'iid' or 'dirichlet-X'.")
    least = min(LEAST_ROWS, len(values) // (2 * silos))
    while True:
        owner = np.empty(len(values), dtype=int)
        for label in np.unique(values):
            members = np.flatnonzero(values == label)
            owner[members] = rng.choice(silos, len(members), p=rng.dirichlet([float(parameter)] * silos))
        if np.bincount(owner, minlength=silos).min() >= least:
            return [np.flatnonzero(owner == silo) for silo in range(silos)]


@cache
def calibrated(target: float, delta: float, sampling_prob: float, steps: int) -> float:
    """Noise for a target epsilon, computed once in a process."""
    return noise_multiplier_for(
        target_epsilon=target, delta=delta, sampling_prob=sampling_prob, steps=steps, neighboring="zero_out"
    )


class Bench:
    """A model with the adapter of one method; kept over its runs, so that the frozen blocks run once per example.

    Args:
      config: Model, files, targets, rank and lengths. ``steps`` is rounds x local steps, and ``expected_batch_size``
        that of all silos together: each samples its own rows with the same probability.
      method: One of ``TRAINED_AS``.
      rounds: Aggregations.
      files: By name: held-out ``validation`` and ``test``, and the ``public`` rows of a basis.
    """

    def __init__(self, config: RunConfig, method: str, rounds: int, files: Mapping[str, Path]) -> None:
        self.rounds = rounds
        kind = method_named(TRAINED_AS[method])
        source = f"public:{files['public']}" if method.endswith(PUBLIC) else "weight"
        inputs = self.inputs = read_inputs(replace(config, method=kind.name).with_basis(source), warm=False)
        model, labels, prepared = inputs.model, inputs.prepared.labels, inputs.prepared
        if kind.kind == "cores":
            made = planned_basis(inputs, inputs.config, config.delta or 1e-5).basis
            self.adapter: Adapter = attach(model, made, allow=HEAD_NAMES)
        else:
            self.adapter = adapt(model, kind)
        self.held_out = {
            name: tokenize_classification(
                read_table(str(file)), columns_of(config), inputs.tokenizer, labels, prepared.max_length
            )
            for name, file in files.items()
            if name != "public"
        }
        self.rule = Rule(method.removesuffix(PUBLIC), self.adapter)
        self.synthetic = inputs.synthetic()
        self._shortest = shortest(self.synthetic, prepared.max_length)
        self._kept = ExitStack()
        self._kept.enter_context(remember_frozen_prefix(model))
        self._theta, self._factors = self.adapter.state(), self.rule.pairs(self.adapter.state())
        self._base = {name: layer.get_base_layer().weight.detach().clone() for name, layer in self.rule.layers.items()}

    def close(self) -> None:
        """Forgets the hidden states."""
        self._kept.close()

    def run(self, job: Job) -> dict[str, Any]:
        """Trains from the start; returns the run's row."""
        self._reset()
        rule = self.rule
        config = replace(self.inputs.config, learning_rate=job.learning_rate, epsilon=job.epsilon)
        examples = self.inputs.prepared.examples
        parts = split_rows([e["labels"] for e in examples], job.silos, job.split, SEED + job.repeat)
        errors = []
        with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
            silos = [
                self._silo(config, [examples[i] for i in part], Path(scratch) / str(i), stack, first=i == 0)
                for i, part in enumerate(parts)
            ]
            for turn in range(self.rounds):
                theta = self.adapter.state()
                replies = [self._round(silo, theta) for silo in silos]
                states = [rule.pairs(reply) for reply in replies]
                combined = combine(rule.method, states, turn)
                errors.append(rule.error(states, combined))
                measured = {} if turn + 1 < self.rounds else rule.measured(silos, replies, combined)
                rule.put(combined, aggregate.mean([head_of_state(reply) for reply in replies]))
            held_out = self.held_out["validation" if job.tuning else "test"]
            found = evaluate(
                self.adapter.model,
                held_out,
                "classification",
                self.inputs.collate,
                self.inputs.prepared.max_length,
                config.token_budget,
            )
            spent = [self._spent(silo) for silo in silos]
        return {
            **asdict(job),
            **found,
            "epsilons": spent,
            "max_epsilon": max(spent),
            "rows": [len(part) for part in parts],
            "noise_multipliers": [silo.plan.noise_multiplier for silo in silos],
            "trained": self.adapter.dimension,
            "rounds": self.rounds,
            "local_steps": silos[0].plan.steps // self.rounds,
            "aggregation_errors": errors,
            **measured,
        }

    def _silo(self, config: RunConfig, rows: list[Any], home: Path, stack: ExitStack, first: bool) -> Silo:
        batch = max(1, round(len(rows) * config.expected_batch_size / len(self.inputs.prepared.examples)))
        steps = config.steps or 1
        plan = make_plan(
            epsilon=config.epsilon,
            delta=config.delta or 1e-5,
            num_examples=len(rows),
            num_examples_declared=False,
            expected_batch_size=batch,
            steps=steps,
            clipping="automatic",
            basis=self.adapter.provenance.to_json(),
            noise_multiplier=calibrated(config.epsilon, config.delta or 1e-5, batch / len(rows), steps),
        )
        home.mkdir()
        ledger = stack.enter_context(Ledger.create(home / "ledger.jsonl", plan))
        optimizer, schedule = make_optimizer(config, self.adapter, plan)
        running = private_steps(
            self.adapter,
            rows,
            ledger=ledger,
            optimizer=optimizer,
            loss_fn=self.inputs.loss_fn,
            collate=self.inputs.collate,
            synthetic=self.synthetic if first else self._shortest,  # the first silo has probed the model whole
            max_length=self.inputs.prepared.max_length,
            schedule=schedule,
            token_budget=config.token_budget,
        )
        stack.callback(running.close)
        return Silo(plan=plan, ledger=ledger, optimizer=optimizer, steps=running)

    def _round(self, silo: Silo, theta: State) -> dict[str, torch.Tensor]:
        """A silo's steps from the global adapter, its optimizer anew."""
        self.adapter.load_state(theta)
        silo.optimizer.state.clear()
        for _ in range(silo.plan.steps // self.rounds):
            next(silo.steps)
        return self.adapter.state()

    def _spent(self, silo: Silo) -> float:
        if silo.ledger.remaining("train"):
            raise RuntimeError("A silo made fewer steps than its plan has.")
        return epsilon(silo.plan).upper

    def _reset(self) -> None:
        with torch.no_grad():
            for name, layer in self.rule.layers.items():
                layer.get_base_layer().weight.copy_(self._base[name])
        self.rule.put(Combined(factors=self._factors), head_of_state(self._theta))
