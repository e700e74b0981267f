"""What the tests of ``dpsb.trainer`` share: tiny models, tokenized data, arguments and trainers."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before TRL and the Hub's client are loaded
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
import workbench
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from dpsb import PrivacyArguments
from dpsb.trainer.hf import DPTrainer
from dpsb.trainer.sft import DPSFTTrainer

disable_progress_bar()
NAMES = ("ham", "spam")
IGNORED_WARNINGS = (
    "ignore:.*is_gradient_checkpointing.*",
    "ignore:.*activation_checkpointing.*",
    "ignore:.*pin_memory.*",
    "ignore::FutureWarning",
)


def privacy(**changes):
    usual = {"epsilon": 8, "delta": 1e-3, "num_examples": 60, "expected_batch_size": 12, "self_test": False}
    return PrivacyArguments(**{**usual, **changes})


def settings(out, **changes):
    usual = {
        "output_dir": str(out),
        "max_steps": 3,
        "learning_rate": 0.05,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return {**usual, **changes}


def rows(kind="classification", seed=0, count=60):
    return [json.loads(line) for line in workbench.data_file(kind, seed, count).read_text().splitlines()]


def tokenizer(kind="bert"):
    return AutoTokenizer.from_pretrained(workbench.bert_folder() if kind == "bert" else workbench.llama_folder())


def labelled(seed=0, count=60, **options):
    """Tokenized rows with labels; ``options`` are the tokenizer's."""
    encode = tokenizer()

    def one(row):
        label = NAMES.index(row["label"]) if row["label"] in NAMES else -100
        return {**encode(row["text"], truncation=True, max_length=16, **options), "labels": label}

    return Dataset.from_list(rows(seed=seed, count=count)).map(one, remove_columns=["text", "label"])


def classifier(adapted=True, **options):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(workbench.bert_folder(), num_labels=2)
    if not adapted:
        return model
    usual = {"r": 4, "lora_alpha": 4, "task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
    return get_peft_model(model, LoraConfig(**{**usual, **options}))


def language_model():
    return AutoModelForCausalLM.from_pretrained(workbench.llama_folder())


def lora(**changes):
    usual = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**usual, **changes})


def build(out, kind=DPTrainer, randomness=None, privacy_changes=None, args=None, **given):
    """A private Trainer on the labelled rows; ``args`` change TrainingArguments, ``given`` the constructor's."""
    usual = {
        "model": given.pop("model", None) or classifier(),
        "args": TrainingArguments(**settings(out, **(args or {}))),
        "train_dataset": labelled() if "train_dataset" not in given else given.pop("train_dataset"),
        "processing_class": tokenizer(),
    }
    trainer = kind(privacy=privacy(**(privacy_changes or {})), **{**usual, **given})
    if randomness is not None:
        trainer.randomness = randomness
    return trainer


def build_sft(out, kind=DPSFTTrainer, randomness=None, privacy_changes=None, args=None, **given):
    """A private SFTTrainer on prompts and completions."""
    from trl import SFTConfig

    usual = {
        "model": given.pop("model", None) or language_model(),
        "args": SFTConfig(**settings(out, max_length=16, **(args or {}))),
        "train_dataset": Dataset.from_list(rows("pairs")) if "train_dataset" not in given else None,
        "processing_class": tokenizer("llama"),
        "peft_config": lora(),
    }
    trainer = kind(privacy=privacy(**(privacy_changes or {})), **{**usual, **given})
    if randomness is not None:
        trainer.randomness = randomness
    return trainer


def theta(adapter):
    return torch.cat([value.flatten().double() for value in adapter.state().values()])
