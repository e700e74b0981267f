"""What a run leaves behind loads with plain transformers and peft, in a process that never imports dpsb."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch
import workbench
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpsb import run
from dpsb.export import export_merged
from dpsb_accounting import Ledger

KINDS = ("native", "pooled", "causal")
TEXTS = ["free money now", "see you at noon, dear friend"]


def settings(kind):
    if kind == "causal":
        return "causal-lm", {}
    return "classification", {"model": str(workbench.bert_folder(pooled=kind == "pooled"))}


def logits_here(model, tokenizer):
    """The logits of a model in this process, each text on its own."""
    model.eval()
    with torch.no_grad():
        return [model(**tokenizer([text], return_tensors="pt")).logits[0].tolist() for text in TEXTS]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run of each kind, its logits as trained, its merged export; and what plain tools compute of them."""
    home, runs = tmp_path_factory.mktemp("export"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpsb.plan.noise_multiplier_for", workbench.calibrated)
        kept = {}
        patch.setattr(run, "save_run", lambda *a, save=run.save_run: (kept.update(adapter=a[1], tok=a[4]), save(*a))[1])
        for kind in KINDS:
            task, changes = settings(kind)
            out = home / kind
            run.fine_tune(workbench.run_config(out, task, learning_rate=0.3, **changes))
            runs[kind] = {"out": out, "trained": logits_here(kept["adapter"].model, kept["tok"])}
            runs[kind]["adapter"] = kept["adapter"]
            assert export_merged(out, home / f"{kind}-merged") < 1e-5
    scripts = [plain_script(kind, runs[kind]["out"], home / f"{kind}-merged") for kind in KINDS]
    program = "import json, sys, torch\nfound = {}\n" + "\n".join(scripts)
    program += "\nassert not [name for name in sys.modules if name.startswith('dpsb')]\nprint(json.dumps(found))\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return runs, json.loads(done.stdout.splitlines()[-1])


def snippet(out):
    """The Python block of the model card, with the folder filled in."""
    (block,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), flags=re.DOTALL)
    return block.replace("PATH_OF_THIS_FOLDER", str(out))


def plain_script(kind, out, merged):
    """Loads the adapter as the model card says, and the merged model; notes the logits of the texts."""
    loop = "for text in " + repr(TEXTS) + ":\n"
    if kind == "pooled":
        tail = snippet(out).split("batch = ")[1].split("\n", 1)[1]
        body = "    batch = tokenizer([text], return_tensors='pt')\n"
        body += "".join(f"    {line}\n" for line in tail.splitlines())
        body += "    found.setdefault(NAME, []).append(logits[0].tolist())\n"
        base = f"from transformers import AutoModel\nmodel = AutoModel.from_pretrained({str(merged)!r}).eval()\n"
    else:
        body = "    logits = model(**tokenizer([text], return_tensors='pt')).logits\n"
        body += "    found.setdefault(NAME, []).append(logits[0].tolist())\n"
        auto = "AutoModelForCausalLM" if kind == "causal" else "AutoModelForSequenceClassification"
        base = f"from transformers import {auto}\nmodel = {auto}.from_pretrained({str(merged)!r}).eval()\n"
    adapted = snippet(out) + loop + body.replace("NAME", repr(kind))
    base += f"tokenizer = AutoTokenizer.from_pretrained({str(merged)!r})\n"
    if kind == "pooled":
        base += f"head = load_file({str(merged / 'head.safetensors')!r})\n"
    return adapted + base + loop + body.replace("NAME", repr(f"{kind}-merged"))


