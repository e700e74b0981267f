"""Files become examples, and no text of a row leaves them by another way."""

import json
import os
import subprocess
import sys
import traceback
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dpsb.data import (
    Collator,
    Columns,
    DataError,
    Table,
    read_table,
    synthetic_examples,
    tokenize_causal,
    tokenize_classification,
)
from dpsb.labels import declared_labels
from dpsb.losses import IGNORED
from dpsb.sampling import bucket_of, length_buckets

CANARY = "zanzibar-4711"
TEXTS = ["buy now", "see you at noon", ""]
LABELS = ["spam", "ham", "ham"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<s>", "</s>", "buy", "now", "see", "you", "at", "noon", "hello"]


def tokenizer(pairs=True, **special):
    vocab = {word: i for i, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if pairs:
        inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]} if pairs else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", **names, **special
    )


def write(path, columns):
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".csv":
        lines = [",".join(columns), *(",".join(f'"{v}"' for v in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix in (".jsonl", ".json"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import datasets

        datasets.Dataset.from_dict(columns).save_to_disk(str(path))
    return path


KINDS = ("mail.parquet", "mail.jsonl", "mail.json", "mail.csv", "folder")


@pytest.mark.parametrize("name", KINDS)
def test_reads_every_kind_of_file(tmp_path, name):
    table = read_table(write(tmp_path / name, {"text": TEXTS, "label": LABELS}))
    assert len(table) == 3
    assert table.columns == {"text": TEXTS, "label": LABELS}
    assert read_table(str(tmp_path / name)).columns == table.columns


def test_csv_with_line_breaks_and_quotes(tmp_path):
    path = tmp_path / "mail.csv"
    path.write_text('text,label\n"one\ntwo, ""three""",spam\nplain,ham\n')
    assert read_table(path).columns == {"text": ['one\ntwo, "three"', "plain"], "label": ["spam", "ham"]}


@pytest.mark.parametrize(
    ("name", "values", "odd"),
    [
        ("a.csv", ["1", "0"], "0.5"),
        ("a.csv", ["007", "012"], "x"),
        ("a.csv", ["true", "false"], "x"),
        ("a.csv", ["2020-01-01 10:00", "2021-01-01 11:00"], "x"),
        ("a.jsonl", ["2020-01-01", "2021-01-01"], "x"),
        ("a.jsonl", [1, 0], 0.5),
    ],
)
def test_one_row_does_not_change_what_the_others_hold(tmp_path, name, values, odd):
    """A row is read on its own: otherwise one person's record changes everybody's label."""
    tables = []
    for column in (values, [*values, odd]):
        path = tmp_path / name
        write(path, {"text": ["t"] * len(column), "label": column})
        tables.append([str(v) for v in read_table(path).columns["label"][:2]])
    assert tables[0] == tables[1] == [str(v) for v in values]


def test_column_names_are_guessed_or_given(tmp_path):
    table = read_table(write(tmp_path / "a.parquet", {"body": TEXTS, "kind": LABELS, "category": ["a", "b", "b"]}))
    examples = tokenize_classification(table, Columns(), tokenizer(), ("a", "b"), 16)
    assert [e["labels"] for e in examples] == [0, 1, 1]
    examples = tokenize_classification(table, Columns(label="kind"), tokenizer(), ("ham", "spam"), 16)
    assert [e["labels"] for e in examples] == [1, 0, 0]


@pytest.mark.parametrize("wrong", [Columns(text="subject"), Columns(label="subject"), Columns(text_pair="subject")])
def test_wrong_column_lists_the_columns(wrong):
    table = Table("mail.csv", {"body": [CANARY], "label": ["ham"]})
    with pytest.raises(DataError, match=r"mail\.csv has no column 'subject'; it has 'body', 'label'") as caught:
        tokenize_classification(table, wrong, tokenizer(), ("ham", "spam"), 16)
    assert CANARY not in str(caught.value)


def test_missing_columns_are_named():
    with pytest.raises(DataError, match=r"no text column.*--text-column \(it has 'x', 'label'\)"):
        tokenize_classification(Table("m", {"x": [], "label": []}), Columns(), tokenizer(), ("a", "b"), 9)
    with pytest.raises(DataError, match=r"no label column.*--label-column \(it has 'text', 'y'\)"):
        tokenize_classification(Table("m", {"text": [], "y": []}), Columns(), tokenizer(), ("a", "b"), 9)
    with pytest.raises(DataError, match=r"neither a text column nor prompt.*\(it has 'x'\)"):
        tokenize_causal(Table("m", {"x": []}), Columns(), tokenizer(pairs=False, eos_token="</s>"), 9)


def test_a_first_row_in_place_of_a_header_is_not_quoted():
    table = Table("m", {f"Dear Dr Smith, {CANARY}": [], "spam": []})
    for missing in (lambda: table.column("text"), lambda: table.pick("text", ())):
        with pytest.raises(DataError, match="2 columns, whose names do not look like a header") as caught:
            missing()
        assert CANARY not in str(caught.value)


def test_labels_from_data_must_look_like_labels():
    for values in ([f"value {i}" for i in range(1001)], ["a", "b" * 65]):
        with pytest.raises(DataError, match="does not look like a public set"):
            declared_labels("from-data", Table("m", {"label": values}), Columns(), None)


def test_labels_of_a_column_of_numbers_with_gaps():
    """pandas makes 0.0, 1.0 and NaN of whole numbers with a gap; none of it may make every row count for nothing."""
    table = Table("m", {"text": ["buy now"] * 4, "label": [0.0, 1.0, float("nan"), None]})
    assert declared_labels("from-data", table, Columns(), None)[0] == ("0", "1")
    for labels in (["0", "1"], ["0.0", "1.0"]):
        found = tokenize_classification(table, Columns(), tokenizer(), labels, 8)
        assert [example["labels"] for example in found] == [0, 1, IGNORED, IGNORED]
    written = Table("m", {"text": ["buy now"] * 3, "label": ["0.0", "1.0", ""]})
    found = tokenize_classification(written, Columns(), tokenizer(), ["0", "1"], 8)
    assert [example["labels"] for example in found] == [0, 1, IGNORED]
    assert declared_labels("from-data", written, Columns(), None)[0] == ("0.0", "1.0")
    apart = Table("m", {"text": ["buy now"] * 2, "label": ["1.0", "1"]})
    found = tokenize_classification(apart, Columns(), tokenizer(), ["1", "1.0"], 8)
    assert [example["labels"] for example in found] == [1, 0]


def test_a_lone_surrogate_is_a_question_mark():
    table = Table("m", {"text": ["fine \ud83d"], "label": ["a"]})
    assert tokenize_classification(table, Columns(), tokenizer(), ("a", "b"), 9)


BROKEN = {
    "a.csv": f"text,label\nfine,ham\n{CANARY},ham,too,many\n",
    "b.csv": f'text,label\n"{CANARY} never closed,ham\nmore,ham',
    "a.jsonl": f'{{"text": "fine"}}\n{{"text": "{CANARY}", \n',
    "b.jsonl": f'{{"text": "fine"}}\n["{CANARY}"]\n',
    "c.jsonl": f"{CANARY}\n",
    "a.parquet": f"PAR1 {CANARY}",
    "empty.csv": "",
    "empty.jsonl": "",
    "empty.parquet": "",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_parsed_shows_no_row(tmp_path, name, capfd):
    """Parsers quote the row they stumble over; it must not get into an error, a traceback or a stream."""
    path = tmp_path / name
    path.write_text(BROKEN[name])
    with pytest.raises(DataError, match=name) as caught:
        read_table(path)
    printed = "".join(traceback.format_exception(caught.value, chain=True))
    for text in (str(caught.value), repr(caught.value), printed, *capfd.readouterr()):
        assert CANARY not in text


def test_unreadable_files(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"none\.csv does not exist"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "mail.txt").write_text(CANARY)
    with pytest.raises(DataError, match="unknown kind"):
        read_table(tmp_path / "mail.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be read as a data set folder"):
        read_table(tmp_path / "empty")
    import pyarrow.csv

    def denied(*args, **options):
        raise PermissionError(CANARY)

    monkeypatch.setattr(pyarrow.csv, "read_csv", denied)
    monkeypatch.setattr(pyarrow.csv, "open_csv", denied)
    with pytest.raises(DataError, match=r"cannot be read as \.csv \(PermissionError\)") as caught:
        read_table(write(tmp_path / "a.csv", {"text": ["x"]}))
    assert CANARY not in str(caught.value)


def test_hub_names(monkeypatch):
    import datasets

    asked = []

    def load(name, split):
        asked.append((name, split))
        if name == "no/thing":
            raise ConnectionError(CANARY)
        return datasets.Dataset.from_dict({"text": TEXTS})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_table("imdb").columns == {"text": TEXTS}
    read_table("org/mail:test")
    assert asked == [("imdb", "train"), ("org/mail", "test")]
    with pytest.raises(DataError, match=r"no/thing is no file here.*\(ConnectionError\)") as caught:
        read_table("no/thing")
    assert CANARY not in str(caught.value)


def test_saved_data_set_of_several_splits(tmp_path):
    import datasets

    one = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(DataError, match=r"several splits.*train, test"):
        read_table(tmp_path / "both")


def test_class_names_of_a_saved_data_set(tmp_path):
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["ham", "spam"])}
    )
    data = {"text": TEXTS, "label": [1, 0, 0]}
    datasets.Dataset.from_dict(data, features=features).save_to_disk(str(tmp_path / "named"))
    table = read_table(tmp_path / "named")
    with pytest.raises(DataError, match="The set of labels must be public"):
        declared_labels(None, table, Columns(), None)  # `class_encode_column` may have read them off the rows
    with pytest.raises(DataError, match="The set of labels must be public"):
        declared_labels(None, table, Columns(), ("no", "yes"))  # no row would have a label of the model's
    published = replace(table, names_are_public=True)
    assert declared_labels(None, published, Columns(), None) == (("ham", "spam"), "data set schema")
    assert declared_labels("from-data", table, Columns(), None)[0] == ("ham", "spam")
    for labels, expected in ((("ham", "spam"), [1, 0, 0]), (("spam", "ham"), [0, 1, 1])):
        examples = tokenize_classification(table, Columns(), tokenizer(), labels, 16)
        assert [e["labels"] for e in examples] == expected


def test_where_labels_come_from():
    table, model = Table("mail.csv", {"text": TEXTS, "label": LABELS}), ("no", "yes")
    assert declared_labels("ham, spam", table, Columns(), model) == (("ham", "spam"), "declared")
    assert declared_labels(None, table, Columns(), model) == (("no", "yes"), "model config")
    assert declared_labels("from-data", table, Columns(), model) == (("ham", "spam"), "from-data")
    with pytest.raises(DataError, match="must be public: declare it"):
        declared_labels(None, table, Columns(), None)
    for spec in ("ham", "ham,ham"):
        with pytest.raises(DataError, match="at least two different labels"):
            declared_labels(spec, table, Columns(), None)
    with pytest.raises(DataError, match="no label column"):
        declared_labels("from-data", Table("m", {"text": TEXTS}), Columns(), None)


def test_undeclared_label_is_ignored():
    table = Table("m", {"text": ["buy", "now", "you", "at"], "label": ["ham", CANARY, None, "spam"]})
    examples = tokenize_classification(table, Columns(), tokenizer(), ("ham", "spam"), 16)
    assert [e["labels"] for e in examples] == [0, IGNORED, IGNORED, 1]


def test_missing_and_empty_texts_are_empty():
    table = Table("m", {"text": [None, "", "buy now"], "label": ["a", "b", "a"]})
    examples = tokenize_classification(table, Columns(), tokenizer(), ("a", "b"), 16)
    assert [e["input_ids"] for e in examples] == [[2, 3], [2, 3], [2, 6, 7, 3]]
    assert tokenize_classification(Table("m", {"text": [], "label": []}), Columns(), tokenizer(), ("a", "b"), 9) == []


def test_text_pairs():
    table = Table("m", {"text_a": ["buy", "see you"], "text_b": ["now", None], "label": ["a", "b"]})
    examples = tokenize_classification(table, Columns(), tokenizer(), ("a", "b"), 16)
    assert examples[0]["input_ids"] == [2, 6, 3, 7, 3]
    assert examples[0]["token_type_ids"] == [0, 0, 0, 1, 1]
    assert examples[1]["input_ids"] == [2, 8, 9, 3, 3]


@pytest.mark.parametrize("max_length", [4, 7])
def test_long_texts_are_cut(max_length):
    table = Table("m", {"text": ["buy " * 50], "label": ["a"]})
    (example,) = tokenize_classification(table, Columns(), tokenizer(), ("a", "b"), max_length)
    assert len(example["input_ids"]) == max_length
    (example,) = tokenize_causal(table, Columns(), tokenizer(pairs=False, eos_token="</s>"), max_length)
    assert example == {"input_ids": [6] * max_length, "labels": [6] * max_length}


def test_causal_plain_text():
    causal = tokenizer(pairs=False, bos_token="<s>", eos_token="</s>")
    examples = tokenize_causal(Table("m", {"text": ["buy now", None, ""]}), Columns(), causal, 16)
    assert examples[0] == {"input_ids": [4, 6, 7, 5], "labels": [IGNORED, 6, 7, 5]}
    assert examples[1] == examples[2] == {"input_ids": [4, 5], "labels": [IGNORED, 5]}
    bare = tokenizer(pairs=False)
    (example,) = tokenize_causal(Table("m", {"text": [""]}), Columns(), bare, 16)
    assert len(example["input_ids"]) == 1
    assert example["labels"] == [IGNORED]


def test_prompt_and_completion():
    causal = tokenizer(pairs=False, eos_token="</s>")
    table = Table("m", {"prompt": ["see you", "see " * 20], "completion": ["at noon", "buy"]})
    short, long = tokenize_causal(table, Columns(), causal, 8)
    assert short == {"input_ids": [8, 9, 10, 11, 5], "labels": [IGNORED, IGNORED, 10, 11, 5]}
    assert long == {"input_ids": [8] * 8, "labels": [IGNORED] * 8}  # contributes zero
    other = Table("m", {"q": ["see you"], "a": ["at noon"]})
    assert tokenize_causal(other, Columns(prompt="q", completion="a"), causal, 8) == [short]
    (alone,) = tokenize_causal(other, Columns(completion="a"), causal, 8)
    assert alone == {"input_ids": [10, 11, 5], "labels": [10, 11, 5]}


def test_collator_pads_to_exactly_the_given_length():
    examples = [
        {"input_ids": [7, 8], "token_type_ids": [0, 1], "labels": 2},
        {"input_ids": [9], "token_type_ids": [0], "labels": IGNORED},
    ]
    batch = Collator(5)(examples, 4)
    assert batch["input_ids"].tolist() == [[7, 8, 5, 5], [9, 5, 5, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]
    assert batch["labels"].tolist() == [2, IGNORED]
    causal = Collator(5)([{"input_ids": [7, 8], "labels": [IGNORED, 8]}], 3)
    assert causal["labels"].tolist() == [[IGNORED, 8, IGNORED]]
    assert all(value.dtype == torch.long for value in (*batch.values(), *causal.values()))


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
@pytest.mark.parametrize("max_length", [2, 8, 512])
def test_synthetic_examples_fit_the_probe(task, max_length):
    examples = synthetic_examples(task, 50, 3, max_length, token_types=True)
    assert len(examples) >= 5
    assert all(1 <= len(e["input_ids"]) <= max_length for e in examples)
    buckets = [bucket_of(len(e["input_ids"]), length_buckets(max_length)) for e in examples]
    assert {buckets.count(bucket) for bucket in buckets} == {6}
    assert set(buckets) == {length_buckets(max_length)[0], max_length}
    assert all(0 <= token < 50 for e in examples for token in e["input_ids"])
    assert examples == synthetic_examples(task, 50, 3, max_length, token_types=True)


READER = """
import sys
from dpsb.data import read_table
for path in sys.argv[1:]:
    assert len(read_table(path)) == 3
"""


def test_local_files_are_copied_to_no_cache(tmp_path):
    files = [str(write(tmp_path / name, {"text": TEXTS, "label": LABELS})) for name in KINDS]
    cache = tmp_path / "cache"
    for name in ("hf", "datasets", "home"):
        (cache / name).mkdir(parents=True)
    places = {"HF_HOME": "hf", "HF_DATASETS_CACHE": "datasets", "HOME": "home", "TMPDIR": "home"}
    environment = {**os.environ, **{name: str(cache / place) for name, place in places.items()}}
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", READER, *files], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(tmp_path.rglob("*")) == before
