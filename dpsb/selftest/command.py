"""What ``dpsb selftest`` does: builds the adapter as ``dpsb train`` would, and tests it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpsb.adapter import attach
from dpsb.basis import weight_svd
from dpsb.config import RunConfig
from dpsb.data import Collator, DataError, read_table, synthetic_examples
from dpsb.losses import causal_lm_loss, classification_loss
from dpsb.models import HEAD_NAMES, MeanPooledClassifier, add_lora, load_base, longest_input
from dpsb.prepare import labels_of, prepare
from dpsb.run import fine_tune
from dpsb.sampling import bucket_of, length_buckets
from dpsb.selftest.files import check_no_trace
from dpsb.selftest.model import selftest_model
from dpsb.selftest.result import SelfTest

_FEWEST = 6


@dataclass(frozen=True)
class Subject:
    """A model and task as the command line names them; see :class:`dpsb.config.RunConfig`."""

    model: str
    task: str = "classification"
    labels: tuple[str, ...] = ("no", "yes")
    rank: int = 16
    targets: str = "all-linear"
    dtype: str = "float32"
    max_length: int = 64

    def config(self, data: Path, out: Path) -> RunConfig:
        """A short private run on ``data``."""
        return RunConfig(
            model=self.model,
            data=str(data),
            out=str(out),
            task=self.task,
            labels=",".join(self.labels) or None,
            rank=self.rank,
            targets=self.targets,
            dtype=self.dtype,
            max_length=self.max_length,
            epsilon=50.0,
            delta=1e-3,
            num_examples=24,
            steps=2,
            expected_batch_size=6,
            checkpoint_every=1,
        )


def selftest_subject(subject: Subject, *, full: bool = False, private: str | None = None) -> SelfTest:
    """Tests a model on synthetic examples.

    Args:
      subject: What to test.
      full: Whether to run the long form.
      private: A data file whose first examples take the place of the synthetic ones, to debug a fault that only they
        show. The result is tainted: for this screen, never for a report. Nothing is written.

    Raises:
      ConfigError: If a setting is out of range.
      ModelError: If the model cannot be loaded or has no such targets.
      DataError: If the private file cannot be used.
    """
    config = subject.config(Path(private or "unused"), Path("unused"))  # refuses settings that are out of range

    def make_base() -> Any:
        base, _ = load_base(subject.model, subject.task, subject.labels, dtype=getattr(torch, subject.dtype))
        return base.encoder if isinstance(base, MeanPooledClassifier) else base

    base, tokenizer = load_base(subject.model, subject.task, subject.labels, dtype=getattr(torch, subject.dtype))
    max_length = min(subject.max_length, longest_input(base, tokenizer) or subject.max_length)
    vocabulary = min(len(tokenizer), int(base.config.vocab_size))  # type: ignore[arg-type,union-attr]
    targets = subject.targets
    chosen = targets.removeprefix("re:") if targets == "all-linear" or targets.startswith("re:") else targets.split(",")
    model = add_lora(base, subject.task, subject.rank, chosen)
    if torch.cuda.is_available():
        model.to("cuda")
    adapter = attach(model, weight_svd(model), allow=HEAD_NAMES)
    types = "token_type_ids" in tokenizer.model_input_names
    chosen_examples = None if private is None else private_examples(config, base, tokenizer)
    found = selftest_model(
        adapter,
        classification_loss if subject.task == "classification" else causal_lm_loss,
        Collator(tokenizer.pad_token_id, next(model.parameters()).device),
        synthetic_examples(subject.task, vocabulary, len(subject.labels), max_length, types),
        max_length,
        full=full,
        make_base=make_base,
        private=chosen_examples,
    )
    if not full or private is not None:
        return found
    traces = check_no_trace(lambda data, out: fine_tune(subject.config(data, out)), subject.labels)
    return SelfTest(found.subject, (*found.checks, *traces))


def private_examples(config: RunConfig, base: Any, tokenizer: Any) -> list[Any]:
    """The first examples of the config's data file that fall into its commonest length bucket. Sensitive.

    Raises:
      DataError: If there are fewer than 6 of them.
    """
    table = read_table(config.data)
    labels, origin = labels_of(config, table)
    prepared = prepare(config, table, base, tokenizer, labels, origin)
    by_bucket: dict[int, list[Any]] = {}
    for example in prepared.examples:
        bucket = bucket_of(len(example["input_ids"]), length_buckets(prepared.max_length))
        by_bucket.setdefault(bucket, []).append(example)
    commonest = max(by_bucket.values(), key=len, default=[])
    if len(commonest) < _FEWEST:
        raise DataError(f"A self-test needs at least {_FEWEST} examples of similar length; {config.data} has too few.")
    return commonest[:_FEWEST]
