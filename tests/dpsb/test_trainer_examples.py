"""From rows to examples: each a function of its own row, and no row can end a run or be told from its error."""

import numpy as np
import pytest
import torch
import trainers
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForMaskedLM

from dpsb.losses import IGNORED
from dpsb.trainer.examples import Form, TokenExamples, example_of, form_of
from dpsb.trainer.refusals import TrainerArgumentError
from dpsb_accounting import Ledger

pytestmark = [
    pytest.mark.usefixtures("quick_calibration"),
    *(pytest.mark.filterwarnings(line) for line in trainers.IGNORED_WARNINGS),
]
CLASSES = Form(task="classification", vocab_size=50, num_labels=3, max_length=6, token_types=2, pad_token_id=0)
WORDS = Form(task="causal-lm", vocab_size=50, num_labels=0, max_length=6, token_types=0, pad_token_id=0)
EMPTY_CLASS = {"input_ids": [0], "labels": IGNORED, "token_type_ids": [0]}
EMPTY_WORDS = {"input_ids": [0], "labels": [IGNORED]}


@pytest.mark.parametrize("container", [list, np.array, torch.tensor])
@pytest.mark.parametrize("mask", [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 1, 1, 0]], ids=["right", "left", "both"])
def test_padding_on_either_side_is_taken_off(container, mask):
    ids = [7 if flag else 0 for flag in mask]
    row = {"input_ids": container(ids), "attention_mask": container(mask), "labels": container(ids), "text": "secret"}
    assert example_of(row, WORDS) == {"input_ids": [7, 7, 7], "labels": [7, 7, 7]}
    row["labels"] = container([2]).sum() if container is not list else 2
    row["token_type_ids"] = container([1] * 5)
    assert example_of(row, CLASSES) == {"input_ids": [7, 7, 7], "labels": 2, "token_type_ids": [1, 1, 1]}


def test_long_rows_are_cut_and_texts_without_labels_count_whole():
    row = {"input_ids": list(range(1, 10))}
    assert example_of(row, WORDS) == {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [1, 2, 3, 4, 5, 6]}
    row["labels"] = [IGNORED] * 4 + [5] * 5
    assert example_of(row, WORDS)["labels"] == [IGNORED] * 4 + [5, 5]


@pytest.mark.parametrize(
    "row",
    [
        {"input_ids": []},
        {"input_ids": None},
        {"attention_mask": [1, 1]},
        {"input_ids": [3, 4], "attention_mask": [0, 0]},
        {"input_ids": [3, 50]},
        {"input_ids": [-1, 3]},
        {"input_ids": [3, 4], "labels": [3]},
        {"input_ids": [3, 4], "labels": [3, 999]},
        {"input_ids": [3, 4], "labels": 3},
        {"input_ids": 3},
        {"input_ids": [3, 4], "attention_mask": 1},
    ],
)
def test_what_the_model_cannot_take_is_an_ignored_token(row):
    assert example_of(row, WORDS) == EMPTY_WORDS
    if "labels" not in row:
        assert example_of({**row, "labels": 1}, CLASSES) == EMPTY_CLASS


def test_token_types_beyond_the_models_make_an_empty_row():
    assert example_of({"input_ids": [3], "labels": 1, "token_type_ids": [2]}, CLASSES) == EMPTY_CLASS


@pytest.mark.parametrize("label", [None, -5, 3, 1.0, "ham"])
def test_a_label_outside_the_models_is_ignored(label):
    assert example_of({"input_ids": [3], "labels": label}, CLASSES)["labels"] == IGNORED


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {"input_ids": st.lists(st.integers(-3, 60), max_size=9)},
            optional={
                "attention_mask": st.lists(st.integers(0, 1), max_size=9),
                "labels": st.lists(st.integers(-101, 60), max_size=9),
            },
        ),
        min_size=1,
        max_size=4,
    )
)
def test_every_row_becomes_an_example_that_can_be_padded(rows):
    examples = TokenExamples(rows, WORDS)
    batch = WORDS.collator("cpu")([examples[i] for i in range(len(examples))], 6)
    assert all(value.shape == (len(rows), 6) for value in batch.values())
    assert 0 <= int(batch["input_ids"].min()) <= int(batch["input_ids"].max()) < 50


