"""Canaries: rows and texts that stand for nobody, put into a run of their own to audit the mechanism from outside.

Gradient canaries are rows of theta's length in directions orthogonal to each other. Each is put into the data by a
fair coin, drawn, clipped and summed like any example's row, and scored by what the released sums say about it. Input
canaries are examples of random tokens, scored by the loss of the final model. The bounds are computed from the scores
by ``dpsb_accounting.auditing``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from dpsb.losses import IGNORED, LossFn
from dpsb.modes import evaluation_mode
from dpsb.randomness import Randomness, SystemRandomness
from dpsb.sampling import length_buckets, microbatches, padded_lengths
from dpsb.secret_canaries import SecretCanaries
from dpsb.withheld import messages_withheld
from dpsb_accounting import Plan
from dpsb_accounting.auditing import CanaryScores

if TYPE_CHECKING:
    from dpsb.basis.canaries import BasisCanaries

WHITE_BOX = (
    "white box: sees every released sum, knows the plan, the basis, every other row and when it was drawn; chooses the "
    "canary's gradient; does not know when the canary was drawn"
)
BLACK_BOX = "black box: chooses texts and labels, sees only the final model's loss on them"
MEMBERSHIP = (
    "black box: has the members and as many other examples as were held out, sees the final model's loss on each"
)
STRETCH = 10.0
"""How many times C a canary's row is long: what enters a sum is of length C only because it is clipped."""


class GradientCanaries:
    r"""Rows of one run that stand for no example, each put in by a fair coin.

    Directions are rows of an orthonormal cosine transform under random signs, so that all inner products of a step
    cost O(d log d), and no canary disturbs another. Each row is ten times as long as the clip norm: what enters the sum
    is of length C only because it is clipped.

    A canary's score is its log-likelihood ratio over the steps, :math:`\sum_t \log(1 - q + q\,e^{(x_t - C/2) C /
    s^2})` with :math:`x_t = \langle \text{released}_t - \text{others}_t, v \rangle` and s the plan's noise standard
    deviation: the most powerful statistic against a mechanism that is what the plan says.

    Args:
      dimension: d.
      plan: The plan of the canary run.
      count: m, at most d.
      randomness: Source of signs, directions and coins.

    Raises:
      ValueError: If ``count`` is not between 2 and ``dimension``, or the plan has no noise.
    """

    def __init__(self, dimension: int, plan: Plan, count: int, randomness: Randomness | None = None) -> None:
        if not 2 <= count <= dimension:
            raise ValueError(f"Expected count={count!r} between 2 and {dimension} (the length of theta).")
        if not plan.is_private:
            raise ValueError("Expected a plan with clipping and noise; a run without them needs no audit.")
        if plan.clipping == "adaptive":
            raise ValueError("Expected a plan with a fixed l2_clip_norm; canaries do not follow clipping='adaptive'.")
        source = randomness or SystemRandomness()
        self._clip, self._noise_std, self._sampling_prob = plan.l2_clip_norm, plan.noise_std, plan.sampling_prob
        self._signs = np.where(source.bernoulli(dimension, 0.5), 1.0, -1.0)
        self._positions = np.argsort(source.words(dimension))[:count]
        self.included = source.bernoulli(count, 0.5)
        self._members = np.flatnonzero(self.included)
        self._ratios = np.zeros(count)

    def __len__(self) -> int:
        """How many rows take part in the draws: the canaries whose coin said so."""
        return len(self._members)

    def rows(self, drawn: np.ndarray) -> torch.Tensor:
        """The rows that a draw took, shape ``(k, d)``, float64; ``drawn`` holds numbers below ``len(self)``."""
        from scipy.fft import idct

        spectrum = np.zeros((len(drawn), len(self._signs)))
        spectrum[np.arange(len(drawn)), self._positions[self._members[drawn]]] = STRETCH * self._clip
        return torch.from_numpy(idct(spectrum, norm="ortho", axis=1) * self._signs)

    def observe(self, released: torch.Tensor) -> None:
        """Takes in what a step released, less what the others contributed, shape ``(d,)``."""
        from scipy.fft import dct

        vector = released.detach().cpu().numpy().astype(np.float64)
        products = dct(vector * self._signs, norm="ortho")[self._positions]
        self._ratios += log_ratio(products, self._clip, self._noise_std, self._sampling_prob)

    def scores(self) -> CanaryScores:
        """The scores of all canaries, those left out included."""
        return CanaryScores(self._ratios, self.included, WHITE_BOX)


def log_ratio(products: np.ndarray, clip: float, noise_std: float, sampling_prob: float) -> np.ndarray:
    """The log-likelihood ratio of what one release shows along each canary: drawn with probability q, or not there."""
    exponent = (products - clip / 2) * clip / noise_std**2
    if sampling_prob == 1.0:
        return np.asarray(exponent)
    return np.asarray(np.logaddexp(math.log1p(-sampling_prob), math.log(sampling_prob) + exponent))


def expected_scores(plan: Plan, count: int, seed: int = 0) -> CanaryScores:
    """Scores as a mechanism that is exactly what the plan says would give them: simulated from the plan, no data.

    Thresholds are fixed on these before the run, and the bound they lead to is what an honest run is expected to show.

    Args:
      plan: A private plan.
      count: Number of simulated canaries.
      seed: Of the simulation; it protects nothing.
    """
    source = np.random.default_rng(seed)
    included = source.random(count) < 0.5
    ratios = np.zeros(count)
    for _ in range(plan.steps):
        drawn = included & (source.random(count) < plan.sampling_prob)
        products = plan.noise_std * source.standard_normal(count) + plan.l2_clip_norm * drawn
        ratios += log_ratio(products, plan.l2_clip_norm, plan.noise_std, plan.sampling_prob)
    return CanaryScores(ratios, included, WHITE_BOX)


