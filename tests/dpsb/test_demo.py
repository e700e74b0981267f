"""The demo on the embedded model and mail, cut short; `make demo` is the real thing."""

import json

import pytest
from rich.console import Console

from dpsb import demo
from dpsb_accounting import verify

SHORT = {**demo.SETTINGS, "steps": 2, "expected_batch_size": 16, "max_length": 16}


def test_settings_are_complete_and_the_files_are_there():
    config = demo.demo_config("run")
    assert config.epsilon == 3.0
    assert config.labels == "ham,spam"
    for split in ("train", "validation", "test"):
        assert demo.mail_file(split).exists()


def test_recorded_figures_belong_to_the_present_settings():
    recorded = demo.recorded_baselines()
    assert recorded["settings"] == {"r_only": dict(demo.SETTINGS), "frozen_features": dict(demo.FROZEN_SETTINGS)}
    for entry in recorded["methods"].values():
        assert len(entry["values"]) == entry["runs"] >= 3
        assert entry["mean"] == pytest.approx(sum(entry["values"]) / entry["runs"])


@pytest.mark.slow
def test_a_short_demo_ends_with_a_claim_and_a_comparison(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "SETTINGS", SHORT)
    run = demo.run_demo(tmp_path / "run")
    assert run.report.claim
    assert run.report.epsilon.upper <= 3.0
    assert run.report.epsilon.delta <= 1 / (10 * 3023)
    assert verify(tmp_path / "run" / "ledger.jsonl").ok
    console = Console(record=True, width=120)
    demo.print_comparison(console, tmp_path / "run")
    page = console.export_text()
    assert f"{run.held_out['accuracy']:.4f}" in page
    for entry in demo.recorded_baselines()["methods"].values():
        assert entry["label"] in page
    assert "held_out" in json.loads((tmp_path / "run" / "report.json").read_text())
    with pytest.raises(demo.RunError, match="already holds a run"):
        demo.run_demo(tmp_path / "run")


@pytest.mark.slow
def test_frozen_features_are_trained_under_the_same_accounting(monkeypatch):
    settings = {**demo.FROZEN_SETTINGS, "steps": 20, "max_length": 16}
    majority = 0.7604
    assert demo.frozen_features_baseline(evaluate_on="test", settings=settings) > majority
