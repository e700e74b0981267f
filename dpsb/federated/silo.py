"""A silo: one message in, one reply out. Its data, its ledger and its policy never leave it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dpsb.federated.budget import FolderBusy, alone, open_ledger, plan_for, run_folder
from dpsb.federated.canaries import SiloCanaries
from dpsb.federated.messages import (
    Receipt,
    Refusal,
    Reply,
    RoundMessage,
    State,
    Update,
    theta_digest,
)
from dpsb.federated.replies import ReplyLost, find, last_round, settle, store
from dpsb.federated.spec import PrivacyModel, RoundSpec, SiloPolicy, SpecRefused
from dpsb.federated.trainer import Trainer
from dpsb.randomness import Randomness, SystemRandomness
from dpsb.reasons import reason
from dpsb_accounting import Ledger, LedgerError


class _Refused(Exception):
    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Silo:
    r"""One party of a federation, as long-lived as its model.

    Guarantees:
      * A round that the policy does not allow costs nothing: no ledger line, no file, no data read.
      * Each step is charged, on disk, before its draw; what a run may charge is fixed by its first line, and the plans
        of all runs in the folder together stay within the policy's epsilon. Nothing is ever refunded.
      * The reply to (run, round, theta) is computed once. Asked again, the silo sends the same bytes: no charge, no new
        noise. The same round with another theta is another reply and is charged again.
      * A refusal tells nothing that depends on the data: what fails while they are in use is ``"failed"``, and the
        reason stays with the silo's operator.

    Args:
      folder: The silo's own; holds a folder for each run, with its ledger and the replies.
      policy: Its limits.
      trainer: Model and loss. Silos within one process may share it, one round at a time.
      dataset: Examples with ``input_ids``. Sensitive, its length too where the policy declares N.
      randomness: By default the operating system's; a seeded one taints every ledger.
      canaries: Of an audit; they taint every ledger.
      on_problem: Told the reason of a failure. For the silo's own screen; it may depend on the data.
    """

    def __init__(
        self,
        folder: Path,
        policy: SiloPolicy,
        trainer: Trainer,
        dataset: Sequence[Any],
        *,
        randomness: Randomness | None = None,
        canaries: SiloCanaries | None = None,
        on_problem: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        self.folder, self.policy = Path(folder), policy
        self._trainer, self._dataset = trainer, dataset
        self._randomness = randomness or SystemRandomness()
        self._canaries = canaries
        self._on_problem = on_problem

    @property
    def name(self) -> str:
        """The silo's public name."""
        return self.policy.silo

    @property
    def start(self) -> State:
        """Names, shapes and types of theta, and the public start of the run."""
        return self._trainer.start

    def answer(self, message: RoundMessage) -> Reply:
        """:meth:`handle` for a message; one that is meant for another silo is refused."""
        if message.silo != self.name:
            return self._refusal(message.spec, "spec", f"This is silo {self.name!r}, the message is for another one.")
        return self.handle(message.theta, message.spec, message.receipt)

    def handle(self, theta: State, spec: RoundSpec, receipt: Receipt | None = None) -> Reply:
        """Does a round, or says why not.

        Args:
          theta: Where to start. Public to the federation.
          spec: What to do, exactly.
          receipt: The last that the coordinator holds of this silo's ledger; a ledger that is behind it is refused.

        Returns:
          An :class:`~dpsb.federated.messages.Update`, or a :class:`~dpsb.federated.messages.Refusal`.
        """
        try:
            self.policy.check(spec)
            self._check_theta(theta, spec)
            with alone(self.folder):
                return self._round(theta, spec, receipt)
        except SpecRefused as error:
            return self._refusal(spec, "spec", str(error))
        except FolderBusy as error:
            return self._refusal(spec, "busy", str(error))
        except ReplyLost as error:
            return self._refusal(spec, "reply_lost", str(error))
        except _Refused as error:
            return self._refusal(spec, error.kind, str(error))
        except LedgerError as error:
            return self._refusal(spec, "ledger", str(error).replace(f"{self.folder}/", ""))
        except Exception as error:  # noqa: BLE001 - nothing of it may reach the server
            self._on_problem(reason(error))
            return self._refusal(spec, "failed", "The silo failed in this round; its operator can see why.")

    def _round(self, theta: State, spec: RoundSpec, receipt: Receipt | None) -> Update:
        provenance = self._trainer.adapter.provenance.to_json()
        try:
            plan = plan_for(spec, self.policy, len(self._dataset), provenance, self._trainer.details)
        except ValueError as error:
            raise SpecRefused(f"The round makes no valid plan: {error}") from None
        home = run_folder(self.folder, spec.run_id)
        if not home.exists():
            self._trainer.check()  # before anything is charged
        with open_ledger(self.folder, self.policy, plan, spec.run_id, receipt) as ledger:
            settle(home, ledger)
            if spec.model is not PrivacyModel.SILO_LOCAL and last_round(ledger) > spec.round:
                raise _Refused("state", "The sum of a round that is over is not sent again: its noise was another.")
            tensors = find(home, ledger, spec)
            if tensors is None:
                left = ledger.remaining("train")
                if left < spec.charges:
                    raise _Refused(
                        "budget",
                        f"The budget of silo {self.name!r} for this run is spent: of {plan.steps} steps {left} are "
                        f"left, the round takes {spec.charges}. Nothing was charged.",
                    )
                self._trainer.check()
                if self._randomness.tainted:
                    ledger.taint("seeded_randomness", "noise and sampling came from a seed, so they can be re-created")
                if self._canaries is not None:
                    ledger.taint(
                        "gradient_canaries", "rows that stand for no example were put in to audit the mechanism"
                    )
                    self._canaries.begin(plan, self._trainer.adapter.dimension, spec.model)
                tensors = self._trainer.work(theta, self._dataset, ledger, spec, self._randomness, self._canaries)
                store(home, ledger, spec, tensors)
            return self._update(tensors, spec, ledger, receipt)

    def _update(self, tensors: State, spec: RoundSpec, ledger: Ledger, receipt: Receipt | None) -> Update:
        return Update(
            silo=self.name,
            run_id=spec.run_id,
            round=spec.round,
            theta_sha256=spec.theta_sha256,
            tensors=tensors,
            receipt=Receipt(ledger_id=ledger.run_id, length=ledger.length, head=ledger.head, round=spec.round),
            follows=None if receipt is None else ledger.hash_at(receipt.length - 1),
        )

    def _check_theta(self, theta: State, spec: RoundSpec) -> None:
        """Refuses a theta that is not this adapter's or not the one that the round names; all of it is public."""
        start = self._trainer.start
        if set(theta) != set(start) or any(
            theta[name].shape != start[name].shape or theta[name].dtype != start[name].dtype for name in start
        ):
            raise _Refused("state", "The theta of the message lacks the names, shapes or types of the adapter.")
        if not all(bool(torch.isfinite(tensor).all()) for tensor in theta.values()):
            raise _Refused("state", "The theta of the message holds a number that is not finite.")
        if theta_digest(theta) != spec.theta_sha256:
            raise _Refused("state", "The theta of the message is not the one whose digest the round names.")
        if spec.basis_sha256 != self._trainer.basis_sha256:
            raise _Refused("state", "The silo's basis (A, B) is not the one that the round names.")

    def _refusal(self, spec: RoundSpec, kind: str, message: str) -> Refusal:
        return Refusal(silo=self.name, run_id=spec.run_id, round=spec.round, kind=kind, message=message)
