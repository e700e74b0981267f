"""What is public shows nothing of vectors without noise; and what a silo must refuse for what is on its disk."""

import json
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from federation import NAMES, Federation, policy, terms
from safetensors.torch import load, save

from dpsb.federated.checks import FederatedError
from dpsb.federated.local import LocalTransport
from dpsb.federated.messages import SUM
from dpsb.federated.server import load_state
from dpsb_accounting import Ledger

ROUNDS = 2
SUMMED = {
    "trusted_server": {"local_steps": 1, "learning_rate": 0.1, "head_learning_rate": 0.1},
    "client_level": {"optimizer": "sgd"},
}


def asked(fed, model, **changes):
    """The terms of a model, allowed by every silo."""
    fed.policies = {name: policy(name, models=[model], clients=3) for name in NAMES}
    if model == "silo_local":
        return terms(rounds=ROUNDS, **changes)
    summed = {"model": model, "server_optimizer": "sgd", "rounds": ROUNDS, "min_silos": 3}
    return terms(**{**summed, **SUMMED[model], **changes})


def header(content):
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


@pytest.mark.parametrize("model", SUMMED)
def test_a_public_ledger_does_not_confirm_a_guess_of_a_vector_without_noise(fed, model):
    """The hash in the ledger is of a file with fresh bytes in it, which are in no message and no other file."""
    fed.coordinator(asked=asked(fed, model)).run()
    for name in NAMES:
        ledger = fed.ledger(name)
        for path in fed.replies(name):
            content = path.read_bytes()
            facts = header(content)
            salt = facts.pop("salt")
            assert ledger.files[path.name] == sha256(content).hexdigest()
            assert len(salt) == 64
            guessed = bytes(save(load(content), metadata={**facts, "salt": "0" * 64}))
            assert sha256(guessed).hexdigest() != ledger.files[path.name]
            others = [p for p in fed.out.rglob("*") if p.is_file() and p != path]
            assert not any(salt.encode() in other.read_bytes() for other in others)


@pytest.mark.parametrize("model", SUMMED)
def test_a_vector_without_noise_is_not_judged_by_its_size(fed, model):
    """A limit below every silo's norm leaves none out, and no norm is in any record."""
    done = fed.coordinator(asked=asked(fed, model, max_update_norm=1e-12)).run()
    assert [record.silos for record in done.history] == [NAMES] * ROUNDS
    fed.out = fed.out.parent / "far"
    silos = fed.silos()
    reply_of = silos["north"].answer

    def longer(message):
        reply = reply_of(message)
        return replace(reply, tensors={SUM: torch.full_like(reply.tensors[SUM], 1e13)})

    silos["north"].answer = longer
    fed.coordinator(LocalTransport(silos), asked(fed, model, min_silos=2, attempts=1)).run()
    for record in load_state(fed.out).history:
        assert record.lost == {"north": "the reply's vector is longer than any that the round can have"}


def test_a_run_whose_ledger_is_gone_stops_a_silo_in_every_run(fed):
    fed.coordinator(asked=asked(fed, "silo_local")).run()
    (path,) = (fed.out / "silos" / "north" / "runs").glob("*/ledger.jsonl")
    path.unlink()
    again = Federation(fed.out, fed.trainer, fed.policies)
    spec = asked(fed, "silo_local").specs("b" * 32, 0, fed.trainer.start, fed.trainer.basis_sha256)["north"]
    reply = again.silo("north").handle(fed.trainer.start, spec)
    assert reply.kind == "ledger"
    assert "is gone; what it spent is unknown, so the silo must stop" in reply.message
    assert len(list((fed.out / "silos" / "north" / "runs").iterdir())) == 1


def test_an_answered_round_is_not_another_round(fed):
    """A cached reply is of one specification, to the last field."""
    silo, start = fed.silo("north"), fed.trainer.start
    spec = asked(fed, "silo_local").specs("a" * 32, 0, start, fed.trainer.basis_sha256)["north"]
    first = silo.handle(start, spec)
    for changes in ({"learning_rate": 0.01}, {"optimizer": "sgd"}):
        other = silo.handle(start, replace(spec, **changes))
        assert (other.kind, other.message) == (
            "spec",
            "Round 0 was answered from this theta under another specification.",
        )
    again = silo.handle(start, spec)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in first.tensors.items())
    (path,) = (fed.out / "silos" / "north" / "runs").glob("*/ledger.jsonl")
    assert Ledger.read(path).charged("train") == spec.local_steps


@pytest.mark.parametrize("name", ["learning_rate", "head_learning_rate"])
def test_a_rate_that_no_float_holds_is_refused_before_anything_is_charged(fed, name):
    with pytest.raises(FederatedError, match=f"Expected {name}=1e\\+39 of at most 1e\\+38"):
        asked(fed, "silo_local", **{name: 1e39})