def test_rows_that_the_model_cannot_take_do_not_end_a_run(tmp_path):
    data = [dict(row) for row in trainers.labelled()]
    for index, bad in enumerate(({"labels": 7}, {"input_ids": [9999] * 3}, {"input_ids": []}, {"labels": None})):
        for offset in range(5):
            data[5 * index + offset] = {"input_ids": [3, 4], "attention_mask": [1, 1], "labels": 0, **bad}
            data[5 * index + offset].pop("attention_mask")
    trainers.build(tmp_path, train_dataset=data).train()
    assert Ledger.read(tmp_path / "ledger.jsonl").charged("train") == 3


# --- the form


def test_the_form_of_a_classifier_and_of_a_language_model():
    form = form_of(trainers.classifier(), trainers.tokenizer(), trainers.labelled(), 16)
    assert (form.task, form.num_labels, form.max_length, form.token_types) == ("classification", 2, 16, 2)
    form = form_of(trainers.language_model(), trainers.tokenizer("llama"), [], None)
    assert (form.task, form.num_labels, form.max_length, form.token_types) == ("causal-lm", 0, 64, 0)


def tokens(**columns):
    return Dataset.from_dict({"input_ids": [[3, 4]], **columns})


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (tokens(labels=[1], position_ids=[[0, 1]]), "column 'position_ids' would reach the model"),
        (tokens(labels=[1], inputs_embeds=[[0.0]]), "column 'inputs_embeds' would reach the model"),
        (tokens(labels=[1], seq_lengths=[[1, 1]]), "'seq_lengths' says that its rows are packed"),
        (tokens(), "a column 'labels' .* of whole numbers, got none"),
        (tokens(labels=["ham"]), "of whole numbers, got string"),
        (tokens(labels=[1.0]), "of whole numbers, got float64"),
        (Dataset.from_dict({"text": ["a"], "labels": [1]}), "with the column 'input_ids'"),
    ],
)
def test_data_sets_that_do_not_fit_are_refused_by_their_schema(data, match):
    with pytest.raises(TrainerArgumentError, match=match):
        form_of(trainers.classifier(), trainers.tokenizer(), data, 16)


def test_other_columns_do_not_matter():
    form_of(trainers.classifier(), trainers.tokenizer(), tokens(labels=[1], text=["secret"], id=[4]), 16)


def test_models_for_other_tasks():
    masked = BertForMaskedLM(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=20))
    with pytest.raises(TrainerArgumentError, match="model='BertForMaskedLM' is neither"):
        form_of(masked, trainers.tokenizer(), [], 16)
    model = trainers.classifier()
    model.get_base_model().config.problem_type = "multi_label_classification"
    with pytest.raises(TrainerArgumentError, match="problem_type='multi_label_classification'"):
        form_of(model, trainers.tokenizer(), [], 16)


def test_a_tokenizer_with_more_tokens_than_the_model_embeds():
    words = trainers.tokenizer()
    words.add_tokens(["zebra"])
    with pytest.raises(TrainerArgumentError, match="Resize the embeddings"):
        form_of(trainers.classifier(), words, [], 16)


def test_without_a_tokenizer_the_positions_limit_the_length():
    assert form_of(trainers.classifier(), None, [], None).max_length == 64


def test_a_length_must_be_known(monkeypatch):
    monkeypatch.setattr("dpsb.trainer.examples.longest_input", lambda *_: None)
    model, words = trainers.language_model(), trainers.tokenizer("llama")
    with pytest.raises(TrainerArgumentError, match="max_length=None to be a number"):
        form_of(model, words, [], None)
    assert form_of(model, words, [], 40).max_length == 40
