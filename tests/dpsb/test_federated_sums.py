"""Models secagg (trusted-sum path) and client_level: what is in a sum, what its noise is, and when none is opened."""

import math

import federation
import numpy as np
import pytest
import torch
from federation import NAMES, WHOLE, Faulty, Federation, Killed, check_ledger, policy, terms

from dpsb import clipped_sums
from dpsb.federated import trainer as trainer_module
from dpsb.federated.coordinator import Coordinator, TooFewSilos
from dpsb.federated.messages import SUM
from dpsb.federated.report import federation_report
from dpsb.federated.server import load_state
from dpsb.federated.terms import SiloTerms
from dpsb.federated.trainer import noise_share
from dpsb.randomness import SeededRandomness, SystemRandomness
from dpsb_accounting import epsilon as epsilon_of
from dpsb_accounting.federated import secagg as secagg_report

ROUNDS, CLIP = 2, 0.001


def allow(fed, model, **changes):
    fed.policies = {name: policy(name, models=[model], **{"clients": 3, **changes}) for name in NAMES}


def secagg(**changes):
    usual = {"model": "secagg", "local_steps": 1, "server_optimizer": "sgd", "rounds": ROUNDS, "min_silos": 3}
    return terms(**{**usual, "learning_rate": 0.1, "head_learning_rate": 0.1, **changes})


def client_level(**changes):
    usual = {"model": "client_level", "server_optimizer": "sgd", "rounds": ROUNDS, "min_silos": 2, "optimizer": "sgd"}
    return terms(**{**usual, "l2_clip_norm": CLIP, **changes})


@pytest.mark.parametrize(("dropouts", "colluders"), [(0, 1), (1, 1), (0, 2)])
def test_shares_that_are_certainly_there_make_the_stated_noise(dropouts, colluders):
    spec = secagg(dropouts=dropouts, colluders=colluders, min_silos=3 - dropouts).spec(
        "north", "a" * 32, 0, "0" * 64, "0" * 64
    )
    share = noise_share(spec, 40_000, SystemRandomness())
    wanted = federation.NOISE / math.sqrt(3 - dropouts - colluders)
    assert float(share.std()) == pytest.approx(wanted, rel=0.03)


def test_the_opened_sum_is_the_sums_and_the_shares_and_nothing_else(fed, monkeypatch):
    """With the draws known, opened sum less clipped sums is exactly the sum of the three shares."""
    allow(fed, "secagg")
    clipped, shares, opened = [], [], []
    inner, normal, mean = clipped_sums.clipped_sum, SystemRandomness.normal, Coordinator._noisy_mean
    monkeypatch.setattr(clipped_sums, "clipped_sum", lambda *a: clipped.append(inner(*a)) or clipped[-1].clone())
    monkeypatch.setattr(SystemRandomness, "normal", lambda s, n: shares.append(normal(s, n)) or shares[-1])
    monkeypatch.setattr(Coordinator, "_noisy_mean", lambda *a: opened.append(mean(*a)) or opened[-1])
    fed.coordinator(asked=secagg()).run()
    assert len(shares) == 3 * ROUNDS, "the server adds none"
    for number in range(ROUNDS):
        part = slice(3 * number, 3 * number + 3)
        std = federation.NOISE / math.sqrt(2)
        wanted = sum(clipped[part]) + std * sum(shares[part])
        found = torch.cat([value.flatten() for value in opened[number].values()])
        torch.testing.assert_close(found * 18, wanted, rtol=0, atol=1e-12)


def test_with_the_same_draws_it_is_a_central_run(fed, monkeypatch):
    """Noise aside, the opened sums are those of trusted_server."""
    draws = {}
    source = np.random.default_rng(2)

    def run(model, asked, out):
        queue = [
            draws.setdefault((r, n), np.flatnonzero(source.random(24) < 0.25)) for r in range(ROUNDS) for n in NAMES
        ]
        monkeypatch.setattr(clipped_sums, "poisson_draw", lambda *_a: queue.pop(0))
        monkeypatch.setattr(SystemRandomness, "normal", lambda _s, n: torch.zeros(n, dtype=torch.float64))
        one = Federation(out, fed.trainer)
        allow(one, model)
        return one.coordinator(asked=asked).run().theta

    summed = run("secagg", secagg(), fed.out / "a")
    central = run("trusted_server", secagg(model="trusted_server"), fed.out / "b")
    for name, value in summed.items():
        torch.testing.assert_close(value, central[name], rtol=0, atol=1e-6)


