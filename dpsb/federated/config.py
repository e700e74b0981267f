"""A federation on one machine, as a TOML file states it: the settings of a run, and who takes part how."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from dpsb.basis_spec import RELEASED, parse_basis
from dpsb.config import ConfigError, RunConfig, make_config
from dpsb.config_file import long_names
from dpsb.federated.checks import (
    FederatedError,
    check_choice,
    check_match,
    check_positive,
    check_text,
    check_whole,
    checked_fields,
)
from dpsb.federated.spec import OPTIMIZERS, SILO_NAME, PrivacyModel, model_named
from dpsb.federated.terms import SERVER_OPTIMIZERS
from dpsb.parts import same_data

NOISES = ("gaussian", "skellam")
SETTINGS_NAME = "federation.json"
"""In the folder of a federation, and of each silo of a deployment: its settings, and where its basis is from."""

EMBEDDED_DATA = "mail"
"""In a federation's settings: the embedded mail, ``data = "mail"`` for training and ``eval_data = "mail"`` for test."""

_AT_THE_SILOS = "(at the silos)"

_NOT_FEDERATED = {
    "steps": "is rounds times local_steps",
    "epochs": "is rounds times local_steps",
    "num_examples": "stands under [silos.NAME]",
    "unit_column": "is not there for federations yet",
    "adaptive_clip": "is not there for federations yet",
    "auto_clip": "is not there for federations yet",
    "allow_dropout": "is not there for federations",
    "warm_start": "is not there for federations yet",
    "warm_start_epochs": "is not there for federations yet",
    "warm_start_learning_rate": "is not there for federations yet",
    "precondition": "is not there for federations yet",
    "rebase_every": "is not there for federations yet",
    "head_share": "is not there for federations yet",
    "checkpoint_every": "is after each round",
}


@dataclass(frozen=True, kw_only=True)
class SiloSettings:
    """One silo of a simulation.

    Args:
      data: Its own training file; left out where one file is split.
      epsilon: Its budget; that of the file's top level if left out.
      expected_batch_size: M; likewise.
      num_examples: A declared public N. Without it the silo's true number counts as public. All silos or none.
    """

    data: str | None = None
    epsilon: float | None = None
    expected_batch_size: int | None = None
    num_examples: int | None = None

    def __post_init__(self) -> None:
        check_text(data=self.data)
        if self.epsilon is not None:
            check_positive(epsilon=self.epsilon)
        for name in ("expected_batch_size", "num_examples"):
            if getattr(self, name) is not None:
                check_whole(1, **{name: getattr(self, name)})


@dataclass(frozen=True, kw_only=True)
class FederationSettings:
    """The table ``[federation]``.

    Args:
      rounds: Number of averages.
      local_steps: Private steps of each silo before each.
      silos: How many silos ``data`` is split over; left out where there are tables ``[silos.NAME]``.
      split_by: The column by whose value rows go to silos, so that rows of one person, domain or branch stay together.
      split_seed: Public seed of the split.
      model: ``"silo_local"``; ``"trusted_server"``: one step a round, the server sees sums without noise;
        ``"secagg"``: one step a round, noise in shares, the sum as a secure aggregation would show it;
        ``"client_level"``: whole silos are hidden, epsilon is then for a silo.
      server_optimizer: ``"none"`` (Fed-SB's mean), ``"sgd"`` or ``"adam"``; models with sums need one of the latter.
      server_learning_rate: Of the server's optimizer on the difference to the mean.
      min_silos: With fewer replies the run stops; all silos less ``dropouts`` if left out.
      spare_rounds: Rounds' worth of steps that each silo pays for besides, for what crashes waste.
      dropouts: ``secagg``: how many silos may be missing in a sum that is opened.
      colluders: ``secagg``: how many silos may help the server, at least 1.
      noise: ``secagg``: ``"gaussian"``, and whoever adds up is trusted; or ``"skellam"``: in whole numbers, through a
        secure sum. Experimental.
    """

    rounds: int = 8
    local_steps: int = 4
    silos: int | None = None
    split_by: str | None = None
    split_seed: int = 0
    model: str = PrivacyModel.SILO_LOCAL.value
    server_optimizer: str = "none"
    server_learning_rate: float = 1.0
    min_silos: int | None = None
    spare_rounds: int = 0
    dropouts: int = 0
    colluders: int = 1
    noise: str = "gaussian"

    def __post_init__(self) -> None:
        check_choice(NOISES, noise=self.noise)
        if self.noise != "gaussian" and self.model != PrivacyModel.SECAGG.value:
            raise FederatedError(f"noise={self.noise!r} is of model secagg, not of {self.model}.")
        check_whole(1, rounds=self.rounds, local_steps=self.local_steps)
        check_whole(0, split_seed=self.split_seed, spare_rounds=self.spare_rounds, dropouts=self.dropouts)
        check_whole(1, colluders=self.colluders)
        for name in ("silos", "min_silos"):
            if getattr(self, name) is not None:
                check_whole(1, **{name: getattr(self, name)})
        model_named(self.model)
        check_text(split_by=self.split_by)
        check_positive(server_learning_rate=self.server_learning_rate)
        if self.server_optimizer not in SERVER_OPTIMIZERS:
            raise FederatedError(
                f"Expected server_optimizer={self.server_optimizer!r} to be one of {', '.join(SERVER_OPTIMIZERS)}."
            )


