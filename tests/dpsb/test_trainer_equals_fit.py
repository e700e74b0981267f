"""A private Trainer's weights are those of ``fit`` with the same randomness, and its losses are per example."""

import difflib
import runpy
from pathlib import Path

import pytest
import torch
import trainers
import workbench
from datasets import Dataset
from torch.nn import functional as F
from transformers import get_linear_schedule_with_warmup

from dpsb.adapter import attach
from dpsb.basis import weight_svd
from dpsb.data import Collator, synthetic_examples
from dpsb.losses import IGNORED, causal_lm_loss, classification_loss
from dpsb.models import HEAD_NAMES
from dpsb.randomness import SeededRandomness
from dpsb.train import Knobs, fit
from dpsb.trainer.examples import TokenExamples
from dpsb_accounting import Ledger, make_report

pytestmark = [
    pytest.mark.usefixtures("quick_calibration"),
    *(pytest.mark.filterwarnings(line) for line in trainers.IGNORED_WARNINGS),
]
SCRIPTS = Path(__file__).parent / "scripts"


def fitted(path, plan, model, examples, task, optimizer, schedule):
    """Theta after ``fit`` under the plan's numbers, on a fresh model."""
    adapter = attach(model, weight_svd(model), allow=HEAD_NAMES)
    path.mkdir()
    vocab = model.get_base_model().get_input_embeddings().weight.shape[0]
    with Ledger.create(path / "ledger.jsonl", plan) as ledger:
        fit(
            adapter,
            examples,
            ledger=ledger,
            optimizer=optimizer(adapter.parameters()),
            loss_fn=classification_loss if task == "classification" else causal_lm_loss,
            collate=Collator(0),
            synthetic=synthetic_examples(task, vocab, 2, 16, token_types=task == "classification"),
            max_length=16,
            schedule=schedule,
            knobs=Knobs(checkpoint_every=0),
            randomness=SeededRandomness(3),
        )
    return trainers.theta(adapter)


def linear(warmup, steps=3):
    """Trainer's linear schedule, as a function of the share of steps done."""
    probe = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    lambdas = get_linear_schedule_with_warmup(probe, warmup, steps).lr_lambdas
    return lambda done: lambdas[0](round(done * steps))


@pytest.mark.parametrize(
    ("batch", "accumulation", "warmup", "optim"),
    [(8, 1, 0, "adamw_torch"), (1, 5, 2, "adamw_torch_fused"), (3, 7, 0, "sgd")],
)
def test_a_trainer_equals_fit_whatever_batch_size_and_accumulation(tmp_path, batch, accumulation, warmup, optim):
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    trainer = trainers.build(
        tmp_path / "trainer", randomness=SeededRandomness(3), args={"optim": optim, "warmup_steps": warmup, **sizes}
    )
    trainer.train()
    ledger = Ledger.read(tmp_path / "trainer" / "ledger.jsonl")
    assert ledger.charged("train") == 3, "one release per optimizer step"
    examples = [
        {"input_ids": row["input_ids"], "token_type_ids": row["token_type_ids"], "labels": row["labels"]}
        for row in trainers.labelled()
    ]
    kinds = {"sgd": torch.optim.SGD}
    expected = fitted(
        tmp_path / "fit",
        ledger.plan,
        trainers.classifier(),
        examples,
        "classification",
        lambda parameters: (
            kinds[optim](parameters, lr=0.05)
            if optim in kinds
            else torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.0)
        ),
        linear(warmup),
    )
    found = trainers.theta(trainer.adapter)
    assert float(found.norm()) > 0
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert make_report(ledger).claim is False, "a seed voids the claim"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_sft_trainer_equals_fit_on_completions(tmp_path, checkpointing):
    trainer = trainers.build_sft(
        tmp_path / "trainer",
        randomness=SeededRandomness(3),
        args={"gradient_checkpointing": checkpointing, "gradient_accumulation_steps": 4},
    )
    trainer.train()
    plan = Ledger.read(tmp_path / "trainer" / "ledger.jsonl").plan
    examples = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in trainer.train_dataset]
    from peft import get_peft_model

    expected = fitted(
        tmp_path / "fit",
        plan,
        get_peft_model(trainers.language_model(), trainers.lora()),
        examples,
        "causal-lm",
        lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.0),
        linear(0),
    )
    found = trainers.theta(trainer.adapter)
    assert float((found - expected).norm() / expected.norm()) < 1e-5


