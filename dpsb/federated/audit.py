"""An audit of a federation: a second simulation with canaries at one silo, and what its releases prove."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dpsb.audit import Audit, white_box, write_audit
from dpsb.federated.budget import RUNS
from dpsb.federated.canaries import FederationCanaries
from dpsb.federated.checks import FederatedError
from dpsb.federated.config import FederateConfig
from dpsb.federated.report import SILOS
from dpsb.federated.server import ServerError
from dpsb.federated.simulate import Callbacks, simulate
from dpsb.federated.spec import PrivacyModel
from dpsb_accounting import Ledger, Phase, Plan, auditing
from dpsb_accounting import epsilon as epsilon_of
from dpsb_accounting.ledger import LEDGER_NAME

CANARY_RUN = "canary-run"


def audit_federation(
    config: FederateConfig,
    out: Path,
    *,
    host: str | None = None,
    canaries: int = 3000,
    confidence: float = 0.95,
    callbacks: Callbacks = Callbacks(),  # noqa: B008
) -> Audit:
    """Simulates a federation once more with canaries at one silo, and bounds that silo's epsilon from below.

    Guarantees:
      * Every ledger of the simulation is tainted: neither its model nor a claim of it can be taken for the audited
        federation's. It reads the same data; its files stay with the operator.
      * In ``silo_local`` the attacker sees every release of the silo, which is more than the server or anyone after it
        does; in the other models it sees every opened sum.

    Args:
      config: Settings of the federation.
      out: New folder.
      host: The silo that is audited; by default the first.
      canaries: At most the length of theta are used.
      confidence: With which the best bound holds.
      callbacks: Where progress goes.

    Raises:
      ServerError: If ``out`` exists and is not empty.
      FederatedError: If there is no such silo, or the model is ``client_level``, whose unit is a whole silo.
    """
    if out.exists() and any(out.iterdir()):
        raise ServerError(f"{out} is not empty; choose another folder for the audit.")
    host = next(iter(config.silos)) if host is None else host
    if host not in config.silos:
        raise FederatedError(f"Expected host={host!r} to be one of {', '.join(config.silos)}.")
    if config.federation.model == PrivacyModel.CLIENT_LEVEL.value:
        raise FederatedError("A client_level federation has silos for units; it cannot be audited with canary rows.")
    planted = FederationCanaries(host, canaries)
    run = replace(config.run, out=str(out / CANARY_RUN))
    simulate(replace(config, run=run), callbacks=callbacks, canaries=planted)
    (path,) = (out / CANARY_RUN / SILOS / host / RUNS).glob(f"*/{LEDGER_NAME}")
    record = Ledger.read(path)
    plan, claimed = record.plan, epsilon_of(record.plan).upper
    summed = config.federation.model != PrivacyModel.SILO_LOCAL.value
    name = "canaries in the aggregate" if summed else "canaries in a silo's releases"
    scores = planted.scores()
    auditing.write_scores(scores, out / "federated-scores.npz")
    attacks = [white_box(name, made_of(plan, record.charged("train")), scores, confidence)]
    notes = [
        f"The attack was made on a separate simulation, with canaries among the rows of silo {host!r}, under the same "
        "terms; its ledgers are tainted and its model is not for release.",
        f"The claim is that of the silo's whole plan of {plan.steps} steps; {record.charged('train')} were made.",
        "For the operator, not for release: the simulation read the private data again and claims nothing.",
    ]
    title = f"Audit of silo {host} in {Path(config.run.out).name}"
    further = {"silo": host, "model": config.federation.model}
    return write_audit(out, title, plan, claimed, confidence, attacks, notes, further)


def made_of(plan: Plan, steps: int) -> Plan:
    """The part of a silo's plan that was made: spare rounds are paid for, and mostly not used."""
    return replace(plan, phases=(Phase("train", plan.train.event, steps),))
