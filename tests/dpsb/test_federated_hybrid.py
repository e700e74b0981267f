"""A hybrid that all silos pay for: each releases the cores of its gradients once, which turn and cut a public basis."""

import json
from dataclasses import replace

import federation
import pytest
import torch
import workbench
from federation import DELTA, NAMES, NOISE, PROB, STEP, Faulty, Federation, Killed, check_ledger, terms
from test_federated_paid_basis import Wired
from test_federated_simulate import SPLIT, settings, split_file

from dpsb.adapter import lora_layers
from dpsb.basis import release as release_module
from dpsb.basis.gradient import mean_gradients
from dpsb.basis.hybrid import frames_of, turned
from dpsb.basis.private import factors_of
from dpsb.federated.checks import FederatedError
from dpsb.federated.config import read_federation
from dpsb.federated.coordinator import TooFewSilos
from dpsb.federated.messages import theta_digest
from dpsb.federated.paid_basis import basis_from, frames_in, mean_noise_std, wide_from
from dpsb.federated.paid_layout import GRADIENT, LEFT, RIGHT, VALUES, Wide, read_wide
from dpsb.federated.report import federation_report
from dpsb.federated.server import ServerError, load_state
from dpsb.federated.simulate import simulate
from dpsb.federated.spec import PaidBasis
from dpsb.federated.terms import SiloTerms
from dpsb.randomness import SystemRandomness
from dpsb_accounting import Gaussian, Ledger, verify
from dpsb_accounting import epsilon as epsilon_of

WIDTH = 8


@pytest.fixture
def fed(tiny, tmp_path):
    made = federation.trainer(tiny)
    wide = wide_from(frames_of(lora_layers(made.adapter.model), WIDTH), "source: weight")
    again = replace(made, wide=wide)
    again._checked = True
    return Federation(tmp_path / "fed", again)


def paid_by(fed, **changes):
    facts = {"width": WIDTH, "source": fed.trainer.wide.source, "frames_sha256": fed.trainer.wide.sha256}
    usual = {"noise_multiplier": 2.0, "l2_clip_norm": 1.0, "clipping": "flat", "share": 0.02}
    return PaidBasis(**{**usual, **facts, **changes})


def asked(fed, noises=(2.0, 2.0, 2.0), **changes):
    each = SiloTerms(sampling_prob=PROB, noise_multiplier=NOISE, expected_batch_size=6)
    silos = {name: replace(each, basis=paid_by(fed, noise_multiplier=s)) for name, s in zip(NAMES, noises, strict=True)}
    return terms(**{"silos": silos, "rounds": 2, "local_steps": 1, **changes})


def coordinator(fed, transport=None, chosen=None):
    made = fed.trainer
    return fed.coordinator(transport, chosen or asked(fed), shapes=made.shapes, wide=made.wide)


def first_spec(fed, name="north", **changes):
    made = fed.trainer
    chosen = (
        asked(fed)
        if not changes
        else asked(
            fed,
            silos=dict.fromkeys(
                NAMES,
                replace(
                    SiloTerms(sampling_prob=PROB, noise_multiplier=NOISE, expected_batch_size=6),
                    basis=paid_by(fed, **changes),
                ),
            ),
        )
    )
    return chosen.specs("a" * 32, 0, made.start, made.basis_sha256, "basis")[name]


