"""Per-example gradients of the target weights themselves: joint norms and clipped sums, never one gradient each.

The gradient of example i in a weight is :math:`G_i = \\sum_t g_{it} x_{it}^\\top` over its tokens, x what the layer
received and g the gradient of what it returned. Norms come from x and g alone (the Gram trick). One backward pass
keeps both, in the place of the activations that it frees, until the norms of all layers are known; then the sums are
made from them, every example weighed. Under activation checkpointing, where keeping them would cost what checkpointing
saves, a second backward pass makes them again. No tensor of shape (n, out, in) is ever made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from dpsb.basis.exact_products import exact_products
from dpsb.capture import CaptureError, checkpointed_modules
from dpsb.losses import LossFn, check_losses
from dpsb.mechanism import Mechanism

_CHUNK_NUMBERS = 1 << 22
_BLOCK_NUMBERS = 1 << 20
_INNER = 128
"""How many products are added up in fp32; sums of such sums are in float64."""
_UNIT = 2.0**-24
"""Of fp32: a sum of k products is off by at most k times it, of the sum of their absolute values (Higham 2002, 3.1)."""

Batch = Mapping[str, torch.Tensor]


class Sketch(NamedTuple):
    """What is looked at of a gradient G: ``left.T @ G @ right``; a side that is None is kept whole.

    Args:
      left: Shape ``(out, k)`` or None. Public or released.
      right: Shape ``(in, k)`` or None. Public or released.
    """

    left: torch.Tensor | None = None
    right: torch.Tensor | None = None

    def of(self, matrix: torch.Tensor) -> torch.Tensor:
        """The sketch of a matrix of shape ``(out, in)``."""
        matrix = matrix if self.left is None else self.left.T @ matrix
        return matrix if self.right is None else matrix @ self.right

    @property
    def is_small(self) -> bool:
        """Whether both sides are cut, so that the tokens of a whole model can be kept."""
        return self.left is not None and self.right is not None


WHOLE = Sketch()


def zeros_for(
    layers: Mapping[str, LoraLayer], sketches: Mapping[str, Sketch], device: torch.device
) -> dict[str, torch.Tensor]:
    """Where the sums of the sketches of every layer begin, float64."""
    totals = {}
    for name, layer in layers.items():
        left, right = sketches[name]
        shape = (layer.out_features if left is None else left.shape[1], layer.in_features)
        shape = shape if right is None else (shape[0], right.shape[1])
        totals[name] = torch.zeros(shape, dtype=torch.float64, device=device)
    return totals


class PartlyAdded(Exception):
    """A sum holds part of a microbatch and cannot be released."""


def squared_norms(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    r"""The squared Frobenius norm of :math:`\sum_t g_t x_t^\top` for each example.

    By :math:`\sum_{t,t'} (x_t\cdot x_{t'})(g_t\cdot g_{t'})` where the tokens are few, otherwise from the products
    themselves, a few examples at a time.

    Guarantees:
      * Never less than the exact value, also where terms cancel: either form is raised by a bound on its own fp32
        rounding, a multiple of :math:`(\sum_t \|x_t\|\|g_t\|)^2` of at most 2^-15 in the Gram form, and of
        :math:`\sum_t \|x_t\|\|g_t\|` of at most t 2^-24 on the norm otherwise.

    Args:
      x: Shape ``(n, t, a)``, fp32. Sensitive.
      g: Shape ``(n, t, b)``, fp32. Sensitive.

    Returns:
      Shape ``(n,)``, float64. Sensitive.

    References:
      Goodfellow (2015), arXiv:1510.01799; Li et al. (2022), arXiv:2110.05679, Section 4 (ghost clipping).
    """
    (_, tokens, a), b = x.shape, g.shape[2]
    largest = (x.norm(dim=2) * g.norm(dim=2)).sum(dim=1, dtype=torch.float64)
    if tokens * (a + b) <= a * b:
        terms = _products_of_tokens(x).mul_(_products_of_tokens(g))
        added = min(a, _INNER) + min(b, _INNER)
        return terms.sum(dim=(1, 2)).clamp(min=0.0) + 2 * added * _UNIT * largest.square()
    size = max(1, _CHUNK_NUMBERS // (a * b))
    chunks = zip(x.split(size), g.split(size), strict=True)
    squares = torch.cat([(gs.mT @ xs).square_().sum(dim=(1, 2), dtype=torch.float64) for xs, gs in chunks])
    return (squares.sqrt() + tokens * _UNIT * largest).square()


def _products_of_tokens(x: torch.Tensor) -> torch.Tensor:
    """The inner products of each example's tokens, shape ``(n, t, t)``, float64, of values of shape ``(n, t, a)``."""
    first, *rest = x.split(_INNER, dim=2)
    products = (first @ first.mT).double()
    for part in rest:
        products += part @ part.mT
    return products


