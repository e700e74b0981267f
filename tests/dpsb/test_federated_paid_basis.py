"""A basis that every silo pays for: charged first, released once, averaged, bound by its hash, and in every claim."""

import json
from dataclasses import replace

import federation
import pytest
import torch
import workbench
from federation import DELTA, NAMES, NOISE, PROB, STEP, Faulty, Killed, check_ledger, policy, terms
from safetensors.torch import load_file
from test_federated_simulate import SPLIT, settings, split_file

from dpsb.artifacts import CORE_NAME
from dpsb.basis import release as release_module
from dpsb.basis.gradient import mean_gradients
from dpsb.basis.private import factors_of
from dpsb.federated.checks import FederatedError
from dpsb.federated.config import read_federation
from dpsb.federated.coordinator import Coordinator, TooFewSilos
from dpsb.federated.messages import RoundMessage, Update, theta_digest
from dpsb.federated.paid_layout import GRADIENT
from dpsb.federated.report import federation_report
from dpsb.federated.server import load_state
from dpsb.federated.simulate import simulate
from dpsb.federated.spec import PaidBasis
from dpsb.federated.terms import SiloTerms
from dpsb.federated.wire import pack, unpack
from dpsb.randomness import SystemRandomness
from dpsb_accounting import Gaussian, Ledger, verify
from dpsb_accounting import epsilon as epsilon_of

PAID = PaidBasis(noise_multiplier=2.0, l2_clip_norm=1.0, clipping="flat", share=0.1)
RELEASE = Gaussian(noise_multiplier=PAID.noise_multiplier)


def asked(paid=PAID, **changes):
    each = SiloTerms(sampling_prob=PROB, noise_multiplier=NOISE, expected_batch_size=6, basis=paid)
    return terms(silos=dict.fromkeys(NAMES, each), rounds=2, local_steps=1, **changes)


def coordinator(fed, transport=None, chosen=None):
    return fed.coordinator(transport, chosen or asked(), shapes=fed.trainer.shapes)


class Wired(Faulty):
    """Every message and reply goes through its bytes."""

    def send(self, messages):
        for message in messages:
            self.seen.append(message)
            if self.before(message) != "lost":
                like = self.silos[message.silo].start
                reply = self.silos[message.silo].answer(unpack(pack(message), like))
                yield from self.after(message, unpack(pack(reply), like))


def test_every_silo_pays_first_and_binds_what_came_of_it(fed):
    sent = {}

    def after(message, reply):
        if message.spec.stage == "basis":
            sent[message.silo] = reply.tensors
        return [reply]

    state = coordinator(fed, Wired(fed.silos(), after=after)).run()
    assert state.round == 2
    assert state.basis_record.silos == NAMES
    assert state.basis_sha256 == theta_digest(state.basis)
    ranks = {name: rank for name, (_, _, rank) in fed.trainer.shapes.items()}
    means = {name: sum(tensors[f"{GRADIENT}{name}"].double() for tensors in sent.values()) / 3 for name in ranks}
    for name, factors in factors_of(means, ranks).items():
        torch.testing.assert_close(state.basis[f"{name}.A"].T @ state.basis[f"{name}.A"], factors.A.T @ factors.A)
        torch.testing.assert_close(state.basis[f"{name}.B"] @ state.basis[f"{name}.B"].T, factors.B @ factors.B.T)
    for name in NAMES:
        record = fed.ledger(name)
        assert [(phase.name, phase.count) for phase in record.plan.phases] == [("basis", 1), ("train", 2)]
        assert record.plan.basis["access"] == "released"
        assert "basis.safetensors" in record.files
        assert verify(record.path).ok
    check_paid(fed)


def check_paid(fed, **charges):
    """Ledgers hold one release for the basis and two steps, or what ``charges`` names; noise was drawn for as much."""
    for name in NAMES:
        releases, steps = charges.get(name, (1, 2))
        check_ledger(fed.ledger(name), steps, basis=(RELEASE, releases))
        numbers = sum(rows * columns for rows, columns, _ in fed.trainer.shapes.values())
        theta = sum(tensor.numel() for tensor in fed.trainer.start.values())
        assert fed.sources[name].drawn == releases * numbers + steps * theta


