"""What a method's noise does to the weights of a real adapter, and how it compares with the gradient; measured.

Everything here runs on public data or on none. The closed forms are in ``dpsb_accounting.noise``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from dpsb.adapter import Adapter
from dpsb.capture import per_example_gradients
from dpsb.losses import LossFn, check_losses
from dpsb.mechanism import Mechanism
from dpsb.models import in_head
from dpsb.randomness import Randomness
from dpsb_accounting.noise import amplification
from dpsb_accounting.shapes import Layer

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Signal:
    """What one step of a method sees, on public examples.

    Args:
      dimension: d, how many numbers are released.
      median_norm: Median length of a row, the clip norm C_P that is taken for the method.
      mean_norm: Length of the mean row.
      clipped_mean_norm: Length of the mean row after clipping to ``median_norm``.
    """

    dimension: int
    median_norm: float
    mean_norm: float
    clipped_mean_norm: float

    def snr(self, noise_multiplier: float, expected_batch_size: float) -> float:
        r"""Length of the mean gradient divided by that of the noise, :math:`(b/\sigma)\,\|\bar g\|/(C_P\sqrt d)`."""
        noise = noise_multiplier / expected_batch_size * self.median_norm * self.dimension**0.5
        return self.mean_norm / noise if noise else float("inf")


def signal_of(adapter: Adapter, loss_fn: LossFn, batches: Iterable[Mapping[str, torch.Tensor]]) -> Signal:
    """The rows of **public** examples, summed up; the adapter must be in train mode.

    Raises:
      ValueError: If there are no examples, or no row has a length.
    """
    rows = []
    for batch in batches:
        size = len(batch["labels"])
        with per_example_gradients(adapter, size) as captured:
            check_losses(loss_fn(adapter.model, batch), size).sum().backward()
            rows.append(captured.get())
    if not rows:
        raise ValueError("Expected at least one public example, got none.")
    stacked = torch.cat(rows).double()
    norms = stacked.norm(dim=1)
    median = float(norms.median())
    if not median > 0:
        raise ValueError("The gradients of the public examples are zero: nothing can be compared.")
    clipped = stacked * (median / norms).clamp(max=1.0)[:, None]
    return Signal(
        dimension=adapter.dimension,
        median_norm=median,
        mean_norm=float(stacked.mean(dim=0).norm()),
        clipped_mean_norm=float(clipped.mean(dim=0).norm()),
    )


def layers_of(adapter: Adapter, rank: int) -> tuple[Layer, ...]:
    """The target weights with the sizes that this adapter's factors have now, for ``dpsb_accounting.noise``."""
    found = factors_of(adapter)
    if found:
        return tuple(
            Layer(
                out_features=B.shape[0],
                in_features=A.shape[1],
                rank=A.shape[0],
                norm_a=float(A.norm()),
                norm_b=float(B.norm()),
            )
            for A, B in found.values()
        )
    return tuple(
        Layer(out_features=m.out_features, in_features=m.in_features, rank=min(rank, m.in_features, m.out_features))
        for m in _trained_weights(adapter).values()
    )


def factors_of(adapter: Adapter) -> Factors:
    """The plain LoRA factors (A, B) of every target weight as they stand; for R-only the second is B R."""
    name = adapter.adapter_name
    return {
        path: (layer.lora_A[name].weight.detach().double(), layer.lora_B[name].weight.detach().double())
        for path, layer in adapter.model.named_modules()
        if isinstance(layer, LoraLayer) and name in layer.lora_A
    }


def noisy_states(
    adapter: Adapter, mechanism: Mechanism, randomness: Randomness, draws: int
) -> Iterable[dict[str, torch.Tensor]]:
    """``draws`` times: theta plus what the mechanism releases for an empty draw, by name, fp64."""
    parameters = [(name, parameter.detach().double()) for name, parameter in adapter.named_parameters()]
    sizes = [value.numel() for _, value in parameters]
    for _ in range(draws):
        noise = mechanism.release(mechanism.zeros(adapter.dimension), randomness).split(sizes)
        yield {name: value + part.view_as(value) for (name, value), part in zip(parameters, noise, strict=True)}


