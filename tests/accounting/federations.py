"""Silos that the tests of federated accounting share."""

from plans import make_plan

from dpsb_accounting import Ledger, Phase, PoissonGaussian
from dpsb_accounting.federated import Silo


def step(noise_multiplier=1.0, sampling_prob=0.01):
    return PoissonGaussian(noise_multiplier=noise_multiplier, sampling_prob=sampling_prob)


def silo(name="north", event=None, steps=1000, before=(), **changes):
    """Returns a silo that trains for some steps, with some fields changed."""
    phases = (*before, Phase("train", event or step(), steps))
    return Silo(**{"name": name, "phases": phases, "delta": 1e-5, **changes})


def silos(number, event=None, steps=1000, **changes):
    """Returns that many equal silos."""
    return [silo(f"silo {i}", event, steps, **changes) for i in range(number)]


def write_ledger(path, event=None, steps=100, charged=0, taint=None, stated=None, **changes):
    """Writes the ledger of one silo and returns its path."""
    event = event or step()
    fields = {
        "phases": (Phase("train", event, steps),),
        "sampling_prob": getattr(event, "sampling_prob", 1.0),
        **changes,
    }
    if stated is not None:
        fields["details"] = {"federated": stated}
    with Ledger.create(path, make_plan(**fields)) as ledger:
        for _ in range(charged):
            ledger.charge("train")
        if taint:
            ledger.taint(taint, "for a test")
    return path
