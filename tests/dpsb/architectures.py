"""Tiny models of the classes that people fine-tune, each with a batch and a per-example loss: the matrix of tests."""

from dataclasses import dataclass, field

import torch
import transformers
from conftest import scattered
from peft import LoraConfig, get_peft_model

from dpsb import basis as bases
from dpsb.adapter import attach
from dpsb.data import Collator
from dpsb.losses import IGNORED, causal_lm_loss, classification_loss, measure_head, seq2seq_loss

VOCAB, PADDED, RANK = 61, 8, 2
LENGTHS = (8, 3, 6)
IMAGE = 8
_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_ENCODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_DECODER = {**_ENCODER, **_TOKENS, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}


@dataclass(frozen=True)
class Architecture:
    """A model class of transformers, how small it is made, and what it is trained for."""

    model: str
    config: str
    task: str
    settings: dict = field(default_factory=dict)
    targets: str | tuple = "all-linear"


ARCHITECTURES = {
    "bert": Architecture(
        "BertForSequenceClassification",
        "BertConfig",
        "classification",
        {**_ENCODER, **_TOKENS, **_NO_DROPOUT, "max_position_embeddings": 32, "num_labels": 3},
        ("query", "key", "value", "dense"),
    ),
    "roberta": Architecture(
        "RobertaForSequenceClassification",
        "RobertaConfig",
        "classification",
        {**_ENCODER, **_TOKENS, **_NO_DROPOUT, "max_position_embeddings": 32, "num_labels": 3},
        r".*encoder.*\.(query|key|value|dense)",
    ),
    "t5": Architecture(
        "T5ForConditionalGeneration",
        "T5Config",
        "seq2seq",
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
        | {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0},
    ),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        "GPT2Config",
        "causal-lm",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, **_TOKENS}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "llama": Architecture("LlamaForCausalLM", "LlamaConfig", "causal-lm", _DECODER),
    "qwen": Architecture("Qwen3ForCausalLM", "Qwen3Config", "causal-lm", {**_DECODER, "head_dim": 4}),
    "gemma": Architecture(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        "causal-lm",
        {**_DECODER, "head_dim": 4, "sliding_window": 4, "query_pre_attn_scalar": 4}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mistral": Architecture("MistralForCausalLM", "MistralConfig", "causal-lm", {**_DECODER, "sliding_window": 4}),
    "vit": Architecture(
        "ViTForImageClassification",
        "ViTConfig",
        "images",
        {**_ENCODER, **_NO_DROPOUT, "image_size": IMAGE, "patch_size": 4, "num_labels": 3},
        r".*\.(query|key|value|dense|[qkvo]_proj|fc1|fc2)",
    ),
}
_SHARING = {
    **_DECODER,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 4,
    "head_dim": 4,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 4,
}
_BLOCKS = r".*layers\.\d+\..*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
SHARING = {  # the upper blocks use the keys and values of a lower one; further classes, outside the matrix
    "gemma3n": Architecture(
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        "causal-lm",
        {**_SHARING, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [24] * 4},
        _BLOCKS,
    ),
    "gemma4": Architecture(
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        "causal-lm",
        {**_SHARING, "global_head_dim": 4, "num_global_key_value_heads": 2},
        _BLOCKS,
    ),
}
LOSSES = {
    "classification": classification_loss,
    "images": classification_loss,
    "causal-lm": causal_lm_loss,
    "seq2seq": seq2seq_loss,
}


def known(kind):
    return ARCHITECTURES.get(kind) or SHARING[kind]


def build(kind, dtype=torch.float32, seed=0):
    """A tiny model of the class, with random weights, as large ones as every layer needs to matter."""
    made = known(kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, made.model)(getattr(transformers, made.config)(**made.settings))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    model = model.to(dtype)
    if made.task == "causal-lm":
        measure_head(model)  # as where a model is loaded
    return model


def adapted(kind, base, basis=bases.random, scatter=0.3):
    """``base`` with cores of rank 2 on every linear layer of its blocks, R random, in train mode."""
    targets = known(kind).targets
    targets = list(targets) if isinstance(targets, tuple) else targets
    model = get_peft_model(
        base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, fan_in_fan_out=kind == "gpt2")
    )
    return scattered(attach(model, basis(model)), scatter)


def batch_for(kind, dtype=torch.float32, seed=3):
    """Three examples of different lengths (images: of one size), padded."""
    generator = torch.Generator().manual_seed(seed)
    task, size = known(kind).task, len(LENGTHS)
    if task == "images":
        images = torch.randn(size, 3, IMAGE, IMAGE, generator=generator)
        return {"pixel_values": images.to(dtype), "labels": torch.arange(size)}
    mask = (torch.arange(PADDED)[None] < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(3, VOCAB, (size, PADDED), generator=generator) * mask
    batch = {"input_ids": ids, "attention_mask": mask}
    if task == "classification":
        return {**batch, "labels": torch.arange(size)}
    if task == "seq2seq":
        targets = torch.randint(3, VOCAB, (size, PADDED - 2), generator=generator)
        written = torch.arange(PADDED - 2)[None] < torch.tensor([[2], [5], [6]])
        return {**batch, "labels": torch.where(written, targets, IGNORED)}
    return {**batch, "labels": torch.where(mask.bool(), ids, IGNORED)}


def loss_of(kind):
    return LOSSES[known(kind).task]


def examples_for(kind, count, seed=5):
    """Examples as ``fit`` takes them, before they are collated."""
    generator = torch.Generator().manual_seed(seed)
    task, found = known(kind).task, []
    for index in range(count):
        if task == "images":
            image = torch.randn(3, IMAGE, IMAGE, generator=generator)
            found.append({"pixel_values": image, "num_tokens": (IMAGE // 4) ** 2 + 1, "labels": index % 3})
            continue
        ids = torch.randint(3, VOCAB, (2 + index % (PADDED - 1),), generator=generator).tolist()
        target = torch.randint(3, VOCAB, (1 + index % PADDED,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": {"seq2seq": target, "classification": index % 3}.get(task, ids)})
    return found


def collate_images(examples, padded_length):
    """All images have one public size, so there is nothing to pad."""
    del padded_length
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


def collate_for(kind):
    made = known(kind).task
    return collate_images if made == "images" else Collator(0, target_length=6 if made == "seq2seq" else None)
