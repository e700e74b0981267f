"""Federations in one process: what a run without faults releases, charges and leaves on disk."""

import shutil
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import federation
import pytest
import torch
import workbench
from federation import NAMES, Federation, Killed, first_spec, policy, terms

from dpsb.federated import budget
from dpsb.federated.aggregate import fed_sb
from dpsb.federated.checks import FederatedError
from dpsb.federated.coordinator import TooFewSilos
from dpsb.federated.local import LocalTransport
from dpsb.federated.messages import RoundMessage, Update, theta_digest
from dpsb.federated.report import federation_report
from dpsb.federated.server import ServerError, load_state
from dpsb.federated.spec import RoundSpec, SiloPolicy, read_policy
from dpsb.federated.terms import SiloTerms, Terms
from dpsb.randomness import SeededRandomness
from dpsb_accounting import federated, verify
from dpsb_accounting.federated import Silo as Described


def test_a_run_averages_what_the_silos_release(fed):
    seen = []
    transport = federation.Faulty(fed.silos(), after=lambda _m, reply: seen.append(reply) or [reply])
    state = fed.coordinator(transport).run()
    assert state.round == 3
    assert [record.silos for record in state.history] == [NAMES] * 3
    last = [reply.tensors for reply in seen[-3:]]
    for name, value in state.theta.items():
        torch.testing.assert_close(value, torch.stack([tensors[name] for tensors in last]).mean(dim=0))
        assert not torch.equal(value, fed.trainer.start[name])
    size = sum(t.numel() for t in state.theta.values()) * 4
    assert all(record.bytes_up == record.bytes_down == 3 * size for record in state.history)
    fed.check_all()
    for name in NAMES:
        assert verify(fed.ledger(name).path).ok
        assert state.receipts[name].head == fed.ledger(name).head


@pytest.mark.parametrize(("model", "allowed", "alone"), [
    ("silo_local", False, True), ("silo_local", True, False), ("secagg", False, True), ("trusted_server", False, False),
])  # fmt: skip
def test_no_theta_lets_a_row_depend_on_its_neighbours(fed, model, allowed, alone):
    """A server that nobody trusts sends theta, and a large one blows up the rounding that neighbours differ by."""
    sizes, plain = [], fed.trainer.collate
    fed.trainer.collate = lambda examples, length: sizes.append(len(examples)) or plain(examples, length)
    optimizer = "none" if model == "silo_local" else "sgd"
    asked = {"model": model, "local_steps": 1, "server_optimizer": optimizer, "min_silos": 3}
    fed.policies["north"] = policy("north", models=(model,), clients=3, examples_together=allowed)
    north, theta = fed.silo("north"), {name: tensor + 1e3 for name, tensor in fed.trainer.start.items()}
    for number in range(3):
        spec = first_spec(fed, number, theta, **asked)
        assert isinstance(north.handle(theta, spec), Update)
    assert (max(sizes) == 1) is alone


def test_report_of_the_ledgers(fed):
    fed.coordinator().run()
    report = federated.silo_local([Described.from_ledger(fed.ledger(name)) for name in NAMES])
    assert report.claim
    assert [row.name for row in report.per_silo] == list(NAMES)
    assert report.incomplete_rounds == 0


def test_seeded_silos_claim_nothing(fed):
    fed.randomness = SeededRandomness(1)
    fed.coordinator().run()
    assert not federated.silo_local([fed.ledger(name) for name in NAMES]).claim


def test_the_model_is_checked_before_anything_is_charged(fed, monkeypatch):
    fed.trainer._checked = False
    calls = []
    monkeypatch.setattr("dpsb.federated.trainer.check_before_run", lambda *_a: calls.append(fed.out.exists()))
    fed.coordinator().run()
    assert len(calls) == 1
    broken = Federation(fed.out.parent / "other", fed.trainer)
    broken.trainer._checked = False
    monkeypatch.setattr("dpsb.federated.trainer.check_before_run", lambda *_a: 1 / 0)
    with pytest.raises(TooFewSilos, match="failed: The silo failed"):
        broken.coordinator().run()
    assert not list((broken.out / "silos").glob("*/runs"))


def test_the_server_resumes_at_the_round_that_is_open(fed):
    done = []

    def kill_in_the_third_round(record):
        done.append(record.round)
        if record.round == 1:
            raise Killed

    with pytest.raises(Killed):
        fed.coordinator(on_round=kill_in_the_third_round).run()
    state = load_state(fed.out)
    assert state.round == 2
    again = fed.coordinator(on_round=lambda record: done.append(record.round)).run()
    assert done == [0, 1, 2]
    assert (again.run_id, again.round) == (state.run_id, 3)
    fed.check_all()


