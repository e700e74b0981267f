"""A silo's ledgers: one per run, opened or created only if its policy can pay for the run's whole plan."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpsb.basis_spec import PHASE
from dpsb.federated.messages import Receipt
from dpsb.federated.spec import PrivacyModel, RoundSpec, SiloPolicy, SpecRefused
from dpsb.plan import differing
from dpsb_accounting import Event, Gaussian, Ledger, LedgerError, Phase, Plan, PoissonGaussian, PoissonSkellam
from dpsb_accounting import epsilon as epsilon_of
from dpsb_accounting.engines import ResourceLimit
from dpsb_accounting.files import flush
from dpsb_accounting.ledger import LEDGER_NAME

RUNS = "runs"


class FolderBusy(RuntimeError):
    """Another process works in the folder of a silo or of a coordinator."""


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds a folder: two rounds at once could both find the same budget left.

    Raises:
      FolderBusy: If another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise FolderBusy(f"Another process works in {folder.name}; only one may at a time.") from None
    try:
        yield
    finally:
        os.close(descriptor)


def plan_for(
    spec: RoundSpec,
    policy: SiloPolicy,
    num_examples: int,
    basis: Mapping[str, Any],
    details: Mapping[str, Any],
    dimension: int,
) -> Plan:
    """The plan of a whole run, from a round of it: the same in every round, or the round is refused.

    T is ``(rounds + spare_rounds) * local_steps``: what a crash or a server that asks twice wastes is paid for from the
    spare rounds, and where these are used up the silo leaves before the last round.

    Args:
      spec: What the server asks for.
      policy: What the silo allows.
      num_examples: The true number, used where the policy declares none. It then counts as public.
      basis: Provenance of the adapter's basis.
      details: Public facts of model and task.
      dimension: Of theta.
    """
    count = num_examples if policy.num_examples is None else policy.num_examples
    federated = {
        "model": spec.model.value,
        "federation": spec.run_id,
        "silo": policy.silo,
        "local_steps": spec.local_steps,
        "noise": "skellam" if spec.clip_steps else "gaussian",
        **_noise_of(spec),
    }
    if spec.model is PrivacyModel.CLIENT_LEVEL:
        return _client_plan(spec, policy, basis, {**details, "federated": federated})
    facts = {"federated": federated, "rounds": spec.rounds, "spare_rounds": policy.spare_rounds}
    steps = (spec.rounds + policy.spare_rounds) * spec.local_steps
    paid: tuple[Phase, ...] = ()
    if spec.basis is None:
        facts["basis_sha256"] = spec.basis_sha256
    else:  # its hash is known, and bound to the ledger, once it is there
        paid = (Phase(PHASE, Gaussian(noise_multiplier=spec.basis.noise_multiplier), 1),)
    return Plan(
        phases=(*paid, Phase("train", _event(spec, dimension), steps)),
        delta=policy.delta,
        target_epsilon=policy.max_epsilon,
        neighboring=policy.relation,
        num_examples=count,
        num_examples_declared=policy.num_examples is not None,
        expected_batch_size=max(1, round(spec.sampling_prob * count)),
        sampling_prob=spec.sampling_prob,
        l2_clip_norm=spec.l2_clip_norm,
        clipping="flat",
        basis=dict(basis),
        details={**details, **facts},
    )


def _event(spec: RoundSpec, dimension: int) -> Event:
    """What one step of a round is to accounting: noise in whole numbers is never taken for Gaussian."""
    noise, prob = spec.noise_multiplier, spec.sampling_prob
    if not spec.clip_steps:
        return PoissonGaussian(noise_multiplier=noise, sampling_prob=prob)
    return PoissonSkellam(noise_multiplier=noise, sampling_prob=prob, clip_steps=spec.clip_steps, dimension=dimension)


def _noise_of(spec: RoundSpec) -> dict[str, Any]:
    """Whose noise the plan's noise multiplier is, for the federation's report."""
    if spec.model is PrivacyModel.SECAGG:
        shares = {"clients": spec.clients, "dropouts": spec.dropouts, "colluders": spec.colluders}
        return {"noise_of": "guaranteed", **shares}
    if spec.model is PrivacyModel.TRUSTED_SERVER:
        return {"noise_by": "server"}
    if spec.model is PrivacyModel.CLIENT_LEVEL:
        return {"noise_by": "server", "participation": "every_round"}
    return {"noise_of": "share"}


def _client_plan(spec: RoundSpec, policy: SiloPolicy, basis: Mapping[str, Any], details: Mapping[str, Any]) -> Plan:
    """Each round releases the silo's whole clipped update once, in a sum with the server's noise; the unit is the silo.

    The number of silos is public, so the relation is ``zero_out``: the silo's update, or nothing in its place.
    """
    facts = {"rounds": spec.rounds, "spare_rounds": policy.spare_rounds, "basis_sha256": spec.basis_sha256}
    return Plan(
        phases=(Phase("train", Gaussian(noise_multiplier=spec.noise_multiplier), spec.rounds + policy.spare_rounds),),
        delta=policy.delta,
        target_epsilon=policy.max_epsilon,
        neighboring="zero_out",
        unit="client",
        num_examples=spec.clients,
        num_examples_declared=False,
        expected_batch_size=spec.clients,
        sampling_prob=1.0,
        l2_clip_norm=spec.l2_clip_norm,
        clipping="flat",
        basis=dict(basis),
        details={**details, **facts},
    )


def run_folder(folder: Path, run_id: str) -> Path:
    """Where a run's ledger and replies are."""
    return folder / RUNS / run_id


