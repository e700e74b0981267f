"""What ``fit`` checks with the user's own model, collator and loss before the first private step.

Everything here runs on *synthetic* examples, so it may raise, compare and print freely.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from dpsb.adapter import Adapter
from dpsb.capture import checkpointed_modules, per_example_gradients
from dpsb.frozen_prefix import whole_model
from dpsb.losses import LossFn, check_losses

Example = Mapping[str, Any]
Batch = Mapping[str, torch.Tensor]


class Collate(Protocol):
    """Examples to model inputs, padded to exactly ``padded_length`` tokens."""

    def __call__(self, examples: Sequence[Example], padded_length: int) -> Batch: ...


_PERTURBATION = 0.05


class ProbeError(ValueError):
    """The model, collator or loss would break the guarantee; the message says how."""


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Sets every dropout probability in ``model`` to 0 inside the block, modules and plain float attributes alike."""
    saved: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        for name, value in vars(module).items():
            drops = name == "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "drop" in name
            if drops and isinstance(value, float) and value:
                saved.append((module, name, value))
    try:
        for module, name, _ in saved:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, value in saved:
            setattr(module, name, value)


@contextmanager
def without_gradients() -> Iterator[None]:
    """No gradients inside the block, and no word from reentrant checkpointing that it misses them."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
        yield


def probe(
    adapter: Adapter,
    loss_fn: LossFn,
    collate: Callable[[Sequence[Example]], Batch],
    synthetic: Sequence[Example],
    batch_size: int = 3,
) -> None:
    """Refuses what would couple examples or train nothing.

    Checks, at a random theta that is put back afterwards: the loss has shape (n,); two passes agree (no dropout or
    other randomness); the loss and the row of an example do not move when the other examples are replaced or removed or
    come before it (batch norm, a token-mean loss, routing, batch-wide quantization); a forward pass changes no buffer
    (running statistics); every tensor of theta has rows that are finite,
    not all zero, and equal to one-by-one autograd; the forward pass uses the tensors that will be trained.

    Args:
      adapter: What will be trained, in train mode and without dropout.
      loss_fn: Per-example loss.
      collate: Examples to model inputs, always of the same padded length.
      synthetic: At least 5 synthetic or public examples of different lengths that share one padded length.
      batch_size: How many examples share a batch, at least 3; repeated from ``synthetic`` as needed.

    Raises:
      ProbeError: If a check fails.
      ValueError: If there are fewer than 5 examples.
    """
    if len(synthetic) < 5:
        raise ValueError(f"Expected at least 5 synthetic examples to probe with, got {len(synthetic)}.")
    first, size = synthetic[0], max(2, batch_size - 1)
    others = [synthetic[1 + i % 2] for i in range(size)]
    replacements = [synthetic[3 + i % 2] for i in range(size)]
    batches = {
        "replaced": (0, [first, *replacements]),
        "removed": (0, [first]),
        "put before it": (size, [*others, first]),
    }
    saved = adapter.state()
    buffers = {name: buffer.clone() for name, buffer in adapter.model.named_buffers()}
    tolerance = _tolerance(adapter.model)
    try:
        _perturb(adapter)
        losses, rows = _losses_and_rows(adapter, loss_fn, collate([first, *others]))
        again, _ = _losses_and_rows(adapter, loss_fn, collate([first, *others]))
        _check_finite(adapter, losses, rows)
        if _distance(losses, again) > tolerance:
            raise ProbeError(
                "Two passes over the same batch give different losses: dropout or another source of randomness is "
                "active in train mode. Set it to 0 in the model's config (or allow_dropout=True if it is dropout)."
            )
        for what, (position, batch) in batches.items():
            other_losses, other_rows = _losses_and_rows(adapter, loss_fn, collate(batch))
            moved = max(_distance(losses[0], other_losses[position]), _distance(rows[0], other_rows[position]))
            if moved > tolerance:
                raise ProbeError(
                    f"An example moved by {moved:.1%} when the others of its batch were {what}: the examples are "
                    "coupled, so clipping bounds nothing. Usual causes: a loss averaged over the batch's tokens, batch "
                    "norm, packing, padding to the longest neighbour, expert routing, batch-wide quantization."
                )
        for name, buffer in adapter.model.named_buffers():
            if not torch.equal(buffer, buffers[name]):
                raise ProbeError(
                    f"A forward pass changes the buffer {name}: it would carry data outside the guarantee."
                )
        _check_against_autograd(adapter, loss_fn, collate([first, *others[:2]]), tolerance)
        adapter.load_state(saved)
        unperturbed = check_losses(loss_fn(adapter.model, collate([first, *others])), size + 1)
        if torch.equal(unperturbed.detach(), losses):
            raise ProbeError("The loss does not change when R changes: the forward pass does not use the adapter.")
    finally:
        adapter.load_state(saved)


def check_step_moves_model(adapter: Adapter, before: Mapping[str, torch.Tensor], loss_fn: LossFn, batch: Batch) -> None:
    """After the first release: the optimizer moved the live tensors, and the model's output follows.

    The step is scaled up to be visible in any precision, the losses on a synthetic batch are compared with those
    before it, and theta is put back.

    Raises:
      ProbeError: If theta did not move, or the output did not.
    """
    after = adapter.state()
    length = sum(float((after[name] - before[name]).double().square().sum()) for name in after) ** 0.5
    if length == 0.0:
        raise ProbeError("The first optimizer step left every trained tensor where it was: check the learning rate.")
    stretch = adapter.dimension**0.5 / length
    try:
        adapter.load_state(before)
        with without_gradients():
            unmoved = loss_fn(adapter.model, batch)
        adapter.load_state({name: before[name] + stretch * (after[name] - before[name]) for name in after})
        with without_gradients():
            moved = loss_fn(adapter.model, batch)
    finally:
        adapter.load_state(after)
    if torch.equal(moved, unmoved):
        raise ProbeError("The optimizer step does not reach the model's output: the forward pass uses other tensors.")


def check_same_losses(adapter: Adapter, loss_fn: LossFn, batch: Batch) -> None:
    """Losses of a synthetic batch are those of the whole model where frozen blocks are remembered, also after a step.

    Theta is put back.

    Raises:
      ProbeError: If remembering changes them.
    """
    saved = adapter.state()
    try:
        for moved in (False, True):
            if moved:
                _perturb(adapter)
            with without_gradients(), whole_model():
                whole = loss_fn(adapter.model, batch)
            for _ in range(2):  # the first pass fills the memory
                with without_gradients():
                    found = loss_fn(adapter.model, batch)
                if _distance(found, whole) > _tolerance(adapter.model):
                    raise ProbeError(
                        "The model gives other losses where its frozen blocks are remembered: "
                        + ("something below them is trained." if moved else "they hand on more than hidden states.")
                        + " Leave remember_frozen_blocks out."
                    )
    finally:
        adapter.load_state(saved)


def check_checkpointing(adapter: Adapter, loss_fn: LossFn, batch: Batch) -> None:
    """Rows of a small synthetic batch are the same with activation checkpointing and without it.

    Autograd itself can be wrong under reentrant checkpointing: blocks that hand keys and values on to later ones beside
    their hidden states (Gemma 3n, Gemma 4) lose the gradient that comes back that way. Theta is put back.

    Raises:
      ProbeError: If the rows differ.
    """
    checkpointed: list[Any] = [*checkpointed_modules(adapter.model)]
    if not checkpointed:
        return
    saved = adapter.state()
    try:
        _perturb(adapter)
        _, rows = _losses_and_rows(adapter, loss_fn, batch)
        for module in checkpointed:
            module.gradient_checkpointing = False
        _, plain = _losses_and_rows(adapter, loss_fn, batch)
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True
        adapter.load_state(saved)
    moved = _distance(rows, plain)
    if moved > 2 * _tolerance(adapter.model):  # in bf16 the sums of a recomputed block come in another order
        raise ProbeError(
            f"Activation checkpointing changes the per-example gradients by {moved:.1%}: blocks hand on more than "
            "hidden states, and the gradient of the rest is lost. Use gradient_checkpointing_kwargs="
            '{"use_reentrant": False}, or none.'
        )


def _perturb(adapter: Adapter) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * _PERTURBATION
            parameter.add_(noise.to(parameter.device, parameter.dtype))


def _losses_and_rows(adapter: Adapter, loss_fn: LossFn, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    size = len(next(iter(batch.values())))
    with per_example_gradients(adapter, size) as rows:
        losses = check_losses(loss_fn(adapter.model, batch), size)
        losses.sum().backward()
        return losses.detach(), rows.get()


def _check_finite(adapter: Adapter, losses: torch.Tensor, rows: torch.Tensor) -> None:
    if not bool(torch.isfinite(losses).all()):
        raise ProbeError("The loss of synthetic examples is not finite: the model's weights contain NaN or overflow.")
    sizes = [parameter.numel() for parameter in adapter.parameters()]
    for (name, _), part in zip(adapter.named_parameters(), rows.split(sizes, dim=1), strict=True):
        if not bool(torch.isfinite(part).all()):
            raise ProbeError(f"The per-example gradients of {name} are not finite on synthetic examples.")
        if not bool(part.any()):
            raise ProbeError(f"The per-example gradients of {name} are all zero: it would be moved by noise alone.")


def _check_against_autograd(adapter: Adapter, loss_fn: LossFn, batch: Batch, tolerance: float) -> None:
    _, rows = _losses_and_rows(adapter, loss_fn, batch)
    sizes = [parameter.numel() for parameter in adapter.parameters()]
    for i in range(len(rows)):
        loss_fn(adapter.model, batch)[i].backward()  # not autograd.grad: reentrant checkpointing refuses it
        for (name, parameter), row in zip(adapter.named_parameters(), rows[i].split(sizes), strict=True):
            exact = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if _distance(row, exact.flatten().float()) > tolerance:
                raise ProbeError(f"The per-example gradient of {name} differs from one-by-one autograd.")
            parameter.grad = None


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative distance; 0 for equal tensors, infinite where one of them holds a NaN."""
    scale = float(torch.maximum(a.double().norm(), b.double().norm()))
    moved = float((a.double() - b.double()).norm()) / scale if scale else 0.0
    return math.inf if math.isnan(moved) else moved


def _tolerance(model: nn.Module) -> float:
    """fp32 agrees to about 1e-6 and half precision to about 1e-2 between batch shapes; coupling moves rows by more."""
    floating = [t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    return 1e-3 if all(dtype in (torch.float32, torch.float64) for dtype in floating) else 5e-2
