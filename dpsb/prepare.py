"""The data side of a run: files, columns, labels, tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpsb.basis.sources import PublicSet, read_public
from dpsb.canaries import InputShape, example_losses
from dpsb.config import RunConfig
from dpsb.data import (
    Collator,
    Columns,
    DataError,
    Table,
    by_unit,
    chosen_columns,
    read_table,
    synthetic_examples,
    tokenize_causal,
    tokenize_classification,
)
from dpsb.labels import declared_labels
from dpsb.losses import IGNORED, LossFn, causal_lm_loss, classification_loss
from dpsb.models import config_labels, longest_input
from dpsb.shared_rows import check_not_shared, public_rows


@dataclass(frozen=True)
class Prepared:
    """The data side of a run. ``examples`` and ``units`` are sensitive, everything else is public."""

    examples: Sequence[Any]
    units: Sequence[Any]
    held_out: Sequence[Any] | None
    public: tuple[PublicSet, ...]
    warm_start: Sequence[Any]
    precondition: Sequence[Any]
    columns: dict[str, str | None]
    labels: tuple[str, ...]
    label_origin: str
    max_length: int

    @property
    def members(self) -> list[Any]:
        """Every example that training may read: with a unit column, those that somebody owns. Sensitive."""
        return [example for unit in self.units for example in (unit if isinstance(unit, list) else [unit])]


def labels_of(config: RunConfig, table: Table) -> tuple[tuple[str, ...], str]:
    """The public label set and where it was declared; empty where there are no labels."""
    if config.task != "classification":
        return (), "none"
    return declared_labels(config.labels, table, columns_of(config), config_labels(config.model))


def columns_of(config: RunConfig) -> Columns:
    """The columns that the user named."""
    return Columns(
        text=config.text_column,
        text_pair=config.text_pair_column,
        label=config.label_column,
        prompt=config.prompt_column,
        completion=config.completion_column,
    )


def targets_of(targets: str) -> str | list[str]:
    """The target modules as PEFT takes them.

    Raises:
      ValueError: If what follows ``re:`` is no regular expression.
    """
    if targets.startswith("re:"):
        try:
            re.compile(targets.removeprefix("re:"))
        except re.error as error:
            raise ValueError(f"targets={targets!r} is no regular expression: {error}.") from None
    if targets == "all-linear" or targets.startswith("re:"):
        return targets.removeprefix("re:")
    return [name.strip() for name in targets.split(",") if name.strip()]


def prepare(
    config: RunConfig, table: Table, base: Any, tokenizer: Any, labels: tuple[str, ...], origin: str
) -> Prepared:
    """Reads and tokenizes every file of a run.

    Raises:
      DataError: If a file cannot be used, or texts of ``max_length`` tokens would hold nothing of the text.
    """
    longest = longest_input(base, tokenizer)
    max_length = min(config.max_length, longest or config.max_length)

    def tokenized(source: str | Table | None, columns: Columns) -> list[dict[str, Any]] | None:
        if source is None:
            return None
        table = source if isinstance(source, Table) else read_table(source)
        if config.task == "classification":
            return tokenize_classification(table, columns, tokenizer, labels, max_length)
        return tokenize_causal(table, columns, tokenizer, max_length, config.chat_template)

    columns = columns_of(config)
    chosen = chosen_columns(table, columns, config.task)
    _check_room(max_length, tokenizer, bool(chosen.get("text_pair")), config.task)
    examples = tokenized(table, columns) or []
    units: Sequence[Any] = by_unit(table, config.unit_column, examples) if config.unit_column else examples
    if not units and config.num_examples is None:  # with a declared N no number of rows is special
        owned = f" with a value in the unit column {config.unit_column!r}" if config.unit_column else ""
        raise DataError(f"{config.data} holds no rows{owned}.")
    public = {source: read_table(source) for source in public_files(config)}
    held_out = None if config.eval_data is None else read_table(config.eval_data)
    check_public_rows(config, table, [] if held_out is None else [held_out], public)
    judged_on = tokenized(held_out, columns)
    if config.task == "classification":
        check_judgeable(f"eval_data={config.eval_data!r}", [example["labels"] for example in judged_on or ()], labels)
    return Prepared(
        examples=examples,
        units=units,
        held_out=judged_on,
        public=tuple(
            read_public(public[source], config.task, columns, tokenizer, labels, max_length)
            for source in config.public_sources
        ),
        warm_start=tokenized(public.get(config.warm_start or ""), columns) or (),
        precondition=_with_labels(config.precondition, tokenized(public.get(config.precondition or ""), columns) or ()),
        columns=chosen,
        labels=labels,
        label_origin=origin,
        max_length=max_length,
    )


def check_judgeable(source: str, targets: Sequence[int], labels: Sequence[str]) -> None:
    """Refuses held-out rows of which none counts, before any budget is spent. Outside the guarantee.

    Args:
      source: Where the rows are from, as the user named it.
      targets: Each row's place among the labels.
      labels: Of the run.

    Raises:
      DataError: If no row has one of the labels.
    """
    if targets and all(target == IGNORED for target in targets):
        raise DataError(
            f"{source}: no row has one of the labels {', '.join(map(repr, labels[:9]))}: "
            "check how they are spelt there. The same goes for the training rows, where a row with another label "
            "counts for nothing and nobody is told."
        )


def _check_room(max_length: int, tokenizer: Any, pair: bool, task: str) -> None:
    """Refuses a length at which every example is the tokenizer's special tokens and nothing of a text to learn from."""
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    least = special + 1 if task == "classification" else max(special + 1, 2)  # a next token needs one before it
    if max_length < least:
        raise DataError(
            f"Expected max_length={max_length!r} of at least {least}: {special} tokens of every example are the "
            "tokenizer's own."
        )