@pytest.mark.parametrize("when", ["before the replies are counted", "before the checkpoint"])
def test_a_server_killed_within_a_round_costs_the_silos_nothing(fed, monkeypatch, when):
    if when == "before the checkpoint":
        inner, calls = federation.Coordinator._next_theta, []

        def deadly(self, *arguments):
            calls.append(0)
            if len(calls) == 2:
                raise Killed
            return inner(self, *arguments)

        monkeypatch.setattr(federation.Coordinator, "_next_theta", deadly)
        coordinator = fed.coordinator()
    else:

        def after(message, reply):
            if (message.silo, message.spec.round) == ("south", 1):
                raise Killed
            return [reply]

        coordinator = fed.coordinator(federation.Faulty(fed.silos(), after=after))
    with pytest.raises(Killed):
        coordinator.run()
    before = {name: [path.read_bytes() for path in fed.replies(name)] for name in NAMES}
    assert load_state(fed.out).round == 1
    monkeypatch.undo()
    fed.coordinator().run()
    fed.check_all()
    for name in NAMES:
        assert [path.read_bytes() for path in fed.replies(name)][: len(before[name])] == before[name]


def test_terms_cannot_change_on_resume(fed):
    fed.coordinator().run()
    with pytest.raises(ServerError, match="rounds differ"):
        fed.coordinator(asked=terms(rounds=4)).run()


def test_two_coordinators_or_two_rounds_at_once_are_refused(fed):
    with budget.alone(fed.out), pytest.raises(budget.FolderBusy):
        fed.coordinator().run()
    silo = fed.silo("north")
    with budget.alone(silo.folder):
        assert silo.handle(fed.trainer.start, first_spec(fed)).kind == "busy"


def test_a_retry_gets_the_same_bytes_and_another_theta_is_charged(fed):
    silo, start = fed.silo("north"), fed.trainer.start
    first = silo.handle(start, first_spec(fed))
    again = fed.silo("north").handle(start, first_spec(fed))
    assert isinstance(first, Update)
    assert theta_digest(first.tensors) == theta_digest(again.tensors)
    assert first.receipt == again.receipt
    fed.check("north", 2)
    other = {name: value + 0.01 for name, value in start.items()}
    replayed = silo.handle(other, first_spec(fed, theta=other))
    assert theta_digest(replayed.tensors) != theta_digest(first.tensors)
    fed.check("north", 4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"min_noise_multiplier": 1.01}, "noise_multiplier of at least 1.01, not 1"),
        ({"max_sampling_prob": 0.2}, "sampling_prob of at most 0.2"),
        ({"max_rounds": 2}, "rounds of at most 2"),
        ({"max_local_steps": 1}, "local_steps of at most 1"),
        ({"max_epsilon": 1.0}, "brings silo 'north' to epsilon"),
        ({"runs": ["b" * 32]}, "does not allow the run"),
        ({"models": ["trusted_server"]}, "allows the models trusted_server"),
        ({"num_examples": 2000}, "delta=0.001 must be less than 1 / num_examples"),
    ],
)
def test_a_round_beyond_the_policy_is_refused_and_costs_nothing(fed, changes, said):
    fed.policies["north"] = policy("north", **changes)
    reply = fed.silo("north").handle(fed.trainer.start, first_spec(fed))
    assert reply.kind == "spec"
    assert said in reply.message
    assert not list((fed.out / "silos" / "north").glob("**/*.jsonl"))


def for_north(**changes):
    usual = {"sampling_prob": federation.PROB, "noise_multiplier": federation.NOISE}
    return {"silos": {"north": SiloTerms(**{**usual, **changes})}, "min_silos": 1}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (for_north(sampling_prob=2 * federation.PROB), "phases"),
        (for_north(noise_multiplier=0.9 * federation.NOISE), "phases"),
        ({"l2_clip_norm": 2.0}, "l2_clip_norm"),
        ({"local_steps": 1}, "phases"),
        ({"rounds": 4}, "phases"),
        ({"rounds": 6, "local_steps": 1}, "details"),
        ({"rounds": 2, "local_steps": 3}, "details"),
    ],
)
def test_other_terms_in_a_later_round_are_refused_and_cost_nothing(fed, changes, said):
    silo, start = fed.silo("north"), fed.trainer.start
    silo.handle(start, first_spec(fed))
    reply = silo.handle(start, first_spec(fed, number=1, **changes))
    assert (reply.kind, said in reply.message) == ("spec", True)
    fed.check("north", 2)


