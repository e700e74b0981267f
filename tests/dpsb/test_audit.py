"""``dpsb audit``: a run of its own with canaries, bounds that honest runs keep to, and a page that stands alone."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import workbench
from typer.testing import CliRunner

from dpsb import audit as auditor
from dpsb import mechanism
from dpsb.audit import audit_run
from dpsb.canaries import expected_scores
from dpsb.cli import app
from dpsb.run import RunError, fine_tune
from dpsb_accounting import Ledger, make_report, verify
from dpsb_accounting.auditing import CanaryScores, FixedThresholds, LowerBound, audit, read_scores, roc
from dpsb_accounting.auditing.page import Attack, to_html, to_json

METHODS = {"clopper-pearson", "gdp", "one-run", "one-run-fdp"}


pytestmark = pytest.mark.usefixtures("quick_calibration", "wide_terminal")


@pytest.fixture(autouse=True)
def few_scores(monkeypatch):
    monkeypatch.setattr(auditor, "_MANY", 8000)


def config(out, **changes):
    evaluation = str(workbench.data_file(seed=5))
    return workbench.run_config(out, **{"eval_data": evaluation, "steps": 20, "rank": 8, **changes})


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """A finished run and its audit, made by the commands."""
    folder = tmp_path_factory.mktemp("audited")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpsb.plan.noise_multiplier_for", workbench.calibrated)
        patch.setattr(auditor, "_MANY", 8000)
        run = fine_tune(config(folder / "run"))
        before = workbench.written(run.out)
        found = CliRunner().invoke(app, ["audit", str(run.out), "--json", "--input-canaries", "60"])
    assert found.exit_code == 0, found.output
    assert workbench.written(run.out) == before, "the audited run is only read"
    return run, folder / "run-audit", json.loads(found.stdout)


def test_an_honest_run_is_not_refuted_and_its_canaries_prove_something(audited):
    run, out, content = audited
    assert content["claimed_epsilon"] == pytest.approx(run.report.epsilon.upper)
    assert content["refuted"] is False
    assert 0.05 < content["ratio"] < 1
    gradient = content["attacks"][0]
    assert {bound["method"] for bound in gradient["bounds"]} == METHODS
    assert all(bound["confidence"] == pytest.approx(1 - 0.05 / 4) for bound in gradient["bounds"])
    assert set(gradient["expected_epsilon_lower"]) == METHODS
    assert json.loads((out / "audit.json").read_text()) == content


def test_the_canary_run_claims_nothing_and_the_audited_one_still_does(audited):
    run, out, _ = audited
    report = make_report(Ledger.read(out / "canary-run" / "ledger.jsonl"))
    assert not report.claim
    assert {"canaries", "gradient_canaries"} <= {taint["name"] for taint in report.to_json()["taints"]}
    assert make_report(Ledger.read(run.out / "ledger.jsonl")).claim


def gradient_attack(epsilon, delta):
    roc_of = roc(CanaryScores(np.arange(4.0), np.array([True, False, True, False]), "white box"))
    facts = {"delta": delta, "confidence": 0.9875, "assumptions": (), "threat_model": "white box", "inputs": {}}
    bounds = [LowerBound(epsilon=e, method=m, **facts) for e, m in ((epsilon, "gdp"), (0.1, "one-run"))]
    return (Attack(name="gradient canaries", threat_model="white box", bounds=bounds, roc=roc_of),)


def test_the_report_can_hold_what_the_gradient_canaries_prove(audited, tmp_path):
    run, out, content = audited
    shutil.copytree(run.out, tmp_path / "run")
    delta = Ledger.read(run.out / "ledger.jsonl").plan.delta
    found = auditor.Audit(out, content, gradient_attack(0.5, delta))
    auditor.into_report(tmp_path / "run", found)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [audit["epsilon_lower"] for audit in report["audits"]] == [0.5]
    assert report["audits"][0]["method"] == "gradient canaries, gdp"
    assert report["audits"][0]["confidence"] == 0.95, "of the largest among the methods"
    before = json.loads((run.out / "report.json").read_text())
    assert report["held_out"] == before["held_out"]
    assert verify(tmp_path / "run" / "ledger.jsonl").ok
    with pytest.raises(ValueError, match="the audit is wrong"):
        auditor.into_report(tmp_path / "run", auditor.Audit(out, content, gradient_attack(1e3, delta)))
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report
    with pytest.raises(RunError, match=r"holds no report\.json"):
        auditor.into_report(tmp_path, found)


def test_thresholds_come_from_the_plan_and_not_from_the_scores(audited):
    _, out, content = audited
    scores = read_scores(out / "gradient-scores.npz")
    for bound in content["attacks"][0]["bounds"]:
        if bound["method"] in ("clopper-pearson", "gdp"):
            assert bound["inputs"]["threshold_rule"] == "fixed beforehand"
            rule = FixedThresholds((bound["inputs"]["threshold"],))
            again = audit(
                scores, bound["method"], delta=bound["delta"], confidence=bound["confidence"], thresholds=rule
            )
            assert again.epsilon == pytest.approx(bound["epsilon_lower"])


def test_members_describe_and_bound_nothing(audited):
    _, _, content = audited
    names = [attack["name"] for attack in content["attacks"]]
    assert names == ["gradient canaries", "input canaries", "real examples"]
    assert content["attacks"][2]["bounds"] == []
    assert {"auc", "tpr_at_fpr"} <= set(content["attacks"][2]["roc"])


def test_no_text_of_the_data_is_in_the_audit(audited):
    _, out, _ = audited
    for content in workbench.written(out).values():
        for canary in workbench.CANARIES:
            assert canary.encode() not in content


def test_the_page_stands_alone_and_says_what_matters(audited):
    _, out, content = audited
    page = (out / "audit.html").read_text()
    assert not re.search(r"<script|<link|https?://(?!www\.w3\.org)", page)
    assert "default-src 'none'" in page
    assert "No attack contradicts the claim" in page
    assert "never prove one" in page
    for attack in content["attacks"]:
        assert attack["name"] in page
        assert attack["threat_model"].split(";")[0].split(",")[0] in page
    assert page.count("<svg") == 4


def test_a_mechanism_that_does_not_clip_is_refuted(tmp_path, monkeypatch):
    """The same commands on a broken dpsb that no longer tests itself: the claim is refuted, and the command fails."""
    run = fine_tune(config(tmp_path / "run"))
    monkeypatch.setattr("dpsb.run.check_before_run", lambda *_: None)
    monkeypatch.setattr(mechanism, "clip_scale", lambda norms, *_: norms * 0 + 1)
    found = CliRunner().invoke(app, ["audit", str(run.out), "--out", str(tmp_path / "audit"), "--input-canaries", "0"])
    assert found.exit_code == 1
    assert "the claim is refuted" in found.stderr
    assert len([line for line in found.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert "The claim is refuted" in (tmp_path / "audit" / "audit.html").read_text()
    assert json.loads((tmp_path / "audit" / "audit.json").read_text())["refuted"] is True


def test_refuses_a_folder_in_use_and_a_folder_without_a_run(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("x")
    with pytest.raises(RunError, match="not empty"):
        audit_run(config(tmp_path / "run"), tmp_path / "full")
    found = CliRunner().invoke(app, ["audit", str(tmp_path / "nothing")])
    assert found.exit_code == 1
    assert "holds no run" in found.stderr


@pytest.mark.parametrize("command", ["audit", "selftest"])
def test_help_shows_an_example(command):
    page = CliRunner().invoke(app, [command, "--help"])
    assert page.exit_code == 0
    assert f"Example: dpsb {command}" in page.output


# --- rules that are found by simulation


def plan(**changes):
    return workbench.fit_plan(**{"noise_multiplier": 1.5, "expected_batch_size": 12, "steps": 20, **changes})


@pytest.mark.parametrize("method", sorted(METHODS))
def test_rules_from_simulation_keep_below_the_truth(method):
    """Fresh scores of an honest mechanism: no bound exceeds the plan's epsilon, the mean is near what is expected."""
    made = plan(delta=1e-5)
    simulated = [expected_scores(made, 2000, seed) for seed in range(3)]
    rule = auditor._best_rule(method, expected_scores(made, 8000, 50), simulated, made.delta, 0.95)
    claim = auditor.epsilon_of(made).upper
    found = [rule(expected_scores(made, 2000, 100 + seed)).epsilon for seed in range(10)]
    assert max(found) < claim
    assert np.mean(found) == pytest.approx(np.mean([rule(one).epsilon for one in simulated]), rel=0.3, abs=0.2)
    assert np.mean(found) > 0.1 * claim


