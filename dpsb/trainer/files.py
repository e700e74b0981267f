"""What a private Trainer writes and reads: safetensors and JSON, nothing pickled, no random state, no losses.

    output_dir/ledger.jsonl        the plan, then one line a charged step
    output_dir/start.safetensors   where training starts: A, B and theta, bound to the plan by its hash
    output_dir/checkpoint-N/       a plain LoRA adapter, theta, the optimizer, the ledger's position, trainer_state.json
    output_dir/report.json         the claim

Trainer's own ``optimizer.pt``, ``scheduler.pt``, ``rng_state.pth``, ``scaler.pt`` and ``training_args.bin`` are not
written.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dpsb.adapter import Adapter
from dpsb.artifacts import write_results
from dpsb.checkpoint import write_state
from dpsb.folders import replacing
from dpsb.start import START_NAME, digest, start_of
from dpsb_accounting import Ledger, LedgerError, LedgerRecord, Plan
from dpsb_accounting.files import write_whole
from dpsb_accounting.ledger import LEDGER_NAME
from dpsb_accounting.positions import check_files

REPORT_NAME, STATE_FILE = "report.json", "trainer_state.json"
_FOLDER = re.compile(r"checkpoint-(\d+)")
_PUBLIC_LOGS = ("epsilon", "delta", "learning_rate", "epoch", "step")
_TIMES = ("_runtime", "_per_second", "_preparation_time")


class TrainerRunError(RuntimeError):
    """``output_dir`` is not in a state for what was asked; the message says what to do."""


def check_folder(out: Path, resume: bool) -> None:
    """Refuses to start over a run, and to resume where there is none.

    Raises:
      TrainerRunError: As said.
    """
    ledger = out / LEDGER_NAME
    if resume and not ledger.exists():
        raise TrainerRunError(f"{out} holds no run to resume ({LEDGER_NAME} is missing).")
    if resume:
        return
    if ledger.exists():
        raise TrainerRunError(
            f"{out} already holds a run: its charged steps are spent. Continue it with "
            "train(resume_from_checkpoint=True), or choose another output_dir; the epsilons of two runs over the same "
            "data add up."
        )
    if checkpoints(out):
        raise TrainerRunError(
            f"{out} holds checkpoints of a run whose {LEDGER_NAME} is gone; choose another output_dir."
        )


def new_ledger(out: Path, plan: Plan, adapter: Adapter) -> Ledger:
    """Creates the ledger, then puts down where training starts.

    Raises:
      LedgerError, OSError: If the folder cannot be written; nothing has been charged.
    """
    start = start_of(adapter)
    if digest(start) != plan.details.get("start_sha256"):
        raise LedgerError("The adapter changed while its plan was being made; nothing was charged.")
    out.mkdir(parents=True, exist_ok=True)
    ledger = Ledger.create(out / LEDGER_NAME, plan)
    try:
        write_whole(out / START_NAME, start)
    except OSError:
        (out / LEDGER_NAME).unlink(missing_ok=True)
        ledger.close()
        raise
    return ledger


def check_not_behind(out: Path, ledger: LedgerRecord) -> None:
    """Refuses a ledger that is behind any checkpoint or adapter in ``out``, whichever of them the run is to go on from.

    Raises:
      LedgerError: If charged steps are missing, which would be made a second time; the message names the file.
    """
    for check in check_files(ledger):
        if not check.ok:
            raise LedgerError(f"{out / check.name}: {check.detail}.")


def forget(out: Path) -> None:
    """Deletes ledger and start of a run that charged nothing, so that it can be started again; call under its lock."""
    if (out / LEDGER_NAME).exists() and Ledger.read(out / LEDGER_NAME).charged("train") == 0:
        for name in (LEDGER_NAME, START_NAME):
            (out / name).unlink(missing_ok=True)


def write_checkpoint(
    folder: Path,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    ledger: Ledger,
    moved_clip_norm: float | None,
    tokenizer: Any,
    state: Any,
) -> None:
    """Writes one ``checkpoint-N`` folder, whole or not at all. Everything in it is released or public."""
    with replacing(folder) as new:
        write_results(new, adapter, ledger, tokenizer, folder.parent / START_NAME)
        write_state(new, adapter, optimizer, ledger, moved_clip_norm)
        without_losses(state).save_to_json(str(new / STATE_FILE))


def restored_state(trainer: Any, folder: str | None, plan: Plan, done: int) -> Any:
    """The Trainer's state as far along as the ledger says, with the log of the checkpoint that is loaded."""
    from transformers.trainer_callback import TrainerState

    trainer.state = TrainerState(stateful_callbacks=exported(trainer))
    saved = None if folder is None else Path(folder) / STATE_FILE
    if saved is not None and saved.is_file():
        trainer.state = TrainerState.load_from_json(str(saved))
        trainer._load_callback_state()
    state = trainer.state
    state.compute_steps(trainer.args, plan.steps)
    state.init_training_references(trainer, plan.steps, math.ceil(plan.steps * plan.sampling_prob), None)
    state.global_step, state.epoch = done, done * plan.sampling_prob
    return state


def exported(trainer: Any) -> list[Any]:
    """The callbacks that have a state of their own to be saved, such as one that stops early."""
    from transformers.trainer_callback import ExportableState

    everything = [*trainer.callback_handler.callbacks, trainer.control]
    return [callback for callback in everything if isinstance(callback, ExportableState)]


def without_losses(state: Any) -> Any:
    """A Trainer's state as it may be written: its log without losses, neither of training nor of held-out data."""
    kept = [{name: entry[name] for name in _PUBLIC_LOGS if name in entry} for entry in state.log_history]
    return replace(state, log_history=[entry for entry in kept if set(entry) - {"step", "epoch"}], total_flos=0)


def save_adapter(folder: Path, out: Path, adapter: Adapter, ledger: LedgerRecord, tokenizer: Any) -> None:
    """Writes adapter, cores, tokenizer and model card into ``folder``, each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        write_results(Path(scratch), adapter, ledger, tokenizer, out / START_NAME)
        for path in sorted(Path(scratch).iterdir()):
            if path.is_dir():
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
            else:
                os.replace(path, folder / path.name)


def checkpoints(out: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = {int(match[1]): path for path in out.glob("checkpoint-*") if (match := _FOLDER.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def remove_old(out: Path, limit: int | None, best: str | None) -> None:
    """Deletes the oldest checkpoints beyond ``limit``; never the newest one, nor the best."""
    if not limit or limit < 1:
        return
    folders = checkpoints(out)
    keep = {path.name for path in folders[-limit:]}
    if best is not None:
        others = [path.name for path in folders if path.name != Path(best).name]
        keep = {Path(best).name, *others[len(others) - max(1, limit - 1) :]}
    for folder in folders:
        if folder.name not in keep:
            shutil.rmtree(folder, ignore_errors=True)


def held_out_of(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """The metrics on held-out data that a report may show, without times. None if there are none."""
    kept = {
        name: value if isinstance(value, int) or abs(value) < float("inf") else str(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and not name.endswith(_TIMES) and name != "epoch"
    }
    return kept or None
