"""Where a new run begins: what it trains, on its model, before any private example counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dpsb.adapter import Adapter, Provenance, attach
from dpsb.baselines.build import adapt, lora_xs
from dpsb.baselines.methods import Method, method_named
from dpsb.baselines.public_starts import public_start
from dpsb.basis.setup import Setup, from_public_rows, train_on_public_rows
from dpsb.basis.stage import Planned, plan_basis
from dpsb.inputs import Inputs
from dpsb.models import HEAD_NAMES
from dpsb.plan import relation_for


def basis_setup(inputs: Inputs, delta: float) -> Setup:
    """What a basis may be computed from.

    Args:
      inputs: Of the run.
      delta: Of the run.
    """
    config, prepared = inputs.config, inputs.prepared
    return Setup(
        config=config,
        model=inputs.model,
        loss_fn=inputs.loss_fn,
        collate=inputs.collate,
        examples=prepared.examples,
        public=prepared.public,
        warm_start=prepared.warm_start,
        max_length=prepared.max_length,
        delta=delta,
        neighboring=relation_for(config.neighboring, config.num_examples is not None),
    )


def begin(inputs: Inputs, setup: Setup, on_status: Callable[[str], None]) -> tuple[Adapter, Planned | None]:
    """The adapter that a new run begins with, and the plan of its basis; None for a method without one.

    Args:
      inputs: Of the run.
      setup: From :func:`basis_setup`.
      on_status: Told what is being computed.

    Raises:
      BudgetError, WidthError, DataError, ValueError: If the settings do not fit the model or the public data.
    """
    config, method = inputs.config, method_named(inputs.config.method)
    planned = None
    if method.kind != "cores":
        adapter = adapt(inputs.model, method, _public_start(inputs, method, on_status))
    else:
        on_status(f"computing the basis ({config.basis})")
        planned = _planned_basis(setup)
        adapter = attach(inputs.model, planned.basis, allow=HEAD_NAMES)
    if config.warm_start_epochs and config.basis != "trained":
        on_status(f"training on the public rows of {config.warm_start}")
        train_on_public_rows(setup, adapter.parameters())
        if adapter.provenance.access == "data_free":  # no longer so
            said = {**adapter.provenance.detail, **from_public_rows(config)}
            adapter = replace(adapter, provenance=replace(adapter.provenance, access="public", detail=said))
            planned = planned and replace(planned, provenance=adapter.provenance)
    return adapter, planned


def _planned_basis(setup: Setup) -> Planned:
    if setup.config.method != "lora-xs":
        return plan_basis(setup)
    basis = lora_xs(setup.model)
    return Planned(basis=basis, provenance=basis.provenance)


def _public_start(inputs: Inputs, method: Method, on_status: Callable[[str], None]) -> Provenance | None:
    """Puts the factors where a method that reads public rows starts them; None for one that reads no data."""
    if method.source is None:
        return None
    on_status(f"computing the start ({method.name})")
    return public_start(
        inputs.model,
        method,
        inputs.loss_fn,
        inputs.prepared.public[0],
        inputs.collate,
        inputs.prepared.max_length,
        inputs.config.token_budget,
        inputs.config.head_init_std,
    )
