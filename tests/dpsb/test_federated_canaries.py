"""Canaries in a silo's releases and in the aggregate: honest federations keep to their claims, broken ones do not."""

import json

import federation
import pytest
import workbench
from federation import NAMES, Federation, policy, terms
from typer.testing import CliRunner

from dpsb import audit as auditor
from dpsb.audit import white_box
from dpsb.cli import app
from dpsb.federated import coordinator
from dpsb.federated import trainer as training
from dpsb.federated.audit import audit_federation, made_of
from dpsb.federated.canaries import FederationCanaries
from dpsb.federated.checks import FederatedError
from dpsb.federated.config import read_federation
from dpsb.federated.local import LocalTransport
from dpsb.federated.silo import Silo
from dpsb.federated.terms import SiloTerms
from dpsb.mechanism import Mechanism
from dpsb_accounting import Ledger, epsilon, make_report

ROUNDS = 6


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(auditor, "_MANY", 8000)


def audited(tiny, folder, model, canaries=760, noise=1.0):
    """A federation of three silos with canaries at north; the attack on it and north's claim for the steps made."""
    fed = Federation(folder / "fed", federation.trainer(tiny, rank=8))
    fed.policies = {name: policy(name, models=[model], clients=3) for name in NAMES}
    planted = FederationCanaries("north", canaries)
    silos = {
        name: Silo(
            fed.out / "silos" / name,
            fed.policies[name],
            fed.trainer,
            workbench.examples(24, seed=number),
            canaries=planted.at(name),
        )
        for number, name in enumerate(NAMES)
    }
    share = SiloTerms(sampling_prob=federation.PROB, noise_multiplier=noise, expected_batch_size=6)
    facts = {"silos": dict.fromkeys(NAMES, share)}
    asked = terms(rounds=ROUNDS, local_steps=2, **facts)
    if model != "silo_local":
        rates = {"learning_rate": 0.1, "head_learning_rate": 0.1, "server_optimizer": "sgd"}
        asked = terms(model=model, rounds=2 * ROUNDS, local_steps=1, min_silos=3, **rates, **facts)
    fed.coordinator(LocalTransport(silos), asked, on_opened=planted.opened).run()
    record = fed.ledger("north")
    made = made_of(record.plan, record.charged("train"))
    assert record.charged("train") == 2 * ROUNDS
    return white_box("canaries", made, planted.scores(), 0.95), epsilon(made).upper, fed


@pytest.mark.parametrize("model", ["silo_local", "trusted_server", "secagg"])
def test_an_honest_federation_is_not_refuted_and_its_canaries_are_seen(tiny, tmp_path, model):
    found, claimed, fed = audited(tiny, tmp_path, model)
    assert found.epsilon < claimed
    assert found.roc.auc > 0.6, "the canaries are in what was released"
    assert ("opened sum" in found.threat_model) == (model != "silo_local")
    for name in NAMES:
        report = make_report(Ledger.read(fed.ledger(name).path))
        assert not report.claim, "a ledger of an audit supports no claim"


def without_clipping(monkeypatch):
    monkeypatch.setattr("dpsb.mechanism.clip_scale", lambda norms, *_: norms * 0 + 1)


def silo_with_less_noise(monkeypatch):
    honest = Mechanism.release
    less = 0.05
    monkeypatch.setattr(
        training.Mechanism, "release", lambda self, total, source: total + less * (honest(self, total, source) - total)
    )


def server_without_noise(monkeypatch):
    monkeypatch.setattr(coordinator.Mechanism, "release", lambda _self, total, _source: total.clone())


def shares_too_small(monkeypatch):
    honest = training.noise_share
    monkeypatch.setattr(training, "noise_share", lambda *arguments: honest(*arguments) / 20)


@pytest.mark.parametrize(
    ("model", "fault"),
    [
        ("silo_local", without_clipping),
        ("silo_local", silo_with_less_noise),
        ("trusted_server", server_without_noise),
        ("trusted_server", without_clipping),
        ("secagg", shares_too_small),
    ],
)
def test_a_broken_federation_is_refuted(tiny, tmp_path, monkeypatch, model, fault):
    fault(monkeypatch)
    found, claimed, _ = audited(tiny, tmp_path, model, noise=2.5)
    assert found.epsilon > claimed


