"""Optimizers and schedules. All of it is post-processing of released gradients: none of it costs privacy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from dpsb.config import RunConfig
from dpsb.heads import in_head
from dpsb_accounting import Plan

if TYPE_CHECKING:
    from dpsb.adapter import Adapter

Schedule = Callable[[float], float]


class NoiseCorrectedAdam(torch.optim.Optimizer):
    r"""Adam whose second moment is freed from the noise that was added on purpose.

    A released gradient is :math:`g_t = \bar g_t + n_t` with :math:`n_t \sim N(0, \Phi I)` and public
    :math:`\Phi = (\sigma C / M)^2`. Then :math:`E g_t^2 = E\bar g_t^2 + \Phi`, so Adam's denominator
    is mostly noise. Here, with Adam's bias-corrected moments,

    .. math:: \theta \leftarrow \theta - \eta\,\hat m_t / \sqrt{\max(\hat v_t - \Phi,\; f\,\Phi)}.

    The floor :math:`f \Phi` bounds a step where the corrected moment is small or negative.

    Args:
      params: As for any torch optimizer.
      lr: Learning rate eta.
      noise_variance: Phi > 0, of every coordinate of the gradient that ``step`` finds. Public.
      betas: Decay rates of the two moments.
      floor: f > 0.

    References:
      Tang, Shpilevskiy and Lecuyer (2023), arXiv:2312.14334 (DP-AdamBC), Algorithm 1; there the floor is a constant.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        noise_variance: float,
        betas: tuple[float, float] = (0.9, 0.999),
        floor: float = 0.1,
    ) -> None:
        if not 0 < noise_variance < math.inf or not 0 < floor < math.inf:
            raise ValueError(f"Expected noise_variance={noise_variance!r} and floor={floor!r} to be positive, finite.")
        super().__init__(params, {"lr": lr, "betas": betas, "noise_variance": noise_variance, "floor": floor})

    @torch.no_grad()
    def step(self, _closure: None = None) -> None:  # type: ignore[override]
        """One step on the gradients that are there."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, gradient = self.state[parameter], parameter.grad
                if not state:
                    state["step"] = 0
                    state["first"], state["second"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
                state["step"] += 1
                state["first"].lerp_(gradient, 1 - beta1)
                state["second"].lerp_(gradient.square(), 1 - beta2)
                mean = state["first"] / (1 - beta1 ** state["step"])
                second = state["second"] / (1 - beta2 ** state["step"])
                noise = group["noise_variance"]
                parameter.sub_(group["lr"] * mean / (second - noise).clamp(min=group["floor"] * noise).sqrt())


def make_optimizer(config: RunConfig, adapter: Adapter, plan: Plan) -> tuple[torch.optim.Optimizer, Schedule]:
    """The optimizer of a run and its learning-rate schedule, from settings that are in the plan.

    The head, the cores or factors, and LoRA+'s B each are a parameter group with a learning rate of their own.
    """
    groups: dict[str, dict[str, Any]] = {}
    rates = {
        "head": config.head_learning_rate or config.learning_rate,
        "B": config.learning_rate * config.lora_plus_ratio,
        "adapter": config.learning_rate,
    }
    for name, parameter in adapter.named_parameters():
        kind = "head" if in_head(name) else "adapter"
        if config.method == "lora-plus" and "lora_B" in name.split("."):
            kind = "B"
        groups.setdefault(kind, {"params": [], "lr": rates[kind]})["params"].append(parameter)
    return _optimizer(config, list(groups.values()), plan), SCHEDULES[config.schedule]


def _optimizer(config: RunConfig, groups: list[dict[str, Any]], plan: Plan) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    if config.optimizer == "adam-corrected" and plan.is_private:
        variance = (plan.noise_std / plan.expected_batch_size) ** 2
        return NoiseCorrectedAdam(groups, lr=config.learning_rate, noise_variance=variance)
    return torch.optim.Adam(groups)


SCHEDULES: dict[str, Schedule] = {
    "constant": lambda _done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
