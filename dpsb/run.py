"""From settings to a finished run folder: data, plan, model, ``fit``, files. What ``dpsb train`` does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpsb.adapter import Adapter, Provenance, lora_layers
from dpsb.artifacts import save_run
from dpsb.basis.budget import realised_share
from dpsb.basis.release import PrivateExamples
from dpsb.basis.sources import sha256_of
from dpsb.basis.stage import BASIS_NAME, Planned, charge_leak, chosen_file, release_basis
from dpsb.beginning import basis_setup, begin
from dpsb.canaries import CanaryAudit
from dpsb.checkpoint import CHECKPOINT_NAMES, remove_checkpoint
from dpsb.config import ConfigError, RunConfig
from dpsb.config_file import DATA_AT
from dpsb.distributed.assist import lead
from dpsb.distributed.team import Team
from dpsb.frozen_prefix import FrozenOutputs, remember_frozen_prefix
from dpsb.head_share import clip_parts
from dpsb.inputs import read_inputs
from dpsb.models import MeanPooledClassifier, target_shapes
from dpsb.optimizers import make_optimizer
from dpsb.parts import located
from dpsb.plan import differing, make_plan
from dpsb.prepare import Prepared, input_shape, losses_by_example
from dpsb.randomness import Randomness, SeededRandomness, SystemRandomness
from dpsb.rebasing import rebasing_of
from dpsb.sampling import length_buckets
from dpsb.selftest.start import check_before_run
from dpsb.start import START_NAME, attach_again, cut_off, digest, read_start, start_of
from dpsb.train import Knobs, Progress, fit
from dpsb_accounting import Ledger, LedgerError, Phase, Plan, Report, make_report
from dpsb_accounting.files import write_whole
from dpsb_accounting.ledger import LEDGER_NAME

SETTINGS_NAME = "run.json"
_PUBLIC_TRAINING = ("warm_start_epochs", "warm_start_learning_rate")


class RunError(RuntimeError):
    """The run folder is not in a state for what was asked; the message says what to do."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
      out: Its folder.
      report: What it claims.
      held_out: Metrics on held-out data, outside the guarantee; empty without such data.
      files: What was written, relative to ``out``.
    """

    out: Path
    report: Report
    held_out: dict[str, float]
    files: tuple[str, ...]


@dataclass(frozen=True)
class Callbacks:
    """How a run tells the operator where it is; none of it is written anywhere."""

    on_status: Callable[[str], None] = lambda _message: None
    on_plan: Callable[[Plan], None] = lambda _plan: None
    on_ledger: Callable[[], None] = lambda: None
    """The ledger stands in the run's folder, and this start has charged nothing yet."""
    on_step: Callable[[Progress], None] = lambda _progress: None


