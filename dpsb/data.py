"""From files to tokenized examples. No text of a row ever reaches an error message or a second file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dpsb.losses import IGNORED
from dpsb.parts import owner_of, part_of
from dpsb.sampling import length_buckets

_TEXT = (
    "text",
    "text_a",
    "sentence",
    "sentence1",
    "premise",
    "question",
    "content",
    "body",
    "message",
    "document",
)
_PAIR = ("text_b", "text_pair", "sentence2", "hypothesis", "answer", "context")
USUAL_LABEL = ("label", "labels", "category", "class", "intent")
_PROMPT = ("prompt", "instruction", "source", "input")
_COMPLETION = ("completion", "response", "output", "target")

_HEADER = re.compile(r"[A-Za-z_][\w.-]{0,39}")
_WHOLE = re.compile(r"-?\d+\.0")
_CSV_BLOCK = 1 << 26  # a row must fit into a block


class DataError(ValueError):
    """A file or column that cannot be used; the message names it and shows no row."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the columns to use; ``None`` means: find it by its usual name. Public."""

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    prompt: str | None = None
    completion: str | None = None


@dataclass(frozen=True)
class Table:
    """Columns of equal length, and the names of a label column's classes where the file itself has them.

    The names are public (``names_are_public``) in a data set on the Hub, whose card declares them. In a folder that was
    saved here they may have been read off the rows, as `class_encode_column` does.
    """

    source: str
    columns: dict[str, list[Any]]
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    names_are_public: bool = False

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def column(self, name: str) -> list[Any]:
        """The values of a column.

        Raises:
          DataError: If there is no such column; the message lists those that exist.
        """
        if name not in self.columns:
            raise DataError(f"{self.source} has no column {name!r}; {self.described()}.")
        return self.columns[name]

    def labels(self, column: str) -> list[str]:
        """The values of a label column as text, numbers of named classes as their names; a missing one is empty.

        Missing are null and NaN. A whole number is written without a point: a column of numbers with gaps comes from
        pandas as 0.0 and 1.0.
        """
        names = self.class_names.get(column, ())
        return [names[v] if isinstance(v, int) and 0 <= v < len(names) else _label(v) for v in self.column(column)]

    def described(self) -> str:
        """The column names, or only their number where they look like a first row instead of a header."""
        if all(_HEADER.fullmatch(name) for name in self.columns):
            return f"it has {', '.join(map(repr, self.columns))}"
        return f"it has {len(self.columns)} columns, whose names do not look like a header line"

    def pick(self, given: str | None, usual: Sequence[str]) -> str | None:
        """The column the user gave, or the first of the usual names that exists."""
        if given is not None:
            self.column(given)
            return given
        return next((name for name in usual if name in self.columns), None)


def read_table(source: str | Path) -> Table:
    """Reads a Parquet, JSON-lines or CSV file, a data set saved by Hugging Face ``datasets``, or a Hub id.

    Local files are read straight into memory: nothing is copied to a cache folder.

    Args:
      source: A path; or ``NAME`` or ``NAME:SPLIT`` on the Hub, where there is a network; or a part of either, see
        :mod:`dpsb.parts`.

    Raises:
      DataError: If the file is missing or cannot be parsed. The parser's own message is withheld, because parsers
        quote the rows they stumble over.
    """
    path, name = Path(source), str(source)
    part = part_of(name)
    if part is not None and not path.exists():
        whole = read_table(part.source)
        if part.by:
            whole.column(part.by)
        rows = part.rows(whole.columns)
        return replace(whole, source=name, columns={key: [v[i] for i in rows] for key, v in whole.columns.items()})
    if not path.exists():
        if path.suffix or name.count("/") > 1 or name.startswith((".", "/", "~")):
            raise DataError(f"{name} does not exist.")
        return _from_hub(name)
    readers = {".parquet": _read_parquet, ".jsonl": _read_json, ".json": _read_json, ".csv": _read_csv}
    reader = _read_saved if path.is_dir() else readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{name} is of an unknown kind; use .parquet, .jsonl, .csv or a folder saved by `datasets`.")
    try:
        table = reader(path)
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever the parser says may quote a row
        raise DataError(
            f"{name} cannot be read as {path.suffix or 'a data set folder'} ({type(error).__name__})."
        ) from None
    if not table.columns:
        raise DataError(f"{name} has no columns.")
    return table


def _read_parquet(path: Path) -> Table:
    import pyarrow.parquet

    return Table(str(path), pyarrow.parquet.read_table(path).to_pydict())


def _read_json(path: Path) -> Table:
    """One object per line (or one array of objects), each on its own: no row changes another's types or columns.

    The first object's keys are the schema, which counts as public.
    """
    text = path.read_text(encoding="utf-8")
    whole = text.lstrip().startswith("[")
    rows = json.loads(text) if whole else [json.loads(line) for line in text.split("\n") if line.strip()]
    names = list(rows[0]) if rows else []
    return Table(str(path), {name: [row.get(name) for row in rows] for name in names})