def _check_apart(silos: Mapping[str, SiloSettings]) -> None:
    """What a federation claims is the worst silo's, which no row of two silos has."""
    for (one, mine), (other, theirs) in combinations(silos.items(), 2):
        if mine.data is not None and theirs.data is not None and same_data(mine.data, theirs.data):
            raise FederatedError(f"Silos {one!r} and {other!r} have the same rows, {mine.data!r}; give each its own.")


@dataclass(frozen=True, kw_only=True)
class FederateConfig:
    """Settings of a federation in one process. All of them are public.

    Args:
      run: Model, data, task, optimizer, privacy: the keys of ``dpsb train``.
      federation: The table ``[federation]``.
      silos: The tables ``[silos.NAME]``, or made from ``federation.silos``.
    """

    run: RunConfig
    federation: FederationSettings
    silos: Mapping[str, SiloSettings] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.run.basis_sampling_prob == 1.0:  # as silos release anyway, and what earlier versions wrote down
            object.__setattr__(self, "run", replace(self.run, basis_sampling_prob=None))
        named = dict(self.silos)
        if not named:
            if self.federation.silos is None or self.federation.silos < 2:
                raise FederatedError("Say who takes part: silos = 3 under [federation], or a table [silos.NAME] each.")
            named = {f"silo-{number + 1}": SiloSettings() for number in range(self.federation.silos)}
            object.__setattr__(self, "silos", named)
        elif self.federation.silos not in (None, len(named)):
            raise FederatedError(f"[federation] has silos={self.federation.silos!r}, but {len(named)} tables follow.")
        for name in named:
            check_match(SILO_NAME, silo=name)
        with_data = [name for name, settings in named.items() if settings.data is not None]
        if with_data and len(with_data) < len(named):
            raise FederatedError("Give every silo its own data, or none of them: then data is split.")
        if with_data and self.federation.split_by:
            raise FederatedError(
                f"split_by={self.federation.split_by!r} has no meaning where silos have their own data."
            )
        for name, settings in named.items():
            try:  # no silo's rows may be the held-out or a public file
                replace(self.run, data=settings.data or self.run.data)
            except ConfigError as error:
                raise FederatedError(f"[silos.{name}]: {error}") from None
        _check_apart(named)
        declared = {settings.num_examples is not None for settings in named.values()}
        if len(declared) > 1:
            raise FederatedError("Declare num_examples for every silo or for none: two kinds of guarantee do not mix.")
        self._check_run()

    def _check_run(self) -> None:
        run, usual = self.run, {f.name: f.default for f in fields(RunConfig)}
        for name, why in _NOT_FEDERATED.items():
            if getattr(run, name) != usual[name]:
                raise FederatedError(f"{name}={getattr(run, name)!r} {why}.")
        if run.method != "sb":
            raise FederatedError(f"method={run.method!r} is not federated here; only 'sb' is, whose average is exact.")
        if run.optimizer not in OPTIMIZERS:
            raise FederatedError(f"Expected optimizer={run.optimizer!r} to be one of {', '.join(OPTIMIZERS)}.")
        if math.isinf(run.epsilon):
            raise FederatedError("epsilon=inf has no meaning in a federation: nothing would protect a silo.")
        spec = parse_basis(run.basis)
        if run.basis_share != usual["basis_share"] and spec.kind not in RELEASED:
            raise FederatedError(f"basis_share={run.basis_share!r} is for a basis that is paid for.")
        if spec.kind in RELEASED:
            self._check_paid_basis()
        elif spec.kind == "leak" or (spec.kind == "lora-sb" and not spec.sources):
            raise FederatedError(
                f"basis={run.basis!r} is computed from private data; in a federation use a data-free basis (weight, "
                "random, complementary, hadamard), public:FILE, or private or hybrid, for which every silo pays."
            )
        if run.basis_choice == "private":
            raise FederatedError("basis_choice='private' reads private data; leave it at 'public'.")
        if run.labels == "from-data":
            raise FederatedError("labels='from-data' would join the silos' labels; declare them.")

    def _check_paid_basis(self) -> None:
        run = self.run
        if self.federation.model != PrivacyModel.SILO_LOCAL.value:
            raise FederatedError(f"basis={run.basis!r} is for model silo_local, not for {self.federation.model}.")
        if run.basis_rounds or run.basis_sampling_prob is not None or run.remember_frozen_blocks:
            raise FederatedError(
                f"basis={run.basis!r} takes one release of all examples from each silo here: leave "
                "out basis_rounds, basis_sampling_prob and remember_frozen_blocks."
            )

    @property
    def basis_is_paid(self) -> bool:
        """Whether every silo pays for a release that the basis is made from."""
        return parse_basis(self.run.basis).kind in RELEASED

    @property
    def min_silos(self) -> int:
        """With fewer replies the run stops."""
        if self.federation.min_silos is not None:
            return self.federation.min_silos
        return len(self.silos) - self.federation.dropouts

    def epsilon(self, silo: str) -> float:
        """The budget of a silo."""
        own = self.silos[silo].epsilon
        return self.run.epsilon if own is None else own

    def expected_batch_size(self, silo: str) -> int:
        """M of a silo."""
        own = self.silos[silo].expected_batch_size
        return self.run.expected_batch_size if own is None else own

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON."""
        silos = {name: asdict(settings) for name, settings in self.silos.items()}
        return {"run": self.run.to_json(), "federation": asdict(self.federation), "silos": silos}


def read_federation(path: Path, out: str | None = None, *, needs_data: bool = True) -> FederateConfig:
    """The settings in a TOML file; ``out`` takes the place of the file's own. A server's need name no data.

    Raises:
      FederatedError, ConfigError: If the file cannot be read, or a key is unknown, missing or out of range.
    """
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise FederatedError(f"{path} cannot be read as the settings of a federation: {error}") from None
    tables = {name: content.pop(name, {}) for name in ("federation", "silos")}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise FederatedError(f"{path}: expected a table [{name}], got {table!r}.")
    silos: dict[str, SiloSettings] = {}
    for name, settings in tables["silos"].items():
        if not isinstance(settings, dict):
            raise FederatedError(f"{path}: expected a table [silos.{name}], got {settings!r}.")
        silos[name] = SiloSettings(**checked_fields(SiloSettings, settings, f"{path}: [silos.{name}]"))
    if out is not None:
        content["out"] = out
    own = next((settings.data for settings in silos.values() if settings.data), None if needs_data else _AT_THE_SILOS)
    if own is not None and "data" not in content:
        content["data"] = own  # each silo's own takes its place
    federation = FederationSettings(**checked_fields(FederationSettings, tables["federation"], f"{path}: [federation]"))
    if content.get("basis") == "trained":
        raise FederatedError(f"{path}: basis='trained' is not there for federations yet; use 'public:FILE'.")
    try:
        run = make_config(_with_embedded(long_names(content, str(path))))
    except ConfigError as error:
        raise FederatedError(f"{path}: {error}") from None
    return FederateConfig(run=run, federation=federation, silos=silos)


def config_from_json(content: Mapping[str, Any]) -> FederateConfig:
    """The inverse of :meth:`FederateConfig.to_json`."""
    silos = {
        name: SiloSettings(**checked_fields(SiloSettings, settings, f"silo {name!r}"))
        for name, settings in content["silos"].items()
    }
    federation = FederationSettings(**checked_fields(FederationSettings, content["federation"], "the federation"))
    return FederateConfig(run=make_config(content["run"]), federation=federation, silos=silos)


def settings_in(folder: Path) -> FederateConfig:
    """The settings of the federation in a folder, a server's or a silo's.

    Raises:
      FederatedError: If there are none.
    """
    try:
        begun = json.loads((folder / SETTINGS_NAME).read_text())
        content, basis = begun["settings"], begun["basis"]
    except (OSError, ValueError, KeyError, TypeError):
        raise FederatedError(
            f"{folder} holds no federation ({SETTINGS_NAME}); make it with `dpsb federate init`."
        ) from None
    try:
        config, _ = config_from_json(content), (basis["kind"], basis["access"])
    except (KeyError, AttributeError, TypeError) as error:
        raise FederatedError(
            f"{folder / SETTINGS_NAME} is not what `dpsb federate init` wrote ({type(error).__name__}: {error}); take "
            "it from the server again."
        ) from None
    return config


def silo_config(config: FederateConfig, name: str) -> RunConfig:
    """The settings with which a silo's own file is read."""
    own = config.silos[name].data
    return replace(config.run, eval_data=None, data=config.run.data if own is None else own)


def _with_embedded(content: Mapping[str, Any]) -> dict[str, Any]:
    from dpsb.demo import mail_file

    changed = dict(content)
    for key, split in (("data", "train"), ("eval_data", "test")):
        if changed.get(key) == EMBEDDED_DATA and not Path(EMBEDDED_DATA).exists():
            changed[key] = str(mail_file(split))
    return changed
