"""``fit``: private training from a frozen plan. The loop is meant to be read from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from dpsb.adapter import Adapter, set_gradient
from dpsb.capture import adapter_train_mode
from dpsb.checkpoint import load_checkpoint, save_checkpoint, saved_clip_norm
from dpsb.clipped_sums import Sharing, charged_sum, examples_per_unit
from dpsb.frozen_prefix import whole_model
from dpsb.losses import LossFn, measure_head
from dpsb.mechanism import Mechanism
from dpsb.modes import modes_of, put_back, training_mode
from dpsb.probe import (
    Batch,
    Collate,
    Example,
    ProbeError,
    check_checkpointing,
    check_same_losses,
    check_step_moves_model,
    probe,
    without_dropout,
)
from dpsb.quantized import check_quantization
from dpsb.randomness import SEEDED, Randomness, SystemRandomness
from dpsb.sampling import bucket_of, length_buckets, own_length
from dpsb.withheld import StepError as StepError
from dpsb_accounting import Ledger, Plan

if TYPE_CHECKING:
    from dpsb.rebasing import Rebasing

_LARGEST_PROBE = 64


@dataclass(frozen=True)
class Progress:
    """What a callback learns after a step: public numbers only."""

    step: int
    steps: int


class Canaries(Protocol):
    """Rows for an audit, as many as take part; told what each step released, less what the examples added."""

    def __len__(self) -> int: ...

    def rows(self, drawn: np.ndarray) -> torch.Tensor: ...

    def observe(self, released: torch.Tensor) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """Settings that change memory and speed, never the mechanism.

    Args:
      token_budget: Tokens per microbatch, padding included.
      checkpoint_every: Steps between checkpoints; 0 writes none.
    """

    token_budget: int = 4096
    checkpoint_every: int = 25


def fit(
    adapter: Adapter,
    dataset: Sequence[Example] | Sequence[Sequence[Example]],
    *,
    ledger: Ledger,
    optimizer: torch.optim.Optimizer,
    loss_fn: LossFn,
    collate: Collate,
    synthetic: Sequence[Example],
    max_length: int,
    schedule: Callable[[float], float] = lambda _done: 1.0,
    knobs: Knobs = Knobs(),
    randomness: Randomness | None = None,
    allow_dropout: bool = False,
    row_scale: torch.Tensor | None = None,
    canaries: Canaries | None = None,
    team: Sharing | None = None,
    rebasing: Rebasing | None = None,
    on_step: Callable[[Progress], None] = lambda _progress: None,
) -> None:
    r"""Trains theta under the ledger's plan; every step is on disk before its data is drawn.

    One step: charge; Poisson draw; per-example gradients in microbatches; clip and sum; one noise draw; division by
    the public ``expected_batch_size``; ``optimizer.step()``.

    Guarantees:
      * The trained tensors are a function of at most ``plan.steps`` releases of the plan's mechanism; what stopped
        the run, and how often it was resumed, does not change that. Steps that the ledger already holds are spent.
      * Raw gradients, losses, drawn sizes and example texts reach no file, log, error or return value.
      * An out-of-memory error makes a microbatch smaller and changes nothing else.

    Args:
      adapter: What is trained, from :func:`dpsb.attach`.
      dataset: Examples with ``input_ids`` of at most ``max_length`` tokens, or with a public ``num_tokens`` (images);
        for a plan whose unit is ``"user"``, one sequence of examples per person. Sensitive, its length included unless
        the plan says otherwise.
      ledger: Open for writing; holds the plan. Checkpoints are written beside it.
      optimizer: Any torch optimizer over ``adapter.parameters()``.
      loss_fn: ``(model, batch) -> (n,)``: one loss per example, each of that example alone.
      collate: ``(examples, padded_length) -> batch``: model inputs padded to exactly that many tokens.
      synthetic: Synthetic or public examples to probe with, at least 5 of different lengths in each length bucket that
        is to be probed; give the smallest and the largest.
      max_length: Largest number of tokens; fixes the public length buckets.
      schedule: Factor on every learning rate, as a function of the share of the plan's steps already charged.
      knobs: Memory and speed.
      randomness: Source of draws and noise, by default the operating system; a seeded one taints the run.
      allow_dropout: Leave dropout on while training (an example's gradient is then that of a thinned model).
      row_scale: Public constants, shape ``(d,)``, that every row is multiplied with before it is clipped; the optimizer
        gets the gradient in that scale (``dpsb.precondition``).
      canaries: Rows that stand for no example, to audit the mechanism (``dpsb.canaries``). They are drawn, clipped and
        summed like any others, and taint the run.
      team: Other processes that take a part of each step (:mod:`dpsb.distributed`).
      rebasing: Moves the window of the cores every so many steps (:mod:`dpsb.rebasing`).
      on_step: Called after every step with public numbers.

    Raises:
      ProbeError: If the model, collator or loss would couple examples or train nothing; nothing has been charged. Or
        if the first step that should have moved the model did not.
      LedgerError: If the ledger cannot be written or does not match the checkpoint; training stops before the draw.
      ValueError: If the optimizer does not hold the live tensors of the adapter, something else is trainable, or a team
        is to re-base.
      MemoryError: If one example alone does not fit into memory.
      StepError: If anything else goes wrong while a step's data are in use; the step is charged, the message withheld.
    """
    if rebasing is not None and team is not None:
        raise ValueError("rebasing and team do not go together: the other processes would keep the old weights.")
    run_dir = ledger.path.parent
    base_rates = [float(group["lr"]) for group in optimizer.param_groups]
    check_start(adapter, ledger.plan, optimizer)
    # whatever the ledger holds: it may have been rolled back
    load_checkpoint(run_dir, adapter, optimizer, ledger, rebasing)
    moved = saved_clip_norm(run_dir)
    steps = private_steps(
        adapter,
        dataset,
        ledger=ledger,
        optimizer=optimizer,
        loss_fn=loss_fn,
        collate=collate,
        synthetic=synthetic,
        max_length=max_length,
        schedule=schedule,
        token_budget=knobs.token_budget,
        randomness=randomness,
        allow_dropout=allow_dropout,
        row_scale=row_scale,
        canaries=canaries,
        team=team,
        base_rates=base_rates,
        moved_clip_norm=moved,
    )
    with closing(steps):
        for progress, moved in steps:
            if rebasing is not None:
                rebasing.after_step(progress.step, progress.steps, adapter, optimizer)
            if knobs.checkpoint_every and progress.step % knobs.checkpoint_every == 0:
                save_checkpoint(run_dir, adapter, optimizer, ledger, moved, rebasing)
            on_step(progress)
    save_checkpoint(run_dir, adapter, optimizer, ledger, moved, rebasing)


def private_steps(
    adapter: Adapter,
    dataset: Sequence[Example] | Sequence[Sequence[Example]],
    *,
    ledger: Ledger,
    optimizer: torch.optim.Optimizer,
    loss_fn: LossFn,
    collate: Collate,
    synthetic: Sequence[Example],
    max_length: int,
    schedule: Callable[[float], float] = lambda _done: 1.0,
    token_budget: int = 4096,
    randomness: Randomness | None = None,
    allow_dropout: bool = False,
    row_scale: torch.Tensor | None = None,
    canaries: Canaries | None = None,
    team: Sharing | None = None,
    base_rates: Sequence[float] | None = None,
    moved_clip_norm: float | None = None,
) -> Generator[tuple[Progress, float | None], None, None]:
    """The loop of :func:`fit`, for callers who keep checkpoints of their own: one private step for each value asked.

    Between two steps the caller may evaluate, save or stop; the model is put back into train mode before the next
    one. A step that was asked for is charged, whatever becomes of it. Nothing is loaded or saved here.

    Args:
      adapter, dataset, ledger, optimizer, loss_fn, collate, synthetic, max_length, schedule: As for :func:`fit`.
      token_budget, randomness, allow_dropout, row_scale, canaries, team: As for :func:`fit`.
      base_rates: Learning rate of every parameter group, which ``schedule`` multiplies; by default the present ones.
      moved_clip_norm: Where an adaptive C stood when the run was interrupted.

    Yields:
      What a callback may know, and where an adaptive C stands now (None where C is fixed). Both are public or released.

    Raises:
      As for :func:`fit`, when the first step is asked for or while a step is made.
    """
    plan = ledger.plan
    mechanism = replace(Mechanism.from_plan(plan), row_scale=row_scale)
    if mechanism.adaptive is not None:
        mechanism = replace(mechanism, l2_clip_norm=moved_clip_norm or mechanism.l2_clip_norm)
    randomness = randomness or SystemRandomness()
    buckets = length_buckets(max_length)
    if examples_per_unit(plan) is not None and team is not None:
        raise ValueError("Expected a plan whose unit is 'example' where several processes share its steps.")
    if unpaid := [phase.name for phase in plan.phases if phase.name != "train" and ledger.remaining(phase.name)]:
        raise ValueError(f"The plan pays for {', '.join(unpaid)} first, which the ledger does not fully hold yet.")
    if row_scale is not None and canaries is not None:
        raise ValueError("row_scale and canaries do not go together: the audit's scores know no scale.")
    check_start(adapter, plan, optimizer)
    rates = [float(group["lr"]) for group in optimizer.param_groups] if base_rates is None else base_rates
    with training_mode(adapter.model):
        adapter_train_mode(adapter)
        modes = modes_of(adapter.model)
        with without_dropout(adapter.model):
            probe_batch = probe_every_bucket(adapter, loss_fn, collate, synthetic, buckets, token_budget)
        if randomness.tainted:
            ledger.taint(*SEEDED)
        if canaries is not None:
            ledger.taint("gradient_canaries", "rows that stand for no example were put in to audit the mechanism")
        with nullcontext() if allow_dropout else without_dropout(adapter.model):
            checked = False
            for _ in range(ledger.remaining("train")):
                put_back(adapter.model, modes)  # the caller may have evaluated it
                with secret_dropout(randomness) if allow_dropout else nullcontext():
                    number, total, planted = charged_sum(
                        adapter,
                        dataset,
                        ledger,
                        mechanism,
                        loss_fn,
                        collate,
                        buckets,
                        token_budget,
                        randomness,
                        others=len(canaries or ()),
                        team=team,
                    )
                released = release_with(mechanism, total, canaries, planted, randomness)
                released, mechanism = mechanism.read(released)
                factor = schedule(number / plan.steps)
                before = {} if checked or factor == 0.0 else adapter.state()
                _step(optimizer, adapter, released / plan.expected_batch_size, rates, factor)
                if before:
                    if team is not None:
                        team.forward_passes(2)
                    check_step_moves_model(adapter, before, loss_fn, probe_batch)
                    checked = True
                yield Progress(number + 1, plan.steps), mechanism.moving_clip_norm


def release_with(
    mechanism: Mechanism,
    total: torch.Tensor,
    canaries: Canaries | None,
    planted: np.ndarray,
    randomness: Randomness,
) -> torch.Tensor:
    """A step's release; canaries that were drawn are among its rows, and are told what they see of it. Released."""
    if canaries is None:
        return mechanism.release(total, randomness)
    rows = canaries.rows(planted).to(total.device)
    released = mechanism.release(total + mechanism.clip_and_sum(rows), randomness)
    canaries.observe(released - total)  # the auditor's attacker knows all other rows
    return released


def check_start(adapter: Adapter, plan: Plan, optimizer: torch.optim.Optimizer) -> None:
    """Refuses what is wrong with adapter, plan and optimizer before anything is loaded or charged.

    Raises:
      ValueError: If the plan states another basis, something else would be trained, or the optimizer holds stale
        tensors.
    """
    if dict(plan.basis) != adapter.provenance.to_json():
        raise ValueError(
            f"The plan states the basis {dict(plan.basis)}, the adapter has {adapter.provenance.to_json()}."
        )
    adapter.check_nothing_else_is_trained()
    _check_optimizer(optimizer, adapter)


@contextmanager
def secret_dropout(randomness: Randomness) -> Iterator[None]:
    """Dropout masks from the operating system too: with a known global seed they would tie an example to its place.

    Around each step, never across two: in between, the caller may seed torch or keep its random state.
    """
    with torch.random.fork_rng():
        torch.manual_seed(int(randomness.words(1)[0] >> 1))
        yield


def probe_every_bucket(
    adapter: Adapter,
    loss_fn: LossFn,
    collate: Collate,
    synthetic: Sequence[Example],
    buckets: Sequence[int],
    token_budget: int,
) -> Batch:
    """Probes in small batches first, then in full microbatches of the longest; returns a small batch."""
    check_quantization(adapter.model)  # again: somebody may have quantized the model after attach()
    measure_head(adapter.model)
    by_length: dict[int, list[Example]] = {}
    for example in synthetic:
        by_length.setdefault(bucket_of(own_length(example), buckets), []).append(example)
    smallest = min(by_length)
    batch = collate(by_length[smallest][:3], smallest)
    with whole_model() as remembers:
        for length, examples in sorted(by_length.items()):
            size = 3 if length == smallest else min(_LARGEST_PROBE, max(3, token_budget // length))
            try:
                probe(adapter, loss_fn, partial(collate, padded_length=length), examples, size)
            except IndexError as error:
                raise ProbeError(f"The model cannot process synthetic examples of {length} tokens: {error}.") from None
        check_checkpointing(adapter, loss_fn, batch)
    if remembers:
        check_same_losses(adapter, loss_fn, batch)
    return batch


def _check_optimizer(optimizer: torch.optim.Optimizer, adapter: Adapter) -> None:
    """Raises ValueError unless the optimizer holds the live tensors of the adapter, and trains nothing else."""
    held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in adapter.named_parameters():
        if held.pop(id(parameter), None) is None:
            raise ValueError(
                f"The optimizer does not hold {name} as it is now (something replaced the tensor after the optimizer "
                "was made); make the optimizer from adapter.parameters() after attach()."
            )
    for parameter in held.values():
        if parameter.requires_grad:
            raise ValueError(
                f"The optimizer also holds a trainable tensor of shape {tuple(parameter.shape)} that is no part of the "
                "adapter: it would follow raw gradients. Make the optimizer from adapter.parameters()."
            )


def _step(
    optimizer: torch.optim.Optimizer,
    adapter: Adapter,
    gradient: torch.Tensor,
    base_rates: Sequence[float],
    factor: float,
) -> None:
    """One optimizer step along a released gradient; what the optimizer holds besides has no gradient and stays."""
    _check_optimizer(optimizer, adapter)
    for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
        group["lr"] = rate * factor
    optimizer.zero_grad(set_to_none=True)
    set_gradient(adapter, gradient)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
