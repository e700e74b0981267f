"""Model trusted_server: sums without noise, one central noise, exactly a central run; and what it refuses."""

import json
from pathlib import Path

import federation
import numpy as np
import pytest
import torch
import workbench
from federation import NAMES, Faulty, Federation, Killed, check_ledger, policy, terms

from dpsb import clipped_sums
from dpsb.federated.checks import FederatedError
from dpsb.federated.coordinator import Coordinator
from dpsb.federated.messages import SUM
from dpsb.federated.server import ServerError, load_state
from dpsb.federated.terms import SiloTerms
from dpsb.randomness import SeededRandomness
from dpsb.train import fit
from dpsb_accounting import federated
from dpsb_accounting.federated import Silo as Described

ROUNDS, BATCH, RATE = 3, 6, 0.1


@pytest.fixture
def fed(tiny, tmp_path):
    found = Federation(tmp_path / "fed", federation.trainer(tiny))
    found.policies = {name: policy(name, models=["trusted_server"]) for name in NAMES}
    return found


def asked(**changes):
    usual = {"model": "trusted_server", "local_steps": 1, "server_optimizer": "sgd", "rounds": ROUNDS}
    return terms(**{**usual, "learning_rate": RATE, "head_learning_rate": RATE, "min_silos": 3, **changes})


def test_it_is_a_central_run_with_the_same_draws_and_noise(fed, monkeypatch, tmp_path):
    source = np.random.default_rng(5)
    draws = [[np.flatnonzero(source.random(24) < 0.25) for _ in NAMES] for _ in range(ROUNDS)]
    queue = [draw for row in draws for draw in row]
    monkeypatch.setattr(clipped_sums, "poisson_draw", lambda *_a: queue.pop(0))
    state = fed.coordinator(asked=asked(), randomness=SeededRandomness(9)).run()

    together = [np.concatenate([draw + 24 * i for i, draw in enumerate(row)]) for row in draws]
    monkeypatch.setattr(clipped_sums, "poisson_draw", lambda *_a: together.pop(0))
    data = [example for name in NAMES for example in fed.silo(name)._dataset]
    work, adapter = fed.trainer, fed.trainer.adapter
    adapter.load_state(work.start)
    changes = {"steps": ROUNDS, "noise_multiplier": federation.NOISE, "expected_batch_size": 3 * BATCH}
    with workbench.new_ledger(tmp_path / "central", num_examples=72, **changes) as ledger:
        fit(
            adapter,
            data,
            ledger=ledger,
            optimizer=torch.optim.SGD(adapter.parameters(), lr=RATE),
            loss_fn=work.loss_fn,
            collate=work.collate,
            synthetic=work.synthetic,
            max_length=work.max_length,
            randomness=SeededRandomness(9),
        )
    for name, value in adapter.state().items():
        torch.testing.assert_close(state.theta[name], value, rtol=0, atol=1e-7)


def test_adam_on_the_server_is_torchs(fed, monkeypatch):
    sums = []
    transport = Faulty(fed.silos(), after=lambda _m, reply: sums.append(reply.tensors[SUM]) or [reply])
    noise = torch.randn(sum(t.numel() for t in fed.trainer.start.values()), dtype=torch.float64)
    monkeypatch.setattr("dpsb.randomness.SystemRandomness.normal", lambda _self, _count: noise)
    state = fed.coordinator(transport, asked(server_optimizer="adam", schedule="linear")).run()
    parameters = {name: torch.nn.Parameter(value.double().clone()) for name, value in fed.trainer.start.items()}
    optimizer = torch.optim.Adam(parameters.values(), lr=RATE)
    for number in range(ROUNDS):
        mean = (torch.stack(sums[3 * number : 3 * number + 3]).sum(dim=0) + noise) / (3 * BATCH)
        for p, part in zip(parameters.values(), mean.split([p.numel() for p in parameters.values()]), strict=True):
            p.grad = part.view_as(p)
        optimizer.param_groups[0]["lr"] = RATE * (1 - number / ROUNDS)
        optimizer.step()
    for name, value in state.theta.items():
        torch.testing.assert_close(value.double(), parameters[name].data, atol=1e-4, rtol=1e-4)


