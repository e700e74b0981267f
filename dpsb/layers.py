"""The modules inside an adapted layer: A frozen, R trained, B frozen; and one fused pass through all of them.

``FrozenDown`` and ``CoreUp`` take the places of the two factors in a PEFT LoRA layer. PEFT's own forward pass then
computes the right thing, ``base(x) + B R A x``, with three tensors of the layer's width that nobody needs: the
product, the product times the scale 1, and the sum. ``FusedLinear`` is PEFT's layer with the same result, written so
that both sums, the one forward and the one in the gradient of x, are accumulated where they arise. Whatever it does
not know (quantized or sharded weights, autocast, several adapters, hooks) goes through PEFT's own forward pass.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CORE_DTYPE = torch.float32


class FrozenDown(nn.Module):
    """Takes the place of ``lora_A[name]``: x -> A x. Keeps no activation for the backward pass."""

    weight: torch.Tensor

    def __init__(self, A: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", A)
        self.bias = None
        self.out_features, self.in_features = A.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class CoreUp(nn.Module):
    """Takes the place of ``lora_B[name]``: h -> B R h. ``core`` (R, fp32) is the only parameter.

    ``weight`` is the product B R, which is what PEFT merges and what ``state_dict`` writes.
    """

    up: torch.Tensor

    def __init__(self, B: torch.Tensor, R: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("up", B)
        self.core = nn.Linear(B.shape[1], B.shape[1], bias=False, device=B.device, dtype=CORE_DTYPE)
        with torch.no_grad():
            self.core.weight.copy_(R)
        self.bias = None
        self.out_features, self.in_features = B.shape

    @property
    def weight(self) -> torch.Tensor:
        return (self.up.to(CORE_DTYPE) @ self.core.weight).to(self.up.dtype)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return F.linear(self.core(h.to(CORE_DTYPE)).to(self.up.dtype), self.up)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        destination = kwargs.get("destination", args[0] if args else None)
        destination = {} if destination is None else destination
        destination[prefix + "weight"] = self.weight.detach()
        return destination

    def _load_from_state_dict(  # type: ignore[no-untyped-def]
        self, state_dict, prefix, _local_metadata, _strict, missing_keys, _unexpected_keys, error_msgs
    ) -> None:
        """Reads a plain LoRA factor W' = B R back: R by least squares, refused where W' leaves the span of B."""
        saved = state_dict.pop(f"{prefix}weight", None)
        if saved is None:
            missing_keys.append(f"{prefix}weight")
            R = self.core.weight.detach()
        else:
            B, target = self.up.double(), saved.to(self.up.device).double()
            R = torch.linalg.lstsq(B, target).solution
            rounding = max(1e-4, 2 * torch.finfo(saved.dtype).eps)
            if not float((B @ R - target).norm()) <= rounding * float(target.norm()):
                error_msgs.append(f"{prefix}weight is not in the span of this adapter's B: attach its own basis first")
        state_dict[f"{prefix}core.weight"] = R.to(CORE_DTYPE)  # read next, by the child


class FusedLinear(LoraLinear):
    """PEFT's LoRA layer on an ``nn.Linear``, y = W0 x + b + B R A x, without the intermediate tensors.

    Only :func:`fuse` makes one, by changing the class of a layer in place. R is still applied by the module
    ``core``, so that Opacus' hooks see its input and the gradient of its output as before.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        name = self._fusable(x) if not args and not kwargs else None
        if name is None:
            return cast(torch.Tensor, super().forward(x, *args, **kwargs))
        down, up = cast(FrozenDown, self.lora_A[name]), cast(CoreUp, self.lora_B[name])
        if x.requires_grad:
            x, z = _Enter.apply(x, down.weight)
        else:
            z = F.linear(x, down.weight)
        h = up.core(z.to(CORE_DTYPE)).to(up.up.dtype)
        base = cast(nn.Linear, self.base_layer)
        return cast(torch.Tensor, _Leave.apply(x, h, base.weight, base.bias, up.up))

    def _fusable(self, x: torch.Tensor) -> str | None:
        """The name of the one active adapter, or None if PEFT's own forward pass must be taken."""
        names = self.active_adapters
        if len(names) != 1 or self.disable_adapters or self.merged or torch.is_autocast_enabled(x.device.type):
            return None
        name = names[0]
        if name not in self.lora_A:
            return None
        base, down, up = self.base_layer, self.lora_A[name], self.lora_B[name]
        if type(base) is not nn.Linear or type(down) is not FrozenDown or type(up) is not CoreUp:
            return None
        parameters = [base.weight] if base.bias is None else [base.weight, base.bias]
        if any(not is_plain(p) or p.requires_grad or p.dtype != x.dtype for p in parameters):
            return None
        if down.weight.dtype != x.dtype or any(_has_hooks(module) for module in (base, down, up)):
            return None
        return name


def is_plain(parameter: torch.Tensor) -> bool:
    """Whether a weight is an ordinary one: quantized and sharded ones are subclasses, fake ones stand for ordinary."""
    return type(parameter) in (nn.Parameter, FakeTensor)


def fuse(layer: LoraLayer) -> None:
    """Lets a layer that holds ``FrozenDown`` and ``CoreUp`` compute in one fused pass, where that is possible."""
    if type(layer) is LoraLinear:
        layer.__class__ = FusedLinear


def unfuse(layer: LoraLayer) -> None:
    """Makes a layer PEFT's own again."""
    if type(layer) is FusedLinear:
        layer.__class__ = LoraLinear


def _has_hooks(module: nn.Module) -> bool:
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(kinds)


class _Enter(torch.autograd.Function):
    """x -> (x, A x). Backward adds the gradient through A to the one through W0, in place.

    The first output must be used by :class:`_Leave` alone: then the gradient that arrives for it is a tensor that
    nobody else holds.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(A)
        return x.view_as(x), F.linear(x, A)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor, gz: torch.Tensor) -> tuple[torch.Tensor, None]:
        (A,) = ctx.saved_tensors
        g.view(-1, g.shape[-1]).addmm_(gz.reshape(-1, gz.shape[-1]), A)
        return g, None


class _Leave(torch.autograd.Function):
    """(x, h) -> W0 x + b + B h, summed in the output of the first product."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, B: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, B)
        y = F.linear(x, weight, bias)
        y.view(-1, y.shape[-1]).addmm_(h.reshape(-1, h.shape[-1]), B.T)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, None, None, None]:
        weight, B = ctx.saved_tensors
        g = g.contiguous()  # both products need it so
        return (g @ weight if ctx.needs_input_grad[0] else None), g @ B, None, None, None
