import dataclasses
import json
import math

import pytest
from plans import make_plan, two_phases

from dpsb_accounting import Ledger, NonPrivate, Phase, epsilon, make_report, spent, verify
from dpsb_accounting.report.build import report_content


@pytest.fixture
def run(tmp_path):
    """A finished run: its ledger and its report beside it."""
    with Ledger.create(tmp_path / "ledger.jsonl", two_phases()) as ledger:
        ledger.charge("basis")
        for _ in range(6):
            ledger.charge("train")
        make_report(ledger).write(tmp_path / "report.json")
    return tmp_path


def test_the_claim_is_the_plan_and_spent_is_information(run):
    record = Ledger.read(run / "ledger.jsonl")
    report = make_report(record)
    data = report.to_json()
    assert report.claim
    assert data["claim"] is True
    assert data["epsilon"]["upper"] == report.epsilon.upper == epsilon(record.plan).upper
    assert data["spent"] == {
        "epsilon": {"lower": spent(record).lower, "upper": spent(record).upper},
        "steps": 6,
        "of": 10,
    }
    assert data["spent"]["epsilon"]["upper"] < data["epsilon"]["upper"]
    assert data["mechanism"] == {
        "type": "poisson_gaussian",
        "noise_multiplier": 1.0,
        "sampling_prob": 0.01,
        "steps": 10,
        "l2_clip_norm": 0.5,
        "noise_std": 0.5,
        "expected_batch_size": 200,
        "clipping": "flat",
    }
    assert data["ledger"]["head"] == record.head
    assert (data["cross_check"], data["cross_check_engine"]) == ("agrees", "quadrature")
    ends = data["cross_check_epsilon"]
    assert report.epsilon.lower <= ends["upper"]
    assert ends["lower"] <= report.epsilon.upper
    assert json.loads((run / "report.json").read_text()) == data


def test_the_statement_never_rounds_down(run):
    record = Ledger.read(run / "ledger.jsonl")
    report = make_report(record)
    words = report.to_json()["statement"]
    stated = float(words.split("(")[1].split(",")[0])
    assert report.epsilon.upper <= stated <= report.epsilon.upper * 1.001
    assert "whole plan of 10 steps" in words
    assert "6 of them were charged" in words


def test_the_text_is_a_page_of_at_most_100_columns(run):
    for held_out in (None, {"accuracy": 0.97}):
        page = make_report(Ledger.read(run / "ledger.jsonl"), held_out=held_out).to_text()
        assert max(map(len, page.splitlines())) <= 100
        assert ("OUTSIDE THE GUARANTEE" in page) == (held_out is not None)
        for word in ("claim", "add_or_remove_one", "does not cover", "released"):
            assert word in page


def test_held_out_metrics_are_marked(run):
    data = make_report(Ledger.read(run / "ledger.jsonl"), held_out={"accuracy": 0.97}).to_json()
    assert data["held_out"] == {"note": "outside the guarantee", "metrics": {"accuracy": 0.97}}


def test_a_tainted_run_makes_no_claim(tmp_path):
    with Ledger.create(tmp_path / "ledger.jsonl", make_plan()) as ledger:
        ledger.taint("seeded randomness", "a test")
        report = make_report(ledger)
    assert not report.claim
    assert "No privacy claim" in report.to_json()["statement"]
    assert report.to_json()["taints"] == [{"name": "seeded randomness", "reason": "a test"}]