def _read_csv(path: Path) -> Table:
    """Every value as the text that stands in the file: inferred types would let one row change the others."""
    import pyarrow.csv

    parsing = pyarrow.csv.ParseOptions(newlines_in_values=True)
    reading = pyarrow.csv.ReadOptions(block_size=_CSV_BLOCK)
    with pyarrow.csv.open_csv(path, parse_options=parsing, read_options=reading) as reader:
        text = dict.fromkeys(reader.schema.names, pyarrow.string())
    conversion = pyarrow.csv.ConvertOptions(column_types=text, strings_can_be_null=False)
    table = pyarrow.csv.read_csv(path, parse_options=parsing, read_options=reading, convert_options=conversion)
    return Table(str(path), table.to_pydict())


def _read_saved(path: Path) -> Table:
    import datasets

    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        raise DataError(f"{path} holds several splits; give the folder of one: {', '.join(loaded)}.")
    return _from_dataset(str(path), loaded)


def _from_hub(name: str) -> Table:
    import datasets

    repository, _, split = name.partition(":")
    try:
        loaded = _from_dataset(name, datasets.load_dataset(repository, split=split or "train"))
    except Exception as error:  # noqa: BLE001
        raise DataError(
            f"{name} is no file here and could not be loaded as a data set from the Hub ({type(error).__name__})."
        ) from None
    return replace(loaded, names_are_public=True)


def _from_dataset(source: str, dataset: Any) -> Table:
    names = {column: tuple(feature.names) for column, feature in dataset.features.items() if hasattr(feature, "names")}
    return Table(source, {column: list(dataset[column]) for column in dataset.column_names}, names)


def check_columns(table: Table, columns: Columns, task: str) -> tuple[str, str | None, str]:
    """The columns of text, second text and label; of a causal LM the first alone, empty where it has completions.

    Raises:
      DataError: If a column that the task needs is missing; the message lists those that exist.
    """
    found = chosen_columns(table, columns, task)
    text, pair, label = found["text"], found.get("text_pair"), found.get("label")
    if task != "classification":
        if text is None and prompts_and_completions(table, columns) is None:
            raise DataError(
                f"{table.source} has neither a text column nor prompt and completion; name them with --text-column, or "
                f"--prompt-column and --completion-column ({table.described()})."
            )
        return text or "", None, ""
    if text is None:
        raise DataError(f"{table.source} has no text column; name it with --text-column ({table.described()}).")
    if label is None:
        raise DataError(f"{table.source} has no label column; name it with --label-column ({table.described()}).")
    return text, pair, label


def tokenize_classification(
    table: Table, columns: Columns, tokenizer: Any, labels: Sequence[str], max_length: int
) -> list[dict[str, Any]]:
    """Tokenized examples with ``labels`` as class index. A row with a label outside the set gets ``IGNORED``.

    Texts are cut at ``max_length`` tokens; a missing text is an empty one. Sensitive.
    """
    text, pair, label = check_columns(table, columns, "classification")
    texts = [_text(value) for value in table.column(text)]
    pairs = None if pair is None else [_text(value) for value in table.column(pair)]
    encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length, verbose=False) if texts else {}
    targets = class_indices(table.labels(label), labels)
    keys = [key for key in ("input_ids", "token_type_ids") if key in encoded]
    return [{**{key: encoded[key][i] for key in keys}, "labels": target} for i, target in enumerate(targets)]


def tokenize_causal(
    table: Table, columns: Columns, tokenizer: Any, max_length: int, chat_template: bool = False
) -> list[dict[str, Any]]:
    """Tokenized examples with one label per token: the completion's tokens, or all of a plain text's. Sensitive.

    With ``chat_template`` a prompt is put as what a user says, in the tokenizer's own chat template, and the completion
    is the assistant's answer.
    """
    text, _, _ = check_columns(table, columns, "causal-lm")
    pairs = prompts_and_completions(table, columns) or ([""] * len(table), table.column(text))
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    cut = {"truncation": True, "max_length": max_length, "verbose": False}  # verbose would log a row's length
    examples = []
    for source, target in zip(*pairs, strict=True):
        head = prompt_ids(_text(source), tokenizer, max_length, chat_template)
        tail = tokenizer(_text(target), add_special_tokens=False, **cut)["input_ids"] + end
        ids = (head + tail)[:max_length] or [tokenizer.eos_token_id or 0]
        marks = ([IGNORED] * len(head) + tail)[: len(ids)]
        examples.append({"input_ids": ids, "labels": marks + [IGNORED] * (len(ids) - len(marks))})
    return examples


def prompts_and_completions(table: Table, columns: Columns) -> tuple[list[Any], list[Any]] | None:
    """The two columns of a table of pairs; None if it has plain texts. Sensitive."""
    prompt, completion = table.pick(columns.prompt, _PROMPT), table.pick(columns.completion, _COMPLETION)
    if completion is None or (prompt is None and columns.completion is None):
        return None
    return (table.column(prompt) if prompt else [""] * len(table)), table.column(completion)


