"""The adapter: an ordinary PEFT LoRA adapter in which only the small square core R is trained.

For every target weight W0 (out, in), :func:`attach` replaces the two factors of a PEFT LoRA layer so that

    y = W0 x + s * B R A x,   A (r, in) and B (out, r) frozen with orthonormal rows / columns, R (r, r) trained, s = 1.

A and B are *buffers*, because PEFT switches gradients on for every adapter *parameter* when adapters are switched.
R is an ``nn.Linear``, because Opacus has an exact and cheap per-example rule for it. ``state_dict`` writes the product
B R as the one LoRA factor, so everything PEFT saves is a plain LoRA adapter that loads without dpsb.

References:
  Ponkshe et al. (2024), arXiv:2411.19557 (LoRA-SB); Balazy et al. (2024), arXiv:2405.17604 (LoRA-XS).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from opacus.grad_sample import GradSampleHooks
from peft.tuners.lora.layer import Conv2d as _LoraConv2d
from peft.tuners.lora.layer import Embedding as _LoraEmbedding
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from dpsb.layers import CORE_DTYPE, CoreUp, FrozenDown, fuse, unfuse
from dpsb.quantized import check_quantization, keep_gradients_exact

_SCALED_BASES = ("lora_xs",)  # kinds whose A is not orthonormal: rows, clipping and noise then live in a skewed space
_INITS_THAT_KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")


class Factors(NamedTuple):
    """The frozen factors of one target weight: ``A`` (r, in) and ``B`` (out, r), and where R starts."""

    A: torch.Tensor
    B: torch.Tensor
    R0: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a basis came from; it goes into the plan, the ledger and the report.

    Args:
      kind: Name of the method, e.g. ``"weight_svd"``.
      access: ``"data_free"``, ``"public"``, ``"released"`` (a private release that the ledger charged) or
        ``"non_private"`` (raw private gradients: every epsilon of such a run is infinite).
      detail: Further public facts, e.g. the file name of the public data.
    """

    kind: str
    access: str
    detail: Mapping[str, str | int | float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "access": self.access, **self.detail}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Provenance:
        detail = {name: value for name, value in content.items() if name not in ("kind", "access")}
        return cls(kind=content["kind"], access=content["access"], detail=detail)


@dataclass(frozen=True, kw_only=True)
class Basis:
    """Factors for every target weight, and where they came from."""

    factors: Mapping[str, Factors]
    provenance: Provenance


class Core(NamedTuple):
    """One trained R: the name of its target weight and the module that holds it."""

    name: str
    layer: LoraLayer
    up: CoreUp


