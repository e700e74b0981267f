"""What ``dpsb basis --diagnose`` does: public files and a model to a diagnosis of every basis. No private data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from dpsb.adapter import lora_layers
from dpsb.basis.diagnose import cut, diagnose_bases
from dpsb.basis.figures import Diagnosis
from dpsb.basis.rehearsal import Budget
from dpsb.basis.sources import read_public
from dpsb.config import TASKS
from dpsb.data import Collator, Columns, DataError
from dpsb.losses import LossFn, causal_lm_loss, classification_loss
from dpsb.models import HEAD_INIT_STD, add_lora, load_base, longest_input
from dpsb.prepare import targets_of

_SOME_LABELS = ("some label", "another label")


def diagnose_files(
    *,
    model: str,
    public: Sequence[str],
    task: str = "classification",
    labels: str | None = None,
    rank: int = 16,
    targets: str = "all-linear",
    width: int | None = None,
    budget: Budget | None = None,
    max_length: int = 128,
    examples: int = 256,
    token_budget: int = 4096,
    on_status: Callable[[str], None] = lambda _message: None,
) -> Diagnosis:
    """Judges every basis for a model, on public files alone.

    Args:
      model: As for ``dpsb train``.
      public: **Public** files, at least one. Each is cut in halves: bases are fitted on one and judged on the other.
      task: ``"classification"`` or ``"causal-lm"``.
      labels: The run's public label set, comma-separated; a file with other labels gets a random head of its own, as
        does every file if this is left out.
      rank: r.
      targets: ``"all-linear"``, names separated by commas, or ``re:REGEX``.
      width: K of a hybrid.
      budget: For the signal over the noise and for forecasts of paid bases.
      max_length: Tokens per example.
      examples: Of each file, both halves together.
      token_budget: Tokens per microbatch: memory and speed only.
      on_status: Told what is being computed.

    Raises:
      ValueError: If an argument is out of range; ``DataError``, ``ModelError``, ``WidthError`` and ``BudgetError``
        are such.
    """
    if task not in TASKS:
        raise ValueError(f"Expected task={task!r} to be one of {', '.join(TASKS)}.")
    if not public:
        raise DataError("A diagnosis needs public data: name at least one file (--public FILE).")
    if len(set(public)) != len(public):
        raise DataError(f"Expected public={','.join(public)!r} to name each file once.")
    for name, value in (("rank", rank), ("max_length", max_length), ("examples", examples)):
        if value < 1:
            raise ValueError(f"Expected {name}={value!r} of at least 1.")
    names = tuple(part.strip() for part in labels.split(",")) if labels else ()
    base, tokenizer = load_base(model, task, (names or _SOME_LABELS) if task == "classification" else ())
    longest = min(max_length, longest_input(base, tokenizer) or max_length)
    sets = [
        replace(read_public(source, task, Columns(), tokenizer, names or _SOME_LABELS, longest), name=source)
        for source in public
    ]
    adapted = add_lora(base, task, rank, targets_of(targets))
    if torch.cuda.is_available():
        adapted.to("cuda")
    collate = Collator(tokenizer.pad_token_id, next(adapted.parameters()).device)
    loss_fn: LossFn = classification_loss if task == "classification" else causal_lm_loss
    return diagnose_bases(
        adapted,
        lora_layers(adapted),
        loss_fn,
        [cut(entry, collate, examples, token_budget) for entry in sets],
        rank=rank,
        head_std=HEAD_INIT_STD,
        width=width,
        budget=budget,
        on_status=on_status,
    )