# --- the loss is each example's own


def own_token_mean(model, example):
    """The mean over the example's own labelled tokens, from its logits alone, without any of dpsb's code."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0, :-1].float()
    labels = torch.tensor(example["labels"])[1:]
    kept = labels != IGNORED
    return float(F.cross_entropy(logits[kept], labels[kept]))


def check_losses(trainer, masked):
    """The Trainer's losses of some rows in one batch equal those of each alone; some tokens are not counted."""
    examples = TokenExamples(trainer.train_dataset, trainer.form)
    chosen = [examples[i] for i in range(12)]
    assert any(IGNORED in example["labels"][1:] for example in chosen) is masked
    batch = trainer.per_example_batch(chosen, 16)
    trainer.model.eval()
    with torch.no_grad():
        found = trainer.per_example_loss(trainer.model, batch)
    for loss, example in zip(found.tolist(), chosen, strict=True):
        if any(label != IGNORED for label in example["labels"][1:]):
            assert loss == pytest.approx(own_token_mean(trainer.model, example), abs=1e-5)
        else:
            assert loss == 0


def test_completion_only_labels(tmp_path):
    trainer = trainers.build_sft(tmp_path)
    check_losses(trainer, masked=True)
    pairs = [{"prompt": "we buy", "completion": " you sell now"}, {"prompt": "offer", "completion": " cheap"}]
    small = trainers.build_sft(tmp_path, train_dataset=Dataset.from_list(pairs))
    words = trainers.tokenizer("llama")
    assert small.form.max_length == 16
    for row, pair in zip(TokenExamples(small.train_dataset, small.form), pairs, strict=True):
        prompt, completion = words(pair["prompt"]).input_ids, words(pair["completion"] + "</s>").input_ids
        assert row == {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }} </s> {% endgeneration %}"
    "{% else %}<s> {{ m.content }} {% endif %}{% endfor %}"
)


def test_assistant_only_labels(tmp_path):
    encode = trainers.tokenizer("llama")
    encode.chat_template = TEMPLATE
    talks = [
        {
            "messages": [
                {"role": "user", "content": a["text"] or "we"},
                {"role": "assistant", "content": b["text"] or "you"},
            ]
        }
        for a, b in zip(trainers.rows("text"), trainers.rows("text", seed=1), strict=True)
    ]
    trainer = trainers.build_sft(
        tmp_path,
        train_dataset=Dataset.from_list(talks),
        processing_class=encode,
        args={"assistant_only_loss": True},
    )
    check_losses(trainer, masked=True)


def test_a_plain_text_counts_every_token(tmp_path):
    data = Dataset.from_list([row for row in trainers.rows("text") if row["text"]])
    check_losses(trainers.build_sft(tmp_path, train_dataset=data), masked=False)


# --- scripts


def changed_lines(name):
    """Lines that are not in the script without privacy; its docstring does not count."""
    before = (SCRIPTS / f"{name}.py").read_text().splitlines()[1:]
    after = (SCRIPTS / f"{name}_private.py").read_text().splitlines()[1:]
    changes = [line for line in difflib.ndiff(before, after) if line[:2] in ("+ ", "- ") and line[2:].strip()]
    return [line for line in changes if line[0] == "+"], changes


@pytest.mark.parametrize("name", ["trainer_script", "sft_script"])
def test_a_script_becomes_private_by_five_lines(name):
    added, _ = changed_lines(name)
    assert 0 < len(added) <= 5


@pytest.mark.parametrize(
    ("name", "model", "data"),
    [
        ("trainer_script_private", workbench.bert_folder, "classification"),
        ("sft_script_private", workbench.llama_folder, "pairs"),
    ],
)
def test_the_private_scripts_run_and_claim(tmp_path, name, model, data):
    script = runpy.run_path(str(SCRIPTS / f"{name}.py"))
    script["main"](str(model()), str(workbench.data_file(data)), str(tmp_path / "run"))
    report = make_report(Ledger.read(tmp_path / "run" / "ledger.jsonl"))
    assert report.claim is True
    assert report.epsilon.upper <= 8
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert (tmp_path / "run" / "report.json").exists()
