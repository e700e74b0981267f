"""Secrets of nobody in the data of a causal language model: does the trained model know, or even write, them?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from dpsb.losses import IGNORED
from dpsb.modes import evaluation_mode
from dpsb.randomness import Randomness, SystemRandomness
from dpsb_accounting.auditing import CanaryScores

BY_RANK = (
    "black box: chooses prompts and their secret continuations, sees only the final model's loss on the secret and on "
    "as many other continuations of the prompt as it likes"
)
BY_WRITING = "black box: chooses prompts and their secret continuations, sees only what the final model writes greedily"

_BATCH = 64
_REFERENCES = 64


class SecretCanaries:
    r"""Random prompts, each with a random secret behind it, put into the data by a fair coin.

    The model is trained on the secret as on a completion. Afterwards the secret is ranked by its loss among
    ``references`` other continuations of its prompt that were drawn like it and that training never saw; its exposure
    is :math:`\log_2 (n + 1) - \log_2 \mathrm{rank}` bits, 1.44 on average for a secret that the model does not know.
    And the model is asked to continue the prompt.

    Args:
      count: m, at least 2.
      vocab_size: Tokens are drawn from all of them.
      length: Tokens of prompt and secret together; half of them are the secret's.
      references: n, at least 1.
      randomness: Source of tokens and coins.

    References:
      Carlini et al. (2019), arXiv:1802.08232 (exposure); Steinke et al. (2023), arXiv:2305.08846 (coins in one run).
    """

    def __init__(
        self,
        count: int,
        vocab_size: int,
        length: int,
        references: int = _REFERENCES,
        randomness: Randomness | None = None,
    ) -> None:
        if count < 2:
            raise ValueError(f"Expected count={count!r} of at least 2.")
        if length < 2 or references < 1:
            raise ValueError(f"Expected length={length!r} of at least 2 and references={references!r} of at least 1.")
        source = randomness or SystemRandomness()
        self.included = source.bernoulli(count, 0.5)
        self._prompt = length - length // 2

        def tokens(*shape: int) -> np.ndarray:
            drawn = source.words(math.prod(shape)) % np.uint64(vocab_size)
            return np.asarray(drawn).astype(np.int64).reshape(shape)

        self._prompts = tokens(count, self._prompt)
        self._secrets = tokens(count, 1 + references, length // 2)
        """Shape ``(m, 1 + n, tokens)``: the secret of each prompt, then the references."""
        self._ranks = np.zeros(count)
        self._written = np.zeros(count)

    def examples(self) -> list[dict[str, Any]]:
        """The examples whose coin said that they are part of the data."""
        return [self._example(int(i), 0) for i in np.flatnonzero(self.included)]

    def by_rank(self, losses: Callable[[Sequence[Mapping[str, Any]]], np.ndarray]) -> CanaryScores:
        """How far each secret's loss lies below its references', in their standard deviations."""
        count, continuations = self._secrets.shape[:2]
        found = losses([self._example(i, j) for i in range(count) for j in range(continuations)])
        table = np.nan_to_num(found.reshape(count, continuations), nan=1e30, posinf=1e30, neginf=-1e30)
        secret, others = table[:, 0], table[:, 1:]
        self._ranks = 1 + (others < secret[:, None]).sum(axis=1)
        spread = np.maximum(others.std(axis=1), 1e-12)
        return CanaryScores((others.mean(axis=1) - secret) / spread, self.included, BY_RANK)

    @torch.no_grad()
    def by_writing(self, model: nn.Module) -> CanaryScores:
        """How many tokens of its secret the model writes, from the first one on, when it is given the prompt."""
        wanted = self._secrets[:, 0]
        length, device = wanted.shape[1], next(model.parameters()).device
        with evaluation_mode(model):
            for start in range(0, len(wanted), _BATCH):
                prompts = torch.from_numpy(self._prompts[start : start + _BATCH]).to(device)
                written: Any = model.generate(  # type: ignore[operator]
                    input_ids=prompts,
                    attention_mask=torch.ones_like(prompts),
                    min_new_tokens=length,
                    max_new_tokens=length,
                    do_sample=False,
                    pad_token_id=0,
                )
                same = written[:, self._prompt :].cpu().numpy() == wanted[start : start + _BATCH]
                self._written[start : start + _BATCH] = np.cumprod(same, axis=1).sum(axis=1)
        return CanaryScores(self._written, self.included, BY_WRITING)

    def summary(self) -> dict[str, float]:
        """Mean exposure in bits, and share of secrets written to the end: of those put in, of those left out."""
        exposure = math.log2(self._secrets.shape[1]) - np.log2(np.maximum(self._ranks, 1))
        whole = self._written == self._secrets.shape[2]
        return {
            "exposure_inserted": float(exposure[self.included].mean()),
            "exposure_left_out": float(exposure[~self.included].mean()),
            "written_inserted": float(whole[self.included].mean()),
            "written_left_out": float(whole[~self.included].mean()),
        }

    def _example(self, canary: int, continuation: int) -> dict[str, Any]:
        secret = self._secrets[canary, continuation].tolist()
        prompt = self._prompts[canary].tolist()
        return {"input_ids": prompt + secret, "labels": [IGNORED] * len(prompt) + secret}
