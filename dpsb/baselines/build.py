"""Puts a method on a base model: what it trains, and where that starts."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, get_peft_model
from torch import nn

from dpsb.adapter import Adapter, Basis, Factors, Provenance, lora_layers, trained_directly
from dpsb.baselines.methods import PEFT_INITS, PUBLIC_STARTS, REFUSED, Method, MethodError, plain_name
from dpsb.baselines.public_starts import LORA_GA, check_lora_ga
from dpsb.basis._common import base_weight, public_generator, truncated_svd
from dpsb.models import MeanPooledClassifier, ModelError, add_lora, in_head, peft_part, peft_task
from dpsb.quantized import check_quantization, keep_gradients_exact


def add_method(base: nn.Module, method: Method, task: str, rank: int, targets: str | Sequence[str]) -> nn.Module:
    """``base`` with the method's modules on it, every tensor that is not to be trained frozen.

    Whatever is drawn comes from a fixed public generator. The classification head, if there is one, is trained with
    every method. A method that starts from public rows still has LoRA's own start: see
    :func:`dpsb.baselines.public_starts.public_start`.

    Args:
      base: From :func:`dpsb.models.load_base`.
      method: From :func:`dpsb.baselines.methods.method_named`.
      task: ``"classification"`` or ``"causal-lm"``.
      rank: r, for the methods that have one.
      targets: As for :func:`dpsb.models.add_lora`.

    Raises:
      MethodError: If the model has nothing that the method could train exactly; the message names the module.
      ModelError: If the targets do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # public: where PEFT's factors start
        if method.kind == "model":
            model = _add_parts(base, method.name, task)
        elif method.peft in (None, "lora", *PUBLIC_STARTS):
            model = add_lora(base, task, rank, targets)
        elif method.peft in PEFT_INITS:
            model = add_lora(base, task, rank, targets, init=method.peft)
        else:
            model = _add_peft(base, method, task, rank, targets)
    if method.name == "ffa-lora":
        _freeze_random_A(model)
    if method.peft == LORA_GA:
        check_lora_ga(model)
    return model


def peft_config_class(method: Method) -> type[PeftConfig]:
    """The class of PEFT's that ``peft:NAME`` means.

    Raises:
      MethodError: If the installed PEFT has none; the message lists those that are not refused by name.
    """
    known = {plain_name(found.__name__): found for found in PEFT_TYPE_TO_CONFIG_MAPPING.values()}
    usable = {name: found for name, found in known.items() if name not in map(plain_name, REFUSED)}
    if method.peft not in usable:
        names = ", ".join(sorted(found.__name__ for found in usable.values()))
        raise MethodError(
            f"method={method.name!r}: PEFT has no such method; it has {names}, and as starts of LoRA "
            f"{', '.join(PEFT_INITS)}, and with a public file {':FILE, '.join(PUBLIC_STARTS)}:FILE."
        )
    return usable[method.peft]


def adapt(model: nn.Module, method: Method, provenance: Provenance | None = None) -> Adapter:
    """The adapter of a baseline: everything in ``model`` that requires a gradient, without cores.

    Args:
      model: From :func:`add_method`.
      method: Of the baseline.
      provenance: Where its start comes from; by default from no data.

    Guarantees:
      * Every trained tensor belongs to a module for which Opacus has an exact per-example rule; ``dpsb.probe`` holds
        the rows against one-by-one autograd before the first step.

    Raises:
      MethodError: If a trained tensor is of another kind; the message names it and says why.
      ValueError: If the model quantizes activations.
    """
    check_quantization(model)
    keep_gradients_exact(model)
    for name, module in model.named_modules():
        if type(module) in GradSampleHooks.GRAD_SAMPLERS:
            continue
        for part, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                raise MethodError(
                    f"method={method.name!r} is refused on this model: {name}.{part} {tuple(parameter.shape)} is a "
                    f"tensor of a {type(module).__name__}, for which Opacus has no exact per-example rule."
                )
    try:
        direct = trained_directly(model)
    except ValueError as error:
        raise MethodError(f"method={method.name!r} is refused on this model: {error}") from None
    if not direct:
        raise MethodError(f"method={method.name!r} finds nothing to train in this model.")
    return Adapter(model, "default", (), direct, provenance or Provenance(kind=method.name, access="data_free"))


