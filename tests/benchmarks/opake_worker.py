"""The other side of ``opake_step.py``: opake's private LoRA steps, in an interpreter that has opake.

Imports nothing of dpsb, and pytest leaves it out (pyproject.toml). Reads the set-up, one JSON object, from standard
input, and then the name of an arm per line, for one step each; answers each line with one JSON object.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
import torchopt
from opake.dpsgd.clipping import clipped_grad
from opake.dpsgd.noise import gaussian_noise
from opake.functional import make_functional
from opake.optimizers import adam
from opake.patches import apply_model_patches, apply_runtime_patches
from opake.random import random_key
from peak import forget_peak, peak_mib
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

PACKAGES = ("opake", "torch", "transformers", "peft", "torchopt")
KEYS = ("input_ids", "attention_mask", "labels")
ARMS = {"opake": {"loss_only": True}, "opake_logits": {}}  # what the model is told besides its inputs
Params = dict[str, torch.Tensor]


def lora_model(setup: Mapping[str, Any]) -> nn.Module:
    """The same base weights as in the other process, LoRA on every linear layer, patched as opake's Trainer does."""
    apply_runtime_patches(compat=True)
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig.from_dict(setup["config"]))
    rank = setup["rank"]
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    apply_model_patches(model, compat=True, performance=True, kernels=False)
    return model


class Arm:
    """A private training loop of its own over the shared frozen model."""

    def __init__(self, model: nn.Module, setup: Mapping[str, Any], told: Mapping[str, Any]) -> None:
        functional, trained, frozen = make_functional(model, disable_autograd_tracking=True, partition_trainable=True)
        self.trained: Params = {name: value.clone() for name, value in trained.items()}
        self._setup, self._frozen, self._told, self._functional = setup, frozen, told, functional
        self._gradients, self._clip_state = self.clipped(setup["clip"])
        self._noise, self._noise_state = gaussian_noise(noise_multiplier=setup["noise"], key=random_key())
        self._optimizer = adam(lr=1e-4)
        self._optimizer_state = self._optimizer.init(self.trained)

    def clipped(self, clip: float) -> tuple[Callable[..., Any], Any]:
        """opake's function for the mean of the clipped per-example gradients, over the expected batch size."""

        def loss(trained: Params, *inputs: torch.Tensor) -> torch.Tensor:
            named = dict(zip(KEYS, inputs, strict=True))
            return self._functional({**self._frozen, **trained}, **named, **self._told)["loss"]

        size = len(self._setup["examples"])
        return clipped_grad(loss, batch_argnums=(1, 2, 3), clipping_norm=clip, normalize_by=size, microbatch_size=size)

    def step(self) -> None:
        """Collate, clipped gradients, noise, Adam."""
        inputs = collated(self._setup["examples"])
        clipped, self._clip_state = self._gradients(self.trained, *inputs, state=self._clip_state)
        noisy, self._noise_state = self._noise(clipped, self._noise_state)
        updates, self._optimizer_state = self._optimizer.update(noisy, self._optimizer_state, params=self.trained)
        self.trained = torchopt.apply_updates(self.trained, updates)

    def checked(self, model: nn.Module) -> dict[str, float]:
        """Whether the step is one of DP-SGD: its clipped mean beside a loop's, its noise, what it changes."""
        clip = self._setup["clip"] / 10  # low enough to bind on a random model
        size = len(self._setup["examples"])
        gradients, state = self.clipped(clip)
        clipped, _ = gradients(self.trained, *collated(self._setup["examples"]), state=state)
        looped = [torch.zeros_like(value) for value in self.trained.values()]
        own = [p for p in model.parameters() if p.requires_grad]
        for example in self._setup["examples"]:
            inputs = dict(zip(KEYS, collated([example]), strict=True))
            row = torch.autograd.grad(model(**inputs).loss, own)
            factor = min(1.0, clip / norm(row)) / size
            looped = [total + factor * value for total, value in zip(looped, row, strict=True)]
        noisy, _ = self._noise(clipped, self._noise_state)
        mine = list(clipped.pytree.values())
        noise = [a - b for a, b in zip(noisy.pytree.values(), mine, strict=True)]
        count = sum(value.numel() for value in mine)
        before = {name: value.clone() for name, value in self.trained.items()}
        self.step()
        return {
            "mean_norm_over_clip": norm(mine) / clip,
            "distance_from_a_loop": norm([a - b for a, b in zip(mine, looped, strict=True)]) / norm(looped),
            "noise_over_stated": norm(noise) / (math.sqrt(count) * self._setup["noise"] * clip / size),
            "smallest_change_of_a_tensor": min((self.trained[k] - v).abs().max().item() for k, v in before.items()),
        }


def collated(examples: Sequence[Sequence[int]]) -> tuple[torch.Tensor, ...]:
    """Token ids, attention mask and labels."""
    ids = torch.tensor(examples)
    return ids, torch.ones_like(ids), ids.clone()


def norm(values: Sequence[torch.Tensor]) -> float:
    """The L2 norm of them together."""
    return math.sqrt(sum(value.double().pow(2).sum().item() for value in values))


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr  # what libraries print is no answer
    warnings.filterwarnings("ignore")

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    setup = json.loads(sys.stdin.readline())
    torch.set_num_threads(setup["threads"])
    model = lora_model(setup)
    arms = {name: Arm(model, setup, told) for name, told in ARMS.items()}
    with torch.no_grad():
        inputs = [dict(zip(KEYS, collated([example]), strict=True)) for example in setup["examples"]]
        losses = [model(**values).loss.item() for values in inputs]
    answer(
        losses=losses,
        targets=sum("lora_A" in name for name in arms["opake"].trained),
        trained=sum(value.numel() for value in arms["opake"].trained.values()),
        checks={name: arm.checked(model) for name, arm in arms.items()},
        versions={"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    )
    for line in sys.stdin:
        forget_peak()
        wall, cpu = time.perf_counter(), time.process_time()
        arms[line.strip()].step()
        answer(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu, peak_mib=peak_mib())


if __name__ == "__main__":
    main()