def fine_tune(
    config: RunConfig,
    *,
    resume: bool = False,
    callbacks: Callbacks = Callbacks(),
    audit: CanaryAudit | None = None,
    team: Team | None = None,
    frozen_outputs: FrozenOutputs | None = None,
) -> Run:
    """Runs or resumes a private fine-tune and writes its folder.

    The folder holds a plain LoRA adapter, the cores in fp32, the ledger, the report and a model card. Nothing is
    written before all inputs have been read and the plan is made.

    Args:
      config: Settings.
      resume: Continue the run in ``config.out``; T minus the charged steps are left.
      callbacks: Where progress goes.
      audit: Canaries to put in. The run is then there to be audited: it is tainted and cannot be resumed.
      team: Processes that share the work; this one leads, the others call :func:`dpsb.distributed.assist.assist`.
      frozen_outputs: With ``config.remember_frozen_blocks``: what earlier runs of this process remember, and what this
        one adds. Sensitive.

    Returns:
      :class:`Run`.

    Raises:
      ConfigError, DataError, ModelError, ProbeError, LedgerError, RunError, ValueError: Each with one sentence on
        what is wrong and what to do; nothing half-written is left behind.
    """
    out = Path(config.out)
    _check_processes(config, team)
    _check_folder(out, resume)
    callbacks.on_status("reading data and model")
    inputs = read_inputs(config, warm=not resume)
    base, tokenizer, prepared, model = inputs.base, inputs.tokenizer, inputs.prepared, inputs.model
    collate, loss_fn = inputs.collate, inputs.loss_fn

    existing = Ledger.read(out / LEDGER_NAME).plan if resume else None
    setup = basis_setup(inputs, _delta(config, prepared))
    planned: Planned | None = None
    if existing is None:
        adapter, planned = begin(inputs, setup, callbacks.on_status)
        start = start_of(adapter)
    else:
        start = read_start(out, existing)
        adapter = attach_again(model, start, existing)
    callbacks.on_status("making the plan")
    provenance = adapter.provenance if planned is None else planned.provenance
    plan = _plan(config, adapter, prepared, provenance, planned.phases if planned else (), start, existing)
    rebasing = rebasing_of(setup, adapter)
    callbacks.on_plan(plan)
    synthetic, randomness = inputs.synthetic(), randomness_of(config)
    remembered = remember_frozen_prefix(model, frozen_outputs) if config.remember_frozen_blocks else nullcontext()
    with remembered, _open_ledger(config, resume, out, plan, start) as ledger:
        callbacks.on_ledger()
        if plan.basis["access"] == "released":
            callbacks.on_status(f"releasing the basis ({config.basis})")
            examples = PrivateExamples(
                model=model,
                layers=lora_layers(model),
                dataset=prepared.examples,
                loss_fn=loss_fn,
                collate=collate,
                synthetic=synthetic,
                max_length=prepared.max_length,
                token_budget=config.token_budget,
                ledger=ledger,
                randomness=randomness,
                canaries=None if audit is None else audit.basis,
                on_pass=lambda number, of: callbacks.on_status(f"basis: pass {number} of {of} over the data"),
            )
            adapter = release_basis(out, adapter, planned.make if planned else None, examples)
            if (chosen := chosen_file(out, ledger)) is not None:
                callbacks.on_status(f"basis: the private examples chose {chosen}")
        charge_leak(ledger)
        optimizer, schedule = make_optimizer(config, adapter, plan)
        units, losses = prepared.units, losses_by_example(config, model, loss_fn, collate, prepared)
        if audit is not None:
            ledger.taint("canaries", "the run was made to be audited; its result is not for release")
            shape = input_shape(config, base, tokenizer, prepared)
            units = [*units, *audit.plant(plan, adapter.dimension, losses, shape)]
        callbacks.on_status("checking the model on synthetic examples")
        if plan.is_private:
            check_before_run(adapter, loss_fn, collate, synthetic, prepared.max_length, config.token_budget)
        scale = inputs.row_scale(adapter)
        leader = None if team is None else lead(team, config, plan, adapter, inputs, synthetic, scale)
        fit(
            adapter,
            units,
            ledger=ledger,
            optimizer=optimizer,
            loss_fn=loss_fn,
            collate=collate,
            synthetic=synthetic,
            max_length=prepared.max_length,
            schedule=schedule,
            knobs=Knobs(token_budget=config.token_budget, checkpoint_every=config.checkpoint_every),
            randomness=randomness,
            allow_dropout=config.allow_dropout,
            row_scale=scale,
            canaries=None if audit is None else audit.rows,
            team=leader,
            rebasing=rebasing,
            on_step=callbacks.on_step,
        )
        if leader is not None:
            leader.stop()
        if audit is not None:
            audit.finish(losses, prepared.members, prepared.held_out, model)
        adapter = adapter if rebasing is None else rebasing.unfold(adapter)
        held_out: dict[str, float] = {}
        if prepared.held_out is not None:
            callbacks.on_status("evaluating on held-out data")
            held_out = inputs.metrics()
        metrics = {name: value if math.isfinite(value) else str(value) for name, value in held_out.items()}  # JSON
        report = make_report(ledger, held_out=metrics or None)
        files = save_run(out, adapter, report, ledger, tokenizer)
        _remove_resumable(out)
    return Run(out, report, held_out, files)


def _remove_resumable(out: Path) -> None:
    """Deletes what only a resume needs; a finished run keeps no optimizer state."""
    remove_checkpoint(out)
    for name in (START_NAME, BASIS_NAME):
        (out / name).unlink(missing_ok=True)