def test_the_claim_holds_the_basis(fed):
    coordinator(fed).run()
    report = federation_report(fed.out).report
    assert report.claim
    assert report.epsilon.upper == pytest.approx(epsilon_of([(RELEASE, 1), (STEP, 2)], DELTA).upper, rel=1e-6)
    assert report.epsilon.upper > epsilon_of([(STEP, 2)], DELTA).upper


def test_the_charge_is_on_disk_before_an_example_is_read(fed, monkeypatch):
    charged = []
    draw = release_module.poisson_draw

    def watched(*arguments):
        (path,) = fed.out.glob(f"silos/{NAMES[len(charged)]}/runs/*/ledger.jsonl")
        charged.append(Ledger.read(path).charged("basis"))
        return draw(*arguments)

    monkeypatch.setattr(release_module, "poisson_draw", watched)
    coordinator(fed).run()
    assert charged == [1, 1, 1]


@pytest.mark.parametrize("together", [False, True])
def test_the_release_takes_one_example_at_a_time(fed, monkeypatch, together):
    """The head that its gradients go through is the server's: blown up, neighbours moved each other's rows by C."""
    sizes, plain, draw = [], fed.trainer.collate, release_module.poisson_draw
    fed.trainer.collate = lambda rows, padded_length: sizes.append(len(rows)) or plain(rows, padded_length)
    monkeypatch.setattr(release_module, "poisson_draw", lambda *given: sizes.clear() or draw(*given))
    fed.policies["north"] = policy("north", examples_together=together)
    spec = asked().specs("a" * 32, 0, fed.trainer.start, fed.trainer.basis_sha256, "basis")["north"]
    assert isinstance(fed.silo("north").handle(fed.trainer.start, spec), Update)
    assert sizes
    assert (max(sizes) == 1) is not together


def test_what_is_released_is_the_clipped_sum_and_its_noise(tiny, fed, monkeypatch):
    """Without noise, and with gradients shorter than C: the sum of the gradients of the base model."""
    monkeypatch.setattr(SystemRandomness, "normal", lambda _s, n: torch.zeros(n, dtype=torch.float64))
    fed.trainer = replace(fed.trainer, adapter=tiny.adapter(tiny.base("bert"), scatter=0))  # R = 0, as in every run
    fed.trainer._checked = True
    paid = replace(PAID, l2_clip_norm=100.0)
    specs = asked(paid).specs("a" * 32, 0, fed.trainer.start, fed.trainer.basis_sha256, "basis")
    reply = fed.silo("north").handle(fed.trainer.start, specs["north"])
    made, data = fed.trainer, workbench.examples(24, seed=1)
    fresh = tiny.lora(tiny.base("bert"), task_type=None, target_modules=["query", "key", "value", "dense"])
    batches = [made.collate([example], made.max_length) for example in data]
    summed = {name: 24 * mean for name, mean in mean_gradients(fresh, made.loss_fn, batches).items()}
    for name, total in summed.items():  # a release is rounded to a grid of about 1e-6 of its noise
        torch.testing.assert_close(reply.tensors[f"{GRADIENT}{name}"], total, rtol=1e-4, atol=2e-4)
    assert sum(float(total.square().sum()) for total in summed.values()) > 1


@pytest.mark.parametrize("clip", [1.0, 0.01])
def test_noise_is_on_every_number_of_every_weight(fed, monkeypatch, clip):
    paid = replace(PAID, l2_clip_norm=clip, noise_multiplier=50.0)
    specs = asked(paid).specs("a" * 32, 0, fed.trainer.start, fed.trainer.basis_sha256, "basis")
    reply = fed.silo("north").handle(fed.trainer.start, specs["north"])
    for tensor in reply.tensors.values():
        assert float(tensor.std()) == pytest.approx(50 * clip, rel=0.15)


def test_a_release_that_is_asked_for_again_is_the_same(fed):
    silo, specs = fed.silo("north"), asked().specs("a" * 32, 0, fed.trainer.start, fed.trainer.basis_sha256, "basis")
    first, again = (silo.handle(fed.trainer.start, specs["north"]) for _ in range(2))
    assert theta_digest(first.tensors) == theta_digest(again.tensors)
    assert fed.ledger("north").charged("basis") == 1