class InputCanaries:
    """Examples of random tokens, each put into the data by a fair coin; scored by how much their loss fell.

    Args:
      task: ``"classification"`` or ``"causal-lm"``.
      count: m, at least 2.
      vocab_size: Tokens are drawn from all of them.
      num_labels: For classification.
      length: Tokens per canary.
      token_types: Whether the model wants ``token_type_ids``.
      randomness: Source of tokens, labels and coins.
    """

    def __init__(
        self,
        task: str,
        count: int,
        vocab_size: int,
        num_labels: int,
        length: int,
        token_types: bool = False,
        randomness: Randomness | None = None,
    ) -> None:
        if count < 2:
            raise ValueError(f"Expected count={count!r} of at least 2.")
        source = randomness or SystemRandomness()
        self.included = source.bernoulli(count, 0.5)
        ids = (source.words(count * length) % np.uint64(vocab_size)).astype(np.int64).reshape(count, length)
        labels = (source.words(count) % np.uint64(max(1, num_labels))).astype(np.int64)
        self._examples: list[dict[str, Any]] = []
        for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
            target = label if task == "classification" else [IGNORED, *row[1:]]
            self._examples.append({"input_ids": row, "labels": target})
            if token_types:
                self._examples[-1]["token_type_ids"] = [0] * length
        self._before = np.zeros(count)

    def examples(self) -> list[dict[str, Any]]:
        """The examples whose coin said that they are part of the data."""
        return [example for example, inside in zip(self._examples, self.included, strict=True) if inside]

    def before(self, losses: Callable[[Sequence[Mapping[str, Any]]], np.ndarray]) -> None:
        """Keeps the losses of all canaries before training, so that hard canaries are not taken for strangers."""
        self._before = losses(self._examples)

    def scores(self, losses: Callable[[Sequence[Mapping[str, Any]]], np.ndarray]) -> CanaryScores:
        """How far the loss of every canary fell."""
        return CanaryScores(self._before - losses(self._examples), self.included, BLACK_BOX)


Losses = Callable[[Sequence[Mapping[str, Any]]], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class InputShape:
    """What an input canary must look like; public facts of the run."""

    task: str
    vocab_size: int
    num_labels: int
    length: int
    token_types: bool


class CanaryAudit:
    """The canaries of one run, from planting to scores; given to ``dpsb.run.fine_tune``.

    Args:
      gradient: Number of gradient canaries; at most the length of theta are used. 0 for none.
      inputs: Number of input canaries; 0 for none.
      basis: Canaries of a basis release; they give scores only where a run makes one.
    """

    def __init__(self, gradient: int = 0, inputs: int = 0, basis: BasisCanaries | None = None) -> None:
        self.rows: GradientCanaries | None = None
        self.basis = basis
        self.plan: Plan | None = None
        self.scores: dict[str, CanaryScores] = {}
        self._numbers = (gradient, inputs)
        self.secrets: SecretCanaries | None = None
        self._inputs: InputCanaries | None = None

    def plant(self, plan: Plan, dimension: int, losses: Losses, shape: InputShape) -> list[Any]:
        """Makes the canaries of a run under ``plan``; returns the rows of data to add."""
        gradient, inputs = self._numbers
        self.plan = plan
        if gradient:
            self.rows = GradientCanaries(dimension, plan, min(gradient, dimension))
        if not inputs:
            return []
        self._inputs = InputCanaries(
            shape.task, inputs, shape.vocab_size, shape.num_labels, shape.length, shape.token_types
        )
        self._inputs.before(losses)
        chosen = self._inputs.examples()
        if shape.task == "causal-lm":
            self.secrets = SecretCanaries(inputs, shape.vocab_size, shape.length)
            chosen += self.secrets.examples()
        return chosen if plan.unit == "example" else [[example] for example in chosen]

    def finish(
        self, losses: Losses, members: Sequence[Any], non_members: Sequence[Any] | None, model: nn.Module
    ) -> None:
        """Scores everything on the final model: canaries, and members against held-out examples. Sensitive."""
        if self.rows is not None:
            self.scores["gradient"] = self.rows.scores()
        if self.basis is not None and self.basis.observed:
            self.scores["basis"] = self.basis.scores()
        if self._inputs is not None:
            self.scores["input"] = self._inputs.scores(losses)
        if self.secrets is not None:
            self.scores["secret-rank"] = self.secrets.by_rank(losses)
            self.scores["secret-writing"] = self.secrets.by_writing(model)
        if members and non_members:
            values = -np.concatenate([losses(members), losses(non_members)])
            inside = np.arange(len(values)) < len(members)
            usable = np.isfinite(values)
            self.scores["membership"] = CanaryScores(values[usable], inside[usable], MEMBERSHIP)


@torch.no_grad()
def example_losses(
    model: nn.Module,
    examples: Sequence[Mapping[str, Any]],
    loss_fn: LossFn,
    collate: Callable[[Sequence[Mapping[str, Any]], int], Mapping[str, torch.Tensor]],
    max_length: int,
    token_budget: int,
) -> np.ndarray:
    """Loss of every example in evaluation mode, shape ``(n,)``, float64. Sensitive where the examples are.

    Raises:
      StepError, StepMemoryError: In the place of any error, which may quote a row.
    """
    padded = padded_lengths(examples, length_buckets(max_length))
    found = np.zeros(len(examples))
    with evaluation_mode(model), messages_withheld("Scoring examples for an audit", "What was charged stays charged."):
        for indices, length in microbatches(np.arange(len(examples)), padded, token_budget):
            batch = collate([examples[int(i)] for i in indices], length)
            found[indices] = loss_fn(model, batch).double().cpu().numpy()
    return found
