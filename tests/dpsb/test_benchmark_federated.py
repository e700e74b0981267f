"""The benchmark of federated server rules, one round of each on a tiny model; its figures are of no interest here."""

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import workbench

EPSILON = 8.0


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    module = import_module("federated")
    yield module
    module.forget()


@pytest.fixture
def setting(script, tmp_path):
    data = str(workbench.data_file())
    config = {
        "model": str(workbench.bert_folder(pooled=True)),
        "data": data,
        "out": str(tmp_path),
        "labels": "ham,spam",
        "delta": 1e-3,
        "steps": 2,
        "expected_batch_size": 12,
        "auto_clip": True,
        "rank": 4,
        "max_length": workbench.PADDED,
        "targets": r"re:.*layer\.1\..*(query|key|value|dense)",
        "head_learning_rate": 0.1,
    }
    files = {"validation": data, "test": data, "public": str(workbench.data_file(seed=5))}
    content = {"config": config, "rounds": 1, **files}
    return script.Setting(text=json.dumps(content))


def test_one_round_of_every_method(script, setting, tmp_path):
    for method in script.NAMES:
        jobs = [script.Job(method=method, silos=3, split="iid", epsilon=EPSILON, learning_rate=0.05, repeat=1)]
        script.do_all(setting, tmp_path, [jobs], processes=1)
    rows = script.rows_in(tmp_path)
    assert {row["method"] for row in rows} == set(script.NAMES)
    for row in rows:
        (error,) = row["aggregation_errors"]
        assert 0 < row["max_epsilon"] <= EPSILON
        assert len(row["epsilons"]) == row["silos"]
        assert sum(row["rows"]) == 60
        if row["method"] == "fedit":
            assert error > 0
        else:
            assert error <= 1e-6
        assert row["noise_energy"] == pytest.approx(row["noise_energy_formula"], rel=0.5)
        for way in ("up", "down"):
            assert 0 < row[f"bytes_{way}"] - row[f"bytes_{way}_formula"] < 1000  # framing
    times = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*-eps*.json")}
    script.do_all(setting, tmp_path, [jobs], processes=1)
    assert times == {file: file.stat().st_mtime_ns for file in times}  # finished runs are kept
    assert script.write(tmp_path).count("\n") == 2 + len(rows)
    assert {file.name for file in tmp_path.glob("*.png")} == {"accuracy.png", "bytes.png"}


def test_splits(script):
    split_rows = import_module("federated_run").split_rows
    labels = ["a", "b", "c"] * 200
    for split in ("iid", "dirichlet-0.5"):
        parts = split_rows(labels, 10, split, seed=1)
        assert sorted(np.concatenate(parts)) == list(range(600))
        assert min(map(len, parts)) >= 30
        assert all(map(np.array_equal, parts, split_rows(labels, 10, split, seed=1)))
    with pytest.raises(ValueError, match="split='rows'"):
        split_rows(labels, 3, "rows", seed=1)


def test_the_rate_is_chosen_on_tuning_runs_only(script, tmp_path):
    for job, accuracy in zip(script.tuning_jobs("fedit"), (0.4, 0.6, 0.5), strict=True):
        row = {"learning_rate": job.learning_rate, "accuracy": accuracy, "cross_entropy": 1.0}
        script.file_of(tmp_path, job).write_text(json.dumps(row))
    assert script.chosen_rate(tmp_path, "fedit") == script.tuning_jobs("fedit")[1].learning_rate


@pytest.mark.parametrize("method", ["fed_sb", "ffa_lora", "fedex_lora", "flora", "fedsvd"])
def test_the_global_model_is_the_mean_of_the_silos_models(script, setting, method):
    """Base and adapter together, as the model computes them, after a second round too."""
    combine = import_module("federated_rule").combine
    bench = script.bench_of(setting, method)
    rule, generator = bench.rule, torch.Generator().manual_seed(3)

    def weights():
        return {n: each.get_base_layer().weight.double() + delta(each) for n, each in rule.layers.items()}

    def delta(layer):
        return layer.get_delta_weight("default").detach().double()

    for turn in range(2):
        theta, silos, states = bench.adapter.state(), [], []
        for _ in range(3):
            state = {n: value + 0.3 * torch.randn(value.shape, generator=generator) for n, value in theta.items()}
            bench.adapter.load_state(state)
            silos.append(weights())
            states.append(rule.pairs(state))
        bench.adapter.load_state(theta)
        rule.put(combine(method, states, turn), {})
        for name, found in weights().items():
            wanted = sum(each[name] for each in silos) / 3
            assert (found - wanted).norm() <= 1e-6 * wanted.norm()
            assert (found - silos[0][name]).norm() > 1e-2 * wanted.norm()