def test_report_of_shares(fed):
    allow(fed, "secagg")
    fed.coordinator(asked=secagg(dropouts=0, colluders=1)).run()
    for name in NAMES:
        check_ledger(fed.ledger(name), ROUNDS)
    report = federation_report(fed.out).report
    assert report.claim
    own = epsilon_of(fed.ledger("north").plan).upper
    assert report.epsilon.upper == pytest.approx(own, rel=1e-6), "the plan's noise is what is left of the shares"
    bare = next(party for party in report.parties if "without secure aggregation" in party.name)
    assert bare.epsilon.upper > report.epsilon.upper


def test_a_dropout_below_the_threshold_opens_nothing(fed, monkeypatch):
    allow(fed, "secagg", min_clients=2)
    opened = []
    mean = Coordinator._noisy_mean
    monkeypatch.setattr(Coordinator, "_noisy_mean", lambda *a: opened.append(sorted(a[3])) or mean(*a))
    asked = secagg(dropouts=1, min_silos=2)
    lost = Faulty(fed.silos(), before=lambda message: "lost" if message.silo != "north" else None)
    with pytest.raises(TooFewSilos, match="Round 0 has 1 usable replies, min_silos is 2"):
        fed.coordinator(lost, asked).run()
    assert not opened
    fed.check_all(0, north=1)  # the charge stays
    fed.coordinator(asked=asked).run()
    assert opened == [list(NAMES)] * ROUNDS
    fed.check_all(ROUNDS)


def test_a_silo_that_never_came_is_one_of_the_dropouts_of_the_report(fed):
    """Its share was in no sum, and the noise that is claimed counts on none of the dropouts' shares."""
    allow(fed, "secagg", min_clients=2)
    away = Faulty(fed.silos(), before=lambda message: "lost" if message.silo == "west" else None)
    fed.coordinator(away, secagg(dropouts=1, min_silos=2)).run()
    found = federation_report(fed.out)
    assert (found.report.claim, found.never) == (True, ("west",))
    own = epsilon_of(fed.ledger("north").plan).upper
    assert found.report.epsilon.upper == pytest.approx(own, rel=1e-6)
    with pytest.raises(ValueError, match="clients=4 must be 2, the number of ledgers, or more by at most dropouts=1"):
        secagg_report([fed.ledger(name) for name in NAMES[:2]], local_steps=1, dropouts=1, colluders=1, clients=4)


def test_a_sum_is_never_opened_for_two_sets_of_silos(fed, monkeypatch):
    """Their difference would show one silo's contribution under its own share alone."""
    allow(fed, "secagg", min_clients=2)
    asked, mean = secagg(dropouts=1, min_silos=2), Coordinator._noisy_mean

    def deadly(*arguments):
        mean(*arguments)
        raise Killed

    monkeypatch.setattr(Coordinator, "_noisy_mean", deadly)
    lost = Faulty(fed.silos(), before=lambda message: "lost" if message.silo == "west" else None)
    with pytest.raises(Killed):
        fed.coordinator(lost, asked).run()
    assert load_state(fed.out).opened == (0, ("north", "south"))
    monkeypatch.setattr(Coordinator, "_noisy_mean", mean)
    without = Faulty(fed.silos(), before=lambda message: "lost" if message.silo == "north" else None)
    with pytest.raises(TooFewSilos, match=r"opened for north, south before .* cannot be opened without north"):
        fed.coordinator(without, asked).run()
    done = fed.coordinator(asked=asked).run()
    assert [record.silos for record in done.history] == [("north", "south"), NAMES]
    assert done.history[0].lost == {"west": "came after the sum was opened without it"}
    for name in NAMES:
        check_ledger(fed.ledger(name), ROUNDS)


