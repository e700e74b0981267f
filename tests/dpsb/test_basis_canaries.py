"""Canaries of the private basis release: an honest one keeps to its claim, a raw or a quieter one does not."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import workbench
from scipy.stats import ks_2samp

from dpsb import audit as auditor
from dpsb.adapter import lora_layers
from dpsb.audit import audit_run, white_box
from dpsb.basis.canaries import BasisCanaries, plan_of_release
from dpsb.basis.private import private, private_provenance
from dpsb.basis.release import Clip, PrivateExamples
from dpsb.canaries import expected_scores
from dpsb.data import Collator, synthetic_examples
from dpsb.mechanism import Mechanism
from dpsb.randomness import SeededRandomness, SystemRandomness
from dpsb_accounting import Gaussian, Ledger, Phase, PoissonGaussian, epsilon, make_report

C, DELTA = 0.5, 1e-3
SIZES = {"a": 900, "b": 1300}


def mechanism(**changes):
    return Mechanism(**{"l2_clip_norm": C, "noise_multiplier": 1.0, "clipping": "flat", **changes})


pytestmark = pytest.mark.usefixtures("quick_calibration")


@pytest.fixture(autouse=True)
def few_scores(monkeypatch):
    monkeypatch.setattr(auditor, "_MANY", 8000)


def test_each_has_a_coordinate_of_its_own_and_length_c():
    canaries = BasisCanaries(800, SeededRandomness(1))
    canaries.place(SIZES)
    everybody = np.arange(len(canaries))
    parts = torch.cat([canaries.part(name, everybody, mechanism()) for name in SIZES])
    assert len(parts) == sum(SIZES.values())
    assert int((parts != 0).sum()) == len(canaries) == int(canaries.included.sum())
    assert torch.allclose(parts[parts != 0].abs(), torch.tensor(C, dtype=torch.float64))
    assert 0.4 < float((parts[parts != 0] > 0).double().mean()) < 0.6
    assert float(sum(canaries.part(name, everybody[:0], mechanism()).norm() for name in SIZES)) == 0
    one = torch.cat([canaries.part(name, everybody[3:4], mechanism()) for name in SIZES])
    assert float(one.norm()) == pytest.approx(C)


def test_another_coordinate_in_every_release():
    canaries = BasisCanaries(50, SeededRandomness(1))
    seen = []
    for _ in range(2):
        canaries.place(SIZES)
        seen.append(torch.cat([canaries.part(name, np.arange(len(canaries)), mechanism()) for name in SIZES]))
    assert int(((seen[0] != 0) & (seen[1] != 0)).sum()) < 10


def test_more_canaries_than_numbers():
    canaries = BasisCanaries(100, SeededRandomness(1))
    canaries.place({"a": 30})
    parts = canaries.part("a", np.arange(len(canaries)), mechanism())
    assert 5 < int((parts != 0).sum()) < 25
    canaries.observe("a", parts, mechanism(), 1.0)
    assert len(canaries.scores()) == 30
    with pytest.raises(ValueError, match="count=1"):
        BasisCanaries(1)


def released_with_canaries(tiny, folder, *, event=None, count=1, rounds=0, spoil=None, canaries=1500):
    """A basis release of a small model with canaries among its examples."""
    provenance = private_provenance(Clip(l2_clip_norm=C, clipping="flat", share=0.5), rounds)
    phase = Phase("basis", event or Gaussian(noise_multiplier=1.0), count)
    plan = workbench.fit_plan(basis=provenance.to_json(), released_before=(phase,), delta=DELTA)
    folder.mkdir()
    planted = BasisCanaries(canaries)
    model = tiny.lora(tiny.base("bert"))
    with Ledger.create(folder / "ledger.jsonl", plan) as ledger:
        examples = PrivateExamples(
            model=model,
            layers=lora_layers(model),
            dataset=workbench.examples(8),
            loss_fn=tiny.loss["bert"],
            collate=Collator(0),
            synthetic=synthetic_examples("classification", 61, 3, workbench.PADDED),
            max_length=workbench.PADDED,
            token_budget=512,
            ledger=ledger,
            randomness=SystemRandomness(),
            canaries=planted,
        )
        if spoil is not None:
            honest = Mechanism.release
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Mechanism, "release", lambda self, total, source: spoil(honest, self, total, source))
                private(examples, provenance)
        else:
            private(examples, provenance)
    return plan, planted.scores(), folder


def attack(plan, scores):
    return white_box("basis canaries", plan_of_release(plan), scores, 0.95, part=True)


def test_an_honest_release_is_not_refuted_and_gives_much_of_its_epsilon(tiny, tmp_path):
    plan, scores, folder = released_with_canaries(tiny, tmp_path / "run")
    found = attack(plan, scores)
    claimed = epsilon([plan.phases[0]], DELTA).upper
    assert found.claimed_epsilon == pytest.approx(claimed)
    assert 0.4 * claimed < found.epsilon < claimed  # 0.71 +- 0.06 of it in 24 runs, 0.52 to 0.80 in all that were seen
    assert not found.refutes(99.0)
    report = make_report(Ledger.read(folder / "ledger.jsonl"))
    assert not report.claim
    assert "basis_canaries" in {taint["name"] for taint in report.to_json()["taints"]}


def raw(_honest, _mechanism, total, _source):
    return total.clone()


def quieter(honest, mechanism, total, source):
    return honest(replace(mechanism, noise_multiplier=mechanism.noise_multiplier / 2), total, source)


def noise_by_share(honest, mechanism, total, source):
    """Noise of C / sqrt(layers) in each layer: the mistake of a joint clip whose noise is shared out."""
    return honest(replace(mechanism, noise_multiplier=mechanism.noise_multiplier / 12**0.5), total, source)


@pytest.mark.parametrize("spoil", [raw, quieter, noise_by_share])
def test_raw_gradients_and_less_noise_are_refuted(tiny, tmp_path, spoil):
    plan, scores, _ = released_with_canaries(tiny, tmp_path / "run", spoil=spoil)
    assert attack(plan, scores).refutes(99.0)


def test_a_missing_clip_is_refuted(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("dpsb.mechanism.clip_scale", lambda norms, *_: norms * 0 + 1)
    plan, scores, _ = released_with_canaries(tiny, tmp_path / "run")
    assert attack(plan, scores).refutes(99.0)


@pytest.mark.parametrize(
    ("event", "count", "rounds"),
    [
        (PoissonGaussian(noise_multiplier=1.0, sampling_prob=0.4), 1, 0),
        (Gaussian(noise_multiplier=2.0), 4, 2),
    ],
    ids=["poisson", "sketches"],
)
def test_scores_have_the_law_that_the_plan_predicts(tiny, tmp_path, event, count, rounds):
    plan, scores, _ = released_with_canaries(
        tiny, tmp_path / "run", event=event, count=count, rounds=rounds, canaries=700
    )
    expected = expected_scores(plan_of_release(plan), 20_000)
    assert ks_2samp(scores.inserted, expected.inserted).pvalue > 1e-4
    assert ks_2samp(scores.left_out, expected.left_out).pvalue > 1e-4


def test_dpsb_audit_attacks_the_basis_beside_the_training(tmp_path):
    """The usual command on a run with a private basis: one attack more, held against the basis' own share."""
    config = workbench.run_config(tmp_path / "run", basis="private", basis_share=0.5, epsilon=8.0)
    found = audit_run(config, tmp_path / "audit", gradient_canaries=400, input_canaries=0)
    names = [one.name for one in found.attacks]
    assert names == ["gradient canaries", "basis canaries"]
    basis = found.attacks[1]
    assert 0 < basis.epsilon < basis.claimed_epsilon < found.content["claimed_epsilon"]
    assert found.content["refuted"] is False
    content = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert content["attacks"][1]["claimed_epsilon"] == pytest.approx(basis.claimed_epsilon)
    assert (tmp_path / "audit" / "basis-scores.npz").exists()


def test_dpsb_audit_refutes_a_basis_from_raw_gradients(tmp_path, monkeypatch):
    """The whole command where the release of the basis, and nothing else, lost its noise."""
    honest = Mechanism.release

    def without_noise_for_the_basis(self, total, source):
        return total.clone() if self.clipping == "automatic" else honest(self, total, source)

    monkeypatch.setattr(Mechanism, "release", without_noise_for_the_basis)
    config = workbench.run_config(tmp_path / "run", basis="private", basis_share=0.5, epsilon=8.0)
    found = audit_run(config, tmp_path / "audit", gradient_canaries=400, input_canaries=0)
    assert found.content["refuted"] is True
    page = (tmp_path / "audit" / "audit.html").read_text()
    assert "The claim is refuted" in page
    assert "basis canaries attack a part whose own claim is" in page
    assert not found.attacks[0].refutes(found.content["claimed_epsilon"])
