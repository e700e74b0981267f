"""Quantized bases: rows exact against the dequantized model, saved, loaded, resumed; what couples examples refused."""

import importlib
from types import SimpleNamespace

import pytest
import torch
import workbench
from datasets import Dataset
from peft import PeftModel
from torch import nn

from dpsb import basis as bases
from dpsb.baselines.build import adapt
from dpsb.baselines.methods import method_named
from dpsb.basis._common import base_weight
from dpsb.losses import causal_lm_loss
from dpsb.quantized import check_quantization
from dpsb.train import Knobs, fit
from dpsb_accounting import Ledger

pytestmark = [
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated"),  # merging is not what is tested
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore::UserWarning:torchao"),
]
WIDE = {"hidden_size": 64, "intermediate_size": 64}  # NF4 has blocks of 64
LENGTHS, OUTLIER = (9, 4, 12, 6, 11), 60
WEIGHT_ONLY = ("int8", "int4", "nf4", "nf4-bf16", "bnb-int8")


def installed(package):
    return pytest.importorskip(package, reason=f"{package} is not installed: pip install --no-deps {package}")


def linears(module, name):
    return isinstance(module, nn.Linear) and "lm_head" not in name


def torchao_base(tiny, config_name, granularity=None, **settings):
    installed("torchao")
    quantization = importlib.import_module("torchao.quantization")
    if granularity is not None:
        kind, *arguments = granularity
        settings["granularity"] = getattr(importlib.import_module("torchao.quantization.granularity"), kind)(*arguments)
    base = tiny.base("llama", **WIDE)
    quantization.quantize_(base, getattr(quantization, config_name)(**settings), filter_fn=linears)
    return base


def bitsandbytes_base(tiny, **settings):
    installed("bitsandbytes")
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    path = workbench.folder("quantized-llama")
    tiny.base("llama", **WIDE).save_pretrained(path)
    config = BitsAndBytesConfig(**settings)
    return LlamaForCausalLM.from_pretrained(
        path, quantization_config=config, device_map="cpu", dtype=settings.get("bnb_4bit_compute_dtype", torch.float32)
    )


def nf4(tiny, dtype=torch.float32):
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return bitsandbytes_base(tiny, **four, bnb_4bit_compute_dtype=dtype)


def quantized_base(tiny, scheme):
    if scheme == "int8":
        return torchao_base(tiny, "Int8WeightOnlyConfig")
    if scheme == "int4":
        return torchao_base(tiny, "IntxWeightOnlyConfig", ("PerGroup", 32), weight_dtype=torch.int4)
    if scheme == "bnb-int8":
        return bitsandbytes_base(tiny, load_in_8bit=True, llm_int8_threshold=0.0)
    return nf4(tiny, torch.bfloat16 if scheme == "nf4-bf16" else torch.float32)


def dequantized(tiny, adapter, dtype):
    """The same adapter on a model that holds the dequantized weights."""
    base = tiny.base("llama", dtype=dtype, **WIDE)
    other = tiny.adapter(base)
    for core, twin in zip(adapter.cores, other.cores, strict=True):
        assert core.name == twin.name
        with torch.no_grad():
            twin.layer.get_base_layer().weight.copy_(base_weight(core.layer))
            twin.layer.lora_A["default"].weight.copy_(core.layer.lora_A["default"].weight)
            twin.up.up.copy_(core.up.up)
            twin.up.core.weight.copy_(core.up.core.weight)
    return other


def alone(tiny, adapter, batch):
    ones = (tiny.take(batch, slice(i, i + 1)) for i in range(len(LENGTHS)))
    return torch.stack([tiny.autograd_row(adapter, causal_lm_loss(adapter.model, one).sum()) for one in ones])


def inside(tiny, adapter, batch):
    return torch.stack([tiny.autograd_row(adapter, causal_lm_loss(adapter.model, batch)[i]) for i in range(5)])


def worst(tiny, rows, others):
    return max(tiny.distance(row, other) for row, other in zip(rows, others, strict=True))