def test_runs_add_up_in_a_silos_budget(fed):
    silo = fed.silo("north")
    assert isinstance(silo.handle(fed.trainer.start, first_spec(fed)), Update)
    cost = budget.epsilon_of(fed.ledger("north").plan).upper
    fed.policies["north"] = policy("north", max_epsilon=1.2 * cost)
    reply = fed.silo("north").handle(fed.trainer.start, first_spec(fed, run_id="b" * 32))
    assert reply.kind == "spec"
    assert "brings silo 'north' to epsilon" in reply.message


@pytest.mark.parametrize("wrong", ["names", "digest", "nan", "basis", "type"])
def test_a_theta_that_is_not_the_named_one_is_refused(fed, wrong):
    theta = dict(fed.trainer.start)
    name = next(iter(theta))
    spec = first_spec(fed)
    if wrong == "names":
        theta.pop(name)
    elif wrong == "digest":
        theta[name] = theta[name] + 1
    elif wrong == "type":
        theta[name] = theta[name].double()
    elif wrong == "nan":
        theta[name] = theta[name] * float("nan")
        spec = first_spec(fed, theta=theta)
    else:
        spec = RoundSpec.from_json({**spec.to_json(), "basis_sha256": "0" * 64})
    assert fed.silo("north").handle(theta, spec).kind == "state"
    assert not list((fed.out / "silos" / "north").glob("**/*.jsonl"))


def test_a_message_that_was_changed_on_its_way_is_asked_again_at_no_cost(fed):
    changed = []

    class Changes(federation.Faulty):
        def send(self, messages):
            for message in messages:
                if message.silo == "west" and not changed:
                    changed.append(message)
                    message = replace(message, theta={name: value + 1 for name, value in message.theta.items()})
                yield self.silos[message.silo].answer(message)

    state = fed.coordinator(Changes(fed.silos())).run()
    assert [record.silos for record in state.history] == [NAMES] * 3
    fed.check_all()


def test_a_message_for_another_silo_is_refused(fed):
    message = RoundMessage(silo="south", spec=first_spec(fed), theta=fed.trainer.start)
    assert fed.silo("north").answer(message).kind == "spec"


def test_nothing_private_leaves_with_a_failure(fed, monkeypatch):
    problems = []
    silo = fed.silo("north")
    silo._on_problem = problems.append

    def broken(*_arguments):
        raise ValueError(f"the row was {workbench.CANARIES[0]}")

    monkeypatch.setattr("dpsb.clipped_sums.clipped_sum", broken)
    reply = silo.handle(fed.trainer.start, first_spec(fed))
    assert (reply.kind, reply.message) == ("failed", "The silo failed in this round; its operator can see why.")
    assert workbench.CANARIES[0] not in problems[0]
    fed.check("north", 1, released=0)


def test_json_forms_are_exact(fed):
    asked = terms(server_optimizer="adam")
    assert Terms.from_json(asked.to_json()) == asked
    spec = first_spec(fed)
    assert RoundSpec.from_json(spec.to_json()) == spec
    with pytest.raises(FederatedError, match="unknown key 'epsilon'"):
        RoundSpec.from_json({**spec.to_json(), "epsilon": 1})


