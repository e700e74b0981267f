"""The benchmark of the paid bases' settings on a tiny model: its replayed sums are those of the pass itself."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
import workbench

from dpsb.adapter import lora_layers
from dpsb.basis.hybrid import frames_of, sketches_of
from dpsb.basis.per_example import WHOLE, add_clipped_sum, zeros_for
from dpsb.basis.release import Clip
from dpsb.config import RunConfig
from dpsb.inputs import read_inputs


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return import_module("basis_settings")


@pytest.fixture
def bench(script, tmp_path):
    config = RunConfig(
        model=str(workbench.bert_folder(pooled=True)),
        data=str(workbench.data_file()),
        out=str(tmp_path),
        labels="ham,spam",
        delta=1e-3,
        steps=2,
        rank=4,
        max_length=workbench.PADDED,
    )
    inputs = read_inputs(config, warm=False)
    inputs.model.eval()
    return script.Bench(inputs=inputs, layers=lora_layers(inputs.model), out=tmp_path, facts={}, draws=3)


def test_replayed_sums_are_those_of_the_pass_and_are_read_back(script, bench, monkeypatch):
    frames = frames_of(bench.layers, 8)
    looks = {
        "whole": script.Look(dict.fromkeys(bench.layers, WHOLE), script.AUTOMATIC),
        "cores": script.Look(sketches_of(frames, bench.inputs.model), Clip(l2_clip_norm=0.1, clipping="flat", share=0)),
    }
    found, records = script.clipped_sums(bench, looks, keep=True)
    for name, look in looks.items():
        totals = zeros_for(bench.layers, look.sketches, torch.device("cpu"))
        for batch in bench.batches(bench.inputs.prepared.examples):
            args = (bench.inputs.model, bench.inputs.loss_fn, batch, bench.layers, look.sketches, look.mechanism)
            add_clipped_sum(*args, totals)
        for layer, total in totals.items():
            torch.testing.assert_close(found[name][layer], total, rtol=1e-4, atol=1e-6)
    assert records
    monkeypatch.setattr(import_module("basis_sums"), "recorded", None)
    again, _ = script.clipped_sums(bench, looks, keep=False)
    assert all(torch.equal(again["cores"][layer], total) for layer, total in found["cores"].items())


def test_a_setting_is_measured_over_draws_and_without_noise_is_the_plain_svd(script, bench):
    frames = frames_of(bench.layers, 8)
    looks = {"cores": script.Look(sketches_of(frames, bench.inputs.model), script.AUTOMATIC)}
    totals, _ = script.clipped_sums(bench, looks, keep=False)
    gradient = {name: torch.randn(layer.out_features, layer.in_features) for name, layer in bench.layers.items()}
    judge = script.Judge("mean", gradient)
    for given in ((0.1, "3"), (None, "3")):
        script.measure_hybrid(bench, "weight", frames, script.AUTOMATIC, totals["cores"], judge, given)
    noisy, clean = (script.rows_in(bench.out.parent)[i : i + 2] for i in (0, 2))
    assert [(row["kept"], row["draws"], row["epsilon"]) for row in noisy] == [("turn", 3, "3"), ("plain", 3, "3")]
    assert [row["draws"] for row in clean] == [1, 1]
    assert clean[0]["energy"] == pytest.approx(clean[1]["energy"], rel=1e-4)