def test_what_the_others_add_is_taken_off(tiny, tmp_path, monkeypatch):
    """Without noise a canary is seen at exactly C in each round in which it was drawn, and at 0 in the others."""
    seen = []
    monkeypatch.setattr(coordinator.Mechanism, "release", lambda _self, total, _source: total.clone())
    monkeypatch.setattr(
        "dpsb.canaries.log_ratio", lambda products, clip, *_: seen.append(products / clip) or 0 * products
    )
    audited(tiny, tmp_path, "trusted_server", canaries=40)
    seen = seen[: 2 * ROUNDS]  # then come the simulations
    for products in seen:
        assert all(min(abs(value), abs(value - 1)) < 1e-6 for value in products)
    assert sum(abs(seen_here - 1) < 1e-6 for products in seen for seen_here in products) > 10


def test_a_host_that_never_came_gives_no_scores():
    with pytest.raises(ValueError, match="took part in no round"):
        FederationCanaries("north", 10).scores()


# --- the whole audit, from a file of settings


def settings(tmp_path, federation_lines=""):
    path = tmp_path / "fed.toml"
    path.write_text(
        f'model = "{workbench.bert_folder()}"\nlabels = "ham,spam"\nepsilon = 8.0\nrank = 8\n'
        f'data = "{workbench.data_file(count=90)}"\nexpected_batch_size = 15\nmax_length = {workbench.PADDED}\n'
        f'out = "{tmp_path / "out"}"\n[federation]\nsilos = 2\n{federation_lines}\n'
    )
    return read_federation(path)


@pytest.fixture
def calibrated(monkeypatch):
    monkeypatch.setattr("dpsb.federated.calibrate.noise_multiplier_for", lambda **_facts: 1.5)
    monkeypatch.setattr("dpsb.federated.trainer.check_before_run", lambda *_args: None)


@pytest.mark.parametrize(
    "model",
    ["rounds = 5\nlocal_steps = 2", 'rounds = 10\nmodel = "trusted_server"\nserver_optimizer = "sgd"\nlocal_steps = 1'],
    ids=["silo_local", "trusted_server"],
)
def test_audit_of_a_file_of_settings(tmp_path, calibrated, model):
    config = settings(tmp_path, model)
    found = audit_federation(config, tmp_path / "audit", host="silo-2", canaries=600)
    assert not (tmp_path / "out").exists(), "the audited federation's folder is not touched"
    content = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert content["silo"] == "silo-2"
    assert content["refuted"] is False
    assert 0 <= content["epsilon_lower"] < content["claimed_epsilon"]
    assert content["model"] == config.federation.model
    page = (tmp_path / "audit" / "audit.html").read_text()
    assert "Audit of silo silo-2 in out" in page
    report = json.loads((tmp_path / "audit" / "canary-run" / "report.json").read_text())
    assert not report["claim"]
    for text in workbench.CANARIES:
        assert all(text.encode() not in file for file in workbench.written(tmp_path / "audit").values())
    with pytest.raises(RuntimeError, match="not empty"):
        audit_federation(config, found.out)


def test_the_command_says_what_is_proved_and_fails_if_a_claim_is_refuted(tmp_path, calibrated, monkeypatch):
    settings(tmp_path, "rounds = 4\nlocal_steps = 2")
    command = ["federate", "audit", "--config", str(tmp_path / "fed.toml"), "--canaries", "300"]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "first"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["refuted"] is False
    monkeypatch.setattr("dpsb.mechanism.clip_scale", lambda norms, *_: norms * 0 + 1)
    broken = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "second")])
    assert broken.exit_code == 1
    assert "the claim is refuted" in broken.stderr
    assert "silo silo-1, silo_local: epsilon is at least" in broken.stdout


def test_refuses_what_it_cannot_audit(tmp_path, calibrated):
    config = settings(tmp_path, "rounds = 2")
    with pytest.raises(FederatedError, match="host='east'"):
        audit_federation(config, tmp_path / "audit", host="east")
    clients = settings(tmp_path, 'rounds = 2\nmodel = "client_level"\nserver_optimizer = "sgd"')
    with pytest.raises(FederatedError, match="client_level"):
        audit_federation(clients, tmp_path / "audit")
    assert not (tmp_path / "audit").exists()