def predicted_energy(adapter: Adapter, layers: Sequence[Layer], noise_std: float) -> float | None:
    r"""Expected squared length of what one release's noise does to all target weights, in closed form.

    For a core it is :math:`\tau^2 |A|^2 |B|^2` whatever the factors, that of R-only where they are orthonormal. For
    LoRA it follows from which factors are trained; B alone is FFA-LoRA, A alone the same on the transposed weight.

    Args:
      adapter: As it stands.
      layers: From :func:`layers_of`.
      noise_std: tau, on each number of theta.

    Returns:
      None where no target weight moves.
    """
    if not layers:
        return None
    if adapter.cores:
        sizes = (float(A.double().norm() * B.double().norm()) ** 2 for A, B, _ in adapter.factors().values())
        return noise_std**2 * math.fsum(sizes)
    trained = {part for name, _ in adapter.named_parameters() for part in ("lora_A", "lora_B") if f".{part}." in name}
    if trained == {"lora_A"}:
        layers, trained = [_transposed(layer) for layer in layers], {"lora_B"}
    form = "full_matrix" if not trained else "lora" if len(trained) == 2 else "ffa_lora"
    return amplification(form, layers, noise_std=noise_std).energy


def _transposed(layer: Layer) -> Layer:
    return replace(
        layer,
        out_features=layer.in_features,
        in_features=layer.out_features,
        norm_a=layer.norm_b,
        norm_b=layer.norm_a,
        norm_of_mean_a=layer.norm_of_mean_b,
        norm_of_mean_b=layer.norm_of_mean_a,
    )


def measured_energies(adapter: Adapter, mechanism: Mechanism, randomness: Randomness, draws: int) -> list[float]:
    """For each draw the squared length of what one release's noise does to all target weights.

    The noise comes from ``mechanism``, is put on theta, and the weights that result are compared with those before:
    nothing of the closed form is used.
    """
    before = weights_at(adapter, {})
    found = []
    for state in noisy_states(adapter, mechanism, randomness, draws):
        after = weights_at(adapter, state)
        found.append(math.fsum(float((after[name] - before[name]).square().sum()) for name in before))
    return found


def measured_federated_energy(
    clients: Sequence[Adapter], mechanism: Mechanism, randomness: Randomness, draws: int, *, average: str
) -> float:
    """The mean of :func:`measured_energies` for a server that averages clients of equal weight, each with own noise.

    Args:
      average: ``"factors"`` (FedIT: A and B apart) or ``"products"`` (FedEx-LoRA and FLoRA; the same as averaging
        what is trained where the product is linear in it, as for Fed-SB and FFA-LoRA).
    """
    if average not in ("factors", "products"):
        raise ValueError(f"Expected average={average!r} to be 'factors' or 'products'.")

    def averaged(states: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        found = [factors_at(client, state) for client, state in zip(clients, states, strict=True)]
        result = {}
        for name in found[0]:
            As, Bs = [one[name][0] for one in found], [one[name][1] for one in found]
            if average == "factors":
                result[name] = sum(Bs) / len(Bs) @ (sum(As) / len(As))  # type: ignore[operator]
            else:
                result[name] = sum(B @ A for A, B in zip(As, Bs, strict=True)) / len(As)  # type: ignore[assignment]
        return result

    total, before = 0.0, averaged([{} for _ in clients])
    streams = [noisy_states(client, mechanism, randomness, draws) for client in clients]
    for states in zip(*streams, strict=True):
        after = averaged(states)
        total += sum(float((after[name] - before[name]).square().sum()) for name in before)
    return total / draws


def weights_at(adapter: Adapter, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the adapter adds to each target weight (or the trained weight itself) if theta were ``state``."""
    found = factors_at(adapter, state)
    if found:
        return {name: B @ A for name, (A, B) in found.items()}
    return {
        name: state.get(f"{name}.weight", module.weight.detach().double())
        for name, module in _trained_weights(adapter).items()
    }


def factors_at(adapter: Adapter, state: Mapping[str, torch.Tensor]) -> Factors:
    """:func:`factors_of` if theta were ``state``; what ``state`` does not hold stays as it is."""
    frozen = adapter.factors()
    found = {}
    for name, (A, B) in factors_of(adapter).items():
        if name in frozen:
            found[name] = (A, frozen[name].B.double() @ state[f"{name}.R"].double()) if state else (A, B)
        else:
            tail = f"{adapter.adapter_name}.weight"
            found[name] = (state.get(f"{name}.lora_A.{tail}", A), state.get(f"{name}.lora_B.{tail}", B))
    return found


def _trained_weights(adapter: Adapter) -> dict[str, nn.Linear]:
    """The linear layers whose own weight is trained, without a head."""
    return {
        name: module
        for name, module in adapter.direct
        if isinstance(module, nn.Linear) and module.weight.requires_grad and not in_head(name)
    }