@pytest.mark.parametrize("suffix", ["", "-merged"])
@pytest.mark.parametrize("kind", KINDS)
def test_plain_tools_compute_the_same_logits(finished, kind, suffix):
    runs, found = finished
    for plain, trained in zip(found[kind + suffix], runs[kind]["trained"], strict=True):
        torch.testing.assert_close(torch.tensor(plain), torch.tensor(trained), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_training_changed_the_logits(finished, kind):
    runs, _ = finished
    adapter, trained = runs[kind]["adapter"], runs[kind]["trained"]
    state = adapter.state()
    with torch.no_grad():
        for core in adapter.cores:
            core.up.core.weight.zero_()
    tokenizer = __import__("transformers").AutoTokenizer.from_pretrained(runs[kind]["out"])
    untrained = logits_here(adapter.model, tokenizer)
    adapter.load_state(state)
    for a, b in zip(untrained, trained, strict=True):
        assert float((torch.tensor(a) - torch.tensor(b)).abs().max()) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_the_cores_file_holds_what_was_trained(finished, kind):
    out, adapter = finished[0][kind]["out"], finished[0][kind]["adapter"]
    saved, plain = load_file(out / "dpsb_core.safetensors"), load_file(out / "adapter_model.safetensors")
    for name, value in adapter.state().items():
        assert torch.equal(saved[name], value)
    for name, factors in adapter.factors().items():
        R, B = saved[f"{name}.R"], saved[f"{name}.B"]
        assert R.dtype == torch.float32
        torch.testing.assert_close(B.T @ B, torch.eye(4), atol=1e-5, rtol=0)
        (lora_b,) = [v for k, v in plain.items() if k.endswith("lora_B.weight") and short(name) in k]
        (lora_a,) = [v for k, v in plain.items() if k.endswith("lora_A.weight") and short(name) in k]
        torch.testing.assert_close(lora_b, B @ R)
        assert torch.equal(lora_a, factors.A)
    assert not [key for key in plain if ".core" in key or ".up." in key]


def short(name):
    return name.removeprefix("encoder.").removeprefix("base_model.model.") + "."


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_config_is_that_of_plain_lora(finished, kind):
    config = json.loads((finished[0][kind]["out"] / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["lora_dropout"]) == ("LORA", 4, 4, 0.0)
    assert config["bias"] == "none"
    assert config["use_dora"] is False


@pytest.mark.parametrize("kind", KINDS)
def test_no_optimizer_randomness_or_loss_is_left(finished, kind):
    files = workbench.written(finished[0][kind]["out"])
    assert not [
        name for name in files if re.search("optim|checkpoint|start|saving|random|trainer|\\.bin$|\\.pt$", name)
    ]
    for name in ("adapter_model.safetensors", "dpsb_core.safetensors"):
        assert not [key for key in load_file(finished[0][kind]["out"] / name) if re.search("exp_avg|moment", key)]
    for name in ("ledger.jsonl", "report.json", "run.json", "README.md"):
        text = files[name].decode()
        for word in ('"loss', '"drawn', "clip_rate", '"seed"', "rng", "wall_time", '"batch_sizes"'):
            assert word not in text


def test_the_pooled_export_keeps_its_labels_and_head(finished):
    out = finished[0]["pooled"]["out"]
    merged = out.parent / "pooled-merged"
    assert (merged / "head.safetensors").read_bytes() == (out / "head.safetensors").read_bytes()
    native = json.loads((out.parent / "native-merged" / "config.json").read_text())
    assert native["id2label"] == {"0": "ham", "1": "spam"}
    assert Ledger.read(out / "ledger.jsonl").plan.details["labels"] == ["ham", "spam"]


def test_the_model_card(finished):
    for kind in KINDS:
        card = (finished[0][kind]["out"] / "README.md").read_text()
        report = json.loads((finished[0][kind]["out"] / "report.json").read_text())
        assert card.startswith("---\nlibrary_name: peft\n")
        assert "## Privacy" in card
        assert "PRIVACY REPORT" in card
        assert math.isfinite(report["epsilon"]["upper"])
        assert "dpsb-accounting verify ledger.jsonl" in card
        assert not re.search("accuracy|perplexity|cross_entropy|OUTSIDE THE GUARANTEE", card)


def test_in_half_precision_the_plain_adapter_is_the_trained_one_to_its_rounding(tmp_path, monkeypatch):
    """R is fp32 in training; what PEFT loads is B R rounded to bf16. Stated in docs/serving.md: 2 % of the logits."""
    monkeypatch.setattr("dpsb.plan.noise_multiplier_for", workbench.calibrated)
    kept = {}
    monkeypatch.setattr(run, "save_run", lambda *a, save=run.save_run: (kept.update(adapter=a[1]), save(*a))[1])
    out = tmp_path / "run"
    run.fine_tune(workbench.run_config(out, "causal-lm", learning_rate=0.3, dtype="bfloat16"))
    ids = torch.randint(5, 20, (3, 9), generator=torch.Generator().manual_seed(1))
    base = AutoModelForCausalLM.from_pretrained(workbench.llama_folder(), dtype=torch.bfloat16)
    with torch.no_grad():
        trained = kept["adapter"].model.eval()(input_ids=ids).logits.float()
        loaded = PeftModel.from_pretrained(base, str(out)).eval()
        plain = loaded(input_ids=ids).logits.float()
        with loaded.disable_adapter():
            without = loaded(input_ids=ids).logits.float()
    moved = float((plain - trained).norm() / trained.norm())
    assert moved <= 2e-2
    assert float((without - trained).norm() / trained.norm()) > 5 * moved, "the adapter does more than the rounding"
    assert export_merged(out, tmp_path / "merged") <= 2e-2
