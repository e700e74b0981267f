"""The main job on what the package brings along: a private spam classifier from real mail, offline."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dpsb.config import RunConfig
from dpsb.run import Callbacks, Run, RunError, fine_tune
from dpsb_accounting import Ledger
from dpsb_accounting.ledger import LEDGER_NAME

LABELS = ("ham", "spam")
# Chosen on the validation split; docs/benchmarks/demo.md tells how, and with how many runs for each method.
SETTINGS: Mapping[str, Any] = {
    "steps": 48,
    "expected_batch_size": 128,
    "max_length": 128,
    "targets": r"re:.*layer\.[45]\..*(query|key|value|dense)",
    "learning_rate": 0.05,
    "head_learning_rate": 0.1,
    "schedule": "linear",
    "token_budget": 2048,
}
FROZEN_SETTINGS: Mapping[str, Any] = {
    "steps": 120,
    "expected_batch_size": 512,
    "max_length": 256,
    "learning_rate": 0.1,
    "l2_clip_norm": 1.0,
}
RECORDED = "baselines.json"


def mail_file(split: str) -> Path:
    """The embedded mail: ``"train"``, ``"validation"`` or ``"test"``."""
    with as_file(files("dpsb") / "mail" / f"{split}.parquet") as path:
        return path


def demo_config(out: Path | str, *, epsilon: float = 3.0, evaluate_on: str = "test") -> RunConfig:
    """The demo's settings; ``evaluate_on`` names the split for the held-out figure."""
    return RunConfig(
        model="minilm",
        data=str(mail_file("train")),
        eval_data=str(mail_file(evaluate_on)),
        labels=",".join(LABELS),
        out=str(out),
        epsilon=epsilon,
        **SETTINGS,
    )


def run_demo(out: Path, *, epsilon: float = 3.0, callbacks: Callbacks = Callbacks()) -> Run:  # noqa: B008
    """Runs the main job in ``out``.

    Raises:
      RunError: If ``out`` already holds a run.
    """
    if (out / LEDGER_NAME).exists():
        raise RunError(f"{out} already holds a run; look at it with `dpsb report {out}`, or choose another --out.")
    return fine_tune(demo_config(out, epsilon=epsilon), callbacks=callbacks)


def non_private_baseline(evaluate_on: str = "test") -> float:
    """Accuracy of the same adapter and settings without clipping and noise (epsilon infinite)."""
    with tempfile.TemporaryDirectory() as scratch:
        return fine_tune(demo_config(Path(scratch) / "run", epsilon=math.inf, evaluate_on=evaluate_on)).held_out[
            "accuracy"
        ]


def frozen_features_baseline(
    epsilon: float = 3.0, evaluate_on: str = "test", settings: Mapping[str, Any] = FROZEN_SETTINGS
) -> float:
    """Accuracy of private logistic regression on the frozen encoder's mean-pooled features, at the same epsilon."""
    from dpsb.baselines.frozen_features import accuracy, fit_logistic_regression
    from dpsb.plan import make_plan

    features, labels = frozen_features(settings["max_length"], ("train", evaluate_on))
    num_examples = len(labels["train"])
    plan = make_plan(
        epsilon=epsilon,
        delta=0.1 / num_examples,
        num_examples=num_examples,
        num_examples_declared=False,
        expected_batch_size=settings["expected_batch_size"],
        steps=settings["steps"],
        l2_clip_norm=settings["l2_clip_norm"],
        details={"model": "minilm", "labels": list(LABELS), "task": "classification"},
    )
    with tempfile.TemporaryDirectory() as scratch, Ledger.create(Path(scratch) / LEDGER_NAME, plan) as ledger:
        weights = fit_logistic_regression(
            features["train"],
            labels["train"],
            len(LABELS),
            ledger=ledger,
            learning_rate=settings["learning_rate"],
        )
    return accuracy(weights, features[evaluate_on], labels[evaluate_on])


@cache
def frozen_features(
    max_length: int, splits: tuple[str, ...]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Mean-pooled features and class indices of the embedded mail's ``splits``."""
    from transformers import AutoModel

    from dpsb.baselines.frozen_features import mean_pooled_features
    from dpsb.data import Collator, Columns, read_table, tokenize_classification
    from dpsb.models import load_base, resolve_model

    _, tokenizer = load_base("minilm", "classification", LABELS)
    encoder = AutoModel.from_pretrained(resolve_model("minilm"), use_safetensors=True)
    features, labels = {}, {}
    for split in splits:
        examples = tokenize_classification(read_table(mail_file(split)), Columns(), tokenizer, LABELS, max_length)
        collate = Collator(tokenizer.pad_token_id)
        features[split] = mean_pooled_features(encoder, examples, collate, max_length, token_budget=2048)
        labels[split] = torch.tensor([example["labels"] for example in examples])
    return features, labels


def recorded_baselines() -> dict[str, Any]:
    """The figures that ``examples/record_baselines.py`` wrote, with how they came about."""
    return dict(json.loads((files("dpsb") / "mail" / RECORDED).read_text()))


def print_comparison(console: Console, out: Path, *, rerun: bool = False) -> None:
    """Puts the run's test accuracy next to the baselines', recorded or run again."""
    report = json.loads((out / "report.json").read_text())
    table = Table(title="test accuracy on 864 mails (held out, outside the guarantee)", title_justify="left")
    for heading in ("method", "epsilon", "accuracy", "runs"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    upper = report["epsilon"]["upper"]
    spent = f"{upper:.3f}" if isinstance(upper, float) else str(upper)
    table.add_row(
        "[bold]this run[/bold]: R-only, private", spent, f"{report['held_out']['metrics']['accuracy']:.4f}", "1"
    )
    recorded = recorded_baselines()
    reruns: dict[str, Callable[[], float]] = {
        "frozen_features": frozen_features_baseline,
        "non_private": non_private_baseline,
    }
    for name, entry in recorded["methods"].items():
        value, count = f"{entry['mean']:.4f} ± {entry['std']:.4f}", str(entry["runs"])
        table.add_row(f"{entry['label']} (recorded)", entry["epsilon"], value, count)
        if rerun and name in reruns:
            console.print(f"[dim]running {entry['label']} again[/dim]")
            table.add_row(f"{entry['label']} (now)", entry["epsilon"], f"{reruns[name]():.4f}", "1")
    console.print(table)
