"""A run from a file to a finished folder: what it claims, what it holds, and what it must not hold."""

import json
import math

import pytest
import torch
import workbench
from safetensors.torch import load_file

from dpsb import run
from dpsb.evaluate import evaluate
from dpsb_accounting import Ledger, verify

pytestmark = pytest.mark.usefixtures("quick_calibration")


def no_canary(*found):
    for item in found:
        text = item if isinstance(item, bytes) else str(item).encode()
        for canary in workbench.CANARIES:
            assert canary.encode() not in text
            assert canary.split("-")[0].encode() not in text


def check_folder(finished):
    """What holds for every finished run."""
    files = workbench.written(finished.out)
    no_canary(*files.values())
    expected = {
        *("adapter_config.json", "adapter_model.safetensors", "dpsb_core.safetensors", "README.md"),
        *("ledger.jsonl", "report.json", "run.json", "tokenizer.json", "tokenizer_config.json"),
    }
    assert expected <= set(files)
    assert set(files) - expected <= {"head.safetensors", "special_tokens_map.json", "vocab.txt"}
    assert set(finished.files) | {"run.json"} == set(files), "print_run names every file"
    tensors = load_file(finished.out / "dpsb_core.safetensors")
    cores = {name: value for name, value in tensors.items() if name.endswith(".R")}
    assert cores
    assert all(value.dtype == torch.float32 and value.shape == (4, 4) for value in cores.values())
    assert all(float(value.norm()) > 0 for value in cores.values())
    report = json.loads(files["report.json"])
    assert report == finished.report.to_json()
    outcome = verify(finished.out / "ledger.jsonl")
    assert outcome.ok, outcome.failures
    for line in files["ledger.jsonl"].decode().splitlines():
        facts = json.loads(line)
        assert facts["kind"] in ("plan", "charge", "taint")
        if facts["kind"] == "charge":
            assert set(facts) == {"event", "hash", "index", "kind", "number", "phase", "prev"}
    card = files["README.md"].decode()
    assert "## Privacy" in card
    assert report["statement"].split(".")[0].split()[0] in card
    assert "accuracy" not in card
    assert "perplexity" not in card
    return files, report