def test_report_and_ledgers(fed):
    state = fed.coordinator(asked=asked()).run()
    for name in NAMES:
        check_ledger(fed.ledger(name), ROUNDS)
    report = federated.trusted_server([Described.from_ledger(fed.ledger(name)) for name in NAMES], local_steps=1)
    assert report.claim
    assert report.parties[0].epsilon is None, "nothing is guaranteed against the server"
    assert not state.tainted
    with pytest.raises(ValueError, match="states model='trusted_server'"):
        federated.silo_local([fed.ledger(name) for name in NAMES])


def test_seeded_noise_of_the_server_is_on_record(fed):
    assert fed.coordinator(asked=asked(rounds=1), randomness=SeededRandomness(1)).run().tainted


def test_a_silo_must_allow_it(fed):
    fed.policies["south"] = policy("south")
    state = fed.coordinator(asked=asked(min_silos=2)).run()
    assert "allows the models silo_local, not trusted_server" in state.left["south"]


def test_a_sum_is_not_sent_again_once_the_round_is_over(fed, tmp_path):
    """A server that went back to an older checkpoint would publish one sum under two noises."""
    fed.coordinator(asked=asked()).run()
    specs = asked().specs(
        next((fed.out / "silos" / "north" / "runs").iterdir()).name,
        0,
        fed.trainer.start,
        fed.trainer.basis_sha256,
    )
    reply = fed.silo("north").handle(fed.trainer.start, specs["north"])
    assert reply.kind == "state"
    assert "not sent again" in reply.message
    check_ledger(fed.ledger("north"), ROUNDS)


def test_a_server_killed_after_the_noise_draws_it_anew_and_charges_nobody(fed, monkeypatch):
    inner, calls = Coordinator._noisy_mean, []

    def deadly(self, *arguments):
        found = inner(self, *arguments)
        calls.append(found)
        if len(calls) == 2:
            raise Killed
        return found

    monkeypatch.setattr(Coordinator, "_noisy_mean", deadly)
    with pytest.raises(Killed):
        fed.coordinator(asked=asked()).run()
    fed.coordinator(asked=asked()).run()
    first = next(iter(calls[1]))
    assert not torch.equal(calls[1][first], calls[2][first])
    for name in NAMES:
        check_ledger(fed.ledger(name), ROUNDS)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"local_steps": 2}, "one gradient release, not local_steps=2"),
        ({"server_optimizer": "none"}, "needs server_optimizer"),
        (
            {"silos": {n: SiloTerms(sampling_prob=0.1, noise_multiplier=1 + i) for i, n in enumerate(NAMES)}},
            "has one noise",
        ),
        ({"model": "secagg", "local_steps": 2}, "one gradient release, not local_steps=2"),
        ({"model": "secagg", "dropouts": 1}, "opens sums of at least clients - dropouts = 2 silos, so min_silos=3"),
        ({"model": "secagg", "dropouts": 2, "min_silos": 1}, "none is left that certainly adds noise"),
        ({"model": "secagg", "colluders": 0}, "colluders=0"),
        ({"model": "client_level", "server_optimizer": "none"}, "needs server_optimizer"),
        ({"min_silos": 4}, "min_silos=4 between 1 and the 3"),
        ({"model": "none"}, "Expected model='none' to be one of silo_local"),
    ],
)
def test_terms_that_cannot_hold_are_refused(changes, said):
    with pytest.raises(FederatedError, match=said):
        asked(**changes)


def test_a_state_of_another_schema_is_named(fed):
    fed.coordinator(asked=asked()).begin()
    path = fed.out / "server" / "server.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": "dpsb-federation/9"}))
    with pytest.raises(ServerError, match="has schema 'dpsb-federation/9'"):
        load_state(fed.out)


def test_a_state_that_is_replaced_between_two_looks_is_found(fed, monkeypatch):
    """The reader looks for the folder just before the new one is put there, and for the old one just after."""
    fed.coordinator(asked=asked()).begin()
    looks = []
    plain = Path.is_dir

    def late(path):
        looks.append(path.name)
        return len(looks) > 2 and plain(path)

    monkeypatch.setattr(Path, "is_dir", late)
    assert load_state(fed.out) is not None
