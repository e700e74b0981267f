"""From a Trainer's data set to the examples of ``fit``: each a function of its own row alone.

Trainer's collators pad to the longest neighbour; here an example is cut to its own tokens and padded to its own public
length (``dpsb.sampling``). What the model cannot take counts as an empty example and contributes zero, because an
error that one person's row raises would tell that the row is there.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from dpsb.data import Collator, synthetic_examples
from dpsb.losses import IGNORED
from dpsb.models import longest_input
from dpsb.trainer.refusals import TrainerArgumentError

_LABELS = ("labels", "label", "label_ids")
_USED = ("input_ids", "attention_mask", "token_type_ids", *_LABELS)
_HARMLESS = ("return_dict", "use_cache", "output_attentions", "output_hidden_states", "logits_to_keep")


@dataclass(frozen=True, kw_only=True)
class Form:
    """What an example looks like for a model. Public.

    Args:
      task: ``"classification"`` or ``"causal-lm"``.
      vocab_size: Rows of the embedding.
      num_labels: Number of classes, 0 for a language model.
      max_length: Most tokens of an example.
      token_types: How many kinds of ``token_type_ids`` the model is given, 0 for none.
      pad_token_id: What to pad with.
    """

    task: str
    vocab_size: int
    num_labels: int
    max_length: int
    token_types: int
    pad_token_id: int

    def synthetic(self) -> list[dict[str, Any]]:
        """Random examples for the probe. Public."""
        return synthetic_examples(self.task, self.vocab_size, self.num_labels, self.max_length, bool(self.token_types))

    def collator(self, device: Any) -> Collator:
        return Collator(self.pad_token_id, device)


@dataclass(frozen=True)
class TokenExamples(Sequence[Any]):
    """The examples of a data set as ``fit`` wants them; rows are read when they are drawn. Sensitive.

    Guarantees:
      * An example is a function of its own row: ``input_ids`` without padding on either side and cut to
        ``max_length``; ``labels`` as the data set has them, or every token of a language model's text where it has
        none.
      * A row without tokens, or with ids or labels outside the model's, is one ignored token: its loss and gradient
        are zero.
    """

    dataset: Any
    form: Form

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return example_of(self.dataset[index], self.form)


def example_of(row: Mapping[str, Any], form: Form) -> dict[str, Any]:
    """One row as an example; see :class:`TokenExamples`. Sensitive."""
    try:
        example = _as_it_stands(row, form)
    except (KeyError, TypeError, ValueError, RuntimeError):  # no tokens, or a number where a list should be, for one
        return _empty(form)
    return example if _usable(example, form) else _empty(form)


def _as_it_stands(row: Mapping[str, Any], form: Form) -> dict[str, Any]:
    ids = _listed(row["input_ids"])
    mask = row.get("attention_mask")
    kept = _own_part([1] * len(ids) if mask is None else _listed(mask), form.max_length)
    given = next((row[name] for name in _LABELS if row.get(name) is not None), None)
    example: dict[str, Any] = {"input_ids": ids[kept]}
    if form.task == "classification":
        example["labels"] = _class_of(given, form.num_labels)
    else:
        example["labels"] = ids[kept] if given is None else _listed(given)[kept]
    if form.token_types:
        types = row.get("token_type_ids")
        example["token_type_ids"] = [0] * len(example["input_ids"]) if types is None else _listed(types)[kept]
    return example


def _listed(value: Any) -> Any:
    if value is None:
        return []
    return value.tolist() if hasattr(value, "tolist") else list(value)


def _own_part(mask: Sequence[int], max_length: int) -> slice:
    """From the first to the last token that is attended to, at most ``max_length`` of them."""
    attended = [position for position, flag in enumerate(mask) if flag]
    if not attended:
        return slice(0, 0)
    return slice(attended[0], min(attended[-1] + 1, attended[0] + max_length))


def _class_of(value: Any, num_labels: int) -> int:
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, int) and 0 <= value < num_labels else IGNORED


def _usable(example: Mapping[str, Any], form: Form) -> bool:
    ids, labels = example["input_ids"], example["labels"]
    if not ids or not all(isinstance(token, int) and 0 <= token < form.vocab_size for token in ids):
        return False
    types = example.get("token_type_ids")
    if types is not None and (len(types) != len(ids) or not all(kind in range(form.token_types) for kind in types)):
        return False
    if form.task == "classification":
        return True
    fitting = (isinstance(label, int) and (label == IGNORED or 0 <= label < form.vocab_size) for label in labels)
    return len(labels) == len(ids) and all(fitting)


def _empty(form: Form) -> dict[str, Any]:
    example: dict[str, Any] = {"input_ids": [form.pad_token_id]}
    example["labels"] = IGNORED if form.task == "classification" else [IGNORED]
    return {**example, "token_type_ids": [0]} if form.token_types else example


def form_of(model: Any, tokenizer: Any, dataset: Any, max_length: int | None) -> Form:
    """The form of the examples for a model. Reads the model, the tokenizer and the data set's schema; no row.

    Args:
      model: A model of transformers, PEFT-wrapped or not.
      tokenizer: The Trainer's ``processing_class``, or None.
      dataset: Its schema, where it has one, counts as public.
      max_length: Most tokens of an example, or None for what the model's positions allow.

    Raises:
      TrainerArgumentError: If the model is for another task, the data set has a column that the model would take and
        dpsb does not pad, or no length is known.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    task = _task_of(base)
    accepted = set(inspect.signature(base.forward).parameters)
    columns = getattr(dataset, "column_names", None)
    _check_labels(task, getattr(dataset, "features", None))
    odd = sorted(set(columns or ()) & accepted - {*_USED, *_HARMLESS})
    if odd:
        raise TrainerArgumentError(
            f"The data set's column {odd[0]!r} would reach the model, and dpsb pads {', '.join(_USED[:3])} and labels "
            "alone; remove the column."
        )
    if "seq_lengths" in (columns or ()):
        raise TrainerArgumentError(
            "The data set's column 'seq_lengths' says that its rows are packed from several examples, so clipping a "
            "row bounds no example; give one example a row."
        )
    if columns is not None and "input_ids" not in columns:
        raise TrainerArgumentError(
            "Expected a tokenized data set with the column 'input_ids'; map the tokenizer over it first."
        )
    vocabulary, known = int(base.get_input_embeddings().weight.shape[0]), 0 if tokenizer is None else len(tokenizer)
    if known > vocabulary:
        raise TrainerArgumentError(
            f"The tokenizer has {known} tokens and the model embeds {vocabulary}: examples with one of the others "
            "would not count. Resize the embeddings before the adapter is added."
        )
    longest = longest_input(base, tokenizer if tokenizer is not None else SimpleNamespace(model_max_length=None))
    length = min(bound for bound in (max_length, longest, 1 << 30) if bound is not None)
    if length == 1 << 30:
        raise TrainerArgumentError(
            f"Expected PrivacyArguments.max_length={max_length!r} to be a number: the model's positions do not limit "
            "how long an example may be, and padded lengths must be public."
        )
    asked = "token_type_ids" in (getattr(tokenizer, "model_input_names", ()) if columns is None else columns)
    pads = (getattr(tokenizer, "pad_token_id", None), getattr(base.config, "pad_token_id", None), 0)
    return Form(
        task=task,
        vocab_size=vocabulary,
        num_labels=int(base.config.num_labels) if task == "classification" else 0,
        max_length=length,
        token_types=int(getattr(base.config, "type_vocab_size", 0)) if asked and "token_type_ids" in accepted else 0,
        pad_token_id=next(pad for pad in pads if isinstance(pad, int) and 0 <= pad < vocabulary),
    )


