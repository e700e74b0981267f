"""Checks against training that silently does nothing, or does more than it should.

``fit`` probes rows, optimizer and first step (``dpsb.probe``). Here: nobody listens to raw gradients, nothing but theta
changes, and what is saved loads back to the same output. Everything runs on weights and synthetic examples.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dpsb.adapter import Adapter
from dpsb.fingerprint import fingerprint
from dpsb.losses import LossFn
from dpsb.probe import Batch, ProbeError, without_gradients

_RELOADED = "dpsb_reloaded"
_SCATTER = 0.05


def check_no_listeners(adapter: Adapter) -> None:
    """Raises ProbeError if something is hooked to a trained tensor: inside a step it would see gradients without noise.

    Layerwise optimizers and ``wandb.watch`` do so.
    """
    for name, parameter in adapter.named_parameters():
        hooks = (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None))
        if any(hooks):
            raise ProbeError(
                f"Something has put a hook on the gradient of {name}: it would see raw gradients of private examples. "
                "Take it off (a layerwise optimizer, wandb.watch or a callback)."
            )


def check_unchanged(adapter: Adapter, before: Mapping[str, int]) -> None:
    """Raises ProbeError, with its name, if a tensor that is not theta is another than at :func:`fingerprint`."""
    now = fingerprint(adapter)
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            raise ProbeError(
                f"{name} changed while training, and it is no part of what is clipped and noised: a callback or an "
                "evaluation wrote to it. The run's result is not to be used."
            )


def check_reload(adapter: Adapter, save: Callable[[Path], None], loss_fn: LossFn, batch: Batch) -> None:
    """Saves the adapter, loads it again as a plain LoRA adapter, and compares the losses of synthetic examples.

    Theta is scattered a little for it, so that a part that is not saved shows; afterwards it is as before.

    Args:
      adapter: In the state in which it is trained.
      save: Writes the adapter's files into a folder, as they will be written at the end.
      loss_fn: Per-example loss.
      batch: Synthetic examples.

    Raises:
      ProbeError: If the loaded adapter gives other losses.
    """
    saved = adapter.state()
    generator = torch.Generator().manual_seed(1)
    try:
        adapter.load_state(
            {
                name: value + _SCATTER * torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
                for name, value in saved.items()
            }
        )
        with tempfile.TemporaryDirectory(prefix="dpsb-reload-") as folder:
            save(Path(folder))
            with without_gradients():
                expected = loss_fn(adapter.model, batch)
                adapter.load_state(saved)  # what is not in the folder is then missing from the losses
                with _loaded_again(adapter, folder):
                    found = loss_fn(adapter.model, batch)
    finally:
        adapter.load_state(saved)
    adapter.check_nothing_else_is_trained()
    moved = float((found.double() - expected.double()).abs().max())
    if not moved <= _tolerance(adapter) * max(1.0, float(expected.abs().max())):
        raise ProbeError(
            "The saved adapter gives other outputs than the model that was saved: some trained part is not written "
            "(a head that PEFT does not know: name it in LoraConfig.modules_to_save, or set task_type='SEQ_CLS')."
        )


@contextmanager
def _loaded_again(adapter: Adapter, folder: str) -> Any:
    """The model with the adapter of a folder, as PEFT loads it, in the place of the one that is trained."""
    model: Any = adapter.model
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {module: module.training for module in model.modules()}
    try:
        model.load_adapter(folder, adapter_name=_RELOADED, is_trainable=False)
        model.set_adapter(_RELOADED)
        for module, mode in modes.items():
            module.training = mode  # PEFT puts the model into eval mode
        yield
    finally:
        model.set_adapter(adapter.adapter_name)
        model.delete_adapter(_RELOADED)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
        for module, mode in modes.items():
            module.training = mode


def _tolerance(adapter: Adapter) -> float:
    tensors = (*adapter.model.parameters(), *adapter.model.buffers())
    return 5e-2 if any(t.dtype in (torch.float16, torch.bfloat16) for t in tensors) else 1e-3