def test_a_silo_wants_enough_parties_in_a_sum(fed):
    allow(fed, "secagg", min_clients=3)
    with pytest.raises(TooFewSilos, match="wants sums of at least 3 parties, not 2"):
        fed.coordinator(asked=secagg(dropouts=1, min_silos=2)).run()
    assert not list((fed.out / "silos").glob("**/*.jsonl"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"clients": 2, "min_clients": 2}, "knows of clients=2 in a sum, not of 3"),
        ({"clients": None}, "knows of clients=None in a sum"),
        ({"min_colluders": 2}, "wants colluders of at least 2, not 1"),
    ],
)
def test_a_silo_knows_who_adds_noise(fed, changes, said):
    allow(fed, "secagg", **changes)
    start = fed.trainer.start
    spec = secagg().specs("a" * 32, 0, start, fed.trainer.basis_sha256)["north"]
    assert said in fed.silo("north").handle(start, spec).message
    assert not list((fed.out / "silos").glob("**/*.jsonl"))


def test_seeded_shares_claim_nothing(fed):
    allow(fed, "secagg")
    fed.randomness = SeededRandomness(4)
    fed.coordinator(asked=secagg()).run()
    assert not federation_report(fed.out).report.claim


# --- whole clients


def test_client_updates_are_clipped_whole_and_charged_once_a_round(fed):
    allow(fed, "client_level", delta=0.01)
    seen = []
    transport = Faulty(fed.silos(), after=lambda _m, reply: seen.append(reply.tensors[SUM]) or [reply])
    fed.coordinator(transport, client_level()).run()
    assert all(float(update.norm()) <= CLIP * (1 + 1e-9) for update in seen)
    assert max(float(update.norm()) for update in seen) > 0.999 * CLIP, "the clip norm is small enough to bind"
    for name in NAMES:
        assert fed.ledger(name).plan.unit == "client"
    fed.check_all(ROUNDS, event=WHOLE)
    report = federation_report(fed.out).report
    assert report.claim
    assert report.terms.unit == "client"
    assert report.epsilon.upper == pytest.approx(epsilon_of([(WHOLE, ROUNDS)], 0.01, "zero_out").upper)


def test_the_servers_noise_is_on_the_sum_of_clients(fed, monkeypatch):
    allow(fed, "client_level", delta=0.01)
    noise = torch.ones(sum(t.numel() for t in fed.trainer.start.values()), dtype=torch.float64)
    monkeypatch.setattr(SystemRandomness, "normal", lambda _s, _n: noise)
    seen = []
    transport = Faulty(fed.silos(), after=lambda _m, reply: seen.append(reply.tensors[SUM]) or [reply])
    state = fed.coordinator(transport, client_level(rounds=1)).run()
    moved = torch.cat([(state.theta[name] - start).flatten() for name, start in fed.trainer.start.items()])
    wanted = (sum(seen) + CLIP * federation.NOISE * noise) / 3
    torch.testing.assert_close(moved.double(), wanted, rtol=0, atol=1e-6)


def test_a_lost_client_leaves_noise_and_divisor_as_they_are(fed, monkeypatch):
    allow(fed, "client_level", delta=0.01)
    monkeypatch.setattr(SystemRandomness, "normal", lambda _s, n: torch.ones(n, dtype=torch.float64))
    seen = []
    transport = Faulty(
        fed.silos(),
        before=lambda message: "lost" if message.silo == "west" else None,
        after=lambda _m, reply: seen.append(reply.tensors[SUM]) or [reply],
    )
    state = fed.coordinator(transport, client_level(rounds=1)).run()
    moved = torch.cat([(state.theta[name] - start).flatten() for name, start in fed.trainer.start.items()])
    torch.testing.assert_close(moved.double(), (sum(seen) + CLIP) / 3, rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), 1.0])
def test_a_client_that_does_not_clip_is_not_used(fed, value):
    from dataclasses import replace

    allow(fed, "client_level", delta=0.01)

    def after(message, reply):
        if message.silo != "south":
            return [reply]
        return [replace(reply, tensors={SUM: torch.full_like(reply.tensors[SUM], value)})]

    state = fed.coordinator(Faulty(fed.silos(), after=after), client_level()).run()
    assert [record.silos for record in state.history] == [("north", "west")] * ROUNDS


