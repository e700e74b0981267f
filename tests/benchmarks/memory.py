"""Memory that the forward pass keeps for the backward pass, R-only against its floor and against LoRA.

floor      the base model with everything frozen and the gradient flowing through (the embeddings' output requires it):
           what any adapter on these layers has to keep.
r_only     dpsb's adapter inside ``per_example_gradients``; what Opacus' hooks keep is counted.
peft_lora  PEFT LoRA of the same rank and targets, as PEFT makes it; ``peft_lora_same_dtype`` without its cast of the
           adapter to fp32.

Counted are the unique storages that autograd saved or Opacus holds at the end of the forward pass, parameters and
buffers excluded. ``r_only_widest_extra`` is the largest last dimension among tensors that R-only holds for its cores:
the rank, never the width of the model. With a GPU the peak of one forward and backward pass is printed as well; the
process's peak resident memory is printed without.
"""

from __future__ import annotations

import resource
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import common
import torch
from common import Workload
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from dpsb.capture import per_example_gradients
from dpsb.data import Collator
from dpsb.models import HEAD_NAMES

MIB = 2**20
TARGET = 1.05
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Block = Callable[[], AbstractContextManager[Any]]


def kept_bytes(model: nn.Module, forward: Callable[[], torch.Tensor], block: Block) -> int:
    """Bytes of the unique storages held at the end of the forward pass for the backward pass."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage  # the reference keeps the address from being used again
        return tensor

    with block():
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = forward()
        for module in model.modules():
            for tensor in own_activations(module):
                keep(tensor)
        total = sum(storage.nbytes() for storage in held.values())
        loss.backward()
    model.zero_grad()
    return total


def own_activations(module: nn.Module) -> list[torch.Tensor]:
    """The tensors that Opacus' forward hooks have stored on this one module."""
    return [tensor for stored in getattr(module, "activations", []) for tensor in stored]


def widest_extra(model: nn.Module, forward: Callable[[], torch.Tensor], block: Block) -> int:
    """The largest last dimension among what Opacus keeps for the cores (heads aside)."""
    with block():
        loss = forward()
        cores = (m for n, m in model.named_modules() if not any(part in HEAD_NAMES for part in n.split(".")))
        widest = max(tensor.shape[-1] for module in cores for tensor in own_activations(module))
        loss.backward()
    model.zero_grad()
    return widest


def forward_of(workload: Workload, model: nn.Module) -> Callable[[], torch.Tensor]:
    """One forward pass on a fixed batch, ending in the sum of the per-example losses."""
    device = next(model.parameters()).device
    batch = Collator(0, device)(workload.examples(workload.batch_size), workload.tokens)
    return lambda: workload.loss_fn(model, batch).sum()


def floor_model(workload: Workload, dtype: torch.dtype) -> nn.Module:
    """The base model, frozen, with the gradient flowing from its embeddings on."""
    model = common.without_dropout(workload.base(dtype)).train().requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())
    return model


def plain_lora(workload: Workload, dtype: torch.dtype) -> nn.Module:
    """PEFT LoRA with the adapter in the type of the base model."""
    task = "SEQ_CLS" if workload.task == "classification" else "CAUSAL_LM"
    config = LoraConfig(r=common.RANK, lora_alpha=common.RANK, target_modules="all-linear", task_type=task)
    base = common.without_dropout(workload.base(dtype))
    return get_peft_model(base, config, autocast_adapter_dtype=False).train()


def cuda_peak(model: nn.Module, forward: Callable[[], torch.Tensor], block: Block) -> float | None:
    """Peak MiB of one forward and backward pass on the GPU beyond what was there before; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with block():
        forward().backward()
    model.zero_grad()
    return round((torch.cuda.max_memory_allocated() - before) / MIB, 2)


def measure(workload: Workload, dtype_name: str) -> dict[str, Any]:
    """Kept memory of every arm in MiB, and the ratio to the floor."""
    dtype = DTYPES[dtype_name]
    adapter = workload.adapter(dtype)
    models = {
        "floor": floor_model(workload, dtype),
        "r_only": adapter.model,
        "peft_lora": workload.lora(dtype).train(),
        "peft_lora_same_dtype": plain_lora(workload, dtype),
    }
    blocks: dict[str, Block] = dict.fromkeys(models, nullcontext)
    blocks["r_only"] = lambda: per_example_gradients(adapter, workload.batch_size)
    kept, peaks = {}, {}
    for name, model in models.items():
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        forward = forward_of(workload, model)
        kept[name] = kept_bytes(model, forward, blocks[name])
        peaks[name] = cuda_peak(model, forward, blocks[name])
    return {
        "model": workload.name,
        "dtype": dtype_name,
        "r_only_over_floor": round(kept["r_only"] / kept["floor"], 4),
        "target": TARGET,
        "peft_lora_over_floor": round(kept["peft_lora"] / kept["floor"], 4),
        "kept_mib": {name: round(value / MIB, 3) for name, value in kept.items()},
        "r_only_widest_extra": widest_extra(adapter.model, forward_of(workload, adapter.model), blocks["r_only"]),
        "cuda_peak_mib": peaks if torch.cuda.is_available() else None,
        "process_peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "batch": [workload.batch_size, workload.tokens],
        "rank": common.RANK,
        "versions": common.machine()["versions"],
    }


def main() -> None:
    parser = common.arguments(__doc__)
    parser.formatter_class = RawDescriptionHelpFormatter
    options = parser.parse_args()
    common.quiet()
    for workload in (common.SMALL_LLAMA, common.MINILM):
        for dtype in DTYPES:
            common.show(measure(workload, dtype), options.json)


if __name__ == "__main__":
    main()
