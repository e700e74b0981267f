"""Model secagg with noise in whole numbers: what is opened, what it costs, what is charged, and what is refused."""

import math
from dataclasses import replace

import federation
import numpy as np
import pytest
import torch
from federation import NAMES, Faulty, Federation, Killed, policy, terms
from safetensors.torch import load_file

from dpsb import clipped_sums
from dpsb.federated import coordinator as coordinator_module
from dpsb.federated import trainer as trainer_module
from dpsb.federated.calibrate import policy_text
from dpsb.federated.coordinator import Coordinator, TooFewSilos
from dpsb.federated.messages import SUM, Note, Summing, theta_digest
from dpsb.federated.report import federation_report
from dpsb.federated.secure.masks import own_key, public_of
from dpsb.federated.secure.opening import context_of
from dpsb.federated.secure.whole_numbers import clip_steps_for, modular
from dpsb.federated.server import load_state
from dpsb.federated.spec import read_policy
from dpsb.federated.wire import pack, unpack
from dpsb.randomness import SeededRandomness, SystemRandomness
from dpsb_accounting import PoissonGaussian, PoissonSkellam, skellam, verify
from dpsb_accounting import epsilon as epsilon_of

pytest.importorskip("flwr")

ROUNDS = 2
FOUR = (*NAMES, "east")


@pytest.fixture
def fed(tiny, tmp_path):
    found = Federation(tmp_path / "fed", federation.trainer(tiny))
    acquaint(found)
    return found


@pytest.fixture
def four(tiny, tmp_path, monkeypatch):
    """Four silos, of which one may be missing."""
    monkeypatch.setattr(federation, "NAMES", FOUR)
    found = Federation(tmp_path / "fed", federation.trainer(tiny))
    acquaint(found, FOUR, min_clients=3, spare_rounds=1)
    return found


def acquaint(fed, names=NAMES, **changes):
    keys = {}
    for name in names:
        folder = fed.out / "silos" / name
        folder.mkdir(parents=True, exist_ok=True)
        keys[name] = public_of(own_key(folder)).hex()
    usual = {"models": ["secagg"], "clients": len(names), "peers": keys}
    fed.policies = {name: policy(name, **{**usual, **changes}) for name in names}


def dimension(fed):
    return sum(tensor.numel() for tensor in fed.trainer.start.values())


def whole(fed, names=NAMES, **changes):
    asked = next(iter(terms().silos.values()))
    usual = {
        "silos": dict.fromkeys(names, asked),
        "model": "secagg",
        "local_steps": 1,
        "server_optimizer": "sgd",
        "rounds": ROUNDS,
        "min_silos": len(names) - changes.get("dropouts", 0),
        "clip_steps": clip_steps_for(dimension(fed), 18, 1.0),
        "learning_rate": 0.1,
        "head_learning_rate": 0.1,
    }
    return terms(**{**usual, **changes})


def event(fed, **changes):
    steps = clip_steps_for(dimension(fed), 18, 1.0)
    usual = {"noise_multiplier": federation.NOISE, "sampling_prob": federation.PROB}
    return PoissonSkellam(**{**usual, "clip_steps": steps, "dimension": dimension(fed), **changes})


class Wired(Faulty):
    """Every message and reply goes through its bytes; `lost` are phases and names whose messages are."""

    def __init__(self, silos, lost=()):
        super().__init__(silos)
        self.lost = lost

    def send(self, messages):
        for message in messages:
            self.seen.append(message)
            if (message.summing.phase, message.silo) not in self.lost:
                like = self.silos[message.silo].start
                yield unpack(pack(self.silos[message.silo].answer(unpack(pack(message), like))), like)


def charges(fed, names=NAMES):
    return {name: fed.ledger(name).charged("train") for name in names}


def watched(monkeypatch):
    """Collects the silos' noisy whole sums, before masks, and the opened sums."""
    inside, opened = [], []
    noisy, unmasked = trainer_module.noisy_whole_sum, coordinator_module.to_real
    monkeypatch.setattr(trainer_module, "noisy_whole_sum", lambda *a: inside.append(noisy(*a)) or inside[-1])
    monkeypatch.setattr(coordinator_module, "to_real", lambda *a: opened.append(a[0]) or unmasked(*a))
    return inside, opened


def test_what_is_opened_is_the_sum_and_nothing_else_is_seen(fed, monkeypatch):
    inside, opened = watched(monkeypatch)
    transport = Wired(fed.silos())
    state = fed.coordinator(transport, whole(fed)).run()
    assert state.round == ROUNDS
    assert [record.silos for record in state.history] == [NAMES] * ROUNDS
    for number in range(ROUNDS):
        part = [vector.numpy() for vector in inside[3 * number : 3 * number + 3]]
        np.testing.assert_array_equal(opened[number], modular(sum(part)))
    assert charges(fed) == dict.fromkeys(NAMES, ROUNDS)
    assert {message.summing.phase for message in transport.seen} == {"share", "mask", "agree", "open"}


