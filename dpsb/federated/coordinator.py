"""The coordinator: rounds over any transport, with a checkpoint after each and strict rules for replies."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from dpsb.basis_spec import PHASE
from dpsb.federated.aggregate import fed_sb
from dpsb.federated.budget import alone
from dpsb.federated.judge import Verdict, judge
from dpsb.federated.messages import SUM, RoundMessage, State, Transport, Update, bytes_of, theta_digest
from dpsb.federated.paid_layout import Wide, released_layout
from dpsb.federated.secure.masks import SecureSumError
from dpsb.federated.secure.opening import SecureSum
from dpsb.federated.secure.whole_numbers import to_real
from dpsb.federated.server import RoundRecord, ServerError, ServerState, load_state, save_state, server_step
from dpsb.federated.spec import PrivacyModel, RoundSpec
from dpsb.federated.terms import Terms, differing
from dpsb.mechanism import Mechanism
from dpsb.randomness import Randomness, SystemRandomness

_FAR = 1e12  # a release for the basis is a sum over all examples, with noise on every coordinate of every weight

_LATE = "came after the sum was opened without it"


class TooFewSilos(ServerError):
    """Fewer silos than ``min_silos`` replied; the round stays open and the run can be resumed."""


class Coordinator:
    r"""Runs the rounds of a federation.

    A round sends theta to every silo that has not left and averages the replies, unweighted:
    :math:`\theta_{t+1} = \frac{1}{|S_t|}\sum_{i \in S_t} \theta_{i,t}` over the silos :math:`S_t` that replied. In
    the other models it adds up the silos' clipped vectors, with one noise (``secagg``: the silos' shares of it), and
    takes a step of its own optimizer.

    Guarantees:
      * Its state is on disk, whole, after each round, and its receipts before a round's replies are used. A coordinator
        that was killed resumes at the round that is not closed and sends the same theta, which silos that have replied
        answer from their disks, at no cost.
      * A round is closed with the replies of at least ``min_silos`` silos, or not at all.
      * A silo whose ledger does not continue what its receipts say is out of the run.
      * In the models with sums, what leaves the coordinator is computed from noisy sums only, one for each round.

    Args:
      out: Its folder; the state is in ``out/server``.
      terms: What to run. On a resumed run they must be the same.
      theta: The public start, in the order of the adapter's parameters.
      basis_sha256: Of the basis that all silos must have.
      transport: Brings messages to the silos.
      randomness: Of the server's noise in ``trusted_server``; a seeded one voids the claim.
      on_round: Told after each round.
      shapes: Out, in and rank of each target weight; needed where the silos pay for the basis. Public.
      wide: The wide public basis, where that is a hybrid. Public.
      on_opened: Given the noisy sum of each round in the models that open one. Released.
    """

    def __init__(
        self,
        out: Path,
        terms: Terms,
        theta: Mapping[str, torch.Tensor],
        basis_sha256: str,
        transport: Transport,
        *,
        randomness: Randomness | None = None,
        on_round: Callable[[RoundRecord], None] = lambda _record: None,
        shapes: Mapping[str, tuple[int, int, int]] | None = None,
        wide: Wide | None = None,
        on_opened: Callable[[torch.Tensor], None] = lambda _sum: None,
    ) -> None:
        self.out, self._terms, self._transport = Path(out), terms, transport
        self._theta, self._basis_sha256 = dict(theta), basis_sha256
        self._randomness = randomness or SystemRandomness()
        self._on_round, self._on_opened = on_round, on_opened
        self._shapes, self._wide = dict(shapes or {}), wide

    def run(self) -> ServerState:
        """Does all rounds that are left.

        Raises:
          TooFewSilos: If a round could not be closed; charges stay, and resuming asks for the same round again.
          ServerError: If the folder holds a run with other terms, or one that cannot be read.
        """
        with alone(self.out):
            state = self.begin()
            if state.terms.basis_is_paid and not state.basis:
                state = self._pay_for_basis(state)
                save_state(self.out, state)
            while state.round < state.terms.rounds:
                state = self._round(state)
                save_state(self.out, state)
                self._on_round(state.history[-1])
            return state

    def begin(self) -> ServerState:
        """The state of the run in the folder, or of a new one, which is then on disk.

        Raises:
          ServerError: As :meth:`run`.
        """
        state = load_state(self.out)
        if state is None:
            state = ServerState(
                run_id=secrets.token_hex(16),
                terms=self._terms,
                basis_sha256=self._basis_sha256,
                round=0,
                theta=self._theta,
                tainted=self._tainted,
            )
            save_state(self.out, state)
            return state
        odd = differing(state.terms, self._terms)
        if odd or (not state.basis and state.basis_sha256 != self._basis_sha256):
            raise ServerError(
                f"{self.out} holds a run whose {', '.join(odd) or 'basis'} differ from what is asked now; terms "
                "cannot change on resume."
            )
        return replace(state, tainted=state.tainted or self._tainted)

    @property
    def _tainted(self) -> bool:
        return self._randomness.tainted and self._terms.model is not PrivacyModel.SILO_LOCAL

    def _round(self, state: ServerState) -> ServerState:
        verdict, sent, secure = self._collect(state)
        state, updates = self._kept(state, verdict, f"Round {state.round}")
        opened = None
        if secure is not None:
            opened = _unmasked(state, updates, secure)
        elif state.terms.model is PrivacyModel.SECAGG:
            state, updates = self._open(state, updates)
            verdict.lost |= {name: _LATE for name in verdict.updates if name not in updates}
        theta, moments = self._next_theta(state, updates, opened)
        record = RoundRecord(
            round=state.round,
            silos=tuple(updates),
            lost={**verdict.lost, **verdict.left},
            bytes_up=sum(bytes_of(update.tensors) for update in updates.values()) + (secure.bytes_up if secure else 0),
            bytes_down=sent * bytes_of(state.theta) + (secure.bytes_down if secure else 0),
            notes=tuple(verdict.notes),
        )
        return replace(
            state,
            round=state.round + 1,
            theta=theta,
            moments=moments,
            history=(*state.history, record),
        )

    def _pay_for_basis(self, state: ServerState) -> ServerState:
        """The basis from each silo's one release: the leading directions of their mean, or how it turns a public basis.

        Post-processing of what they sent. Asked again after a crash, silos send the same bytes; the releases of fewer
        than ``min_silos`` make no basis.
        """
        from dpsb.federated.paid_basis import basis_from  # imports the model's libraries, which no other round needs

        specs = state.terms.specs(state.run_id, 0, state.theta, state.basis_sha256, PHASE)
        paid = {name: each.basis for name, each in state.terms.silos.items() if each.basis is not None}
        if {each.frames_sha256 for each in paid.values()} != {"" if self._wide is None else self._wide.sha256}:
            raise ServerError("The wide public basis here is not the one that the terms of the run name.")
        layout = released_layout(self._shapes, 0 if self._wide is None else self._wide.width)
        verdict, sent = self._asked(state, specs, [name for name in specs if name not in state.left], layout)
        state, updates = self._kept(state, verdict, "The basis")
        mean = fed_sb([update.tensors for update in updates.values()])
        basis = basis_from(mean, self._shapes, self._wide, [paid[name] for name in updates])
        record = RoundRecord(
            round=0,
            silos=tuple(updates),
            lost={**verdict.lost, **verdict.left},
            bytes_up=sum(bytes_of(update.tensors) for update in updates.values()),
            bytes_down=sent * bytes_of(state.theta),
            notes=tuple(verdict.notes),
        )
        return replace(state, basis=basis, basis_sha256=theta_digest(basis), basis_record=record)

    def _kept(self, state: ServerState, verdict: Verdict, what: str) -> tuple[ServerState, dict[str, Update]]:
        """The usable replies, by name, once their receipts are on disk: a silo may not fall back behind them."""
        updates = {name: verdict.updates[name] for name in sorted(verdict.updates)}
        receipts = {**state.receipts, **{name: update.receipt for name, update in updates.items()}}
        state = replace(state, left={**state.left, **verdict.left}, receipts=receipts)
        save_state(self.out, state)
        self._need(state, updates, verdict, what)
        return state, updates

    def _need(self, state: ServerState, updates: Mapping[str, Update], verdict: Verdict, what: str) -> None:
        if len(updates) < state.terms.min_silos:
            away = {**state.left, **verdict.lost, **verdict.left}
            enough = len(state.terms.silos) - len(state.left) >= state.terms.min_silos
            advice = "resume to ask again" if enough else "too many silos have left for this run to go on"
            reasons = "; ".join(f"{name}: {why}" for name, why in sorted(away.items()))
            raise TooFewSilos(
                f"{what} has {len(updates)} usable replies, min_silos is {state.terms.min_silos} "
                f"({reasons}). What was charged stays charged; {advice}."
            )

    def _open(self, state: ServerState, updates: dict[str, Update]) -> tuple[ServerState, dict[str, Update]]:
        """Puts on disk whose sum is opened, before it is: the same round is never opened for another set of silos.

        Two sums of the same contributions over different silos would show what the silos between them contributed, with
        one share of the noise instead of all. So after a crash the sum is of the silos it was of before; what others
        sent since is not used.
        """
        if state.opened is None or state.opened[0] != state.round:
            state = replace(state, opened=(state.round, tuple(updates)))
            save_state(self.out, state)
            return state, updates
        names = state.opened[1]
        missing = [name for name in names if name not in updates]
        if missing:
            raise TooFewSilos(
                f"The sum of round {state.round} was opened for {', '.join(names)} before the coordinator stopped; it "
                f"cannot be opened without {', '.join(missing)}. Resume when they are there."
            )
        return state, {name: updates[name] for name in names}

    def _collect(self, state: ServerState) -> tuple[Verdict, int, SecureSum | None]:
        """Asks the silos that have not left for a round; in a secure sum, those that sent their shares for it."""
        specs = state.terms.specs(state.run_id, state.round, state.theta, state.basis_sha256)
        pending = [name for name in specs if name not in state.left]
        if not state.terms.clip_steps:
            return *self._asked(state, specs, pending, state.theta), None
        secure = SecureSum(specs, self._transport, state.terms.attempts)
        members = secure.share(pending)
        there = list(members) if len(members) >= state.terms.min_silos else []
        verdict, sent = self._asked(state, specs, there, state.theta, secure)
        verdict.lost |= {name: secure.lost.get(name, "no reply") for name in pending if name not in members}
        return verdict, sent, secure

    def _asked(
        self,
        state: ServerState,
        specs: Mapping[str, RoundSpec],
        pending: list[str],
        layout: State,
        secure: SecureSum | None = None,
    ) -> tuple[Verdict, int]:
        """Asks silos; those that gave nothing usable again, ``attempts`` times in all. Replies are like ``layout``."""
        whole, sent = Verdict(), 0
        trained = {name for record in state.history for name in record.silos}
        for _ in range(state.terms.attempts if pending else 0):
            messages = [
                RoundMessage(
                    silo=name,
                    spec=specs[name],
                    theta=state.theta,
                    receipt=state.receipts.get(name),
                    summing=None if secure is None else secure.masking(name),
                    basis={} if name in trained else state.basis,
                )
                for name in pending
            ]
            sent += len(messages)
            found = judge(
                self._transport.send(messages),
                {name: specs[name] for name in pending},
                layout,
                state.receipts,
                max_update_norm=state.terms.max_update_norm if layout is state.theta else _FAR,
            )
            whole.updates |= found.updates
            whole.left |= found.left
            whole.notes += found.notes
            whole.lost = {name: found.lost.get(name, "no reply") for name in pending}
            pending = [name for name in pending if name not in found.updates and name not in found.left]
            whole.lost = {name: whole.lost[name] for name in pending}
            if not pending:
                break
        return whole, sent

    def _next_theta(
        self, state: ServerState, updates: Mapping[str, Update], opened: torch.Tensor | None
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        terms, theta = state.terms, state.theta
        if terms.model is not PrivacyModel.SILO_LOCAL:
            mean = self._noisy_mean(terms, theta, updates, opened)
            if terms.model is PrivacyModel.CLIENT_LEVEL:
                return server_step(theta, {name: -value for name, value in mean.items()}, state, own_rates=False)
            return server_step(theta, mean, state, own_rates=True)
        mean = fed_sb([update.tensors for update in updates.values()])
        if terms.server_optimizer == "none":
            return {name: mean[name] for name in theta}, {}
        difference = {name: theta[name].double() - mean[name].double() for name in theta}
        return server_step(theta, difference, state, own_rates=False)

    def _noisy_mean(
        self,
        terms: Terms,
        theta: Mapping[str, torch.Tensor],
        updates: Mapping[str, Update],
        opened: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """The silos' vectors added up, with one noise, divided by a public number.

        In ``secagg`` the noise is in the silos' shares: in ``opened``, the sum that a secure sum of whole numbers gave,
        or without that in the sum of the vectors, as it would come out of a secure aggregation. The divisor is the
        expected batch of those that took part, in ``client_level`` the number of all clients.
        """
        total = opened
        if total is None:
            total = torch.stack([update.tensors[SUM] for update in updates.values()]).sum(dim=0)
        if terms.model is not PrivacyModel.SECAGG:
            noise = terms.noise_multiplier
            mechanism = Mechanism(l2_clip_norm=terms.l2_clip_norm, noise_multiplier=noise, clipping="flat")
            total = mechanism.release(total, self._randomness)
        self._on_opened(total)
        divisor = sum(terms.silos[name].expected_batch_size for name in updates)
        mean = total / (len(terms.silos) if terms.model is PrivacyModel.CLIENT_LEVEL else divisor)
        parts = mean.split([tensor.numel() for tensor in theta.values()])
        return {name: part.view_as(tensor) for (name, tensor), part in zip(theta.items(), parts, strict=True)}


def _unmasked(state: ServerState, updates: Mapping[str, Update], secure: SecureSum) -> torch.Tensor:
    """The sum that the silos open together, in the units of C. Released: their shares of the noise are in it.

    Raises:
      TooFewSilos: If too few silos help; the round is discarded.
    """
    vectors = {name: update.tensors[SUM].numpy().view("uint32") for name, update in updates.items()}
    try:
        opened = secure.open(updates, vectors)
    except SecureSumError as error:
        raise TooFewSilos(
            f"The sum of round {state.round} is discarded: {error} What was charged stays charged; resume to ask "
            "again, which is charged anew."
        ) from None
    return to_real(opened, state.terms.l2_clip_norm, state.terms.clip_steps)
