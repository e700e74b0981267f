"""Periodic re-basing: every so many steps B R A goes into the frozen weights, R back to 0, and new directions come in.

An r x r core can only move its weight within one window; with windows that change the update's rank grows. What is read
is released R, and public data or a public generator for the new directions: post-processing, which costs no epsilon.
The plan states the period, and the mechanism does not know of it: R has the same shape before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dpsb.adapter import Adapter, Core, Factors, detach, plain_factor
from dpsb.basis._common import add_to_base
from dpsb.basis.setup import Setup
from dpsb.basis.stage import new_factors
from dpsb.layers import is_plain
from dpsb.models import peft_part

REBASED_NAME = "rebased.safetensors"
"""In a checkpoint: every window so far, the present one last. Released and public tensors only."""

NewFactors = Callable[[int], Mapping[str, Factors]]


class RebasingError(ValueError):
    """The model's weights cannot take an update in; the message says why."""


@dataclass
class Rebasing:
    r"""Folds the update of a run into its base weights every ``every`` steps.

    With windows :math:`(B_j, A_j)` and :math:`R_j` as training left it in the j-th of them, the model is at
    :math:`W_0 + \sum_{j<k} B_j R_j A_j + B_k R_k A_k`.

    Args:
      every: Steps between two re-basings. Public.
      new_factors: Directions of the k-th window (k = 1, 2, ...) for every layer, from public data, a public generator
        and what is released. R0 in them is not used.
      folded: By layer, what is in its weight by now: :math:`B_j R_j`, (out, r), and :math:`A_j`, (r, in). Released.
    """

    every: int
    new_factors: NewFactors
    folded: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How often the update was folded in."""
        return max(map(len, self.folded.values()), default=0)

    def after_step(self, step: int, steps: int, adapter: Adapter, optimizer: torch.optim.Optimizer) -> None:
        """Re-bases after the step if it is time and steps are left to use the new window.

        What the optimizer knows of R belongs to the old window and is dropped; the head's state stays.
        """
        if step % self.every or step == steps:
            return
        for core in adapter.cores:
            pair = _update(core, adapter.adapter_name)
            self.folded.setdefault(core.name, []).append(pair)
            add_to_base(core.layer, *pair)
            with torch.no_grad():
                core.up.core.weight.zero_()
            optimizer.state.pop(core.up.core.weight, None)
        _put(adapter, self.new_factors(self.count))

    def save(self, folder: Path, adapter: Adapter) -> None:
        """Writes every window into a checkpoint."""
        tensors: dict[str, torch.Tensor] = {}
        for name, (A, B, _) in adapter.factors().items():
            tensors |= {f"{name}.A": A.detach().cpu(), f"{name}.B": B.detach().cpu()}
        for name, pairs in self.folded.items():
            for index, (up, down) in enumerate(pairs):
                tensors |= {f"{name}.{index}.up": up.cpu(), f"{name}.{index}.down": down.cpu()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / REBASED_NAME)

    def load(self, folder: Path, adapter: Adapter) -> None:
        """Puts the windows of a checkpoint back, into a model that has none of them yet."""
        saved = load_file(folder / REBASED_NAME)
        for core in adapter.cores:
            device = core.up.core.weight.device
            index = 0
            while (up := saved.get(f"{core.name}.{index}.up")) is not None:
                pair = (up.to(device), saved[f"{core.name}.{index}.down"].to(device))
                self.folded.setdefault(core.name, []).append(pair)
                add_to_base(core.layer, *pair)
                index += 1
        _put(adapter, {c.name: Factors(A=saved[f"{c.name}.A"], B=saved[f"{c.name}.B"]) for c in adapter.cores})

    def unfold(self, adapter: Adapter) -> Adapter:
        """Takes everything out of the base weights again: the same function, as one plain LoRA adapter of PEFT's.

        Its rank is r for every window. Nothing is left to train but the head.
        """
        if not self.folded:
            return adapter
        name = adapter.adapter_name
        last = {core.name: _update(core, name) for core in adapter.cores}
        detach(adapter)
        for core in adapter.cores:
            for up, down in self.folded[core.name]:
                add_to_base(core.layer, -up, down)
            _widen(core, name, [*self.folded[core.name], last[core.name]])
        settings = peft_part(adapter.model).peft_config[name]
        settings.r = settings.lora_alpha = adapter.cores[0].layer.r[name]
        return replace(adapter, cores=())


def rebasing_of(setup: Setup, adapter: Adapter) -> Rebasing | None:
    """What the settings of a run ask for; None if they ask for nothing.

    Raises:
      RebasingError: If the weights cannot take an update in.
    """
    config = setup.config
    if config.rebase_every is None or not config.rebases:
        return None
    _check_weights(adapter)
    return Rebasing(config.rebase_every, new_factors(setup, adapter.provenance))


def _check_weights(adapter: Adapter) -> None:
    """Refuses weights that would round an update away, or that are not there as a whole.

    Raises:
      RebasingError: With the name of the weight.
    """
    for core in adapter.cores:
        weight = core.layer.get_base_layer().weight
        if not is_plain(weight) or weight.dtype != torch.float32:
            raise RebasingError(
                f"rebase_every adds to the frozen weights, which takes plain ones in float32; {core.name} is a "
                f"{type(weight).__name__} of {str(weight.dtype).removeprefix('torch.')}."
            )


def _update(core: Core, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    down = core.layer.lora_A[adapter_name].weight
    return core.up.weight.detach().clone(), down.detach().clone()


def _widen(core: Core, adapter_name: str, windows: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Puts all windows side by side into the plain factors of a layer."""
    up, down = (torch.cat([pair[side] for pair in windows], dim=1 - side) for side in (0, 1))
    layer, rank = core.layer, len(down)
    for slot, weight in ((layer.lora_A, down), (layer.lora_B, up)):
        slot[adapter_name] = plain_factor(weight)
    layer.r[adapter_name] = layer.lora_alpha[adapter_name] = rank


def _put(adapter: Adapter, factors: Mapping[str, Factors]) -> None:
    with torch.no_grad():
        for core in adapter.cores:
            core.layer.lora_A[adapter.adapter_name].weight.copy_(factors[core.name].A)
            core.up.up.copy_(factors[core.name].B)
