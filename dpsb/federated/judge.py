"""Which replies of a round are used: strict, pure, and the same whatever brought them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from dpsb.federated.messages import SUM, Note, Receipt, Refusal, Reply, State, Update, theta_digest
from dpsb.federated.spec import PrivacyModel, RoundSpec

LEAVES = ("spec", "budget", "ledger")
"""Refusals after which a silo is not asked again in this run."""
MOST_ROWS = 1e12
"""No silo has so many examples, so no sum of rows clipped to C is longer than so many C; its noise is far shorter."""


@dataclass
class Verdict:
    """What became of the replies of a round.

    Args:
      updates: Those that are used, by silo.
      lost: Silos that gave nothing usable this time, with the reason; they may be asked again.
      left: Silos that are out of the run, with the reason.
      notes: What else was wrong, such as replies of unknown silos.
    """

    updates: dict[str, Update] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def judge(
    replies: Iterable[Reply],
    specs: Mapping[str, RoundSpec],
    theta: State,
    receipts: Mapping[str, Receipt],
    *,
    max_update_norm: float,
) -> Verdict:
    """Sorts the replies of a round.

    An update is used if its silo was asked, its run, round and theta are those asked for, its tensors have the right
    names, shapes and types, are finite and not too far away, and its receipt continues the one that is held: the
    same ledger, grown by at least the round's charges, with the held head where it ended. A second equal update of a
    silo is ignored; a second one that differs throws both away, and so do tensors that are wrong.

    Args:
      replies: In any order.
      specs: What was asked of whom.
      theta: Where the round started.
      receipts: Those held from earlier rounds.
      max_update_norm: See :class:`~dpsb.federated.terms.Terms`.
    """
    verdict = Verdict()
    differing: set[str] = set()
    for reply in replies:
        spec = specs.get(reply.silo)
        if spec is None:
            verdict.notes.append(f"a reply of {reply.silo!r}, which was not asked, was ignored")
        elif (reply.run_id, reply.round) != (spec.run_id, spec.round):
            verdict.notes.append(f"a reply of {reply.silo!r} to another round was ignored")
        elif isinstance(reply, Note):
            verdict.notes.append(f"a late note of {reply.silo!r} to a secure sum was ignored")
        elif isinstance(reply, Refusal):
            _refused(reply, verdict)
        elif reply.silo in differing:
            verdict.notes.append(f"a further reply of {reply.silo!r} was ignored")
        elif reply.silo in verdict.updates:
            if _same(reply, verdict.updates[reply.silo]):
                verdict.notes.append(f"a second, equal reply of {reply.silo!r} was ignored")
            else:
                del verdict.updates[reply.silo]
                differing.add(reply.silo)
                verdict.lost[reply.silo] = "sent two different replies to one round"
        else:
            _update(reply, spec, theta, receipts.get(reply.silo), max_update_norm, verdict)
    for silo in verdict.updates:
        verdict.lost.pop(silo, None)
    for silo in verdict.left:
        verdict.updates.pop(silo, None)
        verdict.lost.pop(silo, None)
    return verdict


def _refused(reply: Refusal, verdict: Verdict) -> None:
    if reply.kind in LEAVES:
        verdict.left[reply.silo] = f"{reply.kind}: {reply.message}"
    else:
        verdict.lost[reply.silo] = f"{reply.kind}: {reply.message}"


def _update(
    reply: Update, spec: RoundSpec, theta: State, held: Receipt | None, max_update_norm: float, verdict: Verdict
) -> None:
    wrong = wrong_receipt(reply, spec, held)
    if wrong:
        verdict.left[reply.silo] = f"ledger: {wrong}"
        return
    wrong = wrong_tensors(reply, spec, theta, max_update_norm)
    if wrong:
        verdict.lost[reply.silo] = wrong
    else:
        verdict.updates[reply.silo] = reply


def wrong_receipt(reply: Update, spec: RoundSpec, held: Receipt | None) -> str:
    """Why the receipt of a reply does not continue the one that is held; empty if it does."""
    new = reply.receipt
    least = (1 if held is None else held.length) + spec.charges + 1  # the charges, and the line binding the reply
    if held is not None and held.round == spec.position:  # the round was asked for before and could not be closed
        least = held.length
    if held is not None and new.ledger_id != held.ledger_id:
        return "the receipt is of another ledger than before"
    if held is not None and reply.follows != held.head:
        return "the ledger does not continue the one seen before; an old one was put back"
    if new.length < least:
        return f"the ledger has {new.length} lines, which is less than the {least} that this round takes"
    return ""


def wrong_tensors(reply: Update, spec: RoundSpec, theta: State, max_update_norm: float) -> str:
    """Why the tensors of a reply cannot be used; empty if they can."""
    if reply.theta_sha256 != spec.theta_sha256:
        return "the reply starts from another theta"
    summed = spec.model is not PrivacyModel.SILO_LOCAL
    wanted: State = theta
    if summed:
        dtype = torch.int32 if spec.clip_steps else torch.float64
        wanted = {SUM: torch.zeros(sum(tensor.numel() for tensor in theta.values()), dtype=dtype)}
    if set(reply.tensors) != set(wanted):
        return "the reply's tensors have other names"
    for name, tensor in reply.tensors.items():
        if tensor.shape != wanted[name].shape or tensor.dtype != wanted[name].dtype:
            return f"the reply's tensor {name} has another shape or type"
        if not bool(torch.isfinite(tensor).all()):
            return "the reply holds a number that is not finite"
    if spec.clip_steps:
        return ""  # under its masks a vector has no size
    squares = sum(float((t.double() - wanted[n].double()).square().sum()) for n, t in reply.tensors.items())
    if summed:  # such a vector has no noise of its own: its size decides about nothing, and is not told
        longest = spec.l2_clip_norm * (1 + 1e-9 if spec.model is PrivacyModel.CLIENT_LEVEL else MOST_ROWS)
        return "" if squares**0.5 <= longest else "the reply's vector is longer than any that the round can have"
    if not squares**0.5 <= max_update_norm:
        return f"the reply moves by {squares**0.5:.3g}, which is more than max_update_norm={max_update_norm:g}"
    return ""


def _same(one: Update, other: Update) -> bool:
    return (one.receipt, dict(one.notes)) == (other.receipt, dict(other.notes)) and theta_digest(
        one.tensors
    ) == theta_digest(other.tensors)