def test_a_release_that_a_crash_lost_is_not_drawn_again(fed, monkeypatch):
    """The silo that died after its charge lacks in the basis; it trains on that of the others."""

    def deadly(self, sketches):
        self.ledger.charge("basis")
        raise Killed

    spec = asked().specs("a" * 32, 0, fed.trainer.start, fed.trainer.basis_sha256, "basis")["south"]
    release = release_module.PrivateExamples.release
    monkeypatch.setattr(release_module.PrivateExamples, "release", deadly)
    with pytest.raises(Killed):
        fed.silo("south").handle(fed.trainer.start, spec)
    monkeypatch.setattr(release_module.PrivateExamples, "release", release)
    reply = fed.silo("south").handle(fed.trainer.start, spec)
    assert (reply.kind, "charged and is lost; it is not drawn again" in reply.message) == ("state", True)
    assert fed.ledger("south").charged("basis") == 1


def test_a_silo_that_missed_the_basis_trains_on_that_of_the_others(fed):
    def before(message):
        return "lost" if message.silo == "west" and message.spec.stage == "basis" else None

    state = coordinator(fed, Faulty(fed.silos(), before=before)).run()
    assert state.basis_record.silos == ("north", "south")
    assert [record.silos for record in state.history] == [NAMES, NAMES]
    check_paid(fed, west=(0, 2))
    assert federation_report(fed.out).report.claim


def test_fewer_releases_than_min_silos_make_no_basis(fed):
    lost = Faulty(fed.silos(), before=lambda message: None if message.silo == "north" else "lost")
    with pytest.raises(TooFewSilos, match="The basis has 1 usable replies, min_silos is 2"):
        coordinator(fed, lost).run()
    assert not load_state(fed.out).basis
    check_ledger(fed.ledger("north"), 0, basis=(RELEASE, 1))
    coordinator(fed).run()
    check_paid(fed)


@pytest.mark.parametrize("moment", ["before it is saved", "after"])
def test_a_server_that_dies_has_the_same_basis_again(fed, monkeypatch, moment):
    target = "_need" if moment == "before it is saved" else "_round"
    inner = getattr(Coordinator, target)

    def deadly(*_arguments):
        raise Killed

    monkeypatch.setattr(Coordinator, target, deadly)
    seen = []
    with pytest.raises(Killed):
        coordinator(fed, Faulty(fed.silos(), after=lambda _m, reply: seen.append(reply) or [reply])).run()
    monkeypatch.setattr(Coordinator, target, inner)
    transport = Faulty(fed.silos(), after=lambda _m, reply: seen.append(reply) or [reply])
    state = coordinator(fed, transport).run()
    asked_again = [message for message in transport.seen if message.spec.stage == "basis"]
    assert len(asked_again) == (3 if moment == "before it is saved" else 0)
    for first, again in zip(seen[:3], seen[3:6], strict=True):
        if moment == "before it is saved":
            assert theta_digest(first.tensors) == theta_digest(again.tensors)
    assert state.round == 2
    check_paid(fed)


def test_a_silo_that_is_started_again_finds_the_basis_on_its_disk(tiny, fed):
    transport = Wired(fed.silos())
    first = coordinator(fed, transport)
    first._on_round = lambda _record: (_ for _ in ()).throw(Killed)
    with pytest.raises(Killed):
        first.run()
    fed.trainer = federation.trainer(tiny)  # on the stand-in again
    transport = Wired(fed.silos())
    again = Coordinator(
        fed.out, asked(), fed.trainer.start, fed.trainer.basis_sha256, transport, shapes=fed.trainer.shapes
    )
    state = again.run()
    assert state.round == 2
    assert all(not message.basis for message in transport.seen), "it is sent once"


