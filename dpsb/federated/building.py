"""From the settings of a federation to its model: the same one at every silo, at the server, and in a simulation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dpsb.adapter import Adapter, attach, lora_layers
from dpsb.artifacts import write_adapter
from dpsb.basis.private import rounds_for
from dpsb.basis.setup import Setup
from dpsb.basis.stage import plan_basis, wide_frames
from dpsb.basis_spec import RELEASED, parse_basis
from dpsb.config import RunConfig
from dpsb.data import Collator, Table, read_table
from dpsb.evaluate import evaluate
from dpsb.federated.card import federation_card
from dpsb.federated.checks import FederatedError
from dpsb.federated.config import SETTINGS_NAME, FederateConfig
from dpsb.federated.paid_basis import provenance_of, wide_from
from dpsb.federated.paid_layout import FRAMES_NAME, Wide, read_wide
from dpsb.federated.report import Federation, write_report
from dpsb.federated.spec import SOURCE_LENGTH, PaidBasis
from dpsb.federated.trainer import Trainer
from dpsb.folders import replacing
from dpsb.models import HEAD_NAMES, add_lora, load_base
from dpsb.prepare import Prepared, columns_of, labels_of, loss_of, prepare, synthetic_of, targets_of
from dpsb.run import run_details
from dpsb.shared_rows import PublicRows, check_not_shared, public_rows, stated_rows
from dpsb.start import START_NAME, attach_saved, start_of
from dpsb_accounting.files import write_whole

ADAPTER, PAID_START = "adapter", "paid-start.safetensors"
PUBLIC_TEXTS = "public_texts"
"""Of the settings' file: digests by which a silo sees whether rows that the basis takes for public are its own."""

Status = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Built:
    """A model ready for rounds.

    Args:
      trainer: What silos work with.
      prepared: The data side of each table. Sensitive.
      tokenizer: Of the model.
    """

    trainer: Trainer
    prepared: Mapping[str, Prepared]
    tokenizer: Any


def build(
    config: FederateConfig, tables: Mapping[str, Table], runs: Mapping[str, RunConfig], out: Path, on_status: Status
) -> Built:
    """Loads model and adapter and tokenizes each silo's table.

    Where ``out`` holds the public start of the federation the adapter is that one, bit for bit; otherwise the basis is
    computed, and start and settings are put down there.

    Args:
      config: Settings of the federation.
      tables: Rows by silo; of a silo's own machine its own alone. Sensitive.
      runs: The settings with which each table is read, by silo.
      out: Folder with, or for, the start.
      on_status: Told what is being done.

    Raises:
      FederatedError, DataError, ModelError: With one sentence on what does not fit.
    """
    run = config.run
    on_status("reading data and model")
    first = next(iter(tables))
    labels, origin = labels_of(run, tables[first])
    dtype = getattr(torch, run.dtype)
    base, tokenizer = load_base(
        run.model, run.task, labels, dtype=dtype, pooling=run.pooling, head_init_std=run.head_init_std
    )
    begun = json.loads((out / SETTINGS_NAME).read_text()) if (out / SETTINGS_NAME).exists() else None
    public: list[PublicRows] = []
    if begun is None:
        given = {source: public_rows(read_table(source), columns_of(run), run.task) for source in run.public_sources}
        public = [rows._replace(source=source) for source, rows in given.items()]  # as the settings name it
    elif any(map(len, tables.values())):  # a server, when its rounds are over, has no rows
        public = _public_rows(run, begun, out)
    for name, table in tables.items():
        check_not_shared(table, public, columns_of(run), run.task, owner=f"the data of silo {name!r}")
    prepared = {name: prepare(runs[name], table, base, tokenizer, labels, origin) for name, table in tables.items()}
    model = add_lora(base, run.task, run.rank, targets_of(run.targets))
    if torch.cuda.is_available():
        model.to("cuda")
    collate = Collator(tokenizer.pad_token_id, next(model.parameters()).device)
    if begun is not None:
        adapter = attach_saved(model, (out / START_NAME).read_bytes(), begun["basis"])
    else:
        on_status(f"computing the basis ({run.basis})")
        if parse_basis(run.basis).kind == "hybrid":
            write_whole(out / FRAMES_NAME, _wide(run, model, prepared[first], collate).content())
        adapter = _new_adapter(run, model, prepared[first], collate)
        write_whole(out / START_NAME, start_of(adapter))
        settings: dict[str, Any] = {"settings": config.to_json(), "basis": adapter.provenance.to_json()}
        settings[PUBLIC_TEXTS] = [rows._asdict() for rows in public]
        write_whole(out / SETTINGS_NAME, (json.dumps(settings, indent=1) + "\n").encode())
    trainer = Trainer(
        adapter=adapter,
        loss_fn=loss_of(run),
        collate=collate,
        synthetic=synthetic_of(run, base, tokenizer, prepared[first]),
        max_length=prepared[first].max_length,
        token_budget=run.token_budget,
        details=run_details(run, model, prepared[first], (out / START_NAME).read_bytes()),
        wide=read_wide(out),
    )
    return Built(trainer=trainer, prepared=prepared, tokenizer=tokenizer)