def test_with_the_same_draws_and_no_noise_it_is_a_central_run(fed, monkeypatch):
    draws, source = {}, np.random.default_rng(2)

    def run(asked, out, changes):
        queue = [
            draws.setdefault((r, n), np.flatnonzero(source.random(24) < 0.25)) for r in range(ROUNDS) for n in NAMES
        ]
        monkeypatch.setattr(clipped_sums, "poisson_draw", lambda *_a: queue.pop(0))
        monkeypatch.setattr(SystemRandomness, "normal", lambda _s, n: torch.zeros(n, dtype=torch.float64))
        monkeypatch.setattr(trainer_module, "skellam", lambda count, *_a: np.zeros(count, dtype=np.int64))
        one = Federation(out, fed.trainer)
        acquaint(one, **changes)
        return one.coordinator(asked=asked).run().theta

    summed = run(whole(fed), fed.out / "a", {})
    central = run(whole(fed, model="trusted_server", clip_steps=0), fed.out / "b", {"models": ["trusted_server"]})
    for name, value in summed.items():
        torch.testing.assert_close(value, central[name], rtol=0, atol=1e-5)


def test_the_claim_is_that_of_skellam_noise_and_never_the_gaussian_one(fed):
    fed.coordinator(asked=whole(fed)).run()
    for name in NAMES:
        record = fed.ledger(name)
        assert record.plan.train.event == event(fed)
        assert record.plan.details["federated"]["noise"] == "skellam"
        assert verify(record.path).ok
    report = federation_report(fed.out).report
    gaussian = PoissonGaussian(noise_multiplier=federation.NOISE, sampling_prob=federation.PROB)
    exact = epsilon_of([(gaussian, ROUNDS)], federation.DELTA)
    assert report.claim
    assert report.epsilon.upper > exact.upper
    assert report.epsilon.upper == pytest.approx(epsilon_of([(event(fed), ROUNDS)], federation.DELTA).upper)
    moved = skellam.sensitivity_after_rounding(l2_clip_norm=1, scale=event(fed).clip_steps, dimension=dimension(fed))
    by_hand = min(
        ROUNDS * skellam.sampled_renyi(order, event(fed).variance, moved, federation.PROB)
        + math.log1p(-1 / order)
        - math.log(federation.DELTA * order) / (order - 1)
        for order in range(2, 64)
    )
    assert report.epsilon.upper == pytest.approx(by_hand, rel=1e-6)
    bare = next(party for party in report.parties if "without secure aggregation" in party.name)
    assert bare.epsilon.upper > report.epsilon.upper


def test_a_budget_that_only_gaussian_noise_would_keep_to_is_refused(fed):
    gaussian = epsilon_of([(PoissonGaussian(noise_multiplier=1.0, sampling_prob=0.25), ROUNDS)], federation.DELTA).upper
    acquaint(fed, max_epsilon=(gaussian + epsilon_of([(event(fed), ROUNDS)], federation.DELTA).upper) / 2)
    with pytest.raises(TooFewSilos, match="its policy allows"):
        fed.coordinator(asked=whole(fed)).run()
    assert not list((fed.out / "silos").glob("**/ledger.jsonl"))


@pytest.mark.parametrize("phase", ["share", "mask", "agree", "open"])
def test_a_dropout_leaves_the_sum_of_the_others_whole(four, monkeypatch, phase):
    inside, opened = watched(monkeypatch)
    lost = {(phase, "south")} if phase in ("agree", "open") else {(each, "south") for each in ("share", "mask")}
    asked = whole(four, FOUR, dropouts=1, rounds=1, attempts=1)
    state = four.coordinator(Wired(four.silos(), lost), asked).run()
    there = FOUR if phase in ("agree", "open") else ("east", "north", "west")
    assert sorted(state.history[0].silos) == sorted(there)
    assert len(inside) == len(there)
    np.testing.assert_array_equal(opened[0], modular(sum(vector.numpy() for vector in inside)))
    assert federation_report(four.out).report.claim


def test_a_silo_that_dies_after_it_sent_its_shares_is_taken_out_by_the_others(four, monkeypatch):
    """Its masks are in every vector that arrived; the others give the shares of its key for this sum."""
    inside, opened = watched(monkeypatch)
    asked = whole(four, FOUR, dropouts=1, rounds=1, attempts=1)
    state = four.coordinator(Wired(four.silos(), {("mask", "south")}), asked).run()
    assert state.history[0].silos == ("east", "north", "west")
    np.testing.assert_array_equal(opened[0], modular(sum(vector.numpy() for vector in inside)))


