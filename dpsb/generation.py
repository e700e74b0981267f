"""What a causal model writes to given prompts, and how near that is to references."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpsb.adapter_files import adapter_settings, with_adapter
from dpsb.config_file import DATA_AT
from dpsb.data import Columns, DataError, Table, prompt_ids, prompts_and_completions, read_table
from dpsb.modes import evaluation_mode
from dpsb.parts import file_of, of_file, same_data, seen_from
from dpsb.run import SETTINGS_NAME, RunError
from dpsb_accounting import Ledger
from dpsb_accounting.ledger import LEDGER_NAME

_BATCH = 16
_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Generated:
    """Answers to some prompts. As sensitive as the prompts and references are.

    Args:
      prompts: Different prompts.
      answers: One for each.
      references: At least one for each.
      metrics: From :func:`scores`.
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]
    metrics: Mapping[str, float]


def generate_for_file(
    folder: Path,
    data: str,
    *,
    base_only: bool = False,
    prompts: int = 200,
    max_new_tokens: int = 64,
    on_batch: Callable[[int, int], None] = lambda _done, _of: None,
) -> Generated:
    """Answers to the prompts of a file by the model of a finished run, put to it as in training.

    Args:
      folder: A finished run of the task causal-lm.
      data: File with prompts and completions; several completions of one prompt are all its references.
      base_only: Leave the adapter out: what the model wrote before training.
      prompts: How many different ones at most, from the top of the file.
      max_new_tokens: Tokens of an answer at most.
      on_batch: Told how many are done, and of how many.

    Raises:
      RunError: If ``folder`` is no finished run of a causal model, or was trained on this very file.
      DataError: If the file cannot be used.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (folder / _ADAPTER).exists() or not (folder / LEDGER_NAME).exists():
        raise RunError(f"{folder} holds no finished adapter with its ledger ({_ADAPTER}, {LEDGER_NAME}).")
    details: Mapping[str, Any] = Ledger.read(folder / LEDGER_NAME).plan.details
    if details.get("task") != "causal-lm":
        raise RunError(f"The run in {folder} is of the task {details.get('task')!r}; only causal-lm generates text.")
    settings_file = folder / SETTINGS_NAME
    stated = json.loads(settings_file.read_text()) if settings_file.exists() else {"data": details.get("data", "")}
    _check_not_trained_on(data, folder, stated)
    check_scorers()
    found = references_by_prompt(read_table(data), _columns(details), prompts)
    settings = adapter_settings(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base: Any = AutoModelForCausalLM.from_pretrained(settings["base_model_name_or_path"], use_safetensors=True)
    model = base if base_only else with_adapter(base, folder)
    if torch.cuda.is_available():
        model = model.to("cuda")
    answers = generate(
        model,
        tokenizer,
        list(found),
        max_length=int(details["max_length"]),
        max_new_tokens=max_new_tokens,
        chat_template=details.get("chat_template") is True,
        on_batch=on_batch,
    )
    references = tuple(tuple(each) for each in found.values())
    return Generated(tuple(found), tuple(answers), references, scores(answers, references))


def _check_not_trained_on(data: str, folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuses the rows that a run was trained on, by whatever path they are named, from whatever folder.

    The settings say where the file was, and how it was typed: if ``out`` is the end of the run's own path, from the
    folder that it begins in, which may have moved since. A file that is in none of these places is known by its name.
    """
    stated, out, here = str(settings["data"]), Path(str(settings.get("out", ""))), folder.resolve()
    known = [str(settings[DATA_AT])] if DATA_AT in settings else []
    guessed = [] if known else [stated]  # a run of an earlier version, or one that came without its settings
    if out.parts and not out.is_absolute() and here.parts[-len(out.parts) :] == out.parts:
        known.append(seen_from(Path(*here.parts[: -len(out.parts)]), stated))
    if any(same_data(data, name) for name in [*known, *guessed]):
        raise RunError(f"data={data!r} is what {folder} was trained on: figures on it would leak it unnoised.")
    mine = file_of(data)
    may_be_it = mine.exists() and mine.name == file_of(stated).name and same_data(data, of_file(mine, stated))
    if may_be_it and not any(file_of(name).exists() for name in known):
        raise RunError(
            f"data={data!r} has the name of the file that {folder} was trained on, {stated!r}, and where that lies is "
            "not known any more: it may be the same. If it is another, give it another name."
        )


