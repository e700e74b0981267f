"""The adapter: what it refuses, what is trained, and that what it writes is plain LoRA."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from dpsb import basis as bases
from dpsb.adapter import (
    Basis,
    CoreUp,
    Factors,
    FrozenDown,
    Provenance,
    attach,
    detach,
    lora_layers,
    merge,
    set_gradient,
)


def of(factors):
    """A basis of these factors."""
    return Basis(factors=factors, provenance=Provenance(kind="test", access="data_free"))


KINDS = ("bert", "llama", "gpt2")


def logits(model, batch):
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def core_names(model):
    return {name for name, _ in model.named_parameters() if name.endswith(".core.weight")}


# --- refusals


REFUSED = {
    "dora": ({"use_dora": True}, "DoRA"),
    "lora_bias": ({"lora_bias": True}, "lora_bias=False"),
    "bias_all": ({"bias": "all"}, "would be trained besides the cores"),
    "bias_lora_only": ({"bias": "lora_only"}, "would be trained besides the cores"),
    "trainable_tokens": ({"trainable_token_indices": [5]}, "would be trained besides the cores"),
    "embedding": ({"target_modules": ["query", "word_embeddings"]}, "is an embedding"),
    "rslora": ({"use_rslora": True}, "use_rslora=False"),
    "scale": ({"lora_alpha": 8}, "has scale 2.0; set lora_alpha equal to r"),
    "dropout": ({"lora_dropout": 0.1}, "lora_dropout=0"),
    "head": ({"modules_to_save": ["classifier"]}, "classifier.* would be trained besides the cores"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(tiny, case):
    options, message = REFUSED[case]
    plain = tiny.lora(tiny.base("bert"), task_type=None, target_modules=["query", "value"])
    factors = bases.random(plain).factors
    model = tiny.lora(tiny.base("bert"), **{"task_type": None, "target_modules": ["query", "value"], **options})
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        attach(model, of(factors))
    after = dict(model.named_parameters())
    assert set(after) == set(before)  # the model is as it was
    assert all(p.requires_grad == before[n][0] and torch.equal(p, before[n][1]) for n, p in after.items())


@pytest.mark.parametrize("layer", [nn.Conv1d(4, 4, 1), nn.Conv2d(4, 4, 1)])
def test_refuses_convolutions(layer):
    model = get_peft_model(nn.Sequential(layer), LoraConfig(r=2, lora_alpha=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="convolution"):
        attach(model, of({"base_model.model.0": Factors(torch.eye(2, 4), torch.eye(4, 2))}))


def test_refuses_a_left_over_trainable_tensor(tiny):
    model = tiny.lora(tiny.base("llama"))
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model\.norm\.weight \(32,\) would be trained besides the cores"):
        attach(model, bases.random(model))


def test_a_tensor_made_trainable_later_is_found(tiny):
    adapter = tiny.adapter(tiny.base("llama"))
    adapter.check_nothing_else_is_trained()
    adapter.model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        adapter.check_nothing_else_is_trained()


def test_refuses_a_head_without_per_example_rule(tiny):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x[..., :3] * self.scale

    base = tiny.base("bert")
    base.classifier = Odd()
    model = tiny.lora(base, task_type=None, target_modules=["query"], modules_to_save=["classifier"])
    with pytest.raises(ValueError, match="no per-example gradient rule"):
        attach(model, bases.random(model), allow=("classifier",))


def test_refuses_factors_that_do_not_fit(tiny):
    model = tiny.lora(tiny.base("llama"), target_modules=["q_proj"])
    factors = dict(bases.random(model).factors)
    name, (A, B, _) = next(iter(factors.items()))
    for wrong, message in (
        (Factors(A[:2], B), "Expected factors of"),
        (Factors(2 * A, B), "orthonormal rows of A"),
        (Factors(A, B + 0.2), "orthonormal columns of B"),
        (Factors(A * float("nan"), B), "orthonormal rows of A"),
        (Factors(A, B, torch.zeros(3, 3)), "Expected R0"),
    ):
        with pytest.raises(ValueError, match=message):
            attach(model, of({**factors, name: wrong}))
    del factors[name]
    with pytest.raises(ValueError, match="no factors for"):
        attach(model, of(factors))


def test_refuses_a_model_without_lora(tiny):
    with pytest.raises(ValueError, match="get_peft_model"):
        lora_layers(tiny.base("llama"))


def test_refuses_an_init_that_changes_the_base_weight(tiny):
    model = tiny.lora(tiny.base("llama"), init_lora_weights="pissa")
    with pytest.raises(ValueError, match="init"):
        attach(model, bases.random(model))


# --- what is trained


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_cores_are_trained(tiny, kind):
    adapter = tiny.adapter(tiny.base(kind), rank=3)
    assert trainable(adapter.model) == core_names(adapter.model)
    assert len(adapter.parameters()) == len(adapter.cores)
    assert adapter.dimension == 9 * len(adapter.cores)
    assert all(p.dtype == torch.float32 and p.shape == (3, 3) for p in adapter.parameters())


def test_allowed_head_is_part_of_theta(tiny):
    adapter = tiny.adapter(tiny.base("bert"), allow=("classifier",))
    heads = {name: p for name, p in adapter.named_parameters() if "classifier" in name}
    assert sorted(tuple(p.shape) for p in heads.values()) == [(3,), (3, 32)]
    assert adapter.dimension == 16 * len(adapter.cores) + 3 * 33
    adapter.check_nothing_else_is_trained()


def test_switching_adapters_leaves_the_trained_set_alone(tiny):
    """PEFT switches gradients on for every adapter parameter; A and B are buffers, so they stay frozen."""
    adapter = tiny.adapter(tiny.base("bert"), allow=("classifier",))
    model, batch = adapter.model, tiny.batch("bert")
    expected, output = trainable(model), logits(model, batch)
    head = {name for name in expected if "classifier" in name}
    assert expected == core_names(model) | head

    with model.disable_adapter():
        pass
    assert trainable(model) == expected
    model.set_adapter("default")
    assert trainable(model) == expected
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    assert trainable(model) == expected
    other = LoraConfig(r=2, lora_alpha=2, target_modules=["query"], task_type=TaskType.SEQ_CLS)
    model.add_adapter("other", other)
    assert core_names(model) <= trainable(model)
    model.set_adapter("other")
    assert not core_names(model) & trainable(model)
    model.set_adapter("default")
    assert trainable(model) == expected
    assert torch.equal(logits(model, batch), output)
    adapter.check_nothing_else_is_trained()


@pytest.mark.parametrize("kind", KINDS)
def test_zero_core_computes_the_base_model(tiny, kind):
    batch = tiny.batch(kind)
    expected = logits(tiny.base(kind), batch)
    assert torch.equal(logits(tiny.adapter(tiny.base(kind), scatter=0.0).model, batch), expected)


def oriented(layer, weight):
    return weight.T if getattr(layer, "fan_in_fan_out", False) else weight


@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_w0_plus_b_r_a(tiny, kind):
    batch, adapter = tiny.batch(kind), tiny.adapter(tiny.base(kind))
    by_hand = tiny.base(kind)
    with torch.no_grad():
        for core in adapter.cores:
            A, B, R = adapter.factors()[core.name]
            weight = by_hand.get_submodule(core.name.removeprefix("base_model.model.")).weight
            weight += oriented(core.layer, B @ R @ A)
    expected = logits(by_hand, batch)
    assert tiny.distance(logits(adapter.model, batch), expected) <= 1e-5
    assert tiny.distance(logits(adapter.model, batch), logits(tiny.base(kind), batch)) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_r_is_the_projected_gradient_of_w(tiny, kind):
    adapter, batch = tiny.adapter(tiny.base(kind)), tiny.batch(kind)
    weights = {core.name: core.layer.get_base_layer().weight.requires_grad_() for core in adapter.cores}
    tiny.loss[kind](adapter.model, batch).sum().backward()
    for core in adapter.cores:
        A, B, _ = adapter.factors()[core.name]
        G = oriented(core.layer, weights[core.name].grad)
        assert tiny.distance(core.up.core.weight.grad, B.T @ G @ A.T) <= 1e-5


def test_set_gradient_unpacks_in_the_order_of_rows(tiny):
    adapter, batch = tiny.adapter(tiny.base("bert"), allow=("classifier",)), tiny.batch("bert")
    tiny.loss["bert"](adapter.model, batch).sum().backward()
    exact = [parameter.grad.clone() for parameter in adapter.parameters()]
    total = tiny.rows(adapter, tiny.loss["bert"], batch).double().sum(dim=0)
    set_gradient(adapter, total)
    for parameter, expected in zip(adapter.parameters(), exact, strict=True):
        assert parameter.grad.dtype == parameter.dtype
        assert tiny.distance(parameter.grad, expected) <= 1e-5
    with pytest.raises(ValueError, match="Expected gradient of shape"):
        set_gradient(adapter, total[1:])


def test_state_round_trip(tiny):
    adapter = tiny.adapter(tiny.base("bert"), allow=("classifier",))
    saved = adapter.state()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(1.0)
    assert not any(torch.equal(saved[name], value) for name, value in adapter.state().items())
    adapter.load_state(saved)
    assert all(torch.equal(saved[name], value) for name, value in adapter.state().items())


def test_load_state_refuses_and_changes_nothing(tiny):
    adapter = tiny.adapter(tiny.base("bert"))
    before = adapter.state()
    names = list(before)
    other = {name: value + 1 for name, value in before.items()}
    without = {name: value for name, value in other.items() if name != names[0]}
    for wrong, message in (
        (without, "names differ"),
        ({**other, "extra": torch.zeros(1)}, "names differ.*'extra'"),
        ({**other, names[-1]: torch.zeros(3, 3)}, "of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            adapter.load_state(wrong)
        assert all(torch.equal(before[name], value) for name, value in adapter.state().items())


# --- plain LoRA in files and in PEFT


LOADER = """
import json, sys, torch, transformers
from peft import PeftModel
from safetensors.torch import load_file
for folder, kind in json.loads(sys.argv[1]):
    auto = getattr(transformers, kind)
    model = PeftModel.from_pretrained(auto.from_pretrained(folder + "/base"), folder + "/adapter").eval()
    batch = load_file(folder + "/expected.safetensors")
    expected = batch.pop("expected")
    with torch.no_grad():
        error = float((model(**batch).logits - expected).abs().max())
    assert error <= 1e-5 * max(1.0, float(expected.abs().max())), (folder, error)
