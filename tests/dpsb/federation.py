"""What the tests of federations share: tiny silos in one process, and transports that lose, double and delay."""

from __future__ import annotations

from collections import defaultdict
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
from dpsb.randomness import SystemRandomness
from dpsb_accounting import Gaussian, Ledger, PoissonGaussian
from dpsb_accounting import epsilon as epsilon_of

NAMES = ("north", "south", "west")
NOISE, PROB, DELTA = 1.0, 0.25, 1e-3
STEP = PoissonGaussian(noise_multiplier=NOISE, sampling_prob=PROB)
WHOLE = Gaussian(noise_multiplier=NOISE)
"""What a charge is for: a silo's private step, or in client_level its whole update in a sum that the server noises."""


class Killed(KeyboardInterrupt):
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


class Counted(SystemRandomness):
    """Counts the numbers of noise that are drawn: what was really released, whatever a ledger says."""

    def __init__(self):
        super().__init__()
        self.drawn = 0

    def normal(self, count):
        self.drawn += count
        return super().normal(count)


def first_spec(fed, number=0, theta=None, run_id="a" * 32, **changes):
    """What is asked of the north in a round of a run without a coordinator."""
    specs = terms(**changes).specs(run_id, number, theta or fed.trainer.start, fed.trainer.basis_sha256)
    return specs["north"]


def only(silo, number):
    """Whether a message is that of one silo's round."""
    return lambda message: (message.silo, message.spec.round) == (silo, number)


@dataclass
class Federation:
    """Three silos and whatever coordinator is asked for, on one folder; what is ``released`` outlives their deaths."""

    out: object
    trainer: Trainer
    policies: dict = field(default_factory=dict)
    randomness: object = None
    sizes: dict = field(default_factory=dict)
    sources: dict = field(default_factory=lambda: defaultdict(Counted))

    def silo(self, name):
        data = workbench.examples(self.sizes.get(name, 24), seed=NAMES.index(name) + 1)
        chosen = self.policies.get(name) or policy(name)
        randomness = self.randomness or self.sources[name]
        return Silo(self.out / "silos" / name, chosen, self.trainer, data, randomness=randomness)

    def silos(self):
        return {name: self.silo(name) for name in NAMES}

    def coordinator(self, transport=None, asked=None, **options):
        transport = transport or LocalTransport(self.silos())
        trainer = self.trainer
        options.setdefault("randomness", self.sources["server"])
        return Coordinator(self.out, asked or terms(), trainer.start, trainer.basis_sha256, transport, **options)

    def ledger(self, name):
        (path,) = (self.out / "silos" / name / "runs").glob("*/ledger.jsonl")
        return Ledger.read(path)

    def replies(self, name):
        return sorted((self.out / "silos" / name / "runs").glob("*/reply-*"))

    def released(self, name):
        """How many noisy vectors of theta's length a silo, or the server, has made."""
        return self.sources[name].drawn / sum(tensor.numel() for tensor in self.trainer.start.values())

    def check(self, name, charged, *, released=None, event=STEP):
        """A silo's ledger holds its charges, and the silo has made as much noise; no ledger where nothing is charged.

        Args:
          charged: Steps, or in client_level rounds.
          released: Where that is another number: a crash came between charge and noise, or the ledger is an old one.
        """
        if charged:
            check_ledger(self.ledger(name), charged, event=event)
        else:
            assert not list((self.out / "silos" / name).glob("**/*.jsonl"))
        if released is None:
            released = charged if event == STEP else 0
        assert self.released(name) == released, f"{name} drew noise for {self.released(name):g}, not for {released}"

    def check_all(self, charged=6, *, released=None, event=STEP, **others):
        """:meth:`check` for every silo; ``others`` are charged otherwise, and ``released`` names who released less."""
        for name in NAMES:
            self.check(name, others.get(name, charged), released=(released or {}).get(name), event=event)


@cache
def by_dp_accounting(charges, delta):
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for event, count in charges:
        one = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        if isinstance(event, PoissonGaussian):
            one = dp_accounting.PoissonSampledDpEvent(event.sampling_prob, one)
        accountant.compose(dp_accounting.SelfComposedDpEvent(one, count))
    return accountant.get_epsilon(delta)


def check_ledger(record, steps, *, event=STEP, basis=None):
    """The ledger holds exactly the charges that are named, and costs what dp-accounting says of these.

    Args:
      steps: How many of ``event``.
      basis: Event and number of the releases for a basis, where the plan has them.
    """
    charges = (*([basis] if basis else []), (event, steps))
    assert tuple((phase.event, record.charged(phase.name)) for phase in record.plan.phases) == charges
    charges = tuple(charge for charge in charges if charge[1])
    spent = epsilon_of(charges, record.plan.delta, record.plan.neighboring)
    reference = by_dp_accounting(charges, record.plan.delta)
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
