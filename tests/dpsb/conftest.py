"""Tiny models, built from their configs (no weights are downloaded), and what the tests share."""

from __future__ import annotations

import math
from types import SimpleNamespace

import federation
import pytest
import torch
import workbench
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn

from dpsb import basis as bases
from dpsb.adapter import attach
from dpsb.capture import adapter_train_mode, per_example_gradients
from dpsb.losses import IGNORED, causal_lm_loss, classification_loss, measure_head

VOCAB = 61
_DECODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "bert": (
        "BertForSequenceClassification",
        "BertConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "num_labels": 3,
        },
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_DECODER, "tie_word_embeddings": False}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**_DECODER, "head_dim": 8, "final_logit_softcapping": 0.5},
    ),
}


@pytest.fixture
def fed(tiny, tmp_path):
    """A federation of three silos on a tiny model."""
    return federation.Federation(tmp_path / "fed", federation.trainer(tiny))


@pytest.fixture
def quick_calibration(monkeypatch):
    """Noise by a table instead of a search that takes seconds."""
    monkeypatch.setattr("dpsb.plan.noise_multiplier_for", workbench.calibrated)


@pytest.fixture
def wide_terminal(monkeypatch):
    """Sentences on the screen stay on one line."""
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture(autouse=True)
def one_thread():
    """The tests share few cores."""
    torch.set_num_threads(1)


def build_base(kind, dtype=torch.float32, seed=0, **overrides):
    """A tiny BERT classifier, Llama, GPT-2 or Gemma 2 with random weights."""
    import transformers

    model_name, config_name, settings = CONFIGS[kind]
    settings = {
        "vocab_size": VOCAB,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **settings,
        **overrides,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, model_name)(getattr(transformers, config_name)(**settings))
    for parameter in model.parameters():  # larger than the usual 0.02, so that every layer matters
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    model = model.to(dtype)
    measure_head(model)  # as where a model is loaded
    return model


def build_lora(base, rank=4, **options):
    """A plain LoRA adapter: the targets are all linear layers."""
    options = {"target_modules": "all-linear", **options}
    if type(base).__name__.startswith("GPT2"):
        options.setdefault("fan_in_fan_out", True)
    if hasattr(base, "classifier"):
        options.setdefault("task_type", TaskType.SEQ_CLS)
    return get_peft_model(base, LoraConfig(r=rank, lora_alpha=options.pop("lora_alpha", rank), **options))


def build_adapter(base, rank=4, allow=(), scatter=0.3, basis=bases.random, **options):
    """A LoRA model with the cores attached, R random so that every layer feels the others, in train mode."""
    if hasattr(base, "classifier") and not allow:
        frozen_head = {"task_type": None, "target_modules": ["query", "key", "value", "dense"]}
        options = {**frozen_head, **options}
    model = build_lora(base, rank, **options)
    return scattered(attach(model, basis(model), allow=allow), scatter)


def scattered(adapter, scatter=0.3):
    """The adapter with R random, so that every layer feels the others, in train mode."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for core in adapter.cores:
            weight = core.up.core.weight
            weight.copy_(scatter * torch.randn(weight.shape, generator=generator))
    adapter.model.train()
    adapter_train_mode(adapter)
    return adapter


def build_batch(kind, lengths=(9, 4, 12, 6, 1), padded=12, seed=3, vocab=VOCAB):
    """A padded batch of random tokens; causal batches have prompt tokens that are not part of the loss."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (len(lengths), padded), generator=generator)
    mask = (torch.arange(padded)[None] < torch.tensor(lengths)[:, None]).long()
    ids = ids * mask
    if kind == "bert":
        labels = torch.arange(len(lengths)) % 3
    else:
        labels = torch.where(mask.bool(), ids, IGNORED)
        labels[:, :2] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def take(batch, index):
    """The examples ``index`` of a batch, with the same padding."""
    return {name: value[index] for name, value in batch.items()}


def rows_of(adapter, loss_fn, batch):
    size = len(next(iter(batch.values())))
    with per_example_gradients(adapter, size) as rows:
        loss_fn(adapter.model, batch).sum().backward()
        return rows.get()


def autograd_row(adapter, loss):
    """Autograd's gradient of one scalar, packed like a row."""
    loss.backward()
    parts = []
    for parameter in adapter.parameters():
        parts.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        parameter.grad = None
    return torch.cat([part.flatten() for part in parts])


def distance(a, b):
    """Norm of the difference, relative to the larger of the two; infinite where one of them holds a NaN."""
    difference, scale = float((a.double() - b.double()).norm()), max(float(a.double().norm()), float(b.double().norm()))
    if math.isnan(difference):
        return math.inf
    return difference / scale if scale else 0.0


@pytest.fixture
def tiny():
    """The builders above, as one object: test modules cannot import a conftest safely."""
    return SimpleNamespace(
        base=build_base,
        lora=build_lora,
        adapter=build_adapter,
        batch=build_batch,
        take=take,
        rows=rows_of,
        autograd_row=autograd_row,
        distance=distance,
        loss={"bert": classification_loss} | dict.fromkeys(("llama", "gpt2", "gemma2"), causal_lm_loss),
        twice=Twice,
        vocab=VOCAB,
    )


class Twice(nn.Module):
    """A model that calls one linear layer twice, under any kind of activation checkpointing.

    ``plan`` says which calls are checkpointed together: "none"; "same": both in one segment; "separate": one
    segment each; "mixed": only the second.
    """

    def __init__(self, plan="none", use_reentrant=False, width=16):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.embed = nn.Embedding(VOCAB, width)
        self.layer = nn.Linear(width, width)
        self.out = nn.Linear(width, 3)
        self.plan, self.use_reentrant = plan, use_reentrant
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)

    def _once(self, h):
        return torch.tanh(self.layer(h))

    def _both(self, h):
        return self._once(self._once(h) + 0.5 * h)

    def _segment(self, function, h):
        return torch.utils.checkpoint.checkpoint(function, h, use_reentrant=self.use_reentrant)

    def forward(self, input_ids, attention_mask=None):
        h = self.embed(input_ids).requires_grad_()
        if self.plan == "same":
            h = self._segment(self._both, h)
        elif self.plan == "separate":
            h = self._segment(self._once, self._segment(self._once, h) + 0.5 * h)
        elif self.plan == "mixed":
            h = self._segment(self._once, self._once(h) + 0.5 * h)
        else:
            h = self._both(h)
        return SimpleNamespace(logits=self.out(h.mean(dim=1)))