def test_a_policy_is_a_file(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text('silo = "north"\nmax_epsilon = 3.0\ndelta = 1e-5\nmodels = ["silo_local"]\n')
    assert read_policy(path) == SiloPolicy(silo="north", max_epsilon=3.0, delta=1e-5)
    path.write_text('silo = "north"\nmax_epsilon = 3.0\ndelta = 1e-5\nmax_epsilom = 4\n')
    with pytest.raises(FederatedError, match="unknown key 'max_epsilom'"):
        read_policy(path)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_server_optimizers_step_on_the_difference_to_the_mean(fed, optimizer):
    seen = []
    transport = federation.Faulty(fed.silos(), after=lambda _m, reply: seen.append(reply.tensors) or [reply])
    state = fed.coordinator(transport, terms(server_optimizer=optimizer, rounds=1)).run()
    mean = fed_sb(seen)
    for name, value in state.theta.items():
        start = fed.trainer.start[name]
        moved = start.double() - mean[name].double()
        # Adam's first step at rate 1: the sign, but for its epsilon where silos hardly moved
        wanted = mean[name] if optimizer == "sgd" else (start.double() - moved / (moved.abs() + 1e-8)).to(start.dtype)
        torch.testing.assert_close(value, wanted, atol=1e-4, rtol=1e-4)


def test_transport_without_a_silo_loses_the_message(fed):
    silos = fed.silos()
    silos.pop("west")
    state = fed.coordinator(LocalTransport(silos)).run()
    assert all(record.lost == {"west": "no reply"} for record in state.history)


def test_silos_that_share_a_model_take_turns(fed, monkeypatch):
    """Rows of two silos never meet in one model, also where two threads ask at once."""
    inside, most = [], []
    inner = fed.trainer._private_steps

    def watched(*arguments):
        inside.append(0)
        most.append(len(inside))
        time.sleep(0.2)
        inner(*arguments)
        inside.pop()

    monkeypatch.setattr(fed.trainer, "_private_steps", watched)
    specs = terms().specs("0" * 32, 0, fed.trainer.start, fed.trainer.basis_sha256)
    with ThreadPoolExecutor() as pool:
        replies = list(pool.map(lambda name: fed.silo(name).handle(fed.trainer.start, specs[name]), NAMES))
    assert all(isinstance(reply, Update) for reply in replies)
    assert most == [1, 1, 1]


def test_only_the_owner_sees_which_runs_there_are(fed):
    fed.coordinator().run()
    runs = fed.out / "silos" / "north" / "runs"
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (runs, *runs.iterdir())] == [0o700, 0o700]
    assert {stat.S_IMODE(reply.stat().st_mode) for reply in fed.replies("north")} == {0o600}


def with_copies(fed, **others):
    """A deployment's server after the run: copies of ledgers and no silo's folder."""
    (fed.out / "ledgers").mkdir()
    for name in NAMES:
        shutil.copy(others.get(name) or fed.ledger(name).path, fed.out / "ledgers" / f"{name}.jsonl")
    shutil.rmtree(fed.out / "silos")


@pytest.mark.parametrize("what", ["another run", "another silo", "another ledger"])
def test_a_copy_of_a_foreign_ledger_supports_no_claim(fed, tmp_path, what):
    """A short ledger with a weak plan must not pass for an early copy of the one that was charged."""
    fed.coordinator().run()
    other = Federation(tmp_path / "other", fed.trainer)
    run_id = "1" * 32 if what == "another run" else load_state(fed.out).run_id
    specs = terms(rounds=1, local_steps=1).specs(run_id, 0, fed.trainer.start, fed.trainer.basis_sha256)
    weak = replace(specs["north"], noise_multiplier=9.0)
    silo = "south" if what == "another silo" else "north"
    assert isinstance(other.silo(silo).handle(fed.trainer.start, weak), Update)
    with_copies(fed, north=other.ledger(silo).path)
    with pytest.raises(ServerError, match="is not the ledger of silo 'north' in this run: nothing can be claimed"):
        federation_report(fed.out)


def test_an_early_copy_of_the_right_ledger_supports_the_claim(fed, tmp_path):
    fed.coordinator().run()
    early = tmp_path / "early.jsonl"
    early.write_bytes(b"".join(fed.ledger("north").path.read_bytes().splitlines(keepends=True)[:2]))
    with_copies(fed, north=early)
    found = federation_report(fed.out)
    assert (found.report.claim, found.behind, found.never) == (True, ("north",), ())


@pytest.mark.parametrize("replies", [False, True])
def test_an_empty_ledger_is_a_silo_that_died_creating_it_unless_there_are_replies(fed, replies):
    """Nothing was charged before its first line is there; in this run and in another it stands in nobody's way."""
    silo, made = fed.silo("north"), fed.trainer
    spec = terms().specs("0" * 32, 0, made.start, made.basis_sha256)["north"]
    if replies:
        assert isinstance(silo.handle(made.start, spec), Update)
        fed.ledger("north").path.write_bytes(b"")
    else:
        home = silo.folder / "runs" / ("0" * 32)
        home.mkdir(parents=True)
        (home / "ledger.jsonl").touch()
    for run_id in ("1" * 32, "0" * 32):
        reply = silo.handle(made.start, replace(spec, run_id=run_id))
        assert (isinstance(reply, Update), getattr(reply, "kind", None)) == (not replies, "ledger" if replies else None)