VARIANTS = {
    "undeclared N": ("classification", {}),
    "declared N": ("classification", {"num_examples": 64}),
    "AUTO-S": ("classification", {"auto_clip": True}),
    "random basis": ("classification", {"basis": "random"}),
    "public basis": ("classification", {"basis": "public"}),
    "LoRA-SB basis": ("classification", {"basis": "lora-sb"}),
    "sgd, cosine, own head rate": ("classification", {"optimizer": "sgd", "schedule": "cosine", "head_lr": 0.01}),
    "some targets": ("classification", {"targets": "query,value"}),
    "targets by pattern": ("classification", {"targets": "re:.*layer.1.*query"}),
    "causal text": ("causal-lm", {}),
    "causal pairs": ("causal-lm", {"data": "pairs", "tokens_per_example": 8}),
    "causal, bf16": ("causal-lm", {"dtype": "bfloat16", "num_examples": 50}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_end_to_end(tmp_path, capfd, name):
    task, changes = VARIANTS[name]
    changes = dict(changes)
    if changes.get("basis") in ("public", "lora-sb"):
        changes["basis"] += f":{workbench.data_file(task, seed=9)}"
    if "data" in changes:
        changes["data"] = str(workbench.data_file("pairs"))
    if "head_lr" in changes:
        changes["head_learning_rate"] = changes.pop("head_lr")
    finished = run.fine_tune(workbench.run_config(tmp_path / "run", task, **changes))
    _, report = check_folder(finished)
    no_canary(*capfd.readouterr())
    declared = "num_examples" in changes
    assert report["claim"] is True
    assert report["taints"] == []
    assert 0 < report["epsilon"]["lower"] <= report["epsilon"]["upper"] <= 8
    assert report["neighboring"] == ("add_or_remove_one" if declared else "zero_out")
    assert report["num_examples"] == changes.get("num_examples", 60)
    assert report["delta"] == pytest.approx(0.1 / report["num_examples"])
    assert report["mechanism"]["clipping"] == ("automatic" if "auto_clip" in changes else "flat")
    access = "public" if ":" in changes.get("basis", "") else "data_free"
    assert report["basis"]["access"] == access


def test_epsilon_infinite_claims_nothing(tmp_path):
    finished = run.fine_tune(workbench.run_config(tmp_path / "run", epsilon=math.inf, basis="lora-sb"))
    _, report = check_folder(finished)
    assert report["claim"] is False
    assert report["epsilon"]["upper"] == "inf"
    assert report["basis"]["access"] == "non_private"
    assert Ledger.read(tmp_path / "run" / "ledger.jsonl").charged("train") == 3


def test_a_seeded_run_claims_nothing(tmp_path):
    thetas = []
    for name in ("one", "two"):
        finished = run.fine_tune(workbench.run_config(tmp_path / name, insecure_seed=7))
        assert finished.report.claim is False
        thetas.append(load_file(tmp_path / name / "dpsb_core.safetensors"))
    assert all(torch.equal(thetas[0][key], thetas[1][key]) for key in thetas[0])


def test_two_default_runs_differ(tmp_path):
    thetas = []
    for name in ("one", "two"):
        torch.manual_seed(0)
        run.fine_tune(workbench.run_config(tmp_path / name, steps=1, targets="query"))
        thetas.append(load_file(tmp_path / name / "dpsb_core.safetensors"))
    assert not any(torch.equal(thetas[0][key], thetas[1][key]) for key in thetas[0] if key.endswith(".R"))


def test_the_ledger_states_the_plan_and_nothing_of_the_data(tmp_path):
    run.fine_tune(workbench.run_config(tmp_path / "one", num_examples=64, insecure_seed=1))
    run.fine_tune(workbench.run_config(tmp_path / "two", num_examples=64, data=str(workbench.data_file(count=31))))
    found = []
    for name in ("one", "two"):
        plan = Ledger.read(tmp_path / name / "ledger.jsonl").plan
        found.append(plan.to_json())
        assert plan.details["labels"] == ["ham", "spam"]
        assert plan.details["labels_origin"] == "declared"
        assert plan.details["max_length"] == 16
    assert found[0] == found[1], "with a declared N, data of another size makes the same plan"


def test_held_out_metrics_are_outside_the_guarantee_and_not_in_the_card(tmp_path):
    held_out = workbench.data_file(seed=5)
    finished = run.fine_tune(workbench.run_config(tmp_path / "run", eval_data=str(held_out)))
    _, report = check_folder(finished)
    assert finished.held_out["examples"] == 59, "the row with an undeclared label is left out"
    assert 0 <= finished.held_out["accuracy"] <= 1
    assert report["held_out"] == {"note": "outside the guarantee", "metrics": finished.held_out}


def test_metrics_that_are_not_finite_do_not_keep_a_run_from_ending(tmp_path, monkeypatch):
    monkeypatch.setattr("dpsb.inputs.evaluate", lambda *_args: {"loss_per_token": math.nan, "perplexity": math.inf})
    held_out = str(workbench.data_file("causal-lm", seed=5))
    finished = run.fine_tune(workbench.run_config(tmp_path / "run", "causal-lm", eval_data=held_out))
    assert json.loads((finished.out / "report.json").read_text())["held_out"]["metrics"] == {
        "loss_per_token": "nan",
        "perplexity": "inf",
    }


def test_perplexity_of_a_model_gone_astray(tiny):
    model = tiny.base("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    found = evaluate(model, workbench.examples(6, kind="llama"), "causal-lm", workbench.Collator(0), 16, 4096)
    assert found["perplexity"] == math.inf
    assert found["tokens"] > 0


def test_a_mean_pooled_classifier(tmp_path):
    changes = {"model": str(workbench.bert_folder(pooled=True)), "eval_data": str(workbench.data_file(seed=5))}
    finished = run.fine_tune(workbench.run_config(tmp_path / "run", **changes))
    files, _ = check_folder(finished)
    assert "head.safetensors" in files
    assert Ledger.read(finished.out / "ledger.jsonl").plan.details["pooling"] == "mean"


def test_labels_from_the_model_config_and_from_the_data(tmp_path):
    model = str(workbench.bert_folder(id2label=("ham", "spam")))
    run.fine_tune(workbench.run_config(tmp_path / "one", model=model, labels=None))
    details = Ledger.read(tmp_path / "one" / "ledger.jsonl").plan.details
    assert (details["labels"], details["labels_origin"]) == (["ham", "spam"], "model config")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"{w} now", "label": w[0]}) + "\n" for w in workbench.WORDS))
    run.fine_tune(workbench.run_config(tmp_path / "two", data=str(data), labels="from-data"))
    details = Ledger.read(tmp_path / "two" / "ledger.jsonl").plan.details
    assert details["labels_origin"] == "from-data"
    assert details["labels"] == sorted({word[0] for word in workbench.WORDS})


def test_texts_are_cut_at_what_the_model_allows(tmp_path):
    data = tmp_path / "long.jsonl"
    rows = [{"text": "buy now " * 100 if i % 2 else "see", "label": ("ham", "spam")[i % 2]} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    finished = run.fine_tune(workbench.run_config(tmp_path / "run", data=str(data), max_length=500))
    details = Ledger.read(finished.out / "ledger.jsonl").plan.details
    assert details["max_length"] == 64
    assert details["length_buckets"][-1] == 64


def test_a_full_disk_at_a_checkpoint_keeps_the_run(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*_args, **_options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("dpsb.checkpoint.save_file", full)
        with pytest.raises(OSError, match=r"checkpoint in .* cannot be written"):
            run.fine_tune(workbench.run_config(out))
    assert Ledger.read(out / "ledger.jsonl").charged("train") == 1
    check_folder(run.fine_tune(run.resumed_config(str(out), {}), resume=True))


def test_a_full_disk_before_the_first_step_leaves_nothing(tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dpsb.run.write_whole", full)
        with pytest.raises(run.RunError, match="nothing was started"):
            run.fine_tune(workbench.run_config(tmp_path / "run"))
    assert workbench.written(tmp_path / "run") == {}
    run.fine_tune(workbench.run_config(tmp_path / "run"))


def test_private_texts_are_in_no_file_of_a_run_that_failed(tmp_path, monkeypatch, capfd):
    def broken(*_args):
        raise RuntimeError("the optimizer broke")

    monkeypatch.setattr("dpsb.train._step", broken)
    with pytest.raises(RuntimeError, match="the optimizer broke"):
        run.fine_tune(workbench.run_config(tmp_path / "run", "causal-lm"))
    files = workbench.written(tmp_path / "run")
    assert "ledger.jsonl" in files
    no_canary(*files.values(), *capfd.readouterr())