@pytest.mark.parametrize("phase", ["mask", "agree", "open"])
def test_below_the_threshold_the_round_is_discarded_and_charges_stay(four, monkeypatch, phase):
    _, opened = watched(monkeypatch)
    asked = whole(four, FOUR, dropouts=1, rounds=1, attempts=1)
    with pytest.raises(TooFewSilos, match=r"Round 0|round 0"):
        four.coordinator(Wired(four.silos(), {(phase, "south"), (phase, "west")}), asked).run()
    assert not opened
    there = FOUR[:1] + FOUR[3:] if phase == "mask" else FOUR
    assert charges(four, there) == dict.fromkeys(there, 1)
    assert load_state(four.out).round == 0
    four.coordinator(Wired(four.silos()), asked).run()
    assert len(opened) == 1
    assert charges(four, there) == dict.fromkeys(there, 2), "the same round is another release"


def test_without_spare_rounds_a_discarded_round_is_missing_in_the_end(fed):
    asked = whole(fed, attempts=1)
    with pytest.raises(TooFewSilos):
        fed.coordinator(Wired(fed.silos(), {("open", "west")}), asked).run()
    with pytest.raises(TooFewSilos, match=r"Round 1 has 0 usable replies.*budget of silo"):
        fed.coordinator(Wired(fed.silos()), asked).run()
    assert charges(fed) == dict.fromkeys(NAMES, ROUNDS)


def test_a_server_that_dies_with_an_opened_sum_pays_for_another(four, monkeypatch):
    asked, inner = whole(four, FOUR, dropouts=1, rounds=1), Coordinator._next_theta

    def deadly(*_arguments):
        raise Killed

    monkeypatch.setattr(Coordinator, "_next_theta", deadly)
    with pytest.raises(Killed):
        four.coordinator(Wired(four.silos()), asked).run()
    monkeypatch.setattr(Coordinator, "_next_theta", inner)
    four.coordinator(Wired(four.silos()), asked).run()
    assert charges(four, FOUR) == dict.fromkeys(FOUR, 2)
    assert federation_report(four.out).report.claim


def test_a_silo_that_is_started_again_is_not_in_the_sum(four, monkeypatch):
    """Its secrets were in memory only. The others open the sum with its vector, or without help from it."""
    inside, opened = watched(monkeypatch)
    silos = four.silos()

    class Restarting(Wired):
        def send(self, messages):
            for reply in super().send(messages):
                yield reply
                if reply.silo == "south" and self.seen[-1].summing.phase == "mask":
                    self.silos["south"] = four.silo("south")

    four.coordinator(Restarting(silos), whole(four, FOUR, dropouts=1, rounds=1)).run()
    np.testing.assert_array_equal(opened[0], modular(sum(vector.numpy() for vector in inside)))


# --- what a silo refuses


def begun(fed, name="north", session="e" * 32, **changes):
    """A silo whose secure sum has begun, with the specification and the others' shares for it."""
    silos, asked = fed.silos(), whole(fed, **changes)
    specs = asked.specs("a" * 32, 0, fed.trainer.start, fed.trainer.basis_sha256)
    sent = {each: silos[each].handle({}, specs[each], None, Summing(session=session, phase="share")) for each in silos}
    assert all(isinstance(note, Note) for note in sent.values())
    notes = {other: sent[other].notes[name] for other in NAMES if other != name}
    return silos[name], specs[name], Summing(session=session, phase="mask", notes=notes)


def test_a_sum_is_not_begun_again_with_the_others_old_shares(fed):
    """Shares of a silo's seed from one beginning and of its key from another would take off all of its masks."""
    silo, spec, summing = begun(fed)
    assert silo.handle(fed.trainer.start, spec, None, summing).tensors
    assert isinstance(silo.handle({}, spec, None, Summing(session="d" * 32, phase="share")), Note)
    for each in (silo, fed.silo("north")):  # also after a restart
        again = each.handle({}, spec, None, Summing(session=summing.session, phase="share"))
        assert (again.kind, "is not begun again" in again.message) == ("state", True)
    later = replace(spec, learning_rate=spec.learning_rate / 2)
    assert silo.handle({}, later, None, Summing(session=summing.session, phase="share")).kind == "state"