@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_rows_are_those_of_the_dequantized_model(tiny, scheme):
    """opacus#718: a quantized base model was asked for."""
    adapter = tiny.adapter(quantized_base(tiny, scheme), basis=bases.weight_svd)
    batch, half = tiny.batch("llama", lengths=LENGTHS), scheme == "nf4-bf16"
    twin = dequantized(tiny, adapter, torch.bfloat16 if half else torch.float32)
    rows = tiny.rows(adapter, causal_lm_loss, batch)
    assert rows.dtype == torch.float32
    assert worst(tiny, rows, inside(tiny, adapter, batch)) <= 1e-5
    against, moved = (
        worst(tiny, rows, tiny.rows(twin, causal_lm_loss, batch)),
        worst(tiny, rows, alone(tiny, adapter, batch)),
    )
    print(f"{scheme}: rows differ by {against:.1e} from the dequantized model's, by {moved:.1e} from examples alone")
    assert against <= (0.1 if half else 1e-5), "bf16 products are rounded in another order"
    assert moved <= (0.1 if half else 1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_rows_under_checkpointing(tiny, scheme, use_reentrant):
    adapter = tiny.adapter(quantized_base(tiny, scheme))
    batch = tiny.batch("llama", lengths=LENGTHS)
    plain = tiny.rows(adapter, causal_lm_loss, batch)
    adapter.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    adapter.model.enable_input_require_grads()
    assert worst(tiny, tiny.rows(adapter, causal_lm_loss, batch), plain) <= 1e-5


def test_an_evaluation_between_steps_changes_no_row(tiny):
    """bitsandbytes packs NF4 for inference on processors with bfloat16, and then its backward pass is wrong."""
    adapter = tiny.adapter(quantized_base(tiny, "nf4"))
    batch = tiny.batch("llama", lengths=LENGTHS)
    before = tiny.rows(adapter, causal_lm_loss, batch)
    adapter.model.eval()
    with torch.no_grad():
        causal_lm_loss(adapter.model, batch)
    adapter.model.train()
    assert torch.equal(tiny.rows(adapter, causal_lm_loss, batch), before)


def test_a_base_that_was_packed_before_is_refused(tiny):
    base = quantized_base(tiny, "nf4").eval()
    with torch.no_grad():
        causal_lm_loss(base, tiny.batch("llama", lengths=LENGTHS))
    state = base.model.layers[0].self_attn.q_proj.weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes packs nothing on this processor")
    with pytest.raises(ValueError, match=r"q_proj.*packed for inference.*Load the model anew"):
        tiny.adapter(base)


# --- an outlier in another example


def moved_by_an_outlier(tiny, adapter):
    """How far the rows of four examples move when the fifth is made of tokens with enormous embeddings."""
    ordinary = tiny.batch("llama", lengths=LENGTHS, vocab=OUTLIER)
    loud = {name: value.clone() for name, value in ordinary.items()}
    loud["input_ids"][2] = OUTLIER
    with torch.no_grad():
        embedding = adapter.model.get_input_embeddings().weight
        embedding[OUTLIER] *= 200
        embedding[OUTLIER, 3] += 300
    quiet = [0, 1, 3, 4]
    before, after = (tiny.rows(adapter, causal_lm_loss, batch)[quiet] for batch in (ordinary, loud))
    return worst(tiny, before, after)


@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_an_outlier_in_another_example_moves_nothing(tiny, scheme):
    assert moved_by_an_outlier(tiny, tiny.adapter(quantized_base(tiny, scheme))) <= 1e-5


def test_per_tensor_activations_couple_examples_and_are_refused(tiny, monkeypatch):
    def base():
        return torchao_base(tiny, "Int8DynamicActivationInt8WeightConfig", ("PerTensor",))

    with pytest.raises(ValueError, match=r"q_proj.*torchao with quantized activations .*per tensor.*whole batch"):
        tiny.adapter(base())
    monkeypatch.setattr("dpsb.adapter.check_quantization", lambda model: None)
    assert moved_by_an_outlier(tiny, tiny.adapter(base())) > 0.01, "the reason for the refusal"


@pytest.mark.parametrize(
    ("config", "granularity"),
    [("Int8DynamicActivationInt8WeightConfig", ("PerRow",)), ("Int8DynamicActivationIntxWeightConfig", None)],
)
def test_per_token_activations_pass_no_gradient_and_are_refused(tiny, config, granularity):
    base = torchao_base(tiny, config, granularity)
    layer, x = base.model.layers[0].self_attn.q_proj, torch.randn(2, 64, requires_grad=True)
    (x.sum() + layer(x).sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(x)), "the reason for the refusal"
    with pytest.raises(ValueError, match=r"q_proj.*quantized activations .*no gradient passes"):
        tiny.adapter(base)


def test_llm_int8_is_refused(tiny):
    base = bitsandbytes_base(tiny, load_in_8bit=True)
    with pytest.raises(ValueError, match=r"q_proj.*LLM\.int8 with llm_int8_threshold=6\.0.*llm_int8_threshold=0\.0"):
        tiny.adapter(base)


def test_a_frozen_layer_that_is_no_target_is_looked_at_too(tiny):
    quantized = torchao_base(tiny, "Int8DynamicActivationInt8WeightConfig", ("PerTensor",)).model.layers[1].mlp

    def base():
        plain = tiny.base("llama", **WIDE)
        plain.model.layers[1].mlp.gate_proj = quantized.gate_proj
        return plain

    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.gate_proj is quantized by torchao"):
        tiny.adapter(base(), target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"gate_proj is quantized by torchao"):
        adapt(tiny.lora(base(), target_modules=["q_proj"]), method_named("lora"))


def stand_in(home, name, **attributes):
    """A module that says it is another package's."""
    module = type(name, (nn.Identity,), {"__module__": home})()
    for key, value in attributes.items():
        setattr(module, key, value)
    return module


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (
            stand_in("bitsandbytes.nn.modules", "Linear8bitLt", state=SimpleNamespace(threshold=6.0)),
            r"LLM\.int8 with llm_int8_threshold=6\.0",
        ),
        (stand_in("transformer_engine.pytorch.module.linear", "Linear"), "Transformer Engine"),
        (stand_in("torch.ao.nn.quantized.dynamic.modules.linear", "Linear"), "torch's eager int8"),
    ],
)
def test_refused_by_name(module, said):
    """Without the packages: it is the names of the modules that are known."""
    with pytest.raises(ValueError, match=rf"^0\.1 is quantized by {said}"):
        check_quantization(nn.Sequential(nn.Sequential(nn.Linear(2, 2), module)))