def test_another_basis_than_the_round_names_is_refused(fed):
    start, chosen = fed.trainer.start, asked()
    state = coordinator(fed, Faulty(fed.silos()), chosen).run()
    other = {name: torch.flip(tensor, [0]) for name, tensor in state.basis.items()}
    spec = chosen.specs(state.run_id, 0, start, theta_digest(state.basis))["north"]
    fed.trainer.basis_sha256 = "0" * 64  # as if it were started again
    said = fed.silo("north").answer(RoundMessage(silo="north", spec=spec, theta=start, basis=other))
    assert (said.kind, "not the one whose digest the round names" in said.message) == ("state", True)
    spec = replace(spec, basis_sha256=theta_digest(other))
    said = fed.silo("north").answer(RoundMessage(silo="north", spec=spec, theta=start, basis=other))
    assert (said.kind, "binds another basis" in said.message) == ("state", True)
    wrong = {name: tensor[:1] for name, tensor in state.basis.items()}
    spec = replace(spec, basis_sha256=theta_digest(wrong))
    said = fed.silo("north").answer(RoundMessage(silo="north", spec=spec, theta=start, basis=wrong))
    assert "not one of this adapter's weights" in said.message
    assert fed.ledger("north").charged("train") == 2


def test_what_stands_in_for_the_basis_is_not_trained_on(fed):
    spec = asked().specs("a" * 32, 0, fed.trainer.start, fed.trainer.basis_sha256)["north"]
    said = fed.silo("north").handle(fed.trainer.start, spec)
    assert (said.kind, "has no basis" in said.message) == ("state", True)
    assert not list((fed.out / "silos").glob("**/ledger.jsonl"))


def test_the_first_round_has_to_follow_the_basis_in_the_ledger(fed):
    """A ledger that is no longer than after the release for the basis did not charge the round."""

    def after(message, reply):
        if message.silo == "south" and message.spec.stage == "train":
            return [replace(reply, receipt=replace(reply.receipt, length=message.receipt.length))]
        return [reply]

    state = coordinator(fed, Faulty(fed.silos(), after=after)).run()
    assert "less than the 5 that this round takes" in state.left["south"]


def test_a_budget_that_has_no_room_for_the_basis_is_refused(fed):
    without = epsilon_of([(STEP, 2)], DELTA).upper
    fed.policies = {name: policy(name, max_epsilon=without * 1.01) for name in NAMES}
    with pytest.raises(TooFewSilos, match="its policy allows"):
        coordinator(fed).run()
    assert not list((fed.out / "silos").glob("**/ledger.jsonl"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "trusted_server", "server_optimizer": "sgd"}, "is of silo_local"),
        ({"silos": {"north": SiloTerms(sampling_prob=0.1, noise_multiplier=1.0, basis=PAID)} | terms().silos}, None),
    ],
)
def test_terms_that_make_no_sense(changes, said):
    if said is None:
        changes["silos"]["north"] = SiloTerms(sampling_prob=0.1, noise_multiplier=1.0, basis=PAID)
        said = "Either all silos pay for the basis or none does"
        with pytest.raises(FederatedError, match=said):
            terms(**changes)
    else:
        with pytest.raises(FederatedError, match=said):
            asked(**changes)


def test_from_settings_to_a_finished_adapter(tmp_path, monkeypatch):
    monkeypatch.setattr("dpsb.federated.calibrate.noise_multiplier_for", lambda **_facts: 4.0)
    monkeypatch.setattr("dpsb.federated.trainer.check_before_run", lambda *_args: None)
    path = settings(tmp_path, f'{split_file(tmp_path)}\nbasis = "private"\nbasis_share = 0.1', SPLIT)
    done = simulate(read_federation(path))
    report = json.loads((done.out / "report.json").read_text())
    assert report["claim"] is True
    assert report["epsilon"]["upper"] <= 8.0
    assert report["basis"]["silos"] == ["silo-1", "silo-2", "silo-3"]
    saved = load_state(done.out).basis
    written = load_file(done.out / "adapter" / CORE_NAME)
    for name in (key for key in saved if key.endswith(".B")):
        torch.testing.assert_close(written[name], saved[name])


@pytest.mark.parametrize(
    ("run", "federated", "said"),
    [
        ('basis = "hybrid"\nbasis_rounds = 2', "", "leave out basis_rounds"),
        ('basis = "private"', 'model = "secagg"\nserver_optimizer = "sgd"', "is for model silo_local"),
        ('basis = "private"\nbasis_rounds = 2', "", "leave out basis_rounds"),
    ],
)
def test_settings_that_are_not_there(tmp_path, run, federated, said):
    path = settings(tmp_path, f"{split_file(tmp_path)}\n{run}", f"{SPLIT}\n{federated}")
    with pytest.raises(FederatedError, match=said):
        read_federation(path)