def prompt_ids(prompt: str, tokenizer: Any, max_length: int, chat_template: bool = False) -> list[int]:
    """What stands before a completion, at most ``max_length`` tokens of it. Sensitive.

    Raises:
      DataError: If a chat template is wanted and the tokenizer has none.
    """
    cut = {"truncation": True, "max_length": max_length, "verbose": False}
    if chat_template:
        if not getattr(tokenizer, "chat_template", None):
            raise DataError("chat_template=True needs a tokenizer with a chat template, and this model's has none.")
        said = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False, **cut)["input_ids"])
    return list(tokenizer(prompt, **cut)["input_ids"]) if prompt else _start(tokenizer)


def _start(tokenizer: Any) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def class_indices(values: Sequence[str], labels: Sequence[str]) -> list[int]:
    """Each value's place among the labels, ``1.0`` and ``1`` being one; ``IGNORED`` for others. Sensitive."""
    index = {_whole(name): i for i, name in enumerate(labels)} | {name: i for i, name in enumerate(labels)}
    return [index.get(value, index.get(_whole(value), IGNORED)) for value in values]


def _label(value: Any) -> str:
    return "" if isinstance(value, float) and math.isnan(value) else _whole(_text(value), isinstance(value, float))


def _whole(text: str, number: bool = True) -> str:
    return text.removesuffix(".0") if number and _WHOLE.fullmatch(text) else text


def _text(value: Any) -> str:
    """A value as text; lone surrogates, which no tokenizer takes, become question marks."""
    return "" if value is None else str(value).encode("utf-8", "replace").decode("utf-8")


@dataclass(frozen=True)
class Collator:
    """Pads examples to one public length, so that an example's shape never depends on its neighbours.

    Args:
      pad_token_id: Token to pad with.
      device: Where the tensors go.
      target_length: For an encoder-decoder: labels are a sequence of their own, cut and padded to this public length.
    """

    pad_token_id: int
    device: torch.device | str = "cpu"
    target_length: int | None = None

    def __call__(self, examples: Iterable[Any], padded_length: int) -> dict[str, torch.Tensor]:
        """Model inputs of shape ``(n, padded_length)``, and ``labels`` of shape ``(n,)`` or ``(n, padded_length)``."""
        rows, target = list(examples), self.target_length or padded_length
        batch = {
            "input_ids": [self._pad(e["input_ids"], self.pad_token_id, padded_length) for e in rows],
            "attention_mask": [self._pad([1] * len(e["input_ids"]), 0, padded_length) for e in rows],
            "labels": [
                e["labels"] if isinstance(e["labels"], int) else self._pad(e["labels"][:target], IGNORED, target)
                for e in rows
            ],
        }
        if rows and "token_type_ids" in rows[0]:
            batch["token_type_ids"] = [self._pad(e["token_type_ids"], 0, padded_length) for e in rows]
        return {name: torch.tensor(values, dtype=torch.long, device=self.device) for name, values in batch.items()}

    @staticmethod
    def _pad(values: Sequence[int], filler: int, length: int) -> list[int]:
        return [*values, *[filler] * (length - len(values))]


def chosen_columns(table: Table, columns: Columns, task: str) -> dict[str, str | None]:
    """Which columns play which part, found by name where the user gave none. Public: it goes into the plan."""
    usual = {"text": _TEXT, "text_pair": _PAIR, "label": USUAL_LABEL, "prompt": _PROMPT, "completion": _COMPLETION}
    parts = ("text", "text_pair", "label") if task == "classification" else ("text", "prompt", "completion")
    return {part: table.pick(getattr(columns, part), usual[part]) for part in parts}


def by_unit(table: Table, column: str, examples: Sequence[Any]) -> list[list[Any]]:
    """The examples of each unit, units in order of first appearance. Sensitive, the number of units included.

    Values are compared as text without surrounding blanks: a person under two spellings is two units. A row whose
    value is missing (empty, null or NaN) belongs to nobody and is left out, without a word.

    Raises:
      DataError: If there is no such column.
    """
    units: dict[str, list[Any]] = {}
    for value, example in zip(table.column(column), examples, strict=True):
        name = owner_of(value)
        if name:
            units.setdefault(name, []).append(example)
    return list(units.values())


def synthetic_examples(
    task: str, vocab_size: int, num_labels: int, max_length: int, token_types: bool = False
) -> list[dict[str, Any]]:
    """Random tokens for the probe: six examples in the smallest length bucket and six in the largest. Public."""
    generator = torch.Generator().manual_seed(0)
    buckets = length_buckets(max_length)
    wanted = [min(length, max_length) for length in (9, 5, 14, 12, 7, 11)]
    if len(buckets) > 1:
        wanted += [max(buckets[-2] + 1, max_length - less) for less in (3, 7, 0, 1, 5, 2)]
    examples = []
    for index, length in enumerate(wanted):
        ids = torch.randint(0, vocab_size, (max(2, length),), generator=generator).tolist()
        labels = index % num_labels if task == "classification" else [IGNORED, *ids[1:]]
        examples.append({"input_ids": ids, "labels": labels})
        if token_types:
            examples[-1]["token_type_ids"] = [0] * len(ids)
    return examples