class _Begin(torch.autograd.Function):
    """Lets gradients be asked for from here on. A leaf would hold its values, and a copy of its gradient besides."""

    @staticmethod
    def forward(_context: Any, output: torch.Tensor, _start: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(_context: Any, *_g: Any) -> Any:
        return None, None


class _Watch:
    """Hands the (x, g) of each target layer to ``on_pair`` while a backward pass runs.

    A layer that is used several times gives one pair, its uses side by side, because their gradients add up. Activation
    checkpointing runs forward hooks again inside the backward pass: such a call counts only where the first one ran
    without gradients and so kept nothing (reentrant checkpointing).

    Args:
      num_examples: n.
      backwards: How many backward passes will run; after the last one no x is held any longer.
    """

    def __init__(self, num_examples: int, backwards: int) -> None:
        self.num_examples, self._backwards = num_examples, backwards
        self.on_pair: Callable[[str, torch.Tensor, torch.Tensor], None] = lambda _name, _x, _g: None
        self._uses: dict[str, int] = {}
        self._kept_nothing: set[str] = set()
        self._waiting: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def hook(self, name: str) -> Callable[[nn.Module, Any, torch.Tensor], torch.Tensor | None]:
        def forward_hook(
            _module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
        ) -> torch.Tensor | None:
            in_backward = torch._C._current_graph_task_id() != -1
            if not in_backward:
                self._uses[name] = self._uses.get(name, 0) + 1
                if not torch.is_grad_enabled():
                    self._kept_nothing.add(name)
                    return None
            elif name not in self._kept_nothing:
                return None
            x = inputs[0].detach()
            version = _version(x)
            if x.dim() < 2 or x.shape[0] != self.num_examples:
                raise CaptureError(
                    f"{name} received its input for another number of examples: they are not in dimension 0 (as in "
                    "mixture-of-experts layers). Do not target it."
                )
            if not output.requires_grad:  # the first layer: nothing before it is trained
                output = _Begin.apply(output, torch.zeros((), requires_grad=True, device=output.device))
            held = [x] * self._backwards  # the graph holds its hooks, and so whatever they hold, until the last one
            output.register_hook(lambda g: self._arrived(name, held.pop(), g.detach(), version))
            return output

        return forward_hook

    def _arrived(self, name: str, x: torch.Tensor, g: torch.Tensor, version: int) -> None:
        if _version(x) != version:  # autograd does not mind: a frozen weight needs no x
            raise CaptureError(f"The input of {name} was changed in place afterwards, so its gradient is lost.")
        waiting = self._waiting.setdefault(name, [])
        waiting.append((x, g))
        if len(waiting) == self._uses[name]:
            self._hand_over(name)

    def _hand_over(self, name: str) -> None:
        pairs = [(_by_token(x), _by_token(g)) for x, g in self._waiting.pop(name)]
        x, g = (torch.cat(side, dim=1) if len(side) > 1 else side[0] for side in zip(*pairs, strict=True))
        self.on_pair(name, x, g)

    def finish(self) -> None:
        """After a backward pass: layers of which some use had no influence on the loss."""
        for name in list(self._waiting):
            self._hand_over(name)


def _by_token(values: torch.Tensor) -> torch.Tensor:
    """Shape (n, tokens, width); further dimensions count as tokens."""
    return values.reshape(values.shape[0], -1, values.shape[-1])


def _version(values: torch.Tensor) -> int:
    """How often a tensor was changed in place."""
    return 0 if values.is_inference() else values._version


@contextmanager
def watching(modules: Mapping[str, nn.Module], num_examples: int, backwards: int = 1) -> Iterator[_Watch]:
    """Watches what these linear modules receive and the gradients of what they return; no hook stays behind."""
    watch = _Watch(num_examples, backwards)
    handles = [module.register_forward_hook(watch.hook(name)) for name, module in modules.items()]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched(
    layers: Mapping[str, LoraLayer], model: nn.Module, num_examples: int, backwards: int = 1
) -> Iterator[_Watch]:
    """Watches the base layers under ``layers`` with every adapter off and nothing trainable; undone afterwards.

    Products of fp32 matrices are exact meanwhile, to fp32 rounding: see :func:`exact_products`.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    disabled = {name: layer.disable_adapters for name, layer in layers.items()}
    weights = {name: layer.get_base_layer() for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer._disable_adapters = True
        for parameter in trainable:
            parameter.requires_grad_(False)
        with watching(weights, num_examples, backwards) as watch, exact_products():
            yield watch
    finally:
        for name, layer in layers.items():
            layer._disable_adapters = disabled[name]
        for parameter in trainable:
            parameter.requires_grad_(True)


def example_norms(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Batch,
    layers: Mapping[str, LoraLayer],
    sketches: list[Mapping[str, Sketch]],
) -> torch.Tensor:
    """Joint norms over all layers of each example's gradient, one column per collection of sketches.

    Returns:
      Shape ``(n, len(sketches))``, float64. Sensitive.
    """
    size = len(next(iter(batch.values())))
    squared = torch.zeros(size, len(sketches), dtype=torch.float64, device=next(model.parameters()).device)

    def on_pair(name: str, x: torch.Tensor, g: torch.Tensor) -> None:
        for column, sketch in enumerate(sketches):
            squared[:, column] += squared_norms(*(side.float() for side in _cut(x, g, sketch[name])))

    with watched(layers, model, size) as watch:
        watch.on_pair = on_pair
        check_losses(loss_fn(model, batch), size).sum().backward()
        watch.finish()
    return squared.sqrt()


def preferences(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Batch,
    layers: Mapping[str, LoraLayer],
    candidates: Sequence[Mapping[str, Sketch]],
) -> torch.Tensor:
    r"""Which of m bases holds most of each example's gradient: :math:`\|P_j g_i\|^2 / \|g_i\|^2` less its mean over j.

    Returns:
      Shape ``(n, m)``, float64, on the processor; zeros for a gradient of zero. Sensitive.
    """
    norms = example_norms(model, loss_fn, batch, layers, [dict.fromkeys(layers, WHOLE), *candidates]).cpu()
    energy = torch.where(norms[:, :1] > 0, (norms[:, 1:] / norms[:, :1]).square(), 0.0)
    return energy - energy.mean(dim=1, keepdim=True)


def add_clipped_sum(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Batch,
    layers: Mapping[str, LoraLayer],
    sketches: Mapping[str, Sketch],
    mechanism: Mechanism,
    totals: Mapping[str, torch.Tensor],
) -> None:
    r"""Adds :math:`\sum_i c_i\,L^\top G_i R` of one microbatch to ``totals``, each example clipped jointly over layers.

    :math:`c_i` brings the norm over *all* layers together to at most C, by the rule of ``mechanism``.

    Guarantees:
      * One example changes all totals together by at most C in L2 norm, up to rounding; one with a NaN or an infinity
        anywhere contributes exactly zero.
      * ``.grad`` of no parameter is touched; hooks are gone afterwards, also after an exception.

    Args:
      model: With PEFT LoRA layers, whose adapters are switched off meanwhile.
      loss_fn: Per-example loss.
      batch: Examples. Sensitive.
      layers: Target layers by name.
      sketches: What is summed of each layer's gradient.
      mechanism: Clip norm and rule.
      totals: Sums by layer, float64, changed in place. Sensitive.

    Raises:
      PartlyAdded: If adding failed, so that ``totals`` may hold part of the microbatch.
    """
    size = len(next(iter(batch.values())))
    squared = torch.zeros(size, dtype=torch.float64, device=next(model.parameters()).device)
    twice = bool(checkpointed_modules(model)) and not all(sketch.is_small for sketch in sketches.values())
    kept: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    versions: list[tuple[int, int]] = []

    def measure(name: str, x: torch.Tensor, g: torch.Tensor) -> None:
        x, g = _cut(x, g, sketches[name])
        squared.add_(squared_norms(x.float(), g.float()))
        if not twice:
            kept.append((name, x, g))
            versions.append((_version(x), _version(g)))

    with watched(layers, model, size, 2 if twice else 1) as watch:
        losses = check_losses(loss_fn(model, batch), size)
        watch.on_pair = measure
        losses.sum().backward(retain_graph=twice)
        watch.finish()
        norms = squared.sqrt()
        scale = mechanism.scale(norms).float()[:, None, None]
        usable = torch.isfinite(norms)[:, None, None] & torch.isfinite(scale)  # float32 has no factor beyond 3e38

        def add(name: str, x: torch.Tensor, g: torch.Tensor) -> None:
            _add_weighted(totals[name], x, g, scale, usable)

        try:
            if twice:
                watch.on_pair = lambda name, x, g: add(name, *_cut(x, g, sketches[name]))
                losses.sum().backward()
                watch.finish()
            while kept:
                name, x, g = kept.pop()
                if versions.pop() != (_version(x), _version(g)):  # what was measured is not what would be added
                    raise CaptureError(f"The input of {name} or its gradient was changed in place while it was kept.")
                add(name, x, g)
        except (RuntimeError, MemoryError) as error:
            raise PartlyAdded from error


def _add_weighted(
    total: torch.Tensor, x: torch.Tensor, g: torch.Tensor, scale: torch.Tensor, usable: torch.Tensor
) -> None:
    """Adds the products g^T x of the usable examples, each times its scale, a block of rows of the sum at a time.

    Args:
      total: Shape ``(b, a)``, float64. Sensitive.
      x: Shape ``(n, t, a)``. Sensitive.
      g: Shape ``(n, t, b)``. Sensitive.
      scale: Shape ``(n, 1, 1)``, fp32. Sensitive.
      usable: Shape ``(n, 1, 1)``. Sensitive.
    """
    known = torch.where(usable, x.float(), 0.0).flatten(0, 1)
    rows = max(1, _BLOCK_NUMBERS // max(known.shape))
    for block, part in zip(total.split(rows), g.split(rows, dim=2), strict=True):
        weighted = torch.where(usable, part.float() * scale, 0.0).flatten(0, 1)
        block.add_(weighted.T @ known)


def _cut(x: torch.Tensor, g: torch.Tensor, sketch: Sketch) -> tuple[torch.Tensor, torch.Tensor]:
    x = x if sketch.right is None else x.float() @ sketch.right
    return x, (g if sketch.left is None else g.float() @ sketch.left)