def open_ledger(folder: Path, policy: SiloPolicy, plan: Plan, run_id: str, receipt: Receipt | None) -> Ledger:
    """The run's ledger: opened if it is there and not behind, created if its whole plan is within the policy.

    Args:
      folder: The silo's.
      policy: Its limits.
      plan: From :func:`plan_for`.
      run_id: Of the federation's run.
      receipt: What the coordinator remembers of this ledger.

    Raises:
      SpecRefused: If the round's terms are not those of the run so far, or the run would cost too much; nothing is
        written then.
      LedgerError: If the ledger is damaged, gone, or behind what the coordinator or a reply has seen.
    """
    home = run_folder(folder, run_id)
    path = home / LEDGER_NAME
    if not _begun(path):
        if receipt is not None:
            raise LedgerError("The silo's ledger of this run is gone; what it spent is unknown, so the silo must stop.")
        path.unlink(missing_ok=True)
        _check_budget(folder, policy, plan)
        _make_home(home)
        return Ledger.create(path, plan)
    ledger = Ledger.open(path)
    try:
        if receipt is not None:
            if receipt.ledger_id != ledger.run_id:
                raise LedgerError("The silo's ledger of this run is another one than the coordinator has seen.")
            ledger.check_not_behind(receipt.length, receipt.head)
        if ledger.plan != plan:
            odd = ", ".join(differing(ledger.plan, plan))
            raise SpecRefused(f"The round differs from the plan that the silo's ledger holds for this run in {odd}.")
    except BaseException:
        ledger.close()
        raise
    return ledger


def _make_home(home: Path) -> None:
    """Makes a run's folder, for its owner alone, and durable: a ledger is as safe as the names that lead to it."""
    for folder in (home.parent, home):
        folder.mkdir(mode=0o700, exist_ok=True)
        flush(folder.parent)


def records(folder: Path) -> list[Any]:
    """The silo's ledgers of all runs, read without locking them.

    Raises:
      LedgerError: If one is damaged, or a run has replies and no ledger.
    """
    paths = [home / LEDGER_NAME for home in sorted((folder / RUNS).glob("*"))]
    return [Ledger.read(path) for path in paths if _begun(path)]


def _begun(path: Path) -> bool:
    """Whether a ledger was ever charged: a silo that dies while it creates one leaves an empty file and no reply.

    Raises:
      LedgerError: If there are replies and no ledger: what they cost is unknown.
    """
    has_replies = any(path.parent.glob("*.safetensors"))
    if has_replies and not path.exists():
        raise LedgerError(
            f"The silo's ledger of run {path.parent.name} is gone; what it spent is unknown, so the silo must stop."
        )
    return has_replies or (path.exists() and path.stat().st_size > 0)


def _check_budget(folder: Path, policy: SiloPolicy, plan: Plan) -> None:
    """Refuses a run whose plan, with the plans of all earlier runs, exceeds the policy's epsilon."""
    phases = list(plan.phases)
    for record in records(folder):
        if record.taints or not record.plan.is_private:
            raise SpecRefused(f"The ledger of run {record.path.parent.name} supports no claim to add to.")
        if (record.plan.unit, record.plan.neighboring) != (plan.unit, plan.neighboring):
            raise SpecRefused(f"The ledger of run {record.path.parent.name} protects another unit or relation.")
        phases += record.plan.phases
    try:
        upper = epsilon_of(phases, delta=policy.delta, neighboring=plan.neighboring).upper
    except ResourceLimit as error:
        raise SpecRefused(f"What the run would cost silo {policy.silo!r} cannot be bounded: {error}") from None
    if not upper <= policy.max_epsilon:
        raise SpecRefused(
            f"The run brings silo {policy.silo!r} to epsilon {upper:.4g}, its policy allows {policy.max_epsilon:g}."
        )
