"""Per-example gradients of theta, from Opacus' hooks in the one ordinary backward pass.

Nothing stays on the model: hooks are put on the cores and heads for one microbatch and taken off again, with every
tensor they left behind. The raw summed gradient that autograd writes into ``.grad`` is thrown away.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from torch import nn

from dpsb.adapter import Adapter

_LEFT_BY_OPACUS_ON_PARAMETERS = ("grad_sample", "_forward_counter")


class _CheckpointSafeHooks(GradSampleHooks):
    """Opacus' rules for the rows of a module, with hooks that are safe for activation checkpointing and repeated use.

    Non-reentrant checkpointing runs the forward pass (and its hooks) again while the backward pass is under way,
    although the first pass has already kept the activation: such a second call is skipped. Reentrant checkpointing
    runs its first pass without gradients, where nothing is kept, so there the second call is the one that counts.

    The gradient of a module's output comes from a hook on that very tensor, which holds the input of the same call: so
    input and gradient belong together whatever becomes of the other calls of a module, whose rows are the sum over
    them. (Torch's full backward hooks wrap every input and output in a function, which costs twice as much; Opacus'
    bookkeeping is made for batches of changing size, costs as much as its rule, and pairs calls by their order.)
    """

    def __init__(self, modules: nn.Module) -> None:
        self._first_pass_kept_nothing: set[nn.Module] = set()
        super().__init__(modules)

    def add_hooks(self, **_given: object) -> None:
        """Forward hooks; a module without a rule gets none, and whoever asks for its rows is told so."""
        self.autograd_grad_sample_hooks = [
            module.register_forward_hook(self._keep_input)
            for module in self._module.modules()
            if type(module) in self.GRAD_SAMPLERS and any(p.requires_grad for p in module.parameters(recurse=False))
        ]
        self.enable_hooks()

    def _keep_input(self, module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        in_backward = torch._C._current_graph_task_id() != -1
        if not in_backward and not torch.is_grad_enabled():
            self._first_pass_kept_nothing.add(module)
        if in_backward and module not in self._first_pass_kept_nothing:
            return
        if not module.training or not torch.is_grad_enabled():
            return
        held = [tensor.detach() for tensor in inputs]
        module.activations = [*getattr(module, "activations", ()), held]
        output.register_hook(partial(self._add_rows, module, held))

    def _add_rows(self, module: nn.Module, held: list[torch.Tensor], gradient: torch.Tensor) -> None:
        """Adds the rows of one call of a module, and lets go of its input."""
        if not self.hooks_enabled:
            return
        if not held:
            raise CaptureError("backward() ran twice over one forward pass; call it once, on the sum of the losses.")
        for parameter, rows in self.GRAD_SAMPLERS[type(module)](module, list(held), gradient.detach()).items():
            before = getattr(parameter, "grad_sample", None)
            if before is not None and len(before) != len(rows):
                raise CaptureError(f"A {type(module).__name__} of theta was used with different numbers of examples.")
            parameter.grad_sample = rows if before is None else before + rows
        held.clear()


class CaptureError(RuntimeError):
    """The model has no per-example gradients to give. The message names the tensor; it depends on no data."""


class Rows:
    """Where the per-example gradients of one microbatch arrive; see :func:`per_example_gradients`."""

    def __init__(self, adapter: Adapter, num_examples: int) -> None:
        self._adapter = adapter
        self._num_examples = num_examples

    def get(self) -> torch.Tensor:
        """Per-example gradients of theta, shape ``(n, d)``, fp32. Sensitive. Call once, after ``backward()``.

        Raises:
          CaptureError: If a tensor of theta got no per-example gradient, or one for another number of examples. The
            message names the tensor and the usual causes; it depends on the model, not on the data.
        """
        parts = []
        for name, parameter in self._adapter.named_parameters():
            sample = getattr(parameter, "grad_sample", None)
            if sample is None:
                raise CaptureError(
                    f"{name} got no per-example gradient: it was not used in the forward pass, its module is in eval "
                    "mode, or something removed the hooks. Call adapter_train_mode(adapter) and use every target."
                )
            if sample.shape[0] != self._num_examples:
                raise CaptureError(
                    f"{name} got per-example gradients for another number of examples: its input does not have the "
                    "examples in dimension 0 (as in mixture-of-experts layers). Do not target it."
                )
            parts.append(sample.reshape(self._num_examples, -1).to(torch.float32))
        return torch.cat(parts, dim=1)


@contextmanager
def per_example_gradients(adapter: Adapter, num_examples: int) -> Iterator[Rows]:
    r"""Collects the gradient of each example's loss with respect to theta.

    Inside the block run the model on ``num_examples`` examples and call ``backward()`` on the **sum** of the
    per-example losses; then ``rows.get()``. For a core, row i is :math:`s\sum_t (B^\top g_{it})(A x_{it})^\top` over
    the tokens t of example i.

    Guarantees:
      * Row i is the gradient of example i's loss, equal to one-by-one autograd, with a layer used several times and
        with no, reentrant or non-reentrant activation checkpointing, provided the loss of an example does not depend
        on the others (``dpsb.probe`` checks that).
      * On leaving the block, also by an exception, hooks, stored activations and ``.grad`` are gone.

    Args:
      adapter: What is trained; cores and heads must be in train mode, otherwise Opacus captures nothing.
      num_examples: n, the number of examples in the microbatch, at least 1.

    Yields:
      :class:`Rows`.

    Raises:
      CaptureError: If a module of theta is in eval mode.

    References:
      Yousefpour et al. (2021), arXiv:2109.12298 (Opacus).
    """
    check_train_mode(adapter)
    modules = nn.ModuleList(adapter.trained_modules())
    hooks = _CheckpointSafeHooks(modules)
    try:
        yield Rows(adapter, num_examples)
    finally:
        hooks.remove_hooks()
        _clean(modules)


def adapter_train_mode(adapter: Adapter) -> None:
    """Puts cores and heads into train mode, which Opacus needs; the rest of the model is left alone."""
    for module in adapter.trained_modules():
        module.train()


def check_train_mode(adapter: Adapter) -> None:
    """Raises CaptureError if a module of theta is in eval mode: its rows would silently be missing."""
    for module in adapter.trained_modules():
        if not module.training:
            raise CaptureError(
                "A core or head is in eval mode, where no per-example gradients are captured; "
                "call adapter_train_mode(adapter) or model.train() first."
            )


def checkpointed_modules(model: nn.Module) -> list[nn.Module]:
    """The modules whose activations are recomputed in the backward pass, as transformers marks them."""
    return [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]


def _clean(modules: nn.Module) -> None:
    for module in modules.modules():
        for held in vars(module).pop("activations", ()):
            held.clear()  # hooks of a graph that is still there hold it too
    for parameter in modules.parameters():
        parameter.grad = None
        for attribute in _LEFT_BY_OPACUS_ON_PARAMETERS:
            if hasattr(parameter, attribute):
                delattr(parameter, attribute)
