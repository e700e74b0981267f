"""The memory plan holds against what a real step allocates, and loads no weights."""

import json

import pytest
import torch
import workbench
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from dpsb import memory
from dpsb.adapter import attach
from dpsb.basis import random
from dpsb.capture import adapter_train_mode, per_example_gradients
from dpsb.cli import app
from dpsb.data import Collator
from dpsb.losses import causal_lm_loss, classification_loss, measure_head
from dpsb.mechanism import clip_and_sum
from dpsb.memory import memory_plan
from dpsb.models import HEAD_NAMES, MeanPooledClassifier, ModelError, add_lora, peft_part

FACTOR = 1.05
SIZE, LENGTH = 6, 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Llama and a BERT that are large enough for overheads not to matter."""
    from transformers import BertConfig, BertModel

    made, size = {}, {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    for kind, model in (
        ("llama", LlamaForCausalLM(LlamaConfig(**size, vocab_size=4000, num_key_value_heads=2))),
        ("bert", BertModel(BertConfig(**size, vocab_size=4000))),
    ):
        made[kind] = tmp_path_factory.mktemp(kind)
        model.save_pretrained(made[kind])
    pooling = made["bert"] / "1_Pooling"
    pooling.mkdir()
    (pooling / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return {kind: str(path) for kind, path in made.items()}


TASKS = {"llama": "causal-lm", "bert": "classification"}


def real_adapter(folder, kind, dtype, checkpointing):
    if kind == "bert":
        base = MeanPooledClassifier(AutoModel.from_pretrained(folder, dtype=dtype), 2)
    else:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        measure_head(base)
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model = add_lora(base, TASKS[kind], 16)
    adapter = attach(model, random(model), allow=HEAD_NAMES)
    if checkpointing:
        peft_part(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    adapter_train_mode(adapter)
    return adapter


def batch_of(kind):
    """With some padding, as microbatches have: transformers makes no mask where there is none, and needs less."""
    tokens = (list(range(5, 5 + LENGTH - i)) for i in range(SIZE))
    return Collator(0)([{"input_ids": ids, "labels": ids if kind == "llama" else 1} for ids in tokens], LENGTH)


def kept_bytes(adapter, forward):
    own = {t.untyped_storage().data_ptr() for t in (*adapter.model.parameters(), *adapter.model.buffers())}
    held = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage
        return tensor

    with per_example_gradients(adapter, SIZE):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            forward()
        for module in adapter.model.modules():
            for stored in getattr(module, "activations", []):
                for tensor in stored:
                    keep(tensor)
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize(
    ("kind", "dtype", "checkpointing"),
    [
        ("llama", torch.float32, False),
        ("llama", torch.bfloat16, True),
        ("bert", torch.bfloat16, False),
        ("bert", torch.float32, True),
    ],
)
def test_the_plan_is_what_a_step_takes(folders, kind, dtype, checkpointing):
    """Activations, peak and weights, each within 5 % of what is measured on a processor."""
    adapter, batch = real_adapter(folders[kind], kind, dtype, checkpointing), batch_of(kind)
    loss_fn = causal_lm_loss if kind == "llama" else classification_loss

    def forward():
        return loss_fn(adapter.model, batch).sum()

    def step():
        with per_example_gradients(adapter, SIZE) as rows:
            forward().backward()
            clip_and_sum(rows.get(), 1.0)

    step()
    measured = {"activations": kept_bytes(adapter, forward), "peak": workbench.peak_bytes(step)}
    plan = memory_plan(
        folders[kind],
        TASKS[kind],
        max_length=LENGTH,
        token_budgets=(SIZE * LENGTH,),
        dtype=dtype,
        checkpointing=checkpointing,
    )
    (row,) = plan.by_budget
    ratios = {name: row[name] / size for name, size in measured.items()}
    print(f"{kind}, {dtype}, checkpointing {checkpointing}: planned over measured", ratios)
    for name, ratio in ratios.items():
        assert 1 / FACTOR <= ratio <= FACTOR, name
    weights = {id(t): t.numel() * t.element_size() for t in (*adapter.model.parameters(), *adapter.model.buffers())}
    assert plan.base_bytes + plan.adapter_bytes == pytest.approx(sum(weights.values()), rel=1e-3)
    assert plan.dimension == adapter.dimension
    assert row["rows"] == 4 * SIZE * adapter.dimension
    assert row["total"] == plan.base_bytes + plan.adapter_bytes + plan.optimizer_bytes + row["peak"]


def test_the_line_is_straight(folders, monkeypatch):
    """Two sizes are run; a third lies where they say."""
    plan = memory_plan(folders["llama"], "causal-lm", max_length=32, token_budgets=(32 * 5,))
    exact = []
    measured = memory._measured

    def noted(adapter, task, size, length):
        exact.append(measured(adapter, task, 5, length))
        return measured(adapter, task, size, length)

    monkeypatch.setattr(memory, "_measured", noted)
    memory_plan(folders["llama"], "causal-lm", max_length=32, token_budgets=(32,))
    kept, peak = exact[0]
    assert plan.by_budget[0]["activations"] == pytest.approx(kept, rel=0.01)
    assert plan.by_budget[0]["peak"] == pytest.approx(peak, rel=0.01)


def test_no_weights_are_loaded(tmp_path, folders):
    """A config of seven thousand million parameters, and no file of weights beside it."""
    big = LlamaConfig(hidden_size=4096, num_hidden_layers=2, num_attention_heads=32, intermediate_size=11008)
    big.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not list(tmp_path.glob("*.safetensors"))
    plan = memory_plan(str(tmp_path), "causal-lm", max_length=16, dtype=torch.bfloat16)
    assert config["num_hidden_layers"] == 2
    assert plan.base_bytes == pytest.approx(2 * plan.parameters, rel=1e-3)
    assert plan.parameters > 600e6


def test_what_cannot_be_planned_is_refused(tmp_path, folders):
    with pytest.raises(ValueError, match="optimizer to be one of sgd, adam, got 'lion'"):
        memory_plan(folders["llama"], "causal-lm", optimizer="lion")
    with pytest.raises(ValueError, match="max_length=0"):
        memory_plan(folders["llama"], "causal-lm", max_length=0)
    LlamaConfig(quantization_config={"quant_method": "bitsandbytes"}).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is quantized"):
        memory_plan(str(tmp_path), "causal-lm")


def test_on_the_command_line(folders, monkeypatch):
    monkeypatch.setattr("dpsb.plan.noise_multiplier_for", workbench.calibrated)
    monkeypatch.setattr(memory, "_measured", lambda adapter, task, size, length: (2**20 * size, 2**21 * size))
    monkeypatch.setenv("COLUMNS", "120")
    command = ["plan", "--epsilon", "3", "--num-examples", "4000", "--model", folders["llama"], "--max-length", "32"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert "examples at once" in shown.output
    assert "peak of a step" in shown.output
    asked = CliRunner().invoke(app, [*command, "--json", "--checkpointing", "--dtype", "bfloat16"])
    facts = json.loads(asked.output)
    assert facts["memory"]["by_budget"][0]["examples"] == 1024 // 32
    assert facts["noise_multiplier"] > 0
    refused = CliRunner().invoke(app, [*command, "--task", "poetry"])
    assert refused.exit_code == 1
    assert "classification or causal-lm" in refused.output
