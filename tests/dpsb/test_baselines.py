"""Every method gives exact rows, starts where it should, survives a resume, and saves what plain PEFT loads."""

import re

import pytest
import torch
import workbench
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dpsb import run
from dpsb.baselines.build import adapt, add_method, frozen_factors, peft_config_class
from dpsb.baselines.methods import METHODS, PEFT_INITS, REFUSED, MethodError, method_named
from dpsb.config import ConfigError
from dpsb.models import add_lora
from dpsb.probe import _perturb
from dpsb.start import START_NAME, attach_again, digest, start_of
from dpsb_accounting import Ledger

TASK = {"bert": "classification", "llama": "causal-lm"}
NO_PARTS = {("llama", "bitfit"), ("llama", "head-only")}
NAMES = [*METHODS, *(f"peft:{name}" for name in PEFT_INITS), "peft:LoraConfig", "peft:LNTuning"]
MATRIX = [(kind, name) for kind in TASK for name in NAMES if (kind, name) not in NO_PARTS]


def adapter_of(tiny, kind, name, base=None):
    return workbench.method_adapter(base or tiny.base(kind), name)


def inputs(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.mark.parametrize(("kind", "name"), MATRIX)
def test_rows_equal_one_by_one_autograd(tiny, kind, name):
    base, batch, loss_fn = tiny.base(kind), tiny.batch(kind), tiny.loss[kind]
    with torch.no_grad():
        untouched = base.train()(**inputs(batch)).logits
    adapter = adapter_of(tiny, kind, name, base)
    adapter.check_nothing_else_is_trained()
    with torch.no_grad():
        started = adapter.model(**inputs(batch)).logits
    assert tiny.distance(untouched, started) <= 1e-5, "the method starts from the base model's function"
    _perturb(adapter)
    rows = tiny.rows(adapter, loss_fn, batch)
    assert rows.shape == (5, adapter.dimension)
    for i, row in enumerate(rows):
        exact = tiny.autograd_row(adapter, loss_fn(adapter.model, tiny.take(batch, slice(i, i + 1))).sum())
        assert tiny.distance(row, exact) <= 1e-5


def test_what_each_method_trains(tiny):
    def names(name, kind="bert"):
        return [key for key, _ in adapter_of(tiny, kind, name).named_parameters()]

    head = {"base_model.model.classifier.modules_to_save.default." + part for part in ("weight", "bias")}
    lora, ffa = set(names("lora")), set(names("ffa-lora"))
    assert {key.split(".")[-3] for key in lora - head} == {"lora_A", "lora_B"}
    assert {key.split(".")[-3] for key in ffa - head} == {"lora_B"}
    assert head <= lora
    assert head <= ffa
    assert names("head-only") == ["classifier.weight", "classifier.bias"]
    assert {key.split(".")[-1] for key in names("bitfit") if "classifier" not in key} == {"bias"}
    assert not [key for key in names("full") if "embeddings" in key and "LayerNorm" not in key]
    assert not [key for key in names("full", "llama") if "embed_tokens" in key]


def test_ffa_lora_has_a_random_orthonormal_A_that_is_the_same_every_time(tiny):
    one, other = (frozen_factors(adapter_of(tiny, "llama", "ffa-lora")) for _ in range(2))
    assert len(one) == 14
    for name, A in one.items():
        assert torch.equal(A, other[name])
        torch.testing.assert_close(A @ A.T, torch.eye(4))


def test_lora_xs_keeps_the_singular_values_in_A(tiny):
    adapter = adapter_of(tiny, "llama", "lora-xs")
    for core in adapter.cores:
        A, B, _ = adapter.factors()[core.name]
        exact = torch.linalg.svdvals(core.layer.get_base_layer().weight)[:4]
        torch.testing.assert_close(A.norm(dim=1), exact)
        torch.testing.assert_close(B.T @ B, torch.eye(4), atol=1e-5, rtol=0)


def test_lora_plus_moves_B_faster(tiny, tmp_path):
    from dpsb.optimizers import make_optimizer

    adapter = adapter_of(tiny, "bert", "lora-plus")
    config = workbench.run_config(tmp_path, method="lora-plus", learning_rate=0.01, head_learning_rate=0.3)
    optimizer, _ = make_optimizer(config, adapter, workbench.fit_plan())
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in adapter.named_parameters():
        expected = 0.3 if "classifier" in name else 0.16 if "lora_B" in name else 0.01
        assert rates[id(parameter)] == pytest.approx(expected)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_method_without_exact_rows_is_refused_by_name(name, tmp_path):
    with pytest.raises(ConfigError, match=f"'peft:{name}' is refused: .{{20}}"):
        workbench.run_config(tmp_path, method=f"peft:{name}")


@pytest.mark.parametrize("name", ["CordaConfig", "CorDA", "LoftQ", "KasaConfig", "Monteclora", "bdlora", "P-Soft"])
def test_a_method_is_refused_however_it_is_spelt(name):
    with pytest.raises(MethodError, match=f"'peft:{name}' is refused: it."):
        method_named(f"peft:{name}")


def test_a_method_of_peft_is_found_however_it_is_spelt(tiny):
    assert method_named("peft:PissaConfig") == method_named("peft:pissa") == method_named("peft:PiSSA")
    for name in ("lntuning", "LN_Tuning", "LNTuningConfig"):
        assert peft_config_class(method_named(f"peft:{name}")).__name__ == "LNTuningConfig"
    same = [adapter_of(tiny, "bert", name).dimension for name in ("lora", "peft:lora", "peft:LoraConfig")]
    assert len(set(same)) == 1


def test_only_what_is_usable_is_listed():
    with pytest.raises(MethodError) as caught:
        peft_config_class(method_named("peft:NoneSuch"))
    listed = str(caught.value).split("it has ")[1]
    assert "pissa" in listed
    for name in re.findall(r"\w+Config", listed):
        assert issubclass(peft_config_class(method_named(f"peft:{name}")), PeftConfig)


@pytest.mark.parametrize("name", ["lorra", "", "peft:", "sb:x", "peft"])
def test_a_method_that_does_not_exist_lists_those_that_do(name, tmp_path):
    with pytest.raises(ConfigError, match="lora-xs, lora, lora-plus, ffa-lora, bitfit, head-only, full, peft:pissa"):
        workbench.run_config(tmp_path, method=name)


def test_a_peft_config_that_does_not_exist_lists_those_that_do(tiny):
    with pytest.raises(MethodError, match=r"PEFT has no such method; it has .*LoraConfig"):
        add_method(tiny.base("bert"), method_named("peft:NoneSuch"), "classification", 4, "all-linear")


@pytest.mark.parametrize(("kind", "name"), sorted(NO_PARTS))
def test_a_model_without_such_parts_is_refused(tiny, kind, name):
    with pytest.raises(MethodError, match=f"'{name}' finds no .* to train in a LlamaForCausalLM"):
        adapter_of(tiny, kind, name)


def test_bare_parameters_are_refused_on_sight_too(tiny):
    """Whatever slips through the list of names is caught on the model, and the message names the tensor."""
    method = method_named("peft:LoraConfig")
    model = add_method(tiny.base("bert"), method, "classification", 4, "all-linear")
    next(model.modules()).extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(MethodError, match=r"extra \(3,\) is a tensor of a PeftModel"):
        adapt(model, method)


def test_a_method_takes_no_basis(tmp_path):
    with pytest.raises(ConfigError, match="method='lora' has no basis to choose, got basis='random'"):
        workbench.run_config(tmp_path, method="lora", basis="random")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"method": "full", "dtype": "bfloat16"}, "must be float32"),
        ({"lora_plus_ratio": 0.0}, "lora_plus_ratio=0.0 to be positive"),
        ({"momentum": 1.0}, "momentum=1.0 between 0 and 1"),
        ({"weight_decay": 0.1}, "weight_decay=0.1"),
        ({"optimizer": "adamw", "weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"optimizer": "lion"}, "one of adam, adamw, adam-corrected, sgd"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, changes, match):
    with pytest.raises(ConfigError, match=match):
        workbench.run_config(tmp_path, **changes)


@pytest.mark.parametrize("name", ["lora", "ffa-lora", "lora-xs", "bitfit", "peft:pissa"])
def test_a_start_is_found_again_bit_for_bit(tiny, name):
    adapter = adapter_of(tiny, "bert", name)
    _perturb(adapter)
    start = start_of(adapter)
    plan = workbench.fit_plan(
        basis=adapter.provenance.to_json(), details={"method": name, "start_sha256": digest(start)}
    )
    method, base = method_named(name), tiny.base("bert")
    model = add_lora(base, "classification", 4) if method.kind == "cores" else None
    model = model or add_method(base, method, "classification", 4, "all-linear")
    again = attach_again(model, start, plan)
    assert start_of(again) == start


# --- whole runs


pytestmark = pytest.mark.usefixtures("quick_calibration")


def loaded(out, kind):
    auto = AutoModelForSequenceClassification if kind == "classification" else AutoModelForCausalLM
    if not (out / "adapter_config.json").exists():
        return auto.from_pretrained(out).eval()
    options = {"num_labels": 2} if kind == "classification" else {}
    base = auto.from_pretrained(workbench.bert_folder() if options else workbench.llama_folder(), **options)
    return PeftModel.from_pretrained(base, str(out)).eval()


RUNS = [("classification", name) for name in ("lora", "lora-xs", "ffa-lora", "bitfit", "peft:pissa")]
RUNS += [("causal-lm", "lora-plus"), ("causal-lm", "peft:olora")]
SLOW = [("classification", name) for name in ("full", "head-only", "lora-plus", "peft:mica", "peft:LNTuning")]
SLOW += [("causal-lm", name) for name in ("lora", "lora-xs", "ffa-lora", "full", "peft:pissa", "peft:LNTuning")]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize(("kind", "name"), [*RUNS, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_a_finished_run_loads_without_dpsb(kind, name, tmp_path, monkeypatch):
    kept, save = {}, run.save_run

    def spy(out, adapter, *rest):
        kept["model"] = adapter.model
        assert (out / START_NAME).exists()
        return save(out, adapter, *rest)

    monkeypatch.setattr(run, "save_run", spy)
    finished = run.fine_tune(workbench.run_config(tmp_path / "run", kind, method=name, learning_rate=0.05))
    ids = {"input_ids": torch.randint(6, 50, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    with torch.no_grad():
        mine, theirs = kept["model"].eval()(**ids).logits, loaded(finished.out, kind)(**ids).logits
    assert float((mine - theirs).abs().max()) <= 2e-6
    report = finished.report.to_json()
    assert report["claim"] is True
    assert report["epsilon"]["upper"] <= 8
    plan = Ledger.read(finished.out / "ledger.jsonl").plan
    assert plan.details["method"] == name
    assert f"method {name}" in (finished.out / "README.md").read_text()
    for canary in workbench.CANARIES:
        assert all(canary.encode() not in content for content in workbench.written(finished.out).values())
    if name == "peft:pissa":
        assert PeftConfig.from_pretrained(str(finished.out)).r == 8, "[B, -B0] and [A; A0] on the untouched base"