assert not [name for name in sys.modules if name.split(".")[0].startswith("dpsb")]
print("equal")
"""


def test_saved_adapter_is_plain_lora_for_a_process_without_dpsb(tiny, tmp_path):
    auto = {
        "bert": "AutoModelForSequenceClassification",
        "llama": "AutoModelForCausalLM",
        "gpt2": "AutoModelForCausalLM",
    }
    jobs = []
    for kind in KINDS:
        folder = tmp_path / kind
        base = tiny.base(kind)
        base.save_pretrained(folder / "base")
        adapter = tiny.adapter(base, allow=("classifier",) if kind == "bert" else ())
        if kind == "bert":
            with torch.no_grad():
                for name, parameter in adapter.named_parameters():
                    if "classifier" in name:
                        parameter.add_(0.5)
        adapter.model.save_pretrained(folder / "adapter")
        batch = {k: v for k, v in tiny.batch(kind, lengths=(12, 7)).items() if k != "labels"}
        expected = logits(adapter.model.eval(), batch)
        save_file({**batch, "expected": expected.contiguous()}, folder / "expected.safetensors")
        keys = set(load_file(folder / "adapter" / "adapter_model.safetensors"))
        plain = {key for key in keys if key.endswith(("lora_A.weight", "lora_B.weight"))}
        assert len(plain) == 2 * len(adapter.cores)
        assert {key.split(".")[-2] for key in keys - plain} == ({"classifier"} if kind == "bert" else set())
        config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 4)
        jobs.append([str(folder), auto[kind]])
    done = subprocess.run([sys.executable, "-c", LOADER, json.dumps(jobs)], capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("equal"), done.stderr[-2000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_lora_is_read_back_as_r(tiny, tmp_path, dtype):
    adapter = tiny.adapter(tiny.base("llama", dtype=dtype))
    adapter.model.save_pretrained(tmp_path)
    fresh = tiny.adapter(tiny.base("llama", dtype=dtype), scatter=0.0)
    result = set_peft_model_state_dict(fresh.model, load_file(tmp_path / "adapter_model.safetensors"))
    assert not result.unexpected_keys
    for name, R in adapter.state().items():
        assert tiny.distance(fresh.state()[name], R) <= (1e-5 if dtype == torch.float32 else 1e-2)


def test_state_dict_round_trip_is_strict(tiny):
    adapter, fresh = tiny.adapter(tiny.base("bert")), tiny.adapter(tiny.base("bert"), scatter=0.0)
    assert not any(".core." in key or key.endswith(".up") for key in adapter.model.state_dict())
    fresh.model.load_state_dict(adapter.model.state_dict(), strict=True)
    for name, R in adapter.state().items():
        assert tiny.distance(fresh.state()[name], R) <= 1e-5


@pytest.mark.parametrize("size", [0.3, 1e-6])
def test_plain_lora_outside_the_span_is_an_error(tiny, tmp_path, size):
    tiny.adapter(tiny.base("llama"), scatter=size, basis=bases.weight_svd).model.save_pretrained(tmp_path)
    fresh = tiny.adapter(tiny.base("llama"), basis=bases.random)
    with pytest.raises(RuntimeError, match="not in the span"):
        set_peft_model_state_dict(fresh.model, load_file(tmp_path / "adapter_model.safetensors"))


@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unmerge_in_place(tiny, kind):
    adapter, batch = tiny.adapter(tiny.base(kind)), tiny.batch(kind)
    expected = logits(adapter.model, batch)
    adapter.model.merge_adapter()
    assert tiny.distance(logits(adapter.model, batch), expected) <= 1e-5
    adapter.model.unmerge_adapter()
    assert tiny.distance(logits(adapter.model, batch), expected) <= 1e-5
    assert trainable(adapter.model) == core_names(adapter.model)


@pytest.mark.parametrize("kind", KINDS)
def test_detach_leaves_plain_peft(tiny, kind):
    adapter, batch = tiny.adapter(tiny.base(kind)), tiny.batch(kind)
    expected = logits(adapter.model, batch)
    detach(adapter)
    assert isinstance(adapter.model, PeftModel)
    assert not [m for m in adapter.model.modules() if isinstance(m, (CoreUp, FrozenDown))]
    assert tiny.distance(logits(adapter.model, batch), expected) <= 1e-5
    assert trainable(adapter.model) == set()


@pytest.mark.parametrize("kind", KINDS)
def test_merge_gives_the_base_model(tiny, kind):
    adapter, batch = tiny.adapter(tiny.base(kind)), tiny.batch(kind)
    expected = logits(adapter.model, batch)
    merged = merge(adapter)
    assert type(merged) is type(tiny.base(kind))
    assert set(merged.state_dict()) == set(tiny.base(kind).state_dict())
    assert tiny.distance(logits(merged, batch), expected) <= 1e-5


def test_r0_is_where_training_starts(tiny):
    model = tiny.lora(tiny.base("llama"), target_modules=["q_proj"])
    factors = {n: f._replace(R0=torch.diag(torch.arange(4.0))) for n, f in bases.random(model).factors.items()}
    adapter = attach(model, of(factors))
    assert all(torch.equal(p, torch.diag(torch.arange(4.0))) for p in adapter.parameters())
