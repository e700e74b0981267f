"""A silo: one message in, one reply out. Its data, its ledger and its policy never leave it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from dpsb.basis.stage import BASIS_NAME
from dpsb.basis_spec import PHASE
from dpsb.federated.budget import FolderBusy, alone, open_ledger, plan_for, run_folder
from dpsb.federated.canaries import SiloCanaries
from dpsb.federated.messages import (
    Note,
    Receipt,
    Refusal,
    Reply,
    RoundMessage,
    State,
    Summing,
    Update,
    theta_digest,
)
from dpsb.federated.paid_basis import provenance_of
from dpsb.federated.replies import ReplyLost, find, last_round, settle, store, was_answered
from dpsb.federated.secure.masks import SecureSumError
from dpsb.federated.secure.sessions import Session
from dpsb.federated.secure.whole_numbers import share_mean
from dpsb.federated.spec import PaidBasis, PrivacyModel, RoundSpec, SiloPolicy, SpecRefused
from dpsb.federated.trainer import Trainer
from dpsb.randomness import SEEDED, Randomness, SystemRandomness
from dpsb.reasons import STOPS, reason
from dpsb_accounting import Ledger, LedgerError, Plan
from dpsb_accounting.files import write_whole


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
        noise. The same round with another theta is another reply and is charged again; so is another secure sum of it.
      * In a secure sum what leaves the silo is its vector under masks, and it helps to open one sum of it, or none.
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
        self._session: Session | None = None

    @property
    def name(self) -> str:
        """The silo's public name."""
        return self.policy.silo

    @property
    def basis_bytes(self) -> int:
        """How large A and B of all weights are together in a message."""
        return sum(4 * rank * (rows + columns) for rows, columns, rank in self._trainer.shapes.values())

    @property
    def start(self) -> State:
        """Names, shapes and types of theta, and the public start of the run."""
        return self._trainer.start

    def answer(self, message: RoundMessage) -> Reply:
        """:meth:`handle` for a message; one that is meant for another silo is refused."""
        if message.silo != self.name:
            return self._refusal(message.spec, "spec", f"This is silo {self.name!r}, the message is for another one.")
        return self.handle(message.theta, message.spec, message.receipt, message.summing, message.basis)

    def handle(
        self,
        theta: State,
        spec: RoundSpec,
        receipt: Receipt | None = None,
        summing: Summing | None = None,
        basis: State | None = None,
    ) -> Reply:
        """Does a round, or says why not.

        Args:
          theta: Where to start. Public to the federation.
          spec: What to do, exactly.
          receipt: The last that the coordinator holds of this silo's ledger; a ledger that is behind it is refused.
          summing: The part of a secure sum; without it noise in whole numbers is refused, and with it any other.
          basis: A and B of the basis that the silos paid for. Released; used if it is the one that the round names.

        Returns:
          An :class:`~dpsb.federated.messages.Update`, or a :class:`~dpsb.federated.messages.Refusal`; a
          :class:`~dpsb.federated.messages.Note` in the phases of a secure sum that need no vector.
        """
        try:
            self.policy.check(spec)
            if (summing is not None) != bool(spec.clip_steps):
                raise SpecRefused("Noise in whole numbers goes through a secure sum, and no other noise does.")
            if summing is not None and summing.phase != "mask":
                with alone(self.folder):
                    return self._note(spec, summing)
            self._take_basis(spec, basis or {})
            self._check_theta(theta, spec)
            with alone(self.folder):
                return self._round(theta, spec, receipt, self._begun(spec, summing))
        except SpecRefused as error:
            return self._refusal(spec, "spec", str(error))
        except SecureSumError as error:
            return self._refusal(spec, "state", str(error))
        except FolderBusy as error:
            return self._refusal(spec, "busy", str(error))
        except ReplyLost as error:
            return self._refusal(spec, "reply_lost", str(error))
        except _Refused as error:
            return self._refusal(spec, error.kind, str(error))
        except LedgerError as error:
            return self._refusal(spec, "ledger", str(error).replace(f"{self.folder}/", ""))
        except STOPS:
            raise
        except BaseException as error:  # noqa: BLE001 - nothing of it may reach the server
            self._on_problem(reason(error))
            return self._refusal(spec, "failed", "The silo failed in this round; its operator can see why.")

    def _note(self, spec: RoundSpec, summing: Summing) -> Note:
        """A secure sum's phase without a vector; the first of them begins a sum and gives up the one before."""
        if summing.phase == "share" and (self._session is None or not self._session.is_of(spec, summing)):
            self._session = None
            if was_answered(run_folder(self.folder, spec.run_id), summing.session):
                raise SecureSumError(
                    "A vector was masked for this secure sum before; it is not begun again, since the shares of two "
                    "beginnings together would open more than one sum."
                )
            self._session = Session(self.folder, self.policy, spec, summing.session)
        return self._of(spec, summing).note(summing)

    def _of(self, spec: RoundSpec, summing: Summing) -> Session:
        if self._session is None or not self._session.is_of(spec, summing):
            raise SecureSumError(f"Silo {self.name!r} is not in this secure sum; it was begun anew, or the silo was.")
        return self._session

    def _begun(self, spec: RoundSpec, summing: Summing | None) -> tuple[Session, Summing] | None:
        return None if summing is None else (self._of(spec, summing), summing)

    def _round(
        self, theta: State, spec: RoundSpec, receipt: Receipt | None, secure: tuple[Session, Summing] | None
    ) -> Update:
        plan = self._plan(spec)
        home = run_folder(self.folder, spec.run_id)
        if not home.exists():
            self._trainer.check()  # before anything is charged
        with open_ledger(self.folder, self.policy, plan, spec.run_id, receipt) as ledger:
            settle(home, ledger)
            if spec.model is not PrivacyModel.SILO_LOCAL and last_round(ledger) > spec.round:
                raise _Refused("state", "The sum of a round that is over is not sent again: its noise was another.")
            if spec.basis is not None and spec.stage == PHASE:
                return self._update(self._released(home, ledger, spec, spec.basis), spec, ledger, receipt, {})
            if spec.basis is not None:
                self._bind_basis(home, ledger)
            found = find(home, ledger, spec) if secure is None else secure[0].sent(secure[1])
            tensors = self._computed(home, ledger, theta, spec, secure) if found is None else found
            return self._update(tensors, spec, ledger, receipt, {} if secure is None else secure[0].confirmations())

    def _plan(self, spec: RoundSpec) -> Plan:
        """The run's plan, the same in every round of it."""
        provenance, details = self._trainer.adapter.provenance, self._trainer.details
        if spec.basis is not None:
            provenance = provenance_of(spec.basis)
        dimension = sum(tensor.numel() for tensor in self.start.values())
        try:
            if spec.clip_steps:
                share_mean(spec)
            return plan_for(spec, self.policy, len(self._dataset), provenance.to_json(), details, dimension)
        except ValueError as error:
            raise SpecRefused(f"The round makes no valid plan: {error}") from None

    def _computed(
        self, home: Path, ledger: Ledger, theta: State, spec: RoundSpec, secure: tuple[Session, Summing] | None
    ) -> State:
        """A round's reply that is not there yet: charged, computed, put down and bound."""
        left = ledger.remaining("train")
        if left < spec.charges:
            raise _Refused(
                "budget",
                f"The budget of silo {self.name!r} for this run is spent: of {ledger.plan.steps} steps {left} are "
                f"left, the round takes {spec.charges}. Nothing was charged.",
            )
        self._trainer.check()
        if secure is not None:
            secure[0].begin(secure[1])
        self._taint(ledger)
        if self._canaries is not None:
            ledger.taint("gradient_canaries", "rows that stand for no example were put in to audit the mechanism")
            self._canaries.begin(ledger.plan, self._trainer.adapter.dimension, spec.model)
        tensors: State = self._trainer.work(
            theta,
            self._dataset,
            ledger,
            spec,
            self._randomness,
            self._canaries,
            together=self.policy.lets_examples_together,
        )
        if secure is None:
            store(home, ledger, spec, tensors)
            return tensors
        self._session = None  # a vector that is masked and cannot be kept is not sent, and its sum is given up
        masked = secure[0].masked(tensors, secure[1])
        store(home, ledger, spec, masked, secure[0].session)
        self._session = secure[0]
        return masked

    def _taint(self, ledger: Ledger) -> None:
        if self._randomness.tainted:
            ledger.taint(*SEEDED)

    def _released(self, home: Path, ledger: Ledger, spec: RoundSpec, paid: PaidBasis) -> State:
        """The silo's release for the basis: charged and computed once, the same bytes ever after."""
        tensors = find(home, ledger, spec, PHASE)
        if tensors is None:
            if not ledger.remaining(PHASE):
                raise _Refused("state", "The release for the basis was charged and is lost; it is not drawn again.")
            self._taint(ledger)
            tensors = self._trainer.release_gradients(
                self._dataset, ledger, paid, self._randomness, together=self.policy.lets_examples_together
            )
            store(home, ledger, spec, tensors, PHASE)
        return tensors

    def _take_basis(self, spec: RoundSpec, basis: State) -> None:
        """Puts the adapter on the paid basis that a round names: the message's, or the one on disk. Released."""
        if spec.basis is None:
            return
        try:
            self._trainer.check_wide(spec.basis)
        except ValueError as error:
            raise _Refused("state", str(error)) from None
        if spec.stage == PHASE:
            return
        if self._trainer.on_paid_basis and self._trainer.basis_sha256 == spec.basis_sha256:
            return
        path = run_folder(self.folder, spec.run_id) / BASIS_NAME
        if not basis and path.exists():
            basis = load(path.read_bytes())
        if theta_digest(basis) != spec.basis_sha256:
            raise _Refused("state", "The message has no basis, or not the one whose digest the round names.")
        try:
            self._trainer.rebase(basis, provenance_of(spec.basis))
        except ValueError as error:
            raise _Refused("state", f"The basis of the message cannot be used: {error}") from None

    def _bind_basis(self, home: Path, ledger: Ledger) -> None:
        """Puts the basis beside the ledger and binds it by its hash; a run has one."""
        content = self._trainer.basis_content()
        bound = ledger.files.get(BASIS_NAME)
        if bound is None:
            write_whole(home / BASIS_NAME, content, mode=0o600)
            ledger.bind_file(BASIS_NAME, sha256(content).hexdigest())
        elif bound != sha256(content).hexdigest():
            raise _Refused("state", "The silo's ledger of this run binds another basis.")

    def _update(
        self, tensors: State, spec: RoundSpec, ledger: Ledger, receipt: Receipt | None, notes: Mapping[str, str]
    ) -> Update:
        return Update(
            silo=self.name,
            run_id=spec.run_id,
            round=spec.round,
            theta_sha256=spec.theta_sha256,
            tensors=tensors,
            receipt=Receipt(ledger_id=ledger.run_id, length=ledger.length, head=ledger.head, round=spec.position),
            follows=None if receipt is None else ledger.hash_at(receipt.length - 1),
            notes=notes,
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