def test_every_silo_pays_for_its_cores_and_their_mean_turns_the_public_basis(fed):
    sent = {}

    def after(message, reply):
        if message.spec.stage == "basis":
            sent[message.silo] = reply.tensors
        return [reply]

    noises = (2.0, 3.0, 4.0)
    state = coordinator(fed, Wired(fed.silos(), after=after), asked(fed, noises)).run()
    assert state.round == 2
    assert state.basis_record.silos == NAMES
    shapes = fed.trainer.shapes
    assert all(sent[n][f"{GRADIENT}{w}"].shape == (WIDTH, WIDTH) for n in NAMES for w in shapes)
    assert state.basis_record.bytes_up == 3 * len(shapes) * WIDTH * WIDTH * 4, "cores, not gradients, travel"
    means = {w: sum(tensors[f"{GRADIENT}{w}"].double() for tensors in sent.values()) / 3 for w in shapes}
    std = (4 + 9 + 16) ** 0.5 / 3
    frames, ranks = frames_in(fed.trainer.wide), {name: rank for name, (_, _, rank) in shapes.items()}
    for name, factors in turned(means, frames, std, ranks).items():
        torch.testing.assert_close(state.basis[f"{name}.A"], factors.A, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(state.basis[f"{name}.B"], factors.B, rtol=1e-3, atol=1e-4)
        B = state.basis[f"{name}.B"]
        torch.testing.assert_close(frames[name].left @ (frames[name].left.T @ B), B, rtol=1e-4, atol=1e-5)
    for name, noise in zip(NAMES, noises, strict=True):
        record = fed.ledger(name)
        assert [(phase.name, phase.count) for phase in record.plan.phases] == [("basis", 1), ("train", 2)]
        check_ledger(record, 2, basis=(Gaussian(noise_multiplier=noise), 1))
        detail = {key: record.plan.basis[key] for key in ("kind", "access", "width", "source", "frames_sha256")}
        assert detail == {
            "kind": "hybrid",
            "access": "released",
            "width": WIDTH,
            "source": "source: weight",
            "frames_sha256": fed.trainer.wide.sha256,
        }
        assert "basis.safetensors" in record.files
        assert verify(record.path).ok


def test_the_claim_holds_the_basis(fed):
    coordinator(fed).run()
    report = federation_report(fed.out).report
    with_basis = epsilon_of([(Gaussian(noise_multiplier=2.0), 1), (STEP, 2)], DELTA).upper
    assert report.claim
    assert report.epsilon.upper == pytest.approx(with_basis, rel=1e-6)


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


def test_what_is_released_is_the_sum_of_the_cores(tiny, fed, monkeypatch):
    """Without noise, and with cores shorter than C: those of the sum of the base model's gradients."""
    monkeypatch.setattr(SystemRandomness, "normal", lambda _s, n: torch.zeros(n, dtype=torch.float64))
    fed.trainer = replace(fed.trainer, adapter=tiny.adapter(tiny.base("bert"), scatter=0))
    fed.trainer._checked = True
    made = fed.trainer
    reply = fed.silo("north").handle(made.start, first_spec(fed, l2_clip_norm=100.0))
    fresh = tiny.lora(tiny.base("bert"), task_type=None, target_modules=["query", "key", "value", "dense"])
    batches = [made.collate([example], made.max_length) for example in workbench.examples(24, seed=1)]
    for name, mean in mean_gradients(fresh, made.loss_fn, batches).items():
        frame = frames_in(made.wide)[name]
        core = frame.left.T @ (24 * mean) @ frame.right
        torch.testing.assert_close(reply.tensors[f"{GRADIENT}{name}"], core, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("clip", [1.0, 0.01])
def test_all_weights_share_one_clip_and_each_number_has_all_of_the_noise(fed, monkeypatch, clip):
    reply = fed.silo("north").handle(fed.trainer.start, first_spec(fed, l2_clip_norm=clip, noise_multiplier=50.0))
    numbers = torch.cat([tensor.flatten() for tensor in reply.tensors.values()])
    assert float(numbers.std()) == pytest.approx(50 * clip, rel=0.1)
    monkeypatch.setattr(SystemRandomness, "normal", lambda _s, n: torch.zeros(n, dtype=torch.float64))
    reply = fed.silo("south").handle(fed.trainer.start, first_spec(fed, "south", l2_clip_norm=clip))
    length = float(torch.cat([tensor.flatten() for tensor in reply.tensors.values()]).double().norm())
    assert length <= 24 * clip * (1 + 1e-4)


def test_a_release_that_is_asked_for_again_is_the_same(fed):
    silo = fed.silo("north")
    first, again = (silo.handle(fed.trainer.start, first_spec(fed)) for _ in range(2))
    assert theta_digest(first.tensors) == theta_digest(again.tensors)
    assert fed.ledger("north").charged("basis") == 1


def test_a_release_that_a_crash_lost_is_not_drawn_again(fed, monkeypatch):
    def deadly(self, sketches):
        self.ledger.charge("basis")
        raise Killed

    release = release_module.PrivateExamples.release
    monkeypatch.setattr(release_module.PrivateExamples, "release", deadly)
    with pytest.raises(Killed):
        fed.silo("south").handle(fed.trainer.start, first_spec(fed, "south"))
    monkeypatch.setattr(release_module.PrivateExamples, "release", release)
    reply = fed.silo("south").handle(fed.trainer.start, first_spec(fed, "south"))
    assert (reply.kind, "charged and is lost; it is not drawn again" in reply.message) == ("state", True)


def test_a_silo_that_missed_the_basis_trains_on_that_of_the_others(fed):
    def before(message):
        return "lost" if message.silo == "west" and message.spec.stage == "basis" else None

    state = coordinator(fed, Faulty(fed.silos(), before=before)).run()
    assert state.basis_record.silos == ("north", "south")
    assert [record.silos for record in state.history] == [NAMES, NAMES]
    assert (fed.ledger("west").charged("basis"), fed.ledger("west").charged("train")) == (0, 2)
    assert federation_report(fed.out).report.claim


def test_fewer_releases_than_min_silos_make_no_basis(fed):
    lost = Faulty(fed.silos(), before=lambda message: None if message.silo == "north" else "lost")
    with pytest.raises(TooFewSilos, match="The basis has 1 usable replies, min_silos is 2"):
        coordinator(fed, lost).run()
    coordinator(fed).run()
    assert [fed.ledger(name).charged("basis") for name in NAMES] == [1, 1, 1]


def test_another_public_basis_than_the_round_names_is_refused_before_anything_is_written(fed):
    start, spec = fed.trainer.start, first_spec(fed)
    for wide in (None, Wide({k: 2 * t for k, t in fed.trainer.wide.tensors.items()}, "source: weight")):
        fed.trainer.wide = wide
        said = fed.silo("north").handle(start, spec)
        assert (said.kind, "wide public basis is not the one that the round names" in said.message) == ("state", True)
    assert not list((fed.out / "silos").glob("**/ledger.jsonl"))


@pytest.mark.parametrize("what", ["huge and tiny", "tilted", "nan", "negative", "missing", "narrow", "double"])
def test_frames_that_are_no_basis_are_refused_before_anything_is_written(fed, what):
    """With frames of 1e17 and 1e-23 the norm of a core is measured as zero, and the core added without a bound."""
    tensors = {name: tensor.clone() for name, tensor in fed.trainer.wide.tensors.items()}
    weight = next(iter(fed.trainer.shapes))
    left, values, right = (f"{weight}{part}" for part in (LEFT, VALUES, RIGHT))
    if what == "huge and tiny":
        tensors |= {left: tensors[left] * 1e17, right: tensors[right] * 1e-23}
    elif what == "tilted":
        tensors[left][:, 1] += 0.01 * tensors[left][:, 0]
    elif what == "nan":
        tensors[right][0, 0] = float("nan")
    elif what == "negative":
        tensors[values] *= -1
    elif what == "missing":
        del tensors[right]
    elif what == "narrow":
        tensors[right] = tensors[right][:, 1:].contiguous()
    else:
        tensors[left] = tensors[left].double()
    fed.trainer.wide = Wide(tensors, "source: weight")
    said = fed.silo("north").handle(fed.trainer.start, first_spec(fed))
    assert (said.kind, weight in said.message) == ("state", True)
    assert not list((fed.out / "silos").glob("**/ledger.jsonl"))


def test_the_release_has_the_least_noise_that_the_policy_wants(fed):
    fed.policies["north"] = federation.policy("north", max_epsilon=1e4, min_noise_multiplier=0.3)
    said = fed.silo("north").handle(fed.trainer.start, first_spec(fed, noise_multiplier=0.2))
    assert (said.kind, said.message) == (
        "spec",
        "Silo 'north' wants a basis' noise_multiplier of at least 0.3, not 0.2.",
    )
    assert not list((fed.out / "silos").glob("**/ledger.jsonl"))


def test_a_server_without_the_public_basis_of_its_terms_stops(fed):
    made = fed.trainer
    with pytest.raises(ServerError, match="not the one that the terms of the run name"):
        fed.coordinator(None, asked(fed), shapes=made.shapes).run()


def test_where_the_release_is_all_noise_the_public_directions_stay(fed):
    """And where it is far above its noise, it alone decides."""
    wide, shapes = fed.trainer.wide, fed.trainer.shapes
    frames, ranks = frames_in(wide), {name: rank for name, (_, _, rank) in shapes.items()}
    weak = {f"{GRADIENT}{name}": torch.zeros(WIDTH, WIDTH) for name in shapes}
    found = basis_from(weak, shapes, wide, [paid_by(fed)])
    for name, frame in frames.items():
        kept = frame.left[:, : ranks[name]]
        torch.testing.assert_close(kept @ kept.T, found[f"{name}.B"] @ found[f"{name}.B"].T, rtol=1e-3, atol=1e-4)
    generator = torch.Generator().manual_seed(0)
    cores = {name: torch.randn(WIDTH, WIDTH, generator=generator) * 1e6 for name in shapes}
    found = basis_from({f"{GRADIENT}{n}": c for n, c in cores.items()}, shapes, wide, [paid_by(fed)])
    wanted = factors_of({n: frames[n].left @ c @ frames[n].right.T for n, c in cores.items()}, ranks)
    overlap = [float((found[f"{n}.B"].T @ each.B).square().sum()) / ranks[n] for n, each in wanted.items()]
    assert min(overlap) > 0.8


def test_noise_of_a_mean_is_that_of_its_releases(fed):
    releases = [paid_by(fed, noise_multiplier=noise, l2_clip_norm=0.5) for noise in (2.0, 3.0)]
    assert mean_noise_std(releases) == pytest.approx(0.5 * 13**0.5 / 2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"frames_sha256": ""}, "frames_sha256"),
        ({"source": ""}, "source"),
        ({"source": "a\nb"}, "source"),
        ({"width": 0}, "frames_sha256"),
        ({"width": -1}, "width"),
        ({"l2_clip_norm": 1e-7}, "l2_clip_norm"),
        ({"l2_clip_norm": 1e37}, "l2_clip_norm"),
    ],
)
def test_a_paid_basis_that_makes_no_sense(fed, changes, said):
    with pytest.raises(FederatedError, match=said):
        paid_by(fed, **changes)


