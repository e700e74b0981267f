"""Faults of a federation, each injected in process. After each, every ledger holds what was really released."""

from dataclasses import replace

import pytest
import torch
from federation import NAMES, Faulty, Killed, first_spec, only, policy, terms

from dpsb import clipped_sums
from dpsb.federated import silo as silo_module
from dpsb.federated.coordinator import TooFewSilos
from dpsb.federated.messages import Update, theta_digest
from dpsb.federated.server import load_state
from dpsb.mechanism import Mechanism
from dpsb_accounting import Ledger

KILLED = {
    "after the charge": (Ledger, "charge", 2),
    "before the noise": (Mechanism, "release", 1),
    "after a step": (Mechanism, "release", 2),
    "before the reply is stored": (silo_module, "store", 1),
    "before the reply is bound": (Ledger, "bind_file", 1),
}


@pytest.mark.parametrize("when", KILLED)
def test_a_silo_that_dies_mid_round(fed, monkeypatch, when):
    """It comes back and is asked again; a reply that was whole is sent, other charges stay and are not refunded."""
    place, name, count = KILLED[when]
    inner, calls, dying = getattr(place, name), [], []

    def deadly(*arguments, **options):
        if dying:
            calls.append(0)
            if len(calls) == count:
                dying.clear()
                raise Killed
        return inner(*arguments, **options)

    monkeypatch.setattr(place, name, deadly)

    class Restarts(Faulty):
        def send(self, messages):
            replies = []
            for message in messages:
                if only("south", 1)(message) and not dying and not calls:
                    dying.append(True)
                try:
                    replies.append(fed.silo(message.silo).answer(message))  # a new process each time
                except Killed:
                    continue
            return replies

    fed.policies["south"] = policy("south", spare_rounds=1)
    state = fed.coordinator(Restarts(fed.silos())).run()
    assert calls
    assert [record.silos for record in state.history] == [NAMES] * 3
    charged_in_vain = {"after the charge": 1, "before the noise": 1, "after a step": 2, "before the reply is stored": 2}
    charged = 6 + charged_in_vain.get(when, 0)
    fed.check_all(south=charged, released={"south": charged - (when in ("before the noise", "after a step"))})
    assert len(fed.replies("south")) == 3


def test_without_spare_rounds_a_crash_costs_the_last_round(fed, monkeypatch):
    release, calls = Mechanism.release, []

    def deadly(self, *arguments):
        calls.append(0)
        if len(calls) == 1:
            raise Killed
        return release(self, *arguments)

    monkeypatch.setattr(Mechanism, "release", deadly)

    class Restarts(Faulty):
        def send(self, messages):
            for message in messages:
                try:
                    yield fed.silo(message.silo).answer(message)
                except Killed:
                    continue

    state = fed.coordinator(Restarts(fed.silos())).run()
    assert [len(record.silos) for record in state.history] == [3, 3, 2]
    assert "budget of silo 'north' for this run is spent" in state.left["north"]
    fed.check_all(north=5, released={"north": 4})


def test_a_lost_reply_is_sent_again_for_nothing(fed):
    lost = []

    def after(message, reply):
        if only("south", 1)(message) and not lost:
            lost.append(reply)
            return []
        return [reply]

    transport = Faulty(fed.silos(), after=after)
    state = fed.coordinator(transport).run()
    assert [record.silos for record in state.history] == [NAMES] * 3
    assert len([m for m in transport.seen if only("south", 1)(m)]) == 2
    fed.check_all()


def test_a_lost_message_costs_nothing(fed):
    transport = Faulty(fed.silos(), before=lambda message: "lost" if message.silo == "west" else None)
    state = fed.coordinator(transport).run()
    assert [record.silos for record in state.history] == [("north", "south")] * 3
    assert not (fed.out / "silos" / "west").exists()
    fed.check_all(west=0)


def test_the_same_round_with_another_theta_is_charged_again(fed):
    """A server that resumes from an older theta, or lies about it: each answer is another release."""

    def before(message):
        if only("south", 1)(message):
            theta = {name: value * 1.5 for name, value in message.theta.items()}
            spec = replace(message.spec, theta_sha256=theta_digest(theta))
            assert isinstance(fed.silo("south").handle(theta, spec), Update)

    fed.policies["south"] = policy("south", spare_rounds=1)
    state = fed.coordinator(Faulty(fed.silos(), before=before)).run()
    assert state.round == 3
    fed.check_all(south=8)


@pytest.mark.parametrize("equal", [True, False])
def test_a_doubled_reply(fed, equal):
    def after(message, reply):
        if not only("south", 1)(message):
            return [reply]
        other = reply if equal else replace(reply, tensors={n: t + 1 for n, t in reply.tensors.items()})
        return [reply, other, reply]

    state = fed.coordinator(Faulty(fed.silos(), after=after)).run()
    record = state.history[1]
    assert ("south" in record.silos) == equal
    if equal:
        assert len(record.notes) == 2
    else:
        assert record.lost["south"] == "sent two different replies to one round"
    fed.check_all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t * float("nan"), "not finite"),
        (lambda t: t + float("inf"), "not finite"),
        (lambda t: t + 1e6, "more than max_update_norm"),
        (lambda t: t.double(), "another shape or type"),
        (lambda t: t[:1], "another shape or type"),
    ],
    ids=["nan", "inf", "huge", "type", "shape"],
)
def test_a_bad_update_is_not_used(fed, change, said):
    def after(message, reply):
        if only("south", 1)(message):
            return [replace(reply, tensors={name: change(tensor) for name, tensor in reply.tensors.items()})]
        return [reply]

    state = fed.coordinator(Faulty(fed.silos(), after=after)).run()
    assert said in state.history[1].lost["south"]
    assert state.history[2].silos == NAMES
    assert all(bool(torch.isfinite(value).all()) for value in state.theta.values())
    fed.check_all()


