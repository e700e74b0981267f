"""A federation in one process: data, model, silos, rounds, adapter, report. What ``dpsb federate simulate`` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dpsb.data import read_table
from dpsb.federated.building import Built, build, finish
from dpsb.federated.calibrate import policy_text, terms_of
from dpsb.federated.canaries import FederationCanaries
from dpsb.federated.checks import FederatedError
from dpsb.federated.config import SETTINGS_NAME, FederateConfig, settings_in, silo_config
from dpsb.federated.coordinator import Coordinator
from dpsb.federated.local import LocalTransport
from dpsb.federated.messages import Reply
from dpsb.federated.report import REPORT_NAME, SILOS, Federation, federation_report
from dpsb.federated.secure.masks import own_key, public_of
from dpsb.federated.server import RoundRecord, ServerError
from dpsb.federated.silo import Silo
from dpsb.federated.spec import POLICY_NAME, SiloPolicy
from dpsb.federated.split import split_table
from dpsb.federated.terms import Terms
from dpsb.federated.trainer import Trainer
from dpsb.folders import new_folder
from dpsb.frozen_prefix import remember_frozen_prefix
from dpsb.run import randomness_of
from dpsb_accounting.files import write_whole

ENGINES = ("local", "flower")


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


def simulate(
    config: FederateConfig,
    *,
    engine: str = "local",
    callbacks: Callbacks = Callbacks(),
    canaries: FederationCanaries | None = None,
) -> Simulated:
    """Runs a federation in ``config.run.out``, or goes on with the one that is there.

    Each silo has a folder with its policy, its ledger and its replies, as it would on a machine of its own; they share
    the process and the model. So nothing is hidden from whoever runs this: it is for trying out settings and for tests.

    Args:
      config: Settings.
      engine: ``"local"``, or ``"flower"``: the coordinator is then a ServerApp in Flower's simulation, and each message
        goes through its engine to a ClientApp and on to the silo's worker, as in a deployment.
      callbacks: Where progress goes.
      canaries: Of an audit, in one process; the federation is then there to be audited and claims nothing.

    Raises:
      FederatedError, ServerError, DataError, ModelError, ProbeError, LedgerError: With one sentence each.
      FileExistsError: If ``config.run.out`` holds something else.
    """
    if engine not in ENGINES:
        raise FederatedError(f"Expected engine={engine!r} to be one of {', '.join(ENGINES)}.")
    if engine == "flower" and find_spec("flwr") is None:
        raise FederatedError("engine='flower' needs Flower: pip install '.[federated]' in a checkout.")
    out = Path(config.run.out)
    if (out / REPORT_NAME).exists():
        raise ServerError(f"The federation in {out} is finished; look at it with `dpsb federate report {out}`.")
    resumed = (out / SETTINGS_NAME).exists()
    if resumed and settings_in(out).to_json() != config.to_json():
        raise ServerError(f"The settings differ from those of the federation in {out}; they cannot change on resume.")
    with nullcontext(out) if resumed else new_folder(out, last=SETTINGS_NAME) as folder:  # what fails leaves nothing
        built, terms, policies = _checked(config, folder, callbacks)
    trainer = built.trainer
    policies = {name: replace(policy, examples_together=True) for name, policy in policies.items()}  # theta is our own
    if terms.clip_steps:
        policies = _acquainted(policies, out)
    callbacks.on_terms(terms, policies)
    randomness = randomness_of(config.run)
    silos = {}
    for name, policy in policies.items():
        folder = out / SILOS / name
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / POLICY_NAME, policy_text(policy).encode())
        silos[name] = Silo(
            folder,
            policy,
            trainer,
            built.prepared[name].examples,
            randomness=randomness,
            canaries=None if canaries is None else canaries.at(name),
            on_problem=callbacks.on_problem,
        )
    with _remembering(config, trainer):
        coordinator = Coordinator(
            out,
            terms,
            trainer.start,
            trainer.basis_sha256,
            LocalTransport(silos, callbacks.on_reply),
            randomness=randomness,
            on_round=callbacks.on_round,
            shapes=trainer.shapes,
            wide=trainer.wide,
            on_opened=(lambda _sum: None) if canaries is None else canaries.opened,
        )
        if engine == "local":
            coordinator.run()
        else:
            _by_flower(coordinator, silos, callbacks)
    callbacks.on_status("writing the adapter")
    federation = federation_report(out)
    return Simulated(out, federation, finish(out, built, config, federation))


def _checked(
    config: FederateConfig, folder: Path, callbacks: Callbacks
) -> tuple[Built, Terms, Mapping[str, SiloPolicy]]:
    """All that can fail before anything is charged: the data, the start, the noise, the model's self-test."""
    built = _built(config, folder, callbacks)
    trainer = built.trainer
    callbacks.on_status("calibrating the silos' noise")
    dimension = sum(tensor.numel() for tensor in trainer.start.values())
    sizes = {name: len(prepared.examples) for name, prepared in built.prepared.items()}
    terms, policies = terms_of(config, sizes, dimension, trainer.wide)
    callbacks.on_status("checking the model on synthetic examples")
    with _remembering(config, trainer):
        trainer.check()
    return built, terms, policies


def _remembering(config: FederateConfig, trainer: Trainer) -> AbstractContextManager[Any]:
    return remember_frozen_prefix(trainer.adapter.model) if config.run.remember_frozen_blocks else nullcontext()


def _built(config: FederateConfig, out: Path, callbacks: Callbacks) -> Built:
    names = list(config.silos)
    if config.silos[names[0]].data is None:
        if config.run.neighboring == "replace_one":
            raise FederatedError(
                "neighboring='replace_one' does not hold where one file is split over silos: whose a row is depends on "
                "what it says, so one that is replaced can leave a silo and enter another. Use zero_out or "
                "add_or_remove_one, or give each silo a file of its own."
            )
        table = read_table(config.run.data)
        tables = split_table(table, names, config.federation.split_by, config.federation.split_seed)
    else:
        tables = {name: read_table(silo_config(config, name).data) for name in names}
    for name, rows in tables.items():
        if not len(rows):
            raise FederatedError(f"Silo {name!r} has no rows; split over fewer silos, or by another column.")
    runs = {name: silo_config(config, name).with_basis("weight") for name in names}
    runs[names[0]] = replace(silo_config(config, names[0]), eval_data=config.run.eval_data)
    return build(config, tables, runs, out, callbacks.on_status)


def _acquainted(policies: Mapping[str, SiloPolicy], out: Path) -> dict[str, SiloPolicy]:
    """The policies with all silos' public keys, which real silos give each other."""
    keys = {}
    for name in policies:
        folder = out / SILOS / name
        folder.mkdir(parents=True, exist_ok=True)
        keys[name] = public_of(own_key(folder)).hex()
    return {name: replace(policy, peers=keys) for name, policy in policies.items()}


def _by_flower(coordinator: Coordinator, silos: Mapping[str, Silo], callbacks: Callbacks) -> None:
    from dpsb.federated.flower.engine import simulate_rounds

    coordinator.begin()
    simulate_rounds(coordinator.out, silos, on_reply=callbacks.on_reply, on_status=callbacks.on_status)
