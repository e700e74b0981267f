"""Remembers what the frozen blocks below the lowest trained one computed for an example, so that they run only once.

With adapters on the upper blocks of a model alone, everything below is the same function in every step; with a trained
head alone, all blocks are. While :func:`remember_frozen_prefix` is active, the hidden states that leave the last frozen
block are kept in memory, by the example's own tokens, and only what is above runs again. Nothing is written to disk.
What is kept is as sensitive as the examples and goes away with the block, or with the :class:`FrozenOutputs` that were
handed in, by which the runs of a sweep share it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from dpsb.fingerprint import tensors_digest
from dpsb.heads import in_head
from dpsb.models import block_lists


class PrefixError(ValueError):
    """The model has no frozen blocks to remember; the message says why."""


@dataclass
class FrozenOutputs:
    """What frozen blocks computed, for the next run of this process whose frozen blocks are the same.

    Args:
      kept: Hidden states by an example's own tokens. Sensitive; in memory only.
      in_tuple: Whether the blocks return their hidden states in a tuple.
      blocks: What computed them: SHA-256 of the tensors, and settings. Other blocks begin anew.
    """

    kept: dict[bytes, torch.Tensor] = field(default_factory=dict)
    in_tuple: bool = False
    blocks: str | None = None

    def begin(self, blocks: str | None) -> None:
        """Drops what other blocks computed; None stands for blocks that cannot be told from others."""
        if blocks is None or blocks != self.blocks:
            self.kept.clear()
            self.blocks = blocks


@contextmanager
def remember_frozen_prefix(model: nn.Module, outputs: FrozenOutputs | None = None) -> Iterator[int]:
    """Lets the blocks below the lowest trained one, or below a trained head, run once per example in the with block.

    Guarantees:
      * Per-example gradients and losses are those of the model without it, up to floating-point rounding: a row's
        hidden states are computed from its own tokens, in a batch of the same padded length.
      * ``fit`` probes the model with its frozen blocks (:func:`whole_model`), and that remembering changes no loss.
      * Outside a forward pass the model's modules are where they were. On leaving, everything kept is gone, but for
        what is in ``outputs``.

    Args:
      model: Of transformers, with or without PEFT. Which tensors are trained must not change inside. Dropout must be 0
        in the frozen blocks: a mask would be remembered too.
      outputs: Of earlier runs; used only if every frozen number below the lowest trained block is the same, and all of
        them are plain tensors (no quantized weights).

    Yields:
      The number of blocks that are skipped.

    Raises:
      PrefixError: If the lowest block is trained, or the trained tensors do not all lie in one list of blocks or in the
        head; with a head alone, if the model has not exactly one list.
    """
    encoder, parent, name, count = _frozen_part(model)
    if outputs is None:
        outputs = FrozenOutputs()
    else:
        outputs.begin(_fingerprint(encoder, getattr(parent, name), count))
    memory = _Memory(encoder, parent, name, count, outputs)
    handles = [
        encoder.register_forward_pre_hook(memory.before, with_kwargs=True),
        encoder.register_forward_hook(memory.after, always_call=True),
    ]
    _ACTIVE.append(memory)
    try:
        yield count
    finally:
        _ACTIVE.remove(memory)
        for handle in handles:
            handle.remove()


@contextmanager
def whole_model() -> Iterator[bool]:
    """Lets the frozen blocks run for every batch inside, as if nothing were remembered, and remembers nothing new.

    A probe must look at the model so: a block that couples examples would be asked about each of them once only, and
    then seem not to.

    Yields:
      Whether anything is remembered outside.
    """
    awake = [memory for memory in _ACTIVE if not memory.asleep]
    for memory in awake:
        memory.asleep = True
    try:
        yield bool(awake)
    finally:
        for memory in awake:
            memory.asleep = False


_ACTIVE: list[_Memory] = []


def _is_trained(module: nn.Module) -> bool:
    return any(map(_is_trained_itself, module.modules()))


def _is_trained_itself(module: nn.Module) -> bool:
    return isinstance(module, LoraLayer) or any(p.requires_grad for p in module.parameters(recurse=False))


def _frozen_part(model: nn.Module) -> tuple[Any, nn.Module, str, int]:
    """The transformers model that holds the blocks, the module that holds their list, its name, how many are frozen."""
    lists = block_lists(model)
    only = lists[0] if len(lists) == 1 else None  # with a trained head alone, all of its blocks are frozen
    found = _list_of_blocks(model, _is_trained) or _list_of_blocks(model, lambda blocks: blocks is only)
    if found is None or not any(p.requires_grad for p in model.parameters()):
        raise PrefixError(
            "The model has no list of blocks with trained tensors in it, or (for a head alone) not exactly one list of "
            "several blocks: nothing to remember."
        )
    encoder, parent, name, blocks = found
    count = next((i for i, block in enumerate(blocks) if _is_trained(block)), len(blocks))
    if count == 0:
        raise PrefixError("The lowest block is trained, so there is no frozen one below it; target upper blocks only.")
    among = {id(module) for module in blocks.modules()}
    for path, module in encoder.named_modules():
        if id(module) not in among and not in_head(path) and _is_trained_itself(module):
            raise PrefixError(f"{path} is trained and may lie below the frozen blocks; remember none of them.")
    return encoder, parent, name, count


def _list_of_blocks(
    model: nn.Module, wanted: Callable[[nn.ModuleList], bool]
) -> tuple[Any, nn.Module, str, nn.ModuleList] | None:
    """The wanted list with the module that holds it, its name there, and the innermost transformers model around it."""
    from transformers import PreTrainedModel

    found = None
    for encoder in (m for m in model.modules() if isinstance(m, PreTrainedModel)):
        for parent in encoder.modules():
            for name, blocks in parent.named_children():
                if isinstance(blocks, nn.ModuleList) and wanted(blocks):
                    found = encoder, parent, name, blocks  # the innermost model that holds the list comes last
            if found is not None and found[1] is parent:
                break
    return found


def _fingerprint(encoder: Any, blocks: nn.ModuleList, count: int) -> str | None:
    """SHA-256 of every frozen tensor of the model but those of the upper blocks alone, and of how it is built."""
    lower, upper = ({id(t) for t in (*b.parameters(), *b.buffers())} for b in (blocks[:count], blocks[count:]))
    above = upper - lower
    tensors = [*encoder.named_parameters(remove_duplicate=False), *encoder.named_buffers(remove_duplicate=False)]
    below = {name: t for name, t in tensors if id(t) not in above and not t.requires_grad}
    if any(type(tensor) not in (torch.Tensor, nn.Parameter) for tensor in below.values()):
        return None  # quantized weights keep part of what they are elsewhere
    settings = f"{type(encoder).__qualname__}, {encoder.config._attn_implementation}, {encoder.config.to_json_string()}"
    return f"{tensors_digest(below)} {settings}"


class _Instead(nn.Module):
    """Stands for a frozen block: hands on the hidden states, or those that are remembered.

    Whatever else models ask of a block, such as its kind of attention, the block itself answers.
    """

    def __init__(self, block: nn.Module, memory: _Memory, recalls: bool) -> None:
        super().__init__()
        self.__dict__.update(_block=block, _memory=memory, _recalls=recalls)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
        memory: _Memory = self.__dict__["_memory"]
        if self.__dict__["_recalls"]:
            needs_gradient = hidden_states.requires_grad and torch.is_grad_enabled()
            hidden_states = memory.batch.requires_grad_(needs_gradient)
        return (hidden_states,) if memory.outputs.in_tuple else hidden_states


class _Memory:
    """Hidden states by an example's own tokens, and the hooks that fill and use them."""

    def __init__(self, encoder: Any, parent: nn.Module, name: str, count: int, outputs: FrozenOutputs) -> None:
        blocks = list(getattr(parent, name))
        self.encoder, self.parent, self.name = encoder, parent, name
        self.blocks: nn.ModuleList = getattr(parent, name)
        self.lower = nn.ModuleList(blocks[:count])
        standing = [_Instead(block, self, i == count - 1) for i, block in enumerate(blocks[:count])]
        self.upper = nn.ModuleList([*standing, *blocks[count:]])
        self.outputs = outputs
        self.batch = torch.empty(0)
        self.computing = self.asleep = False

    def before(self, _encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Makes the hidden states of a batch ready, and lets the forward pass start above the frozen blocks."""
        if self.computing or self.asleep:
            return
        inputs: dict[str, Any] = {"input_ids": args[0] if args else kwargs.get("input_ids")}
        inputs |= {name: kwargs.get(name) for name in ("attention_mask", "token_type_ids")}
        lengths = _own_lengths(inputs)
        if lengths is None or len(args) > 1:
            return  # not padded on the right, or called in another way: the whole model runs
        keys = _keys(inputs, lengths)
        kept = self.outputs.kept
        missing = [i for i, key in enumerate(keys) if key not in kept]
        if missing:
            hidden = self._run_lower({name: v[missing] for name, v in inputs.items() if v is not None})
            for row, i in enumerate(missing):
                kept[keys[i]] = hidden[row, : lengths[i]].cpu().clone()
        rows = [kept[key] for key in keys]
        batch = rows[0].new_zeros(len(rows), inputs["input_ids"].shape[1], rows[0].shape[1])
        for row, part in zip(batch, rows, strict=True):
            row[: len(part)] = part
        self.batch = batch.to(inputs["input_ids"].device)
        self.parent._modules[self.name] = self.upper

    def after(self, _encoder: nn.Module, _args: Any, _output: Any) -> None:
        if not self.computing:
            self.parent._modules[self.name] = self.blocks
            self.batch = torch.empty(0)

    def _run_lower(self, inputs: dict[str, Any]) -> torch.Tensor:
        """What the last frozen block returns."""
        seen: list[Any] = []
        handle = self.lower[-1].register_forward_hook(lambda _module, _args, output: seen.append(output))
        self.computing = True
        self.parent._modules[self.name] = self.lower
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")  # none is wanted
                self.encoder(**inputs)
        finally:
            handle.remove()
            self.computing = False
            self.parent._modules[self.name] = self.blocks
        self.outputs.in_tuple = isinstance(seen[0], tuple)
        hidden: torch.Tensor = seen[0][0] if self.outputs.in_tuple else seen[0]
        return hidden


def _own_lengths(inputs: dict[str, Any]) -> list[int] | None:
    """The number of tokens of each row, if padding comes after them."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if ids is None or mask is None or mask.shape != ids.shape or mask.shape[0] == 0:
        return None
    lengths = mask.sum(dim=1)
    right = torch.arange(mask.shape[1], device=mask.device)[None] < lengths[:, None]
    return lengths.tolist() if torch.equal(mask.bool(), right) and int(lengths.min()) > 0 else None


def _keys(inputs: dict[str, Any], lengths: list[int]) -> list[bytes]:
    """Each row's own tokens and their types, as bytes."""
    parts = [inputs[name] for name in ("input_ids", "token_type_ids") if inputs.get(name) is not None]
    stacked = torch.stack([part.to(torch.int32) for part in parts], dim=1).cpu()
    return [stacked[i, :, :length].contiguous().numpy().tobytes() for i, length in enumerate(lengths)]
