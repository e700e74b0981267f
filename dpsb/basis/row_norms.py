"""How long the rows of public examples are where training starts: in the weights, in the cores, and in the head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from dpsb.adapter import Factors, trained_directly
from dpsb.basis.choose import sketches_of
from dpsb.basis.per_example import WHOLE, Batch, Sketch, example_norms, squared_norms, watching
from dpsb.heads import HEAD_NAMES
from dpsb.losses import LossFn


@dataclass(frozen=True, kw_only=True)
class RowNorms:
    """Lengths of n examples' gradients, float64 on the CPU. As sensitive as the examples.

    Args:
      whole: In the target weights, shape ``(n,)``.
      cores: As the cores of each of k bases see it, shape ``(n, k)``.
      head: In the head's own parameters, shape ``(n,)``; None where no head is trained, or one that is not linear.
      head_numbers: How many numbers the head has.
    """

    whole: torch.Tensor
    cores: torch.Tensor
    head: torch.Tensor | None
    head_numbers: int

    def head_shares(self) -> list[float | None]:
        r"""With each basis, the median of :math:`\|h_i\|^2 / (\|h_i\|^2 + \|R_i\|^2)`: what one joint clip divides."""
        if self.head is None:
            return [None] * self.cores.shape[1]
        head = self.head.square()[:, None]
        shares: list[float | None] = (head / (head + self.cores.square())).nanmedian(dim=0).values.tolist()
        return shares


def row_norms(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    layers: Mapping[str, LoraLayer],
    bases: Sequence[Mapping[str, Factors]],
) -> RowNorms:
    """The lengths of every example's row with R = 0, under several bases at once.

    Args:
      model: A PEFT LoRA model; its head, if it has one, is what PEFT trains beside the adapter.
      loss_fn: Per-example loss.
      batches: Examples, at least one batch. Sensitive if they are.
      layers: Its target layers by name.
      bases: A and B by layer, of each basis.

    Raises:
      ValueError: If the head has a kind of module without a per-example rule.
    """
    device = next(model.parameters()).device
    looks: list[Mapping[str, Sketch]] = [dict.fromkeys(layers, WHOLE)]
    looks += [sketches_of(factors, device) for factors in bases]
    head = {name: module for name, module in trained_directly(model, HEAD_NAMES) if "lora_" not in name}
    linear = {name: module for name, module in head.items() if isinstance(module, nn.Linear)}
    lengths, squares = [], []
    numbers: dict[str, int] = {}
    for batch in batches:
        size = len(next(iter(batch.values())))
        of_head = torch.zeros(size, dtype=torch.float64)

        def on_pair(name: str, x: torch.Tensor, g: torch.Tensor, of_head: torch.Tensor = of_head) -> None:
            of_head += _squares(linear[name], x.float(), g.float())
            numbers[name] = g.shape[-1] * (x.shape[-1] + (linear[name].bias is not None))  # a hook may put another head

        with watching(linear, size) as watch:
            watch.on_pair = on_pair
            lengths.append(example_norms(model, loss_fn, batch, layers, looks).cpu())
            watch.finish()
        squares.append(of_head)
    known = bool(numbers) and len(linear) == len(head)
    rows = torch.cat(lengths)
    return RowNorms(
        whole=rows[:, 0],
        cores=rows[:, 1:],
        head=torch.cat(squares).sqrt() if known else None,
        head_numbers=sum(numbers.values()) if known else 0,
    )


def _squares(module: nn.Linear, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Each example's squared norm in weight and bias, shape ``(n,)``, float64 on the CPU."""
    squares = squared_norms(x, g)
    if module.bias is not None:
        squares = squares + g.double().sum(dim=1).square().sum(dim=1)
    return squares.cpu()