@dataclass(frozen=True)
class Adapter:
    """What is trained in a model: the cores, and modules that are trained as they are (a head, a baseline's factors).

    Parameters are looked up in the modules at every call, never kept: PEFT may replace a parameter behind one's back,
    and an optimizer that goes on moving the old one trains nothing.
    """

    model: nn.Module
    adapter_name: str
    cores: tuple[Core, ...]
    direct: tuple[tuple[str, nn.Module], ...]
    provenance: Provenance

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and live parameter of every R and every directly trained tensor, always in the same order."""
        for core in self.cores:
            yield f"{core.name}.R", cast(nn.Parameter, core.up.core.weight)
        for name, module in self.direct:
            for part, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    yield f"{name}.{part}", parameter

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def check_nothing_else_is_trained(self) -> None:
        """Raises ValueError if a tensor of the model requires a gradient and is no part of theta."""
        for name, parameter in _left_over(self.model, self.parameters()):
            raise ValueError(f"{name} {tuple(parameter.shape)} requires a gradient but is no part of the adapter.")

    def trained_modules(self) -> list[nn.Module]:
        """The modules whose parameters make up theta: each core's ``nn.Linear``, then the direct ones."""
        return [core.up.core for core in self.cores] + [module for _, module in self.direct]

    @property
    def dimension(self) -> int:
        """d, the length of theta: the sum of r*r over the cores plus the size of what is trained directly."""
        return sum(parameter.numel() for parameter in self.parameters())

    def state(self) -> dict[str, torch.Tensor]:
        """A copy of theta by name, in the precision it is trained in. Released once training has begun."""
        return {name: parameter.detach().clone().contiguous() for name, parameter in self.named_parameters()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Puts theta back.

        Raises:
          ValueError: If names or shapes are not those of this adapter; nothing is changed then.
        """
        live = dict(self.named_parameters())
        if set(live) != set(state):
            odd = sorted(set(live) ^ set(state))
            raise ValueError(f"Expected the state of this adapter; {len(odd)} names differ, the first is {odd[0]!r}.")
        for name, parameter in live.items():
            if parameter.shape != state[name].shape:
                raise ValueError(f"Expected {name} of shape {tuple(parameter.shape)}, got {tuple(state[name].shape)}.")
        with torch.no_grad():
            for name, parameter in live.items():
                parameter.copy_(state[name])

    def factors(self) -> dict[str, Factors]:
        """A, B and the present R of every target weight."""
        return {
            core.name: Factors(
                core.layer.lora_A[self.adapter_name].weight, core.up.up, core.up.core.weight.detach().clone()
            )
            for core in self.cores
        }


def set_gradient(adapter: Adapter, gradient: torch.Tensor) -> None:
    """Unpacks a released vector, shape ``(d,)``, into ``.grad`` of the live parameters."""
    parameters = adapter.parameters()
    if gradient.shape != (sum(p.numel() for p in parameters),):
        raise ValueError(f"Expected gradient of shape ({adapter.dimension},), got {tuple(gradient.shape)}.")
    for parameter, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)


def lora_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, LoraLayer]:
    """The LoRA layers of ``model`` that carry ``adapter_name``, by module name.

    Raises:
      ValueError: If there are none, or one of them is not plain linear LoRA with scale 1 and dropout 0; the message
        says which setting of ``LoraConfig`` to change.
    """
    init = getattr(getattr(model, "peft_config", {}).get(adapter_name), "init_lora_weights", True)
    if init not in _INITS_THAT_KEEP_THE_BASE:
        raise ValueError(f"init_lora_weights={init!r} changes the base weights; leave it at its default.")
    found: dict[str, LoraLayer] = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if isinstance(module, _LoraEmbedding) and adapter_name in module.lora_embedding_A:
            raise ValueError(f"{name} is an embedding; leave embeddings out of LoraConfig.target_modules.")
        if adapter_name in module.lora_A:
            _check_plain(name, module, adapter_name)
            found[name] = module
    if not found:
        raise ValueError(f"The model has no LoRA layer named {adapter_name!r}; call peft.get_peft_model first.")
    return found


def _check_plain(name: str, layer: LoraLayer, adapter_name: str) -> None:
    down, up = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    if isinstance(layer, _LoraConv2d) or down.weight.dim() != 2:
        raise ValueError(f"{name} is a convolution; only linear layers can be targets.")
    if getattr(layer, "lora_variant", {}).get(adapter_name) is not None or layer.use_dora.get(adapter_name):
        raise ValueError(f"{name} uses a LoRA variant (DoRA or the like); set use_dora=False and the plain init.")
    if getattr(up, "bias", None) is not None:
        raise ValueError(f"{name} has a LoRA bias; set lora_bias=False.")
    if layer.scaling[adapter_name] != 1.0:
        scale = layer.scaling[adapter_name]
        raise ValueError(f"{name} has scale {scale}; set lora_alpha equal to r and use_rslora=False (scale 1).")
    if getattr(layer.lora_dropout[adapter_name], "p", 0.0):
        raise ValueError(f"{name} has adapter dropout; set lora_dropout=0.")
    if not (isinstance(down, (nn.Linear, FrozenDown)) and isinstance(up, (nn.Linear, CoreUp))):
        raise ValueError(f"{name} is a {type(layer).__name__} with unknown factors; only plain linear LoRA is handled.")


def trained_directly(model: nn.Module, allow: Collection[str] | None = None) -> tuple[tuple[str, nn.Module], ...]:
    """The modules that own a trainable parameter themselves; only those under a name in ``allow``, if it is given.

    Raises:
      ValueError: If one of them is of a kind for which Opacus has no per-example rule, or two of them share a tensor.
    """
    found: list[tuple[str, nn.Module]] = []
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        owned = [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]
        if not owned or (allow is not None and not set(name.split(".")) & set(allow)):
            continue
        if type(module) not in GradSampleHooks.GRAD_SAMPLERS:
            raise ValueError(f"{name} is a {type(module).__name__}, which has no per-example gradient rule; freeze it.")
        for parameter in owned:
            if owners.setdefault(id(parameter), name) != name:
                raise ValueError(f"{name} shares a tensor with {owners[id(parameter)]}; freeze it.")
        found.append((name, module))
    return tuple(found)


def _left_over(model: nn.Module, accounted: Collection[nn.Parameter]) -> Iterator[tuple[str, nn.Parameter]]:
    known = {id(parameter) for parameter in accounted}
    if all(id(p) in known for p in _trainable(model)):  # before every step: much faster than with names
        return iter(())
    return ((n, p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in known)


def _trainable(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every parameter that requires a gradient, perhaps several times."""
    waiting, seen = [model], {model}
    while waiting:
        module = waiting.pop()
        yield from (p for p in module._parameters.values() if p is not None and p.requires_grad)
        further = [child for child in module._modules.values() if child is not None and child not in seen]
        seen.update(further)
        waiting += further


def attach(
    model: nn.Module,
    basis: Basis,
    *,
    allow: Collection[str] = (),
    adapter_name: str = "default",
) -> Adapter:
    """Turns a PEFT LoRA adapter into one whose only trained tensors are the cores R.

    Guarantees:
      * Afterwards the tensors of ``model`` that require a gradient are exactly the cores and the parameters inside
        modules named in ``allow``; anything else is an error, and the model is left as it was.
      * With R = 0 (no ``R0`` in ``factors``) the model computes what the base model computes.

    Args:
      model: A model returned by ``peft.get_peft_model`` with a plain ``LoraConfig`` (``lora_alpha`` equal to ``r``,
        ``lora_dropout=0``).
      basis: A, B and perhaps R0 for every target weight, as the functions in ``dpsb.basis`` return them. Its
        provenance stays with the adapter, and ``fit`` wants it to be the one that the plan states.
      allow: Names of modules that may be trained besides the cores, e.g. ``("classifier",)``. Their gradients are
        clipped and noised together with the cores'.
      adapter_name: PEFT's name of the adapter.

    Raises:
      ValueError: If a target is not plain linear LoRA, if the factors do not fit, if a trainable tensor is left over
        that is neither a core nor allowed, or if the model quantizes activations (:mod:`dpsb.quantized`).
    """
    check_quantization(model)
    layers, factors = lora_layers(model, adapter_name), basis.factors
    missing = sorted(set(layers) - set(factors))
    if missing:
        raise ValueError(f"The basis has no factors for {missing[0]} ({len(missing)} of {len(layers)} are missing).")
    for name, layer in layers.items():
        _check_shapes(name, factors[name], layer, adapter_name)
        if basis.provenance.kind not in _SCALED_BASES:
            _check_orthonormal(name, factors[name])
    heads = trained_directly(model, allow)
    accounted = [p for layer in layers.values() for p in _lora_parameters(layer, adapter_name)]
    accounted += [p for _, module in heads for p in module.parameters(recurse=False)]
    for name, parameter in _left_over(model, accounted):
        raise ValueError(
            f"{name} {tuple(parameter.shape)} would be trained besides the cores. Freeze it, or name its module in "
            f"allow={tuple(allow)!r} so that it is clipped and noised too (look at LoraConfig.bias, modules_to_save "
            "and trainable_token_indices)."
        )
    cores = [put_core(name, layer, factors[name], adapter_name) for name, layer in layers.items()]
    keep_gradients_exact(model)
    return Adapter(model, adapter_name, tuple(cores), heads, basis.provenance)


def put_core(name: str, layer: LoraLayer, factors: Factors, adapter_name: str = "default") -> Core:
    """Puts A, B and R in the places of a layer's LoRA factors, as :func:`attach` does once it has checked them."""
    A, B, R0 = factors
    old = layer.lora_A[adapter_name].weight
    weight = layer.get_base_layer().weight
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.get_default_dtype()
    R = torch.zeros(A.shape[0], A.shape[0]) if R0 is None else R0
    up = CoreUp(B.to(old.device, dtype).contiguous(), R.to(old.device, CORE_DTYPE))
    layer.lora_A[adapter_name] = FrozenDown(A.to(old.device, dtype).contiguous())
    layer.lora_B[adapter_name] = up
    fuse(layer)
    return Core(name, layer, up)


def _lora_parameters(layer: LoraLayer, adapter_name: str) -> list[nn.Parameter]:
    return [*layer.lora_A[adapter_name].parameters(), *layer.lora_B[adapter_name].parameters()]


def _check_shapes(name: str, factors: Factors, layer: LoraLayer, adapter_name: str) -> None:
    A, B, R0 = factors
    down, up = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    if A.shape != down.shape or B.shape != up.shape:
        raise ValueError(
            f"Expected factors of {name} with A {tuple(down.shape)} and B {tuple(up.shape)}, "
            f"got A {tuple(A.shape)} and B {tuple(B.shape)}."
        )
    rank = A.shape[0]
    if R0 is not None and R0.shape != (rank, rank):
        raise ValueError(f"Expected R0 of {name} with shape {(rank, rank)}, got {tuple(R0.shape)}.")


def _check_orthonormal(name: str, factors: Factors) -> None:
    A, B, _ = factors
    identity = torch.eye(A.shape[0], dtype=torch.float64)
    for label, gram in (
        ("rows of A", A.double() @ A.double().T),
        ("columns of B", B.double().T @ B.double()),
    ):
        error = float((gram.cpu() - identity).abs().max())
        if not error < 0.05:
            raise ValueError(f"Expected orthonormal {label} for {name}; they are off by {error:.2g}.")


def detach(adapter: Adapter) -> None:
    """Puts plain ``nn.Linear`` factors (A and B R) back, so that PEFT sees an ordinary LoRA adapter again."""
    for core in adapter.cores:
        for slot, weight in (
            (core.layer.lora_A, core.layer.lora_A[adapter.adapter_name].weight),
            (core.layer.lora_B, core.up.weight),
        ):
            slot[adapter.adapter_name] = plain_factor(weight)
        unfuse(core.layer)


def plain_factor(weight: torch.Tensor) -> nn.Linear:
    """A factor as PEFT has it: a frozen ``nn.Linear`` without bias, with a copy of ``weight``."""
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        plain.weight.copy_(weight)
    return plain.requires_grad_(False)


def merge(adapter: Adapter) -> nn.Module:
    """The base model with s B R A added to its weights and all adapter modules gone (PEFT's ``merge_and_unload``)."""
    detach(adapter)
    peft_model: Any = adapter.model
    merged: nn.Module = peft_model.merge_and_unload()
    return merged
