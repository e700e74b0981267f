"""What tensors are: a number each that any order of summing gives, or one SHA-256; the same on every machine."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from dpsb.adapter import Adapter

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(adapter: Adapter) -> dict[str, int]:
    """The sum over the bits of every tensor of the model that is not theta, by name."""
    trained = {id(parameter) for parameter in adapter.parameters()}
    tensors = [*adapter.model.named_parameters(), *adapter.model.named_buffers()]
    return {name: bits_of(tensor) for name, tensor in tensors if id(tensor) not in trained}


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, shapes, types and bytes, in order of the names. As sensitive as the tensors."""
    digest = sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        head = f"{len(name)}:{name}|{tensor.dtype}|{'x'.join(map(str, tensor.shape))}|"
        digest.update(head.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def bits_of(tensor: torch.Tensor) -> int:
    """The sum over a tensor's bits, as whole numbers."""
    if hasattr(tensor, "__tensor_flatten__") and type(tensor) not in (torch.Tensor, nn.Parameter):
        return sum(bits_of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])  # quantized weights
    whole = tensor.detach().contiguous().view(-1)
    if whole.is_complex():
        whole = torch.view_as_real(whole).reshape(-1)
    kind = _INTEGERS.get(whole.element_size())
    return int((whole if kind is None or whole.dtype == torch.bool else whole.view(kind)).sum(dtype=torch.int64))