def test_quantized_after_the_adapter_was_attached(tiny, tmp_path):
    adapter = tiny.adapter(tiny.base("llama", **WIDE))
    adapter.model.late = stand_in("bitsandbytes.nn.modules", "Linear8bitLt", state=SimpleNamespace(threshold=6.0))
    with workbench.new_ledger(tmp_path) as ledger:
        given, named = arguments(adapter, ledger)
        with pytest.raises(ValueError, match=r"^late is quantized by LLM\.int8"):
            fit(*given, **named)
        assert ledger.charged("train") == 0


def test_what_is_not_quantized_passes(tiny):
    check_quantization(tiny.base("bert"))
    check_quantization(
        nn.Sequential(stand_in("bitsandbytes.nn.modules", "Linear8bitLt", state=SimpleNamespace(threshold=0.0)))
    )


# --- a run


def arguments(adapter, ledger):
    data = workbench.examples(24, kind="llama")
    return workbench.fit_arguments(adapter, data, ledger, loss_fn=causal_lm_loss, kind="llama", lr=0.05)


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_train_interrupt_resume_save_and_load(tiny, tmp_path, scheme):
    """The resumed run goes on from the checkpoint; the saved files are plain LoRA on the same quantized base."""

    def adapter():
        return tiny.adapter(quantized_base(tiny, scheme), scatter=0.0)

    class Cut(Exception):
        pass

    def cut(progress):
        if progress.step == 2:
            raise Cut

    first = adapter()
    with workbench.new_ledger(tmp_path, steps=4) as ledger:
        given, named = arguments(first, ledger)
        named["knobs"] = Knobs(checkpoint_every=1)
        with pytest.raises(Cut):
            fit(*given, **named, on_step=cut)
    resumed = adapter()
    with Ledger.open(tmp_path / "ledger.jsonl") as ledger:
        given, named = arguments(resumed, ledger)
        seen = []
        fit(*given, **named, on_step=lambda progress: seen.append((progress.step, resumed.state())))
        assert ledger.charged("train") == 4
    assert [step for step, _ in seen] == [3, 4]
    assert all(not torch.equal(value, first.state()[name]) for name, value in resumed.state().items())

    resumed.model.save_pretrained(tmp_path / "adapter")
    batch = tiny.batch("llama", lengths=LENGTHS)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    bare = quantized_base(tiny, scheme).train()  # in eval mode bitsandbytes packs NF4, which rounds differently
    with torch.no_grad():
        untrained = bare(**inputs).logits
        loaded = PeftModel.from_pretrained(bare, tmp_path / "adapter").train()(**inputs).logits
        expected = resumed.model.train()(**inputs).logits
    torch.testing.assert_close(loaded, expected, rtol=1e-4, atol=1e-4)
    assert float((loaded - untrained).abs().max()) > 1e-3


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*")
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_under_a_trainer(tmp_path, scheme):
    """An SFTTrainer that evaluates between its steps; nothing but the cores changes, and no test of its own fails."""
    installed({"int8": "torchao", "nf4": "bitsandbytes"}[scheme])
    import trainers
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if scheme == "int8":
        quantization = importlib.import_module("torchao.quantization")
        model = trainers.language_model()
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=linears)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        path = workbench.llama_folder()
        model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, device_map="cpu")
    trainer = trainers.build_sft(
        tmp_path,
        model=model,
        args={"eval_strategy": "steps", "eval_steps": 1},
        eval_dataset=Dataset.from_list(trainers.rows("pairs", seed=1, count=8)),
    )
    before = trainers.theta(trainer.adapter)
    trainer.train()
    trainer.save_model()
    assert Ledger.read(tmp_path / "ledger.jsonl").charged("train") == 3
    assert not torch.equal(trainers.theta(trainer.adapter), before)
    assert (tmp_path / "adapter_model.safetensors").exists()