@pytest.mark.parametrize(
    ("value", "length"),
    [(None, 0), (float("nan"), 0), (float("inf"), 0), (float("-inf"), 0), (3e38, CLIP), (1e-6, 1e-6)],
    ids=["zero", "nan", "inf", "-inf", "huge", "small"],
)
def test_whatever_an_update_is_what_leaves_the_silo_is_finite_and_clipped(fed, monkeypatch, value, length):
    """One number of theta becomes the start's plus ``value``, or none moves. Zero is an update too, and is charged."""

    class Forced(torch.optim.SGD):
        def step(self):
            first = self.param_groups[0]["params"][0]
            if value is not None:
                first.data.view(-1)[0] = start.view(-1)[0] + value

    allow(fed, "client_level", delta=0.01)
    start = next(iter(fed.trainer.start.values())).double()
    monkeypatch.setattr(trainer_module, "local_optimizer", lambda adapter, _spec: Forced(adapter.parameters(), lr=1))
    seen = []
    transport = Faulty(fed.silos(), after=lambda _m, reply: seen.append(reply.tensors[SUM]) or [reply])
    state = fed.coordinator(transport, client_level(rounds=1)).run()
    raw = next(iter(fed.trainer.adapter.state().values()))
    assert bool(torch.isfinite(raw).all()) == (value is None or math.isfinite(value)), "it is so before the clip"
    for vector in seen:
        assert float(vector.norm()) <= CLIP * (1 + 1e-9)
        assert float(vector.norm()) == pytest.approx(length, rel=0.1)
    assert state.history[0].silos == NAMES
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.theta.values())
    fed.check_all(1, event=WHOLE)
    assert fed.released("server") == 1


def test_a_round_of_too_few_clients_opens_nothing_and_its_charges_stay(fed):
    allow(fed, "client_level", delta=0.01)
    away = Faulty(fed.silos(), before=lambda m: "lost" if m.silo != "north" and m.spec.round == 1 else None)
    with pytest.raises(TooFewSilos, match="Round 1 has 1 usable replies, min_silos is 2"):
        fed.coordinator(away, client_level()).run()
    assert fed.released("server") == 1
    fed.check_all(1, north=2, event=WHOLE)
    done = fed.coordinator(asked=client_level()).run()
    assert [record.silos for record in done.history] == [NAMES] * ROUNDS
    assert fed.released("server") == ROUNDS
    fed.check_all(ROUNDS, event=WHOLE)


@pytest.mark.parametrize("model", ["silo_local", "client_level"])
def test_silos_of_unequal_sizes_count_alike(fed, monkeypatch, model):
    """A weight by size could be any number, and would move with one example; the sensitivity is that of equal parts."""
    monkeypatch.setattr(SystemRandomness, "normal", lambda _s, n: torch.zeros(n, dtype=torch.float64))
    allow(fed, model, delta=0.01)
    fed.sizes = dict(zip(NAMES, (8, 24, 72), strict=True))
    each = {"sampling_prob": federation.PROB, "noise_multiplier": federation.NOISE}
    silos = {name: SiloTerms(**each, expected_batch_size=size // 4) for name, size in fed.sizes.items()}
    asked = {"silo_local": terms, "client_level": client_level}[model](silos=silos, rounds=1)
    vectors = []

    def after(message, reply):
        theta = message.theta
        moves = {name: reply.tensors[name].double() - theta[name] for name in theta if name in reply.tensors}
        vectors.append(reply.tensors[SUM] if not moves else torch.cat([move.flatten() for move in moves.values()]))
        return [reply]

    state = fed.coordinator(Faulty(fed.silos(), after=after), asked).run()
    moved = torch.cat([(state.theta[name] - start).flatten() for name, start in fed.trainer.start.items()]).double()
    torch.testing.assert_close(moved, sum(vectors) / 3, rtol=0, atol=1e-6)
    by_size = sum(size * vector for size, vector in zip(fed.sizes.values(), vectors, strict=True)) / 104
    assert float((moved - by_size).norm()) > 0.1 * float(moved.norm())


def test_guarantees_for_silos_and_for_examples_are_not_added(fed):
    allow(fed, "client_level", delta=0.01)
    start, basis = fed.trainer.start, fed.trainer.basis_sha256
    fed.silo("north").handle(start, client_level().specs("a" * 32, 0, start, basis)["north"])
    fed.policies["north"] = policy("north", delta=0.01)
    reply = fed.silo("north").handle(start, terms().specs("b" * 32, 0, start, basis)["north"])
    assert (reply.kind, "another unit or relation" in reply.message) == ("spec", True)