def test_a_zero_update_is_an_update(fed):
    def after(message, reply):
        return [replace(reply, tensors=dict(message.theta)) if message.silo == "south" else reply]

    state = fed.coordinator(Faulty(fed.silos(), after=after)).run()
    assert [record.silos for record in state.history] == [NAMES] * 3
    fed.check_all()


def test_replies_of_others_are_ignored(fed):
    def after(message, reply):
        late = replace(reply, round=message.spec.round + 1)
        return [replace(reply, silo="mallory"), late, replace(reply, run_id="f" * 32), reply]

    state = fed.coordinator(Faulty(fed.silos(), after=after)).run()
    assert [record.silos for record in state.history] == [NAMES] * 3
    assert any("mallory" in note for note in state.history[0].notes)
    fed.check_all()


def test_another_theta_in_a_reply_is_not_used(fed):
    def after(message, reply):
        return [replace(reply, theta_sha256="0" * 64) if only("south", 0)(message) else reply]

    state = fed.coordinator(Faulty(fed.silos(), after=after)).run()
    assert "another theta" in state.history[0].lost["south"]
    fed.check_all()


def spends_a_round(fed):
    """Somebody else has a round's worth of the south's steps done before the first round."""
    spent = []

    def before(message):
        if only("south", 0)(message) and not spent:
            spent.append(True)
            theta = {name: value + 0.1 for name, value in message.theta.items()}
            fed.silo("south").handle(theta, replace(message.spec, theta_sha256=theta_digest(theta)))

    return Faulty(fed.silos(), before=before)


def test_a_spent_budget_ends_a_silos_part_and_the_run_goes_on(fed):
    state = fed.coordinator(spends_a_round(fed)).run()
    assert [len(record.silos) for record in state.history] == [3, 3, 2]
    assert "Nothing was charged" in state.left["south"]
    fed.check_all()


def test_a_spent_budget_ends_the_run_where_every_silo_is_needed(fed):
    said = r"Round 2 has 2 usable replies, min_silos is 3 \(south: budget: The budget of silo 'south' .* have left"
    with pytest.raises(TooFewSilos, match=said):
        fed.coordinator(spends_a_round(fed), terms(min_silos=3)).run()
    fed.check_all()
    with pytest.raises(TooFewSilos, match=said):  # asking again neither helps nor costs anything
        fed.coordinator(asked=terms(min_silos=3)).run()
    assert load_state(fed.out).round == 2
    fed.check_all()


def test_too_few_silos_stop_the_run_and_it_can_go_on(fed):
    def before(message):
        return "lost" if message.silo != "north" and message.spec.round == 1 else None

    with pytest.raises(TooFewSilos, match=r"Round 1 has 1 usable replies, min_silos is 2 \(south: no reply; west"):
        fed.coordinator(Faulty(fed.silos(), before=before)).run()
    fed.check_all(north=4, south=2, west=2)
    theta = load_state(fed.out).theta
    state = fed.coordinator().run()
    assert [record.round for record in state.history] == [0, 1, 2]
    assert theta_digest(theta) != theta_digest(state.theta)
    fed.check_all()


def test_a_laxer_specification_is_refused_at_no_cost(fed):
    fed.policies["south"] = policy("south", min_noise_multiplier=2.0)
    state = fed.coordinator().run()
    assert state.left["south"].startswith("spec: Silo 'south' wants noise_multiplier of at least 2")
    assert [record.silos for record in state.history] == [("north", "west")] * 3
    fed.check_all(south=0)


def test_the_local_steps_are_those_of_fit(fed, tmp_path):
    """A silo's round and ``fit`` with the same draws and noise arrive at the same theta, bit for bit."""
    from dpsb.randomness import SeededRandomness
    from dpsb.train import Knobs, fit

    fed.randomness = SeededRandomness(3)
    silo, start, spec = fed.silo("north"), fed.trainer.start, first_spec(fed, rounds=1)
    reply = silo.handle(start, spec)
    work = fed.trainer
    (tmp_path / "fit").mkdir()
    work.adapter.load_state(start)
    with Ledger.create(tmp_path / "fit" / "ledger.jsonl", fed.ledger("north").plan) as ledger:
        fit(
            work.adapter,
            silo._dataset,
            ledger=ledger,
            optimizer=train_optimizer(work, spec),
            loss_fn=work.loss_fn,
            collate=work.collate,
            synthetic=work.synthetic,
            max_length=work.max_length,
            knobs=Knobs(token_budget=1),  # a silo computes one example at a time
            randomness=SeededRandomness(3),
        )
    for name, value in work.adapter.state().items():
        assert torch.equal(value, reply.tensors[name])


def train_optimizer(work, spec):
    from dpsb.federated.trainer import local_optimizer

    return local_optimizer(work.adapter, spec)


def test_steps_are_charged_before_their_draw(fed, monkeypatch):
    draw, seen = clipped_sums.poisson_draw, []

    def noted(*arguments):
        seen.append(fed.ledger("north").charged("train"))
        return draw(*arguments)

    monkeypatch.setattr(clipped_sums, "poisson_draw", noted)
    fed.silo("north").handle(fed.trainer.start, first_spec(fed))
    assert seen == [1, 2]