def check_public_rows(
    config: RunConfig, private: Table, held_out: Sequence[Table], public: Mapping[str, Table]
) -> None:
    """Refuses public files with private rows in them, and a warm start from rows that the run is judged on.

    Args:
      config: Settings.
      private: The training rows.
      held_out: What is judged on.
      public: The tables of :func:`public_files`, by what the user named them.

    Raises:
      SharedRowsError: With the number of such rows, for the operator's screen.
    """
    columns = columns_of(config)
    stated = {source: public_rows(table, columns, config.task) for source, table in public.items()}
    check_not_shared(private, list(stated.values()), columns, config.task)
    if config.warm_start:
        for table in held_out:
            check_not_shared(table, [stated[config.warm_start]], columns, config.task, owner="the held-out data")


def public_files(config: RunConfig) -> list[str]:
    """Every file that a run takes for public, as the user named it."""
    return [*config.public_sources, *(source for source in (config.warm_start, config.precondition) if source)]


def _with_labels(source: str | None, examples: Sequence[Any]) -> Sequence[Any]:
    if examples and all(example["labels"] == IGNORED for example in examples):  # never so for a language model
        raise DataError(f"{source} is of no use for second moments: no row has a usable label of the run.")
    return examples


def loss_of(config: RunConfig) -> LossFn:
    """The per-example loss of the task."""
    if config.task == "classification":
        return classification_loss
    return lambda model, batch: causal_lm_loss(model, batch, tokens_per_example=config.tokens_per_example)


def input_shape(config: RunConfig, base: Any, tokenizer: Any, prepared: Prepared) -> InputShape:
    """What random examples for this model look like. Public."""
    return InputShape(
        task=config.task,
        vocab_size=min(len(tokenizer), base.config.vocab_size),
        num_labels=len(prepared.labels),
        length=min(prepared.max_length, 16),
        token_types="token_type_ids" in tokenizer.model_input_names,
    )


def synthetic_of(config: RunConfig, base: Any, tokenizer: Any, prepared: Prepared) -> list[dict[str, Any]]:
    """Random examples for the probe, of the shortest and the longest kind. Public."""
    shape = input_shape(config, base, tokenizer, prepared)
    return synthetic_examples(config.task, shape.vocab_size, shape.num_labels, prepared.max_length, shape.token_types)


def losses_by_example(
    config: RunConfig, model: Any, loss_fn: LossFn, collate: Collator, prepared: Prepared
) -> Callable[[Sequence[Any]], Any]:
    """The loss of each of some examples, without gradients. As sensitive as they are."""
    return lambda examples: example_losses(model, examples, loss_fn, collate, prepared.max_length, config.token_budget)