def _columns(details: Mapping[str, Any]) -> Columns:
    columns: Mapping[str, Any] = details.get("columns", {})
    return Columns(**{part: columns.get(part) for part in ("text", "prompt", "completion")})


def references_by_prompt(table: Table, columns: Columns, count: int) -> dict[str, list[str]]:
    """The first ``count`` different prompts of a table, each with every completion that it has there. Sensitive.

    Raises:
      DataError: If the table has no prompts and completions.
    """
    pairs = prompts_and_completions(table, columns)
    if pairs is None:
        raise DataError(
            f"{table.source} has no prompts and completions to generate for; name them with --prompt-column and "
            f"--completion-column ({table.described()})."
        )
    found: dict[str, list[str]] = {}
    for prompt, completion in zip(*pairs, strict=True):
        text = "" if prompt is None else str(prompt)
        if text in found or len(found) < count:
            found.setdefault(text, []).append("" if completion is None else str(completion))
    if not found:
        raise DataError(f"{table.source} holds no rows to generate for.")
    return found


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_length: int,
    max_new_tokens: int,
    chat_template: bool = False,
    on_batch: Callable[[int, int], None] = lambda _done, _of: None,
) -> list[str]:
    """Greedy answers, in the order of the prompts; what may stand before them is cut as in training. Sensitive.

    Args:
      model: A causal model of transformers, or PEFT's.
      tokenizer: Its tokenizer.
      prompts: Texts. Sensitive.
      max_length: Tokens of a prompt at most.
      max_new_tokens: Tokens of an answer at most.
      chat_template: As in training.
      on_batch: Told how many are done, and of how many.
    """
    device = next(model.parameters()).device
    ids = [prompt_ids(prompt, tokenizer, max_length, chat_template) or [tokenizer.eos_token_id] for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    answers = [""] * len(ids)
    with evaluation_mode(model):
        for start in range(0, len(order), _BATCH):
            chosen = order[start : start + _BATCH]
            longest = max(len(ids[i]) for i in chosen)
            padded = [[tokenizer.pad_token_id] * (longest - len(ids[i])) + ids[i] for i in chosen]
            mask = [[0] * (longest - len(ids[i])) + [1] * len(ids[i]) for i in chosen]
            written: Any = model.generate(  # type: ignore[operator]
                input_ids=torch.tensor(padded, device=device),
                attention_mask=torch.tensor(mask, device=device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
            texts = tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = text.strip()
            on_batch(min(start + _BATCH, len(order)), len(order))
    return answers


def check_scorers() -> None:
    """Raises DataError if one of the two packages that score answers is not installed: before they are generated."""
    if any(find_spec(name) is None for name in ("sacrebleu", "rouge_score")):
        raise DataError("Scores need two packages: pip install '.[generation]' in a checkout.")


def scores(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Mapping[str, float]:
    """Corpus BLEU (sacrebleu, 0 to 100) and mean ROUGE-L F1 (0 to 1, the best reference of each prompt).

    Args:
      answers: One for each prompt.
      references: At least one for each prompt.

    Raises:
      DataError: If the two packages are not installed.
    """
    check_scorers()
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    most = max(len(each) for each in references)
    streams = [[each[k] if k < len(each) else None for each in references] for k in range(most)]
    bleu = sacrebleu.corpus_bleu(list(answers), streams)  # type: ignore[arg-type]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    rouge = [
        scorer.score_multi(list(each), answer)["rougeL"].fmeasure
        for answer, each in zip(answers, references, strict=True)
    ]
    return {"bleu": float(bleu.score), "rouge_l": sum(rouge) / len(rouge), "prompts": len(answers)}