def _task_of(base: Any) -> str:
    from transformers.models.auto import modeling_auto

    name = type(base).__name__
    if name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "causal-lm"
    if name in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        problem = getattr(base.config, "problem_type", None)
        if problem not in (None, "single_label_classification") or base.config.num_labels < 2:
            raise TrainerArgumentError(
                f"problem_type={problem!r} with num_labels={base.config.num_labels!r} is not a choice among classes, "
                "which is the one classification loss that dpsb has; use fit with a per-example loss of your own."
            )
        return "classification"
    raise TrainerArgumentError(
        f"model={name!r} is neither a causal language model nor a sequence classifier; use fit with a per-example loss "
        "of your own."
    )


def _check_labels(task: str, features: Mapping[str, Any] | None) -> None:
    """Refuses a classifier's data set whose schema has no whole numbers as labels: every row would be ignored."""
    if task != "classification" or features is None:
        return
    kinds = [str(getattr(features[name], "dtype", "?")) for name in _LABELS if name in features]
    if not kinds or not kinds[0].startswith(("int", "uint", "bool")):
        raise TrainerArgumentError(
            f"Expected the data set to have a column 'labels' (or 'label') of whole numbers, got "
            f"{kinds[0] if kinds else 'none'}; map the names of the classes to numbers first."
        )