def _check_processes(config: RunConfig, team: Team | None) -> None:
    if config.shard_base and team is None:
        raise ConfigError("shard_base cuts the base over the processes of torchrun; start the run with torchrun.")
    for name, asked in (("unit_column", config.unit_column is not None), ("rebase_every", config.rebases)):
        if asked and team is not None:
            raise ConfigError(f"{name}={getattr(config, name)!r} is not there for several processes; start one.")


def _check_folder(out: Path, resume: bool) -> None:
    ledger = out / LEDGER_NAME
    if resume:
        if not ledger.exists():
            raise RunError(f"{out} holds no run to resume ({LEDGER_NAME} is missing); leave --resume out.")
        if (out / "report.json").exists():
            _remove_resumable(out)
            raise RunError(
                f"The run in {out} is finished: its budget is spent and its report is written. Start another run in "
                "another folder; its epsilon adds to this one's if it reads the same data."
            )
    elif ledger.exists():
        finished = (out / "report.json").exists()
        advice = "choose another --out" if finished else "continue it with --resume, or choose another --out"
        raise RunError(f"{out} already holds a {'finished ' if finished else ''}run; {advice}.")
    elif has_remains(out):
        raise RunError(f"{out} holds remains of a run whose {LEDGER_NAME} is gone; choose another --out.")
    elif out.exists() and not out.is_dir():
        raise RunError(f"out={str(out)!r} is a file; --out names the folder that a run makes.")
    elif out.exists() and any(out.iterdir()):
        raise RunError(
            f"{out} is not empty and holds no run, which would overwrite what is there; choose another --out."
        )


def has_remains(folder: Path) -> bool:
    """Whether a folder holds something of a run but not its ledger, which is the first file that a run writes."""
    names = (SETTINGS_NAME, START_NAME, BASIS_NAME, "report.json", *CHECKPOINT_NAMES)
    return any((folder / name).exists() for name in names) and not (folder / LEDGER_NAME).exists()


def _num_examples(config: RunConfig, prepared: Prepared) -> int:
    return config.num_examples if config.num_examples is not None else len(prepared.units)


def _delta(config: RunConfig, prepared: Prepared) -> float:
    return config.delta if config.delta is not None else 0.1 / _num_examples(config, prepared)


def _plan(
    config: RunConfig,
    adapter: Adapter,
    prepared: Prepared,
    provenance: Provenance,
    before: tuple[Phase, ...],
    start: bytes,
    existing: Plan | None,
) -> Plan:
    epochs = 10.0 if config.steps is None and config.epochs is None else config.epochs
    plan = make_plan(
        epsilon=config.epsilon,
        delta=_delta(config, prepared),
        num_examples=_num_examples(config, prepared),
        num_examples_declared=config.num_examples is not None,
        expected_batch_size=config.expected_batch_size,
        steps=config.steps,
        epochs=epochs,
        neighboring=config.neighboring,
        l2_clip_norm=config.l2_clip_norm,
        clipping=config.clipping,
        adaptive_quantile=config.adaptive_clip or 0.5,
        unit="user" if config.unit_column else "example",
        basis=provenance.to_json(),
        released_before=before if existing is None else existing.phases[: existing.phases.index(existing.train)],
        noise_multiplier=existing.noise_multiplier if existing is not None and existing.is_private else None,
        details={**run_details(config, adapter.model, prepared, start), **_clip_parts(config, adapter)},
    )
    share = existing.details.get("basis_budget") if existing is not None else realised_share(plan)
    if share is not None:
        plan = replace(plan, details={**plan.details, "basis_budget": share})
    if existing is not None and plan != existing:
        odd = ", ".join(differing(plan, existing))
        raise RunError(f"The settings differ from the run's plan in {odd}; a plan cannot change on resume.")
    return plan


def _clip_parts(config: RunConfig, adapter: Adapter) -> dict[str, Any]:
    """How rows are divided where head and adapter are clipped apart; nothing for a run without clipping."""
    if config.head_share is None or math.isinf(config.epsilon):
        return {}
    return {"clip_parts": clip_parts(adapter, config.head_share)}