def test_a_non_private_run_is_reported_as_infinite(tmp_path):
    plan = make_plan(
        phases=(Phase("train", NonPrivate(reason="no noise"), 3),),
        clipping="none",
        l2_clip_norm=math.inf,
        target_epsilon=math.inf,
    )
    with Ledger.create(tmp_path / "ledger.jsonl", plan) as ledger:
        ledger.charge("train")
        make_report(ledger).write(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["epsilon"] == data["spent"]["epsilon"] == {"lower": "inf", "upper": "inf"}
    assert data["claim"] is False
    assert data["target_epsilon"] == data["mechanism"]["l2_clip_norm"] == "inf"
    assert verify(tmp_path / "ledger.jsonl").ok


@pytest.mark.parametrize("neighboring", ["zero_out", "replace_one"])
def test_an_undeclared_number_counts_as_public(tmp_path, neighboring):
    plan = make_plan(num_examples_declared=False, neighboring=neighboring)
    with Ledger.create(tmp_path / "ledger.jsonl", plan) as ledger:
        words = make_report(ledger).to_json()["statement"]
    assert "the true number, 20000, counts as public" in words
    assert f"The relation is {neighboring}: two data sets are neighbours" in words


def test_writing_is_atomic(run, monkeypatch):
    before = (run / "report.json").read_bytes()
    report = make_report(Ledger.read(run / "ledger.jsonl"))

    def fail(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)  # the new file is written by then, under another name
    with pytest.raises(OSError, match="disk full"):
        report.write(run / "report.json")
    assert (run / "report.json").read_bytes() == before
    assert sorted(file.name for file in run.iterdir()) == ["ledger.jsonl", "report.json"]


def test_a_second_engine_that_disagrees_makes_the_looser_bound_the_claim(tmp_path, monkeypatch):
    from dpsb_accounting import agreement
    from dpsb_accounting.engines.answer import Answer
    from dpsb_accounting.report import build

    def larger(composition, delta, neighboring):
        return Answer(engine="other", lower=2.0, upper=2.5, rigorous=True, method="a test")

    plan = make_plan(delta=2e-5)
    build._second.cache_clear()
    monkeypatch.setattr(agreement, "SECOND_ENGINES", (larger,))
    with Ledger.create(tmp_path / "ledger.jsonl", plan) as ledger:
        data = make_report(ledger).to_json()
        make_report(ledger).write(tmp_path / "report.json")
    assert epsilon(plan).upper < 1
    assert (data["epsilon"]["upper"], data["cross_check"]) == (2.5, "disagrees")
    assert "(2.500, 2e-05)" in data["statement"]
    assert "do not overlap" in make_report(Ledger.read(tmp_path / "ledger.jsonl")).to_text()
    assert verify(tmp_path / "ledger.jsonl").ok
    edited = json.loads((tmp_path / "report.json").read_text())
    edited["epsilon"]["upper"] = edited["accounting"][0]["epsilon"]["upper"] = epsilon(plan).upper
    (tmp_path / "report.json").write_text(json.dumps(edited))
    assert not verify(tmp_path / "ledger.jsonl").ok
    build._second.cache_clear()


AUDIT = {"method": "one run", "epsilon_lower": 0.2, "confidence": 0.95, "delta": 1e-5}


def test_an_audit_is_shown_and_none_is_called_not_audited(run):
    record = Ledger.read(run / "ledger.jsonl")
    assert "not audited" in make_report(record).to_text()
    made = make_report(record, audits=[AUDIT])
    assert "epsilon is at least 0.2 at delta 1e-05" in made.to_text()
    assert "not audited" not in made.to_text()
    make_report(record, audits=[{**AUDIT, "epsilon_lower": 5.0, "delta": 1e-9}])  # contradicts nothing at delta 1e-5
    made.write(run / "report.json")
    assert verify(run / "ledger.jsonl").ok


@pytest.mark.parametrize(
    "changes",
    [{"epsilon_lower": 5.0}, {"epsilon_lower": -1}, {"confidence": 1}, {"delta": 0}, {"method": ""}, {"x": 1}],
)
def test_an_audit_that_contradicts_the_claim_is_refused(run, changes):
    record = Ledger.read(run / "ledger.jsonl")
    with pytest.raises(ValueError, match=r"audit|epsilon_lower|confidence|delta|method"):
        make_report(record, audits=[{**AUDIT, **changes}])
    data = {**make_report(record).to_json(), "audits": [{**AUDIT, **changes}]}
    (run / "report.json").write_text(json.dumps(data))
    assert [failure.name for failure in verify(run / "ledger.jsonl").failures][:1] == ["audits"]


@pytest.mark.parametrize(("upper", "delta"), [(0.1, 1e-5), (1.0, 1e-6), (8.0, 1e-3), (800.0, 1e-5)])
def test_no_attacker_beats_the_rates(upper, delta):
    """Against the exact trade-off of randomized response, the worst mechanism that (epsilon, delta) allows."""
    from dpsb_accounting.report import attackers

    for entry in attackers(upper, delta):
        rate, found = entry["false_positive_rate"], entry["true_positive_rate_at_most"]
        growth = math.exp(min(upper, 700))
        knee = (1 - delta) / (1 + growth)  # false-positive rate of believing the larger likelihood
        best = delta + growth * rate if rate <= knee else 1 - (1 - delta - rate) / growth
        assert found >= min(best, 1.0) - 1e-12
        assert found <= min(best + 1e-4, 1.0) + 1e-9


def test_unusable_shapes_do_not_stop_a_report(tmp_path):
    for shapes in (5, "x", [{"out_features": -1, "in_features": 2}], [[1]]):
        plan = make_plan(details={"rank": 4, "target_shapes": shapes})
        path = tmp_path / f"{str(shapes)[:2].strip('[')}.jsonl"
        with Ledger.create(path, plan) as ledger:
            assert make_report(ledger).to_json()["noise_on_weights"] is None


def test_half_precision_is_said_from_the_revision_on_that_knows_it(tmp_path):
    plan = make_plan(details={"dtype": "bfloat16"})
    with Ledger.create(tmp_path / "ledger.jsonl", plan) as ledger:
        report = make_report(ledger).to_json()
    assert "bfloat16" in report["assumptions"][-1]
    record = Ledger.read(tmp_path / "ledger.jsonl")
    assert "bfloat16" not in str(report_content(record, 1)[0]["assumptions"])
    with Ledger.create(tmp_path / "other.jsonl", make_plan()) as ledger:
        assert "bfloat16" not in str(make_report(ledger).to_json()["assumptions"])


def test_files_that_were_declared_public_are_named(tmp_path):
    details = {"warm_start": "near {0}.csv", "precondition": "near {0}.csv"}
    basis = {"kind": "hybrid", "access": "released", "source": "wide.csv", "source_sha256": "0" * 64}
    plan = dataclasses.replace(two_phases(), basis=basis, details=details)
    path = tmp_path / "ledger.jsonl"
    with Ledger.create(path, plan) as ledger:
        report = make_report(ledger)
    assert "What was read of near {0}.csv, wide.csv was declared public" in report.to_json()["assumptions"][-1]
    report.write(tmp_path / "report.json")
    assert verify(path).ok
    assert "declared public" not in str(report_content(Ledger.read(path), 2)[0]["assumptions"])
    weights = {"kind": "hybrid", "access": "released", "source": "weight"}
    over_weights = dataclasses.replace(plan, basis=weights, details={})
    with Ledger.create(tmp_path / "other.jsonl", over_weights) as ledger:
        assert "declared public" not in str(make_report(ledger).to_json()["assumptions"])
