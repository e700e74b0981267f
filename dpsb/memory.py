"""The memory of a private step, from a model's config alone: no weights are loaded and no data is read.

The model is built without storage, its adapter put on, and one microbatch is run on tensors that have shapes and no
numbers: forward, backward, rows, clipping, exactly as in ``fit``. Every storage that would have been made is counted
while it lives. Two sizes of the microbatch are run; the rest lies on a straight line.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpsb.adapter import Adapter, Factors, Provenance, lora_layers, put_core, trained_directly
from dpsb.capture import adapter_train_mode, per_example_gradients
from dpsb.losses import assume_head, causal_lm_loss, classification_loss
from dpsb.mechanism import clip_and_sum
from dpsb.models import HEAD_NAMES, ModelError, add_lora, block_lists, empty_base, peft_part
from dpsb.probe import without_dropout

TOKEN_BUDGETS = (1024, 2048, 4096, 8192, 16384, 32768)
_MOMENTS = {"sgd": 1, "adam": 2}
_NUM_LABELS = 2


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes that a private step needs, by what they are for. Public: a function of the model's shape and settings.

    Args:
      parameters: Number of the base model's parameters.
      dimension: d, the length of theta.
      base_bytes: The frozen weights.
      blocks_bytes: Those of them that lie in the model's blocks.
      largest_block_bytes: The largest block.
      adapter_bytes: A, B and theta.
      optimizer_bytes: Gradient, moments and the float64 sum, a vector of length d each.
      task: What the model is trained for.
      max_length: Tokens of every example; all are taken to be that long.
      by_budget: For each token budget: ``examples`` in a microbatch, ``activations`` that the forward pass keeps,
        ``rows`` (n x d in fp32), ``peak`` (the most at any moment beside weights and optimizer) and ``total``.
    """

    parameters: int
    dimension: int
    base_bytes: int
    blocks_bytes: int
    largest_block_bytes: int
    adapter_bytes: int
    optimizer_bytes: int
    task: str
    max_length: int
    by_budget: Sequence[Mapping[str, int]]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "by_budget": [dict(row) for row in self.by_budget]}


