"""A federation in one process: data, model, silos, rounds, adapter, report. What ``dpsb federate simulate`` does."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dpsb.adapter import Adapter, attach
from dpsb.artifacts import CORE_NAME
from dpsb.baselines.save import save_weights
from dpsb.basis.stage import Setup, plan_basis
from dpsb.checkpoint import replacing
from dpsb.data import Collator, read_table
from dpsb.evaluate import evaluate
from dpsb.federated.calibrate import policy_text, terms_of
from dpsb.federated.config import FederateConfig, silo_config
from dpsb.federated.coordinator import Coordinator
from dpsb.federated.local import LocalTransport
from dpsb.federated.messages import Reply
from dpsb.federated.report import REPORT_NAME, SILOS, Federation, federation_report, write_report
from dpsb.federated.server import RoundRecord, ServerError
from dpsb.federated.silo import Silo
from dpsb.federated.spec import FederatedError, SiloPolicy
from dpsb.federated.split import split_table
from dpsb.federated.terms import Terms
from dpsb.federated.trainer import Trainer
from dpsb.frozen_prefix import remember_frozen_prefix
from dpsb.models import HEAD_NAMES, add_lora, load_base
from dpsb.prepare import Prepared, labels_of, loss_of, prepare, synthetic_of, targets_of
from dpsb.randomness import Randomness, SeededRandomness, SystemRandomness
from dpsb.run import run_details
from dpsb.start import START_NAME, attach_saved, start_of
from dpsb_accounting.files import write_whole

SETTINGS_NAME, ADAPTER = "federation.json", "adapter"


@dataclass(frozen=True)
class Simulated:
    """A finished simulation: its folder, what it may claim, and metrics outside the guarantee."""

    out: Path
    federation: Federation
    held_out: dict[str, float]


@dataclass(frozen=True)
class Callbacks:
    """How a simulation tells the operator where it is; none of it is written anywhere."""

    on_status: Callable[[str], None] = lambda _message: None
    on_terms: Callable[[Terms, Mapping[str, SiloPolicy]], None] = lambda _terms, _policies: None
    on_reply: Callable[[Reply], None] = lambda _reply: None
    on_round: Callable[[RoundRecord], None] = lambda _record: None
    on_problem: Callable[[str], None] = lambda _reason: None


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """Everything before the first round. ``data`` is sensitive."""

    trainer: Trainer
    data: Mapping[str, Sequence[Any]]
    held_out: Sequence[Any] | None
    tokenizer: Any


def simulate(config: FederateConfig, *, callbacks: Callbacks = Callbacks()) -> Simulated:
    """Runs a federation in ``config.run.out``, or goes on with the one that is there.

    Each silo has a folder with its policy, its ledger and its replies, as it would on a machine of its own; they share
    the process and the model. So nothing is hidden from whoever runs this: it is for trying out settings and for tests.

    Raises:
      FederatedError, ServerError, DataError, ModelError, ProbeError, LedgerError: With one sentence each.
    """
    out = Path(config.run.out)
    if (out / REPORT_NAME).exists():
        raise ServerError(f"The federation in {out} is finished; look at it with `dpsb federate report {out}`.")
    resumed = (out / SETTINGS_NAME).exists()
    if not resumed and out.exists() and any(out.iterdir()):
        raise ServerError(f"{out} is not empty and holds no federation; choose another folder.")
    ready = _prepare(config, out, resumed, callbacks)
    callbacks.on_status("calibrating the silos' noise")
    terms, policies = terms_of(config, {name: len(examples) for name, examples in ready.data.items()})
    callbacks.on_terms(terms, policies)
    randomness = _randomness(config)
    silos = {}
    for name, policy in policies.items():
        folder = out / SILOS / name
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "policy.toml", policy_text(policy).encode())
        silos[name] = Silo(
            folder, policy, ready.trainer, ready.data[name], randomness=randomness, on_problem=callbacks.on_problem
        )
    callbacks.on_status("checking the model on synthetic examples")
    model = ready.trainer.adapter.model
    with remember_frozen_prefix(model) if config.run.remember_frozen_blocks else nullcontext():
        ready.trainer.check()
        state = Coordinator(
            out,
            terms,
            ready.trainer.start,
            ready.trainer.basis_sha256,
            LocalTransport(silos, callbacks.on_reply),
            randomness=randomness,
            on_round=callbacks.on_round,
        ).run()
    adapter = ready.trainer.adapter
    adapter.load_state(state.theta)
    federation = federation_report(out)
    _save_adapter(config, adapter, federation, ready.tokenizer)
    held_out: dict[str, float] = {}
    if ready.held_out is not None:
        callbacks.on_status("evaluating on held-out data")
        run, trainer = config.run, ready.trainer
        held_out = evaluate(
            adapter.model, ready.held_out, run.task, trainer.collate, trainer.max_length, run.token_budget
        )
    write_report(out, federation, {k: v if math.isfinite(v) else str(v) for k, v in held_out.items()})
    return Simulated(out, federation, held_out)


def _prepare(config: FederateConfig, out: Path, resumed: bool, callbacks: Callbacks) -> _Ready:
    run = config.run
    if resumed and json.loads((out / SETTINGS_NAME).read_text())["settings"] != config.to_json():
        raise ServerError(f"The settings differ from those of the federation in {out}; they cannot change on resume.")
    callbacks.on_status("reading data and model")
    names = list(config.silos)
    if config.silos[names[0]].data is None:
        tables = split_table(read_table(run.data), names, config.federation.split_by, config.federation.split_seed)
    else:
        tables = {name: read_table(silo_config(config, name).data) for name in names}
    labels, origin = labels_of(run, tables[names[0]])
    dtype = getattr(torch, run.dtype)
    base, tokenizer = load_base(
        run.model, run.task, labels, dtype=dtype, pooling=run.pooling, head_init_std=run.head_init_std
    )
    prepared: dict[str, Prepared] = {}
    for name in names:
        if not len(tables[name]):
            raise FederatedError(f"Silo {name!r} has no rows; split over fewer silos, or by another column.")
        chosen = silo_config(config, name)
        chosen = replace(chosen, eval_data=run.eval_data) if name == names[0] else replace(chosen, basis="weight")
        prepared[name] = prepare(chosen, tables[name], base, tokenizer, labels, origin)
    first = prepared[names[0]]
    model = add_lora(base, run.task, run.rank, targets_of(run.targets))
    if torch.cuda.is_available():
        model.to("cuda")
    collate = Collator(tokenizer.pad_token_id, next(model.parameters()).device)
    loss_fn = loss_of(run)
    adapter = _adapter(config, out, resumed, model, first, collate, callbacks)
    trainer = Trainer(
        adapter=adapter,
        loss_fn=loss_fn,
        collate=collate,
        synthetic=synthetic_of(run, base, tokenizer, first),
        max_length=first.max_length,
        token_budget=run.token_budget,
        details=run_details(run, model, first, (out / START_NAME).read_bytes()),
    )
    return _Ready(
        trainer=trainer,
        data={name: prepared[name].examples for name in names},
        held_out=first.held_out,
        tokenizer=tokenizer,
    )


def _adapter(
    config: FederateConfig,
    out: Path,
    resumed: bool,
    model: torch.nn.Module,
    prepared: Prepared,
    collate: Collator,
    callbacks: Callbacks,
) -> Adapter:
    """The adapter on a basis that needs no private example; on resume the very one that the run began with."""
    if resumed:
        saved = json.loads((out / SETTINGS_NAME).read_text())
        return attach_saved(model, (out / START_NAME).read_bytes(), saved["basis"])
    callbacks.on_status(f"computing the basis ({config.run.basis})")
    planned = plan_basis(
        Setup(
            config=config.run,
            model=model,
            loss_fn=loss_of(config.run),
            collate=collate,
            examples=(),
            public=prepared.public,
            max_length=prepared.max_length,
            delta=0.5,
            neighboring="zero_out",
        )
    )
    adapter = attach(model, planned.basis, allow=HEAD_NAMES)
    if adapter.provenance.access not in ("data_free", "public"):
        raise FederatedError(f"basis={config.run.basis!r} is {adapter.provenance.access}, not data-free or public.")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / START_NAME, start_of(adapter))
    settings = {"settings": config.to_json(), "basis": adapter.provenance.to_json()}
    write_whole(out / SETTINGS_NAME, (json.dumps(settings, indent=1) + "\n").encode())
    return adapter


def _save_adapter(config: FederateConfig, adapter: Adapter, federation: Federation, tokenizer: Any) -> None:
    """Writes the averaged adapter as a plain LoRA adapter with a card, and its cores in fp32 beside it."""
    out, run_id = Path(config.run.out), federation.state.run_id
    for stale in out.glob(f"{ADAPTER}.new"):
        shutil.rmtree(stale)
    with replacing(out / ADAPTER) as folder:
        save_weights(adapter, folder, out / START_NAME)
        tokenizer.save_pretrained(folder)
        tensors = {name: value.cpu() for name, value in adapter.state().items()}
        tensors |= {f"{name}.B": f.B.detach().cpu().contiguous() for name, f in adapter.factors().items()}
        save_file(tensors, folder / CORE_NAME, metadata={"format": "dpsb-core/1", "run_id": run_id})
        (folder / "README.md").write_text(_card(config, federation))


def _card(config: FederateConfig, federation: Federation) -> str:
    """The model card: what this is and what is claimed. No metrics on private people."""
    report, run = federation.report, config.run
    rests_on = "\n".join(f"- {line}" for line in report.assumptions)
    return f"""---
library_name: peft
tags:
- lora
- differential-privacy
- dpsb
---

# Adapter trained by {len(config.silos)} silos with differential privacy

Base model `{run.model}`, task {run.task}, R-only (rank {run.rank}), averaged over {federation.state.round} rounds in
the privacy model {report.model}. It is a plain LoRA adapter; dpsb is not needed to load it.

## Privacy

{report.statement}

This rests on:

{rests_on}

To check the claim, recompute it from the silos' ledgers: `dpsb-accounting federated --model {report.model}`.
"""


def _randomness(config: FederateConfig) -> Randomness:
    seed = config.run.insecure_seed
    return SystemRandomness() if seed is None else SeededRandomness(seed)
