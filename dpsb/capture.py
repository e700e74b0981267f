"""Per-example gradients of theta, from Opacus' hooks in the one ordinary backward pass.

Nothing stays on the model: hooks are put on the cores and heads for one microbatch and taken off again, with every
tensor they left behind. The raw summed gradient that autograd writes into ``.grad`` is thrown away.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from opacus.grad_sample import GradSampleHooks
from torch import nn

from dpsb.adapter import Adapter

_LEFT_BY_OPACUS_ON_MODULES = ("activations",)
_LEFT_BY_OPACUS_ON_PARAMETERS = ("grad_sample", "_forward_counter")


class _CheckpointSafeHooks(GradSampleHooks):
    """Opacus' hooks, made safe for non-reentrant activation checkpointing.

    That kind of checkpointing runs the forward pass (and its hooks) again while the backward pass is under way,
    although the first pass has already kept the activation: such a second call is skipped. Reentrant checkpointing
    runs its first pass without gradients, where nothing is kept, so there the second call is the one that counts.

    The gradient of a module's output comes from a hook on that very tensor. Torch's full backward hooks hand on the
    same gradient, and wrap every input and output in a function of its own to do so, which costs twice as much. The
    rows of a module that is used several times are the sum over its uses.
    """

    def __init__(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        self._first_pass_kept_nothing: set[nn.Module] = set()
        super().__init__(*args, **kwargs)

    def add_hooks(self, **_given: object) -> None:
        """Forward hooks only, on modules for which Opacus has a rule (``attach`` lets no other in)."""
        self.autograd_grad_sample_hooks = [
            module.register_forward_hook(self.capture_activations_hook)
            for module in self._module.modules()
            if type(module) in self.GRAD_SAMPLERS and any(p.requires_grad for p in module.parameters(recurse=False))
        ]
        self.enable_hooks()

    def capture_activations_hook(self, module, forward_input, forward_output) -> None:  # type: ignore[no-untyped-def]
        in_backward = torch._C._current_graph_task_id() != -1
        if not in_backward and not torch.is_grad_enabled():
            self._first_pass_kept_nothing.add(module)
        if in_backward and module not in self._first_pass_kept_nothing:
            return
        held = len(getattr(module, "activations", ()))
        super().capture_activations_hook(module, forward_input, forward_output)
        if len(getattr(module, "activations", ())) > held:
            forward_output.register_hook(partial(self._gradient_of_output, module))

    def _gradient_of_output(self, module: nn.Module, gradient: torch.Tensor) -> None:
        """Adds the rows of one use of a module, by Opacus' rule for its kind.

        In the place of Opacus' own bookkeeping, which is made for batches of changing size and costs twice the rule.
        """
        if not self.hooks_enabled:
            return
        rule, kept = self.GRAD_SAMPLERS[type(module)], cast(Any, module).activations.pop()
        for parameter, rows in rule(module, kept, gradient.detach()).items():
            held = parameter.grad_sample
            if held is not None and len(held) != len(rows):
                raise CaptureError(f"A {type(module).__name__} of theta was used with different numbers of examples.")
            parameter.grad_sample = rows if held is None else held + rows


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
    hooks = _CheckpointSafeHooks(modules, loss_reduction="sum")
    try:
        with warnings.catch_warnings():
            # Torch says so where the first core follows frozen embeddings; Opacus does not use that gradient.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
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
        for attribute in _LEFT_BY_OPACUS_ON_MODULES:
            if hasattr(module, attribute):
                delattr(module, attribute)
    for parameter in modules.parameters():
        parameter.grad = None
        for attribute in _LEFT_BY_OPACUS_ON_PARAMETERS:
            if hasattr(parameter, attribute):
                delattr(parameter, attribute)