def test_silos_that_pay_for_different_bases_are_refused(fed):
    each = SiloTerms(sampling_prob=PROB, noise_multiplier=NOISE, expected_batch_size=6)
    different = (paid_by(fed), paid_by(fed), paid_by(fed, frames_sha256="0" * 64))
    silos = {name: replace(each, basis=paid) for name, paid in zip(NAMES, different, strict=True)}
    with pytest.raises(FederatedError, match="All silos pay for the same basis"):
        asked(fed, silos=silos)


@pytest.mark.parametrize("public", [False, True], ids=["of the weights", "of a public file"])
def test_from_settings_to_a_finished_adapter_within_the_budget(tmp_path, monkeypatch, public):
    """Noise of basis and training together comes to the target, within 1 %."""
    monkeypatch.setattr("dpsb.federated.trainer.check_before_run", lambda *_args: None)
    source = f":{workbench.data_file(seed=9)}" if public else ""
    path = settings(tmp_path, f'{split_file(tmp_path)}\nbasis = "hybrid{source}"\nbasis_width = 8', SPLIT)
    config = read_federation(path)
    done = simulate(config)
    report = json.loads((done.out / "report.json").read_text())
    assert report["claim"] is True
    assert 0.99 * config.run.epsilon <= report["epsilon"]["upper"] <= config.run.epsilon
    assert report["basis"]["silos"] == ["silo-1", "silo-2", "silo-3"]
    wide, state = read_wide(done.out), load_state(done.out)
    assert {each.basis.frames_sha256 for each in state.terms.silos.values()} == {wide.sha256}
    assert {each.basis.width for each in state.terms.silos.values()} == {wide.width} == {8}
    assert wide.source.startswith(f"source: {source[1:]}; source_sha256: " if public else "source: weight")
    assert "source: weight" in report["basis"].get("source", "source: weight")


@pytest.mark.parametrize(
    ("federated", "said"),
    [
        ('model = "secagg"\nserver_optimizer = "sgd"', "is for model silo_local"),
        ('model = "trusted_server"\nserver_optimizer = "sgd"', "is for model silo_local"),
    ],
)
def test_other_models_are_refused(tmp_path, federated, said):
    path = settings(tmp_path, f'{split_file(tmp_path)}\nbasis = "hybrid"', f"{SPLIT}\n{federated}")
    with pytest.raises(FederatedError, match=said):
        read_federation(path)
