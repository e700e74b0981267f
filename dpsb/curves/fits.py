"""Whether the methods of a sweep fit its model and its data, told before any cell is run."""

from __future__ import annotations

from pathlib import Path

import torch

from dpsb.adapter import lora_layers
from dpsb.baselines.build import adapt, add_method, peft_config_class
from dpsb.baselines.methods import PEFT_INITS, PUBLIC_STARTS, method_named
from dpsb.basis.hybrid import check_width
from dpsb.basis_spec import BASIS_SETTINGS, parse_basis, settings_for
from dpsb.config import RunConfig
from dpsb.curves.cells import pairs
from dpsb.curves.entries import CurveError, Entry
from dpsb.curves.settings import CurveSettings
from dpsb.data import DataError, check_columns, class_indices, read_table
from dpsb.models import QuantizedConfigError, add_lora, empty_base
from dpsb.parts import part_of
from dpsb.prepare import check_judgeable, check_public_rows, columns_of, labels_of, public_files, targets_of

_SOME_LABELS = 2
"""Stands in for what only the data tell; nothing that is checked here depends on it."""


def check_methods(settings: CurveSettings) -> None:
    """Raises one sentence on the first method whose every run would fail, before another one has spent epsilon.

    Checked are settings of a basis that no method reads, names of PEFT's, targets and rank against the shapes of the
    model, the width of a hybrid. The model is built without weights, so this costs seconds at most; one whose config
    does not tell its shapes (a quantized one) is left to the cells.

    Raises:
      CurveError: With the method as the user wrote it.
    """
    _check_settings_used(settings)
    first: dict[Entry, float] = {}
    for entry, epsilon in pairs(settings):
        first.setdefault(entry, epsilon)
    for entry, epsilon in first.items():
        config = settings.run(entry, epsilon, settings.rates[entry.text][0], Path("cell"))
        try:
            _check_shapes(config)
        except QuantizedConfigError:
            continue
        except ValueError as error:
            raise CurveError(f"methods: {entry.text!r} cannot be run: {error}") from None


def check_data(settings: CurveSettings) -> None:
    """Refuses a sweep whose files have no text or label column, whose labels nobody declared, or no held-out row has.

    Raises:
      DataError: With one sentence; nothing has been written.
    """
    entry, epsilon = next(iter(pairs(settings)))
    config = settings.run(entry, epsilon, settings.rates[entry.text][0], Path("cell"))
    table = read_table(config.data)
    labels, _ = labels_of(config, table)
    columns = columns_of(config)
    check_columns(table, columns, config.task)
    for tuning in {False, settings.tunes}:
        config = settings.run(entry, epsilon, settings.rates[entry.text][0], Path("cell"), tuning=tuning)
        held_out, source = read_table(str(config.eval_data)), _judged_on(settings, config, tuning)
        if not len(held_out):
            raise DataError(f"{source} holds no rows to judge runs on.")
        _, _, label = check_columns(held_out, columns, config.task)
        if label:
            check_judgeable(source, class_indices(held_out.labels(label), labels), labels)


def _judged_on(settings: CurveSettings, config: RunConfig, tuning: bool) -> str:
    """What a user gave for the rows that a cell is judged on."""
    part = part_of(str(config.eval_data))
    if part is not None:
        share = "validation_share" if tuning else "test_share"
        return f"The part of {part.source} that {share}={getattr(settings, share)!r} holds out"
    name = "validation_data" if tuning and settings.validation_data else "eval_data"
    return f"{name}={config.eval_data!r}"


def check_public_files(settings: CurveSettings) -> None:
    """Refuses a sweep whose methods take rows for public that are private too, or judge on rows of a warm start.

    The private ones are all of the data file, the parts that are held out of it too. Whether there are such rows, and
    how many, is private. A cell that failed for it would be in the sweep's page and
    tables, which are made to be shown; so no sweep begins, and only the operator's screen says why.

    Raises:
      SharedRowsError: With the number of such rows.
      DataError: If a file cannot be read.
    """
    configs = [
        settings.run(entry, epsilon, settings.rates[entry.text][0], Path("cell"), tuning=tuning)
        for entry, epsilon in pairs(settings)
        for tuning in (False, settings.tunes)
    ]
    sources = dict.fromkeys(source for config in configs for source in public_files(config))
    if sources:
        judged_on = dict.fromkeys(config.eval_data for config in configs if config.warm_start and config.eval_data)
        public = {source: read_table(source) for source in sources}
        part = part_of(configs[0].data)
        private = read_table(configs[0].data if part is None else part.source)
        check_public_rows(configs[0], private, [read_table(file) for file in judged_on], public)


def _check_settings_used(settings: CurveSettings) -> None:
    bases = [parse_basis(entry.basis) for entry in settings.entries if entry.basis is not None]
    choice = str(settings.shared.get("basis_choice", "public"))
    for name, (unset, purpose) in BASIS_SETTINGS.items():
        given = settings.shared.get(name, unset[0])
        if given not in unset and not any(name in settings_for(basis, choice) for basis in bases):
            raise CurveError(
                f"{name}={given!r} is for {purpose}, and none of the methods "
                f"{', '.join(entry.text for entry in settings.entries)} is on such a basis: leave out {name}."
            )


def _check_shapes(config: RunConfig) -> None:
    method, targets = method_named(config.method), targets_of(config.targets)
    with torch.device("meta"):
        base = empty_base(config.model, config.task, _SOME_LABELS, getattr(torch, config.dtype), config.pooling)
        if method.kind == "model":
            adapt(add_method(base, method, config.task, config.rank, targets), method)
        elif method.peft in PUBLIC_STARTS:
            add_method(base, method, config.task, config.rank, targets)
        elif method.peft in (None, "lora", *PEFT_INITS):
            layers = lora_layers(add_lora(base, config.task, config.rank, targets))
            if parse_basis(config.basis).kind == "hybrid":
                check_width(layers, config.rank, config.basis_width)
        else:
            peft_config_class(method)
