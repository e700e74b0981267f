"""The one report of a federation, from what lies in its folder: the silos' ledgers and the coordinator's rounds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpsb.federated.budget import run_folder
from dpsb.federated.messages import Receipt
from dpsb.federated.server import ServerError, ServerState, load_state
from dpsb.federated.spec import PrivacyModel
from dpsb.federated.terms import Terms
from dpsb_accounting import Ledger, LedgerRecord, federated
from dpsb_accounting.federated import FederatedReport, Silo
from dpsb_accounting.files import write_whole
from dpsb_accounting.ledger import LEDGER_NAME

SCHEMA = "dpsb-federation-report/1"
REPORT_NAME, SILOS = "report.json", "silos"


@dataclass(frozen=True, kw_only=True)
class Federation:
    """What a federation did and may claim. Public.

    Args:
      report: The claim, by ``dpsb_accounting.federated``.
      state: The coordinator's.
      never: Silos without a ledger here: nothing of them was used. A deployment's server cannot know what they charged.
      behind: Silos of whose ledger the server has an early copy only. The plan is its first line, so the claim holds;
        what they charged in the end, their own ledgers say.
    """

    report: FederatedReport
    state: ServerState
    never: tuple[str, ...]
    behind: tuple[str, ...] = ()

    def to_json(self, held_out: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The report as JSON; ``held_out`` are metrics outside the guarantee."""
        rounds = [record.to_json() for record in self.state.history]
        content = {
            "schema": SCHEMA,
            **{key: value for key, value in self.report.to_json().items() if key != "schema"},
            "run_id": self.state.run_id,
            "rounds": {"done": self.state.round, "planned": self.state.terms.rounds, "history": rounds},
            "left": dict(self.state.left),
            "without_ledger": list(self.never),
            "early_copies": list(self.behind),
            "bytes": {
                "up": sum(record.bytes_up for record in self.state.history),
                "down": sum(record.bytes_down for record in self.state.history),
            },
        }
        if self.state.basis_record is not None:
            record = self.state.basis_record
            content["basis"] = {
                "silos": list(record.silos),
                "lost": dict(record.lost),
                "sha256": self.state.basis_sha256,
                "bytes_up": record.bytes_up,
            }
        if held_out:
            content["held_out"] = {"metrics": dict(held_out), "note": "outside the guarantee"}
        return content


def copy_of_ledger(out: Path, silo: str) -> Path:
    """Where a deployment's server keeps what a silo handed out of its ledger."""
    return out / "ledgers" / f"{silo}.jsonl"


def federation_report(out: Path) -> Federation:
    """Recomputes the report from the folder of a federation, finished or not.

    Every silo that has a ledger counts with its whole plan, whether or not its replies were used. The claim is that of
    the plans; what was charged stands beside it.

    Raises:
      ServerError: If there is no federation, no silo has charged anything yet, or a ledger is of another silo or run.
      LedgerError: If a ledger is damaged.
      ValueError: If the ledgers' plans do not go together, with the reason.
    """
    state = load_state(out)
    if state is None:
        raise ServerError(f"{out} holds no federation; start one with `dpsb federate simulate`.")
    found, never, behind = [], [], []
    for name in state.terms.silos:
        path, copy = run_folder(out / SILOS / name, state.run_id) / LEDGER_NAME, copy_of_ledger(out, name)
        receipt = state.receipts.get(name)
        if not path.exists() and not copy.exists():
            if receipt is not None:
                raise ServerError(
                    f"The ledger of silo {name!r}, which took part, is not here: nothing can be claimed. Start the "
                    f"server again while that silo is up, or put its owner's ledger.jsonl at {copy}."
                )
            never.append(name)
            continue
        record = Ledger.read(path if path.exists() else copy)
        _check_whose(record, name, state.run_id, receipt)
        if receipt is not None and not path.exists() and record.length < receipt.length:
            behind.append(name)
        elif receipt is not None:
            record.check_not_behind(receipt.length, receipt.head)
        silo = Silo.from_ledger(record, name)
        if state.tainted:
            silo = dataclasses.replace(silo, taints=(*silo.taints, "seeded_randomness of the server"))
        found.append(silo)
    if not found:
        raise ServerError(f"No silo in {out} has a ledger yet, so there is nothing to report.")
    return Federation(report=_report(found, state.terms), state=state, never=tuple(never), behind=tuple(behind))


def _check_whose(record: LedgerRecord, silo: str, run_id: str, receipt: Receipt | None) -> None:
    """Refuses a ledger that states another silo or run, or is not the one that the silo's receipts are of."""
    stated = record.plan.details.get("federated")
    named = (stated.get("federation"), stated.get("silo")) if isinstance(stated, Mapping) else (None, None)
    if named != (run_id, silo) or (receipt is not None and receipt.ledger_id != record.run_id):
        raise ServerError(f"{record.path} is not the ledger of silo {silo!r} in this run: nothing can be claimed.")


def _report(silos: list[Silo], terms: Terms) -> FederatedReport:
    """The report in the federation's own model; what the ledgers state otherwise is refused."""
    if terms.model is PrivacyModel.TRUSTED_SERVER:
        return federated.trusted_server(silos, local_steps=terms.local_steps)
    if terms.model is PrivacyModel.CLIENT_LEVEL:
        return federated.client_level(silos, participation="every_round", noise_by="server")
    if terms.model is PrivacyModel.SECAGG:
        return federated.secagg(
            silos,
            local_steps=terms.local_steps,
            dropouts=terms.dropouts,
            colluders=terms.colluders,
            clients=len(terms.silos),
            noise_of="guaranteed",
        )
    return federated.silo_local(silos)


def write_report(out: Path, federation: Federation, held_out: Mapping[str, Any] | None = None) -> None:
    """Writes ``report.json``, whole or not at all."""
    text = json.dumps(federation.to_json(held_out), indent=1)
    write_whole(out / REPORT_NAME, (text + "\n").encode())