def test_a_masked_vector_that_cannot_be_kept_is_not_sent(fed, monkeypatch):
    silo, spec, summing = begun(fed)
    monkeypatch.setattr("dpsb.federated.silo.store", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    assert silo.handle(fed.trainer.start, spec, None, summing).kind == "failed"
    monkeypatch.undo()
    assert silo.handle(fed.trainer.start, spec, None, summing).kind == "state"


def test_one_vector_for_one_theta_in_a_sum(fed):
    silo, spec, summing = begun(fed)
    start = fed.trainer.start
    first = silo.handle(start, spec, None, summing)
    again = silo.handle(start, spec, None, summing)
    assert torch.equal(first.tensors[SUM], again.tensors[SUM]), "asked again: the same bytes"
    assert fed.ledger("north").charged("train") == 1
    assert first.tensors[SUM].dtype == torch.int32
    moved = {name: tensor + 1 for name, tensor in start.items()}
    other = silo.handle(moved, replace(spec, theta_sha256=theta_digest(moved)), None, summing)
    assert (other.kind, "not in this secure sum" in other.message) == ("state", True)
    fewer = replace(summing, notes=dict(list(summing.notes.items())[:1]))
    assert "asked something else in phase 'mask'" in silo.handle(start, spec, None, fewer).message
    assert fed.ledger("north").charged("train") == 1


def test_nothing_is_charged_for_a_sum_that_cannot_be(fed):
    silo, spec, summing = begun(fed)
    start = fed.trainer.start
    forged = {name: note[:-2] + "00" for name, note in summing.notes.items()}
    for wrong, said in (
        (None, "Noise in whole numbers goes through a secure sum"),
        (replace(summing, session="f" * 32), "not in this secure sum"),
        (replace(summing, notes={}), "needs 3 of the silos that the policy knows, not 1"),
        (replace(summing, notes=forged), "not from the silo that it names"),
    ):
        assert said in silo.handle(start, spec, None, wrong).message
    record = fed.ledger("north")
    assert record.charged("train") == 0
    usual = replace(spec, clip_steps=0)
    assert "its vector would leave it without masks" in silo.handle(start, usual, None, summing).message


@pytest.mark.parametrize("laxer", [{"noise_multiplier": 0.5}, {"clip_steps": 2**11}, {"l2_clip_norm": 2.0}])
def test_a_server_that_asks_the_others_for_less_noise_gets_no_sum(fed, laxer):
    """A silo's epsilon counts on the others' shares: what these were asked for is in every note."""
    silos, start = fed.silos(), fed.trainer.start
    usual = whole(fed).specs("a" * 32, 0, start, fed.trainer.basis_sha256)["north"]
    sent = {}
    for name in NAMES:
        asked = replace(usual, **laxer) if name != "north" else usual
        sent[name] = silos[name].handle({}, asked, None, Summing(session="e" * 32, phase="share"))
    notes = {name: sent[name].notes["north"] for name in NAMES if name != "north"}
    reply = silos["north"].handle(start, usual, None, Summing(session="e" * 32, phase="mask", notes=notes))
    assert "not from the silo that it names" in reply.message
    assert fed.ledger("north").charged("train") == 0


def test_every_number_that_a_share_depends_on_is_in_every_note(four):
    start, basis = four.trainer.start, four.trainer.basis_sha256
    one, two = (whole(four, FOUR, dropouts=n).specs("a" * 32, 0, start, basis)["north"] for n in (0, 1))
    contexts = {context_of(each, "e" * 32) for each in (one, two, replace(two, dropouts=0, colluders=2))}
    assert len(contexts) == 3


def test_a_silo_gives_up_an_older_sum_for_a_new_one(fed):
    silo, spec, summing = begun(fed)
    silo.handle({}, spec, None, Summing(session="f" * 32, phase="share"))
    assert "not in this secure sum" in silo.handle(fed.trainer.start, spec, None, summing).message


def test_a_policy_without_the_others_keys_takes_part_in_no_secure_sum(fed):
    acquaint(fed, peers={})
    with pytest.raises(TooFewSilos, match="the public keys of 0 other silos"):
        fed.coordinator(asked=whole(fed)).run()
    assert not list((fed.out / "silos").glob("**/ledger.jsonl"))


def test_a_silo_with_the_others_keys_sends_no_vector_without_masks(fed):
    """A server that asks for the Gaussian kind would see each silo's sum under a share of the noise alone."""
    with pytest.raises(TooFewSilos, match="so it is in secure sums alone"):
        fed.coordinator(asked=whole(fed, clip_steps=0)).run()
    assert not list((fed.out / "silos").glob("**/ledger.jsonl"))


def test_peers_survive_the_policy_file(fed, tmp_path):
    (tmp_path / "policy.toml").write_text(policy_text(fed.policies["north"]))
    assert read_policy(tmp_path / "policy.toml") == fed.policies["north"]


def test_seeded_shares_claim_nothing(fed):
    fed.randomness = SeededRandomness(4)
    fed.coordinator(asked=whole(fed)).run()
    assert not federation_report(fed.out).report.claim


def test_replies_on_disk_are_masked(fed, monkeypatch):
    inside, _ = watched(monkeypatch)
    fed.coordinator(asked=whole(fed, rounds=1)).run()
    for vector, name in zip(inside, NAMES, strict=True):
        (reply,) = fed.replies(name)
        stored = load_file(reply)[SUM].numpy().view("uint32")
        assert float(np.mean(stored == modular(vector.numpy()))) < 0.01