def build_without_data(config: FederateConfig, out: Path, on_status: Status) -> Built:
    """The model for a server: no row of any silo is read, only public and held-out files of its own."""
    run = config.run
    columns = {
        "classification": (run.text_column or "text", run.text_pair_column, run.label_column or "label"),
        "causal-lm": (run.text_column or "text", run.prompt_column, run.completion_column),
    }[run.task]
    nothing = Table("", {name: [] for name in columns if name is not None})
    return build(config, {"": nothing}, {"": replace(run, num_examples=1)}, out, on_status)


def finish(out: Path, built: Built, config: FederateConfig, federation: Federation) -> dict[str, float]:
    """Writes the averaged adapter as a plain LoRA adapter with a card, cores in fp32 beside it, and the report.

    Returns:
      Metrics on held-out rows, if there are any; outside the guarantee.
    """
    trainer, run = built.trainer, config.run
    start = out / START_NAME
    if federation.state.basis:
        trainer.rebase(federation.state.basis, provenance_of(next(iter(_paid(federation)))))
        start = out / PAID_START
        write_whole(start, start_of(trainer.adapter))
    adapter = trainer.adapter
    adapter.load_state(federation.state.theta)
    with replacing(out / ADAPTER) as folder:
        write_adapter(folder, adapter, federation.state.run_id, built.tokenizer, start)
        (folder / "README.md").write_text(federation_card(config, federation))
    rows, metrics = next(iter(built.prepared.values())).held_out, {}
    if rows is not None:
        metrics = evaluate(adapter.model, rows, run.task, trainer.collate, trainer.max_length, run.token_budget)
    write_report(out, federation, {k: v if math.isfinite(v) else str(v) for k, v in metrics.items()})
    return metrics


def _paid(federation: Federation) -> list[PaidBasis]:
    return [terms.basis for terms in federation.state.terms.silos.values() if terms.basis is not None]


def _public_rows(run: RunConfig, begun: Mapping[str, Any], out: Path) -> list[PublicRows]:
    """The rows that the basis takes for public, as the settings of a federation that was begun name them."""
    try:
        named = [stated_rows(stated) for stated in begun.get(PUBLIC_TEXTS, [])]
    except (TypeError, ValueError) as error:
        raise FederatedError(f"{out / SETTINGS_NAME}: {PUBLIC_TEXTS} is not what a server writes: {error}.") from None
    if sorted(rows.source for rows in named) != sorted(run.public_sources):
        raise FederatedError(
            f"{out / SETTINGS_NAME} does not say which rows the basis takes for public ({PUBLIC_TEXTS}; older versions "
            "of dpsb said less), so no silo can tell whether they are its own; begin the federation anew."
        )
    return named


def _wide(run: RunConfig, model: torch.nn.Module, prepared: Prepared, collate: Collator) -> Wide:
    """The wide public basis that silos' releases turn and cut."""
    frames, _, said = wide_frames(_setup(run, model, prepared, collate))
    source = "; ".join(f"{name}: {value}" for name, value in said.items())
    return wide_from(frames, source.encode("ascii", "replace").decode()[:SOURCE_LENGTH])


def _setup(run: RunConfig, model: torch.nn.Module, prepared: Prepared, collate: Collator) -> Setup:
    """What a basis without private examples is made from."""
    return Setup(
        config=run,
        model=model,
        loss_fn=loss_of(run),
        collate=collate,
        examples=(),
        public=prepared.public,
        max_length=prepared.max_length,
        delta=0.5,
        neighboring="zero_out",
    )


def _new_adapter(run: RunConfig, model: torch.nn.Module, prepared: Prepared, collate: Collator) -> Adapter:
    """The adapter on a basis that needs no private example; a random one stands in for one that silos pay for."""
    kind = parse_basis(run.basis).kind
    if kind in RELEASED:
        if kind == "private" and rounds_for(lora_layers(model), run.basis_rounds):
            raise FederatedError("A weight is wider than 1024 on both sides; silos release no whole gradients of it.")
        run = run.with_basis("random")
    planned = plan_basis(_setup(run, model, prepared, collate))
    adapter = attach(model, planned.basis, allow=HEAD_NAMES)
    if adapter.provenance.access not in ("data_free", "public"):
        raise FederatedError(f"basis={run.basis!r} is {adapter.provenance.access}, not data-free or public.")
    return adapter