def run_details(config: RunConfig, model: Any, prepared: Prepared, start: bytes) -> dict[str, Any]:
    """The public facts of a run that its plan states beside the mechanism."""
    return {
        "model": config.model,
        "data": Path(config.data).name,
        "columns": prepared.columns,
        **(
            {"unit_column": config.unit_column, "examples_per_unit": config.examples_per_unit}
            if config.unit_column
            else {}
        ),
        "method": config.method,
        "basis": config.basis,
        "start_sha256": digest(start),
        "task": config.task,
        "rank": config.rank,
        "targets": config.targets,
        "target_shapes": target_shapes(model),
        "pooling": "mean" if isinstance(model, MeanPooledClassifier) else "native",
        "head_init_std": config.head_init_std,
        **_public_files(config),
        **({n: getattr(config, n) for n in _PUBLIC_TRAINING} if config.warm_start_epochs else {}),
        "max_length": prepared.max_length,
        "length_buckets": list(length_buckets(prepared.max_length)),
        "labels": list(prepared.labels),
        "labels_origin": prepared.label_origin,
        "optimizer": config.optimizer,
        "momentum": config.momentum,
        "weight_decay": config.weight_decay,
        "lora_plus_ratio": config.lora_plus_ratio,
        "learning_rate": config.learning_rate,
        "head_learning_rate": config.head_learning_rate or config.learning_rate,
        "schedule": config.schedule,
        "dtype": config.dtype,
        **({"rebase_every": config.rebase_every} if config.rebases else {}),
        **{name: True for name in ("part_of_sweep", "chat_template") if getattr(config, name)},
        "tokens_per_example": config.tokens_per_example,
        "allow_dropout": config.allow_dropout,
    }


def _public_files(config: RunConfig) -> dict[str, str]:
    named = [(name, getattr(config, name)) for name in ("warm_start", "precondition") if getattr(config, name)]
    return {
        key: value for name, file in named for key, value in [(name, Path(file).name), *sha256_of(file, name).items()]
    }


def _open_ledger(config: RunConfig, resume: bool, out: Path, plan: Plan, start: bytes) -> Ledger:
    """Opens the run's ledger; for a new run, then puts down the settings and where training starts."""
    if resume:
        ledger = Ledger.open(out / LEDGER_NAME)
        if ledger.plan != plan:
            ledger.close()
            raise LedgerError(f"{out / LEDGER_NAME} changed while the run was being resumed.")
        return ledger
    try:
        out.mkdir(parents=True, exist_ok=True)
        ledger = Ledger.create(out / LEDGER_NAME, plan)
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error.strerror}.") from None
    try:
        settings = {**config.to_json(), DATA_AT: located(config.data)}
        write_whole(out / SETTINGS_NAME, (json.dumps(settings, indent=1) + "\n").encode())
        write_whole(out / START_NAME, start)
    except OSError as error:
        ledger.close()
        for name in (LEDGER_NAME, SETTINGS_NAME, START_NAME):  # nothing has been charged
            (out / name).unlink(missing_ok=True)
        raise RunError(f"{out} cannot be written ({error}); nothing was started.") from None
    return ledger


def randomness_of(config: RunConfig) -> Randomness:
    """The operating system's, unless a seed that voids the claim is set."""
    return SystemRandomness() if config.insecure_seed is None else SeededRandomness(config.insecure_seed)


def resumed_config(out: str, changes: dict[str, Any]) -> RunConfig:
    """The settings of the run in ``out``, with knobs changed where the user gave new ones.

    Raises:
      RunError: If there is no such run.
    """
    from dpsb.config import make_config
    from dpsb.config_file import read_config

    path = Path(out) / SETTINGS_NAME
    if not path.exists():
        if (Path(out) / LEDGER_NAME).exists():
            raise RunError(cut_off(Path(out)))
        raise RunError(
            f"{out} holds no run to resume or audit ({SETTINGS_NAME} is missing); a new run takes no --resume."
        )
    try:
        return make_config({**read_config(path), **changes, "out": out})
    except ConfigError as error:
        raise RunError(f"The run in {out} cannot be resumed: {error}") from None