def memory_plan(
    model: str,
    task: str,
    *,
    rank: int = 16,
    targets: str | Sequence[str] = "all-linear",
    max_length: int = 256,
    token_budgets: Sequence[int] = TOKEN_BUDGETS,
    dtype: torch.dtype = torch.float32,
    optimizer: str = "adam",
    checkpointing: bool = False,
) -> MemoryPlan:
    """What a private step on ``model`` will need, for several token budgets.

    Args:
      model: Folder, Hub id, ``"minilm"`` or ``"smollm2"``; only its config is read.
      task: ``"classification"`` or ``"causal-lm"``.
      rank: r of the cores.
      targets: As for :func:`dpsb.models.add_lora`.
      max_length: Tokens of an example. What is planned for is the worst case, in which all are that long.
      token_budgets: Tokens per microbatch; one example is always let through.
      dtype: Compute type of the frozen weights.
      optimizer: ``"adam"`` or ``"sgd"``.
      checkpointing: With transformers' activation checkpointing, non-reentrant.

    Returns:
      :class:`MemoryPlan`. A test holds activations and peak to within 5 % of what a real step on a processor allocates.
      The libraries' own memory, the allocator's gaps and the data set come on top.

    Raises:
      ModelError: If the config cannot be loaded, is of a quantized model, or does not fit ``rank`` or ``targets``.
      ValueError: If another argument is out of range.
    """
    if optimizer not in _MOMENTS:
        raise ValueError(f"Expected optimizer to be one of {', '.join(_MOMENTS)}, got {optimizer!r}.")
    if max_length < 1 or any(budget < 1 for budget in token_budgets):
        raise ValueError(f"Expected max_length={max_length!r} and token_budgets={token_budgets!r} of at least 1.")
    with torch.device("meta"):
        base = empty_base(model, task, _NUM_LABELS, dtype)
        counted = sum(parameter.numel() for parameter in base.parameters())
        base_bytes = _bytes(base)
        blocks = [_bytes(block) for blocks in block_lists(base) for block in blocks]
        adapted = add_lora(base, task, rank, targets)
        layers = lora_layers(adapted)
        cores = tuple(put_core(name, layer, _empty_factors(layer)) for name, layer in layers.items())
    adapter = Adapter(adapted, "default", cores, trained_directly(adapted, HEAD_NAMES), Provenance(kind="", access=""))
    if checkpointing:
        _checkpoint(adapted)
    (kept_1, peak_1), (kept_2, peak_2) = (_measured(adapter, task, size, max_length) for size in (1, 2))
    dimension = adapter.dimension
    optimizer_bytes = dimension * (4 * (1 + _MOMENTS[optimizer]) + 8)
    fixed = _bytes(adapted) + optimizer_bytes
    rows = []
    for budget in token_budgets:
        n = max(1, budget // max_length)
        peak = peak_1 + (n - 1) * (peak_2 - peak_1)
        kept = kept_1 + (n - 1) * (kept_2 - kept_1)
        sizes = {"activations": kept, "rows": 4 * n * dimension, "peak": peak, "total": fixed + peak}
        rows.append({"token_budget": budget, "examples": n, **sizes})
    return MemoryPlan(
        parameters=counted,
        dimension=dimension,
        base_bytes=base_bytes,
        blocks_bytes=sum(blocks),
        largest_block_bytes=max(blocks, default=0),
        adapter_bytes=_bytes(adapted) - base_bytes,
        optimizer_bytes=optimizer_bytes,
        task=task,
        max_length=max_length,
        by_budget=tuple(rows),
    )


def _bytes(model: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _empty_factors(layer: Any) -> Factors:
    return Factors(A=layer.lora_A["default"].weight.detach(), B=layer.lora_B["default"].weight.detach())


def _checkpoint(model: nn.Module) -> None:
    part: Any = peft_part(model)
    if not getattr(part, "supports_gradient_checkpointing", False):
        raise ModelError("checkpointing=True: this model has no activation checkpointing.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # transformers 5 has a new name for it, 4 has not
        part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _measured(adapter: Adapter, task: str, size: int, length: int) -> tuple[int, int]:
    """Bytes that a forward pass over ``size`` examples keeps, and the most that the whole microbatch holds."""
    loss_fn = classification_loss if task == "classification" else causal_lm_loss
    model = adapter.model
    assume_head(model)
    with FakeTensorMode(), _without_storage(model), without_dropout(model):
        model.train()
        adapter_train_mode(adapter)
        ids = torch.ones(size, length, dtype=torch.long)
        labels = torch.zeros(size, dtype=torch.long) if task == "classification" else ids
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        kept = _Kept(model)
        with _Peak(model, size * (length - 1)) as peak, per_example_gradients(adapter, size) as rows:
            with saved_tensors_hooks(kept.add, lambda tensor: tensor):
                loss = loss_fn(model, batch).sum()
            for module in model.modules():
                for tensor in tree_leaves(getattr(module, "activations", [])):
                    kept.add(tensor)
            total = kept.forget()
            loss.backward()
            clip_and_sum(rows.get(), 1.0)
        return total, peak.most


def _storages(model: nn.Module) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}


class _Kept:
    """Unique storages that autograd and Opacus hold at the end of the forward pass, weights aside."""

    def __init__(self, model: nn.Module) -> None:
        self._own = _storages(model)
        self._held: dict[int, torch.UntypedStorage] = {}

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._held[storage._cdata] = storage
        return tensor

    def forget(self) -> int:
        total = sum(storage.nbytes() for storage in self._held.values())
        self._held.clear()
        return total


class _Peak(TorchDispatchMode):
    """The most bytes alive at any moment among the storages made inside.

    Args:
      model: Its weights do not count.
      labelled: How many tokens have a label, which tensors without values cannot tell.
    """

    def __init__(self, model: nn.Module, labelled: int) -> None:
        super().__init__()
        self.most = self._held = 0
        self._seen, self._labelled = _storages(model), labelled

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func is torch.ops.aten.nonzero.default:
            result: Any = torch.zeros(self._labelled, args[0].dim(), dtype=torch.long)
        else:
            result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self._held += size
            self.most = max(self.most, self._held)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._held -= size


@contextmanager
def _without_storage(model: nn.Module) -> Iterator[None]:
    """Tensors with the shapes and types of the model's own in their places, of the fake mode that is active."""
    made: dict[int, torch.Tensor] = {}
    saved: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    for module in model.modules():
        holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for holder in holders:
            for name, tensor in holder.items():
                if tensor is None:
                    continue
                saved.append((holder, name, tensor))
                if id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    trained = tensor.requires_grad
                    made[id(tensor)] = nn.Parameter(empty, trained) if isinstance(tensor, nn.Parameter) else empty
    for place, name, tensor in saved:
        place[name] = made[id(tensor)]
    try:
        yield
    finally:
        for place, name, tensor in saved:
            place[name] = tensor
