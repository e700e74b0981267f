"""What the tests of federations share: tiny silos in one process, and transports that lose, double and delay."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import workbench

from dpsb.data import Collator, synthetic_examples
from dpsb.federated.coordinator import Coordinator
from dpsb.federated.local import LocalTransport
from dpsb.federated.silo import Silo
from dpsb.federated.spec import SiloPolicy
from dpsb.federated.terms import SiloTerms, Terms
from dpsb.federated.trainer import Trainer
from dpsb_accounting import Ledger, PoissonGaussian
from dpsb_accounting import epsilon as epsilon_of

NAMES = ("north", "south", "west")
NOISE, PROB, DELTA = 1.0, 0.25, 1e-3


class Killed(BaseException):
    """Stands for a process that dies: nothing may catch it."""


def trainer(tiny, kind="bert", **options):
    adapter = tiny.adapter(tiny.base(kind), **options)
    made = Trainer(
        adapter=adapter,
        loss_fn=tiny.loss[kind],
        collate=Collator(0),
        synthetic=synthetic_examples("classification" if kind == "bert" else "causal-lm", 61, 3, workbench.PADDED),
        max_length=workbench.PADDED,
        details={"model": kind, "rank": 4},
    )
    made._checked = True  # the probe and the self-test have tests of their own; one test here runs them
    return made


def policy(name, **changes):
    settings = {"max_epsilon": 50.0, "delta": DELTA, "num_examples": 24, "max_rounds": 20, "max_local_steps": 8}
    return SiloPolicy(silo=name, **{**settings, **changes})


def terms(**changes):
    asked = SiloTerms(sampling_prob=PROB, noise_multiplier=NOISE, expected_batch_size=6)
    usual = {"silos": dict.fromkeys(NAMES, asked), "rounds": 3, "local_steps": 2, "min_silos": 2}
    return Terms(**{**usual, **changes})


@dataclass
class Federation:
    """Three silos and whatever coordinator is asked for, on one folder."""

    out: object
    trainer: Trainer
    policies: dict = field(default_factory=dict)
    randomness: object = None

    def silo(self, name):
        data = workbench.examples(24, seed=NAMES.index(name) + 1)
        chosen = self.policies.get(name) or policy(name)
        return Silo(self.out / "silos" / name, chosen, self.trainer, data, randomness=self.randomness)

    def silos(self):
        return {name: self.silo(name) for name in NAMES}

    def coordinator(self, transport=None, asked=None, **options):
        transport = transport or LocalTransport(self.silos())
        trainer = self.trainer
        return Coordinator(self.out, asked or terms(), trainer.start, trainer.basis_sha256, transport, **options)

    def ledger(self, name):
        (path,) = (self.out / "silos" / name / "runs").glob("*/ledger.jsonl")
        return Ledger.read(path)

    def charges(self):
        return {name: self.ledger(name).charged("train") for name in NAMES}

    def replies(self, name):
        return sorted((self.out / "silos" / name / "runs").glob("*/reply-*"))


@cache
def by_dp_accounting(noise, prob, steps, delta):
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    step = dp_accounting.PoissonSampledDpEvent(prob, dp_accounting.GaussianDpEvent(noise))
    accountant.compose(dp_accounting.SelfComposedDpEvent(step, steps))
    return accountant.get_epsilon(delta)


def check_ledger(record, steps, *, noise=NOISE, prob=PROB):
    """The ledger holds exactly the steps that were released, and costs what dp-accounting says of these."""
    assert record.charged("train") == steps
    assert record.plan.train.event == PoissonGaussian(noise_multiplier=noise, sampling_prob=prob)
    spent = epsilon_of([(record.plan.train.event, steps)], record.plan.delta, record.plan.neighboring)
    reference = by_dp_accounting(noise, prob, steps, record.plan.delta)
    assert spent.lower <= reference * (1 + 1e-3)
    assert abs(spent.upper - reference) <= 0.01 * reference


class Faulty:
    """A transport that changes messages on their way and replies on their way back."""

    def __init__(self, silos, *, before=lambda _m: None, after=lambda _m, reply: [reply]):
        self.silos, self.before, self.after = silos, before, after
        self.seen = []

    def send(self, messages):
        replies = []
        for message in messages:
            self.seen.append(message)
            if self.before(message) == "lost":
                continue
            replies += self.after(message, self.silos[message.silo].answer(message))
        return replies
