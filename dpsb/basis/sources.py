"""Public data for a basis: another label space or task is allowed, and what was done about it is said."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import file_digest
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from dpsb.basis._common import public_generator
from dpsb.basis.gradient import mean_gradients
from dpsb.data import (
    Columns,
    DataError,
    Table,
    chosen_columns,
    class_indices,
    prompts_and_completions,
    read_table,
    tokenize_causal,
    tokenize_classification,
)
from dpsb.labels import LONGEST_LABEL, MOST_LABELS
from dpsb.losses import IGNORED, LossFn
from dpsb.models import in_head
from dpsb.probe import Collate, Example

EXAMPLES = 512
"""How many public examples a basis is computed from."""

_ROWS_OF_THE_RUN = 0.9
"""The share of a file's rows that must have a label of the run for its labels to be the run's."""

_Row = TypeVar("_Row")


def public_sample(rows: Sequence[_Row], count: int) -> list[_Row]:
    """At most so many rows, drawn with a fixed public seed and in the order drawn.

    Files are often sorted by label, or alternate: the first rows, or every other one, could all be of one class.
    """
    order = torch.randperm(len(rows), generator=public_generator())
    return [rows[i] for i in order[:count].tolist()]


@dataclass(frozen=True)
class PublicSet:
    """A public data set, tokenized for the model of a run.

    Args:
      name: Its file name, for the plan.
      examples: With ``labels`` as the loss wants them, as :func:`public_sample` draws them: any part stands for all.
      own_labels: Number of classes where it has a label space of its own; 0 where the model's head fits.
      note: What was done about labels or task, for the plan.
      run_labels: Whether its rows carry the run's own labels.
    """

    name: str
    examples: Sequence[Example]
    own_labels: int
    note: str
    run_labels: bool = False


def read_public(
    source: str | Table, task: str, columns: Columns, tokenizer: Any, labels: Sequence[str], max_length: int
) -> PublicSet:
    """Reads a public file (or takes its table) for a basis.

    Columns of the private file are used where they exist, else the usual ones.

    For classification with labels of its own the gradient is taken through a random head of that many classes, which
    :func:`public_gradients` puts in for the time. Without labels, or with too many, they are drawn at random: the
    gradient then shows what the texts excite, not what tells classes apart.

    Raises:
      DataError: If the file is missing, has no usable column or no rows.
    """
    table = source if isinstance(source, Table) else read_table(source)
    name, here = Path(table.source).name, columns_here(table, columns)
    if not len(table):
        raise DataError(f"{table.source} holds no rows to compute a basis from.")
    found = chosen_columns(table, here, "classification")
    if task != "classification":
        unused = found["label"]
        note = "language modelling on its text" + (f"; its column {unused!r} is not used" if unused else "")
        return PublicSet(name, tokenize_causal(_sampled(table), here, tokenizer, max_length), 0, note)
    text, pair = _text_and_pair(table, here)
    here = replace(here, text=text, text_pair=pair)
    column = found["label"]
    own = _label_set(table, column) if column else ()
    occur, of_the_run = _labels_of_the_run(table, column, labels) if column and own else (0, False)
    if of_the_run:
        own_labels, use, note = 0, tuple(labels), "the labels of the run"
    elif own:
        own_labels, use = len(own), own
        known = f" ({occur} of the run's {len(labels)} labels occur)" if occur else ""
        note = f"another label space{known}: a random head of {len(own)} classes for the gradient"
    else:
        own_labels, use, note = 0, tuple(labels), "no usable labels: drawn at random"
        drawn = torch.randint(len(use), (len(table),), generator=public_generator()).tolist()
        table = Table(table.source, {**table.columns, "label": [use[i] for i in drawn]})
        here = replace(here, label="label")
    examples = tokenize_classification(_sampled(table), here, tokenizer, use, max_length)
    return PublicSet(name, examples, own_labels, note, of_the_run)


def stated(source: str, labels: str) -> dict[str, str]:
    """What a plan says of a public file: its name, its SHA-256 if it is one file, and what was done about its labels.

    Whoever is handed the file can so tell that it is the one that A and B are from.
    """
    return {"source": source, **sha256_of(source), "labels": labels}


def sha256_of(source: str, prefix: str = "source") -> dict[str, str]:
    """``{"source_sha256": ...}`` of a file's bytes; nothing for a folder, a part of a file or a name on the Hub."""
    if not Path(source).is_file():
        return {}
    with Path(source).open("rb") as file:
        return {f"{prefix}_sha256": file_digest(file, "sha256").hexdigest()}