def lora_xs(model: nn.Module, adapter_name: str = "default") -> Basis:
    r"""LoRA-XS as published: :math:`W_0 \approx U S V^\top`, B = U, A = S V^T; R starts at 0.

    A is not orthonormal: R's gradient is stretched along the large singular directions, and clipping and noise act in
    that skewed space. ``sb`` with the basis ``weight`` is the same without the singular values.

    References:
      Balazy et al. (2024), arXiv:2405.17604.
    """
    factors, generator = {}, public_generator()
    for name, layer in lora_layers(model, adapter_name).items():
        U, S, Vh = truncated_svd(base_weight(layer), layer.r[adapter_name], generator)
        factors[name] = Factors(A=S[:, None] * Vh, B=U)
    return Basis(factors=factors, provenance=Provenance(kind="lora_xs", access="data_free"))


def frozen_factors(adapter: Adapter) -> dict[str, torch.Tensor]:
    """What a baseline's adapter holds besides theta, such as FFA-LoRA's A, by name. Public."""
    model: Any = peft_part(adapter.model)
    prefix = getattr(getattr(model, "base_model", None), "prefix", None)
    if prefix is None or adapter.cores:
        return {}
    trained = {id(parameter) for parameter in adapter.parameters()}
    tensors = ((name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in trained)
    return {name: parameter.detach() for name, parameter in tensors if prefix in name}


def _freeze_random_A(model: nn.Module) -> None:
    generator = public_generator()
    for layer in lora_layers(peft_part(model)).values():
        A = layer.lora_A["default"].weight
        frame = torch.linalg.qr(torch.randn(A.shape[1], A.shape[0], generator=generator)).Q.T
        with torch.no_grad():
            A.copy_(frame)
        A.requires_grad_(False)


def _add_parts(base: nn.Module, name: str, task: str) -> nn.Module:
    base.requires_grad_(False)
    chosen = list(_parts(base, name))
    if not chosen:
        what = "classification head" if name == "head-only" else "bias that Opacus captures" * (name == "bitfit")
        raise MethodError(f"method={name!r} finds no {what or 'layer'} to train in a {type(base).__name__} ({task}).")
    for parameter in chosen:
        parameter.requires_grad_(True)
    return base


def _parts(base: nn.Module, name: str) -> Iterator[nn.Parameter]:
    for path, module in base.named_modules():
        if type(module) not in GradSampleHooks.GRAD_SAMPLERS or isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            continue
        if isinstance(base, MeanPooledClassifier) and "pooler" in path.split(
            "."
        ):  # not used when the tokens are averaged
            continue
        for part, parameter in module.named_parameters(recurse=False):
            if in_head(path) or name == "full" or (name == "bitfit" and part == "bias"):
                yield parameter


def _add_peft(base: nn.Module, method: Method, task: str, rank: int, targets: str | Sequence[str]) -> nn.Module:
    config = _peft_config(method, base, task, rank, targets)
    inner = base.encoder if isinstance(base, MeanPooledClassifier) else base
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            adapted = get_peft_model(inner, config)
    except (ValueError, TypeError) as error:
        raise ModelError(f"method={method.name!r} does not fit this model: {error}") from None
    if not isinstance(base, MeanPooledClassifier):
        return adapted
    base.encoder = adapted
    return base


def _peft_config(method: Method, base: nn.Module, task: str, rank: int, targets: str | Sequence[str]) -> PeftConfig:
    found = peft_config_class(method)
    wanted = {
        "task_type": peft_task(base, task),
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "exclude_modules": ".*pooler.*" if isinstance(base, MeanPooledClassifier) else None,
        "r": rank,
        "rank": rank,
    }
    accepted = inspect.signature(found).parameters
    return found(**{key: value for key, value in wanted.items() if key in accepted})