@pytest.mark.slow
def test_gdp_bounds_of_sampled_mechanisms_err_low():
    """Sampling makes the trade-off less than Gaussian: even endless canaries would not refute an honest claim."""
    for sampling, steps, noise in ((2, 8, 0.6), (2, 48, 0.9), (12, 20, 1.5)):
        made = plan(expected_batch_size=sampling, steps=steps, noise_multiplier=noise, delta=1e-5)
        many = expected_scores(made, 200_000, 3)
        claim = auditor.epsilon_of(made).upper
        for threshold in np.quantile(many.values, [0.2, 0.5, 0.8, 0.95, 0.99, 0.998]):
            rule = FixedThresholds((float(threshold) + 1e-9,))
            assert audit(many, "gdp", delta=made.delta, thresholds=rule).epsilon < claim


# --- the page


def attack(epsilon, **changes):
    bound = LowerBound(epsilon=epsilon, delta=1e-5, confidence=0.95, method="gdp", assumptions=("a < b",))
    curve = roc(CanaryScores(np.arange(40.0), np.arange(40) % 2))
    return replace(Attack(name="canaries", threat_model="sees <all>", bounds=(bound,), roc=curve), **changes)


def test_page_and_json_of_a_refuted_claim():
    page = to_html(
        title="<b>", claimed_epsilon=2.0, delta=1e-5, confidence=0.95, attacks=[attack(3.0)], notes=["a & b"]
    )
    assert "The claim is refuted" in page
    assert "Only bounds that assume a Gaussian" not in page
    assert "&lt;b&gt;" in page
    assert "sees &lt;all&gt;" in page
    assert "a &amp; b" in page
    content = to_json(2.0, 1e-5, 0.95, [attack(3.0)])
    assert content["refuted"] is True
    assert content["epsilon_lower"] == 3.0
    assert json.loads(json.dumps(content)) == content


def test_page_says_where_only_gaussian_bounds_refute():
    gaussian = attack(3.0)
    gaussian = replace(gaussian, bounds=(replace(gaussian.bounds[0], mu=1.0),))
    page = to_html(title="x", claimed_epsilon=2.0, delta=1e-5, confidence=0.95, attacks=[gaussian], notes=[])
    assert "Only bounds that assume a Gaussian trade-off" in page


def test_page_without_bounds_or_attacks():
    for attacks in ([], [attack(1.0, bounds=())]):
        page = to_html(title="x", claimed_epsilon=2.0, delta=1e-5, confidence=0.95, attacks=attacks, notes=[])
        assert "No attack contradicts the claim" in page
        assert to_json(2.0, 1e-5, 0.95, attacks)["epsilon_lower"] == 0.0