def digests(sources: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of each of several files that a basis is chosen from, as far as they are files."""
    named = (sha256_of(source, f"candidate_{i + 1}") for i, source in enumerate(sources))
    return {name: value for entry in named for name, value in entry.items()}


def columns_here(table: Table, columns: Columns) -> Columns:
    """The named columns, as far as this table has them."""
    return Columns(**{part: given if given in table.columns else None for part, given in vars(columns).items()})


def columns_read(table: Table, columns: Columns, task: str) -> list[str]:
    """The columns whose text a model is given, of a private or a public table: what tokenization takes."""
    if task == "classification":
        text, pair = _text_and_pair(table, columns)
        read = [] if text is None else [text, pair]
    else:
        said = chosen_columns(table, columns, task)
        pairs = prompts_and_completions(table, columns) is not None
        read = [said["prompt"], said["completion"]] if pairs else [said["text"]]
    return [name for name in dict.fromkeys(read) if name is not None]


def _text_and_pair(table: Table, columns: Columns) -> tuple[str | None, str | None]:
    """The columns that a classifier is given: a public file without one of text may have prompts and completions."""
    found = chosen_columns(table, columns, "classification")
    if found["text"] is not None:
        return found["text"], found["text_pair"]
    said = chosen_columns(table, columns, "causal-lm")
    return said["prompt"] or said["completion"], said["completion"] or found["text_pair"]


def _sampled(table: Table) -> Table:
    """Twice as many rows as a basis uses: a ranking and a diagnosis need another half."""
    rows = public_sample(range(len(table)), 2 * EXAMPLES)
    columns = {name: [column[i] for i in rows] for name, column in table.columns.items()}
    return replace(table, columns=columns)


def _label_set(table: Table, column: str) -> tuple[str, ...]:
    if names := table.class_names.get(column):
        return names
    values = {*table.labels(column)} - {""}
    usable = 2 <= len(values) <= MOST_LABELS and all(len(value) <= LONGEST_LABEL for value in values)
    return tuple(sorted(values)) if usable else ()


def _labels_of_the_run(table: Table, column: str, labels: Sequence[str]) -> tuple[int, bool]:
    """How many labels of the run occur, and whether the file is labelled with them; the other rows count for nothing.

    Numbers from 0 name classes of any task, so it takes both: nine rows in ten have a label of the run, and most of
    the run's labels occur (of those that so few rows could show).
    """
    values = table.labels(column)
    known = [index for index in class_indices(values, labels) if index != IGNORED]
    occur = len(set(known))
    enough = 2 * occur > min(len(labels), len(values)) and len(known) >= _ROWS_OF_THE_RUN * len(values)
    return occur, enough


@contextmanager
def own_head(model: nn.Module, num_labels: int, std: float) -> Iterator[None]:
    """Lets the classifier's last linear layer answer with a random head of so many classes; 0 changes nothing."""
    handles = []
    if num_labels:
        generator = public_generator()
        found = [module for name, module in model.named_modules() if isinstance(module, nn.Linear) and in_head(name)]
        for module in found[-1:] + [m for m in found[:-1] if m.out_features == found[-1].out_features]:
            weight = (torch.randn(num_labels, module.in_features, generator=generator) * std).to(module.weight)
            handles.append(module.register_forward_hook(_answer_with(weight)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _answer_with(weight: torch.Tensor) -> Any:
    return lambda _module, inputs, _output: F.linear(inputs[0], weight)


def batches_of(
    examples: Sequence[Example], collate: Collate, max_length: int, token_budget: int
) -> Iterator[Mapping[str, torch.Tensor]]:
    """Public examples in microbatches, all padded alike."""
    size = max(1, token_budget // max_length)
    return (collate(examples[i : i + size], max_length) for i in range(0, len(examples), size))


def public_gradients(
    model: nn.Module,
    loss_fn: LossFn,
    public_set: PublicSet,
    collate: Collate,
    max_length: int,
    token_budget: int,
    head_std: float,
) -> dict[str, torch.Tensor]:
    """The mean gradient of each target weight over the first 512 examples of a public set, (out, in). Public.

    Raises:
      DataError: If it is zero or not finite.
    """
    batches = batches_of(public_set.examples[:EXAMPLES], collate, max_length, token_budget)
    with own_head(model, public_set.own_labels, head_std):
        gradients = mean_gradients(model, loss_fn, batches)
    size = sum(float(gradient.double().square().sum()) for gradient in gradients.values())
    if not math.isfinite(size):
        raise DataError(f"{public_set.name} gives a gradient that is not finite, as weights or losses are.")
    if size == 0:
        raise DataError(f"{public_set.name} gives no gradient to start from: no row has a usable label.")
    return gradients
