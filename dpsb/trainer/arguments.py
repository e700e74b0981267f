"""What a user states about privacy; everything else stays in transformers' ``TrainingArguments``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dpsb.basis_spec import DATA_FREE_KINDS


@dataclass(frozen=True, kw_only=True)
class PrivacyArguments:
    """The private half of a Trainer's settings. All of it is public and goes into the plan.

    The number of steps T is the Trainer's own: ``max_steps``, or ``num_train_epochs * num_examples /
    expected_batch_size``. The noise follows from epsilon, delta, T and q = ``expected_batch_size / num_examples``.

    Args:
      epsilon: Target for one example, > 0 and finite.
      delta: Probability parameter, below 1 / N.
      num_examples: N, a *declared* public number, which is never compared with the data; or None: the true number of
        examples then counts as public, and the relation is ``zero_out``.
      expected_batch_size: M, the divisor of the noisy sum; what ``per_device_train_batch_size`` and
        ``gradient_accumulation_steps`` are without privacy.
      l2_clip_norm: C, to which the gradient of each example is clipped.
      auto_clip: AUTO-S instead of flat clipping.
      adaptive_clip: Let C follow this quantile of the norms, privately.
      head_share: Share of C squared that is the classification head's own (``dpsb.head_share``).
      neighboring: As for :func:`dpsb.make_plan`; by default the strongest relation that holds.
      basis: ``"weight"``, ``"random"``, ``"complementary"`` or ``"hadamard"``. One from public data is an argument of
        the Trainer (``basis=``); those that read private data are for ``dpsb train``.
      rank: r of a new LoRA adapter on all linear layers, for a model that has none. Leave it out where the model is a
        ``PeftModel`` already, or where ``peft_config`` is given.
      max_length: Most tokens of an example; longer ones are cut. Left out: SFTConfig's ``max_length``, or what the
        model's positions allow.
      token_budget: Tokens per microbatch, padding included: memory and speed only.
      self_test: Test sums, noise and sampling on synthetic examples before the first step, as ``dpsb train`` does.

    Raises:
      ValueError: If an argument is out of range; the message names it and shows the value.

    Example:
      >>> PrivacyArguments(epsilon=8, delta=1e-5, num_examples=20_000, expected_batch_size=512, rank=16).clipping
      'flat'
    """

    epsilon: float
    delta: float
    num_examples: int | None
    expected_batch_size: int
    l2_clip_norm: float = 1.0
    auto_clip: bool = False
    adaptive_clip: float | None = None
    head_share: float | None = None
    neighboring: str | None = None
    basis: str = "weight"
    rank: int | None = None
    max_length: int | None = None
    token_budget: int = 4096
    self_test: bool = True

    def __post_init__(self) -> None:
        for name in ("epsilon", "l2_clip_norm"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 < value < math.inf:
                raise ValueError(f"Expected {name}={value!r} to be positive and finite.")
        if not _is_number(self.delta) or not 0 < self.delta < 1:
            raise ValueError(f"Expected delta={self.delta!r} between 0 and 1.")
        for name in ("num_examples", "expected_batch_size", "rank", "max_length", "token_budget"):
            value = getattr(self, name)
            optional = name in ("num_examples", "rank", "max_length")
            if not (value is None and optional) and (not isinstance(value, int) or value < 1):
                raise ValueError(f"Expected {name}={value!r} to be a whole number of at least 1.")
        if self.num_examples is not None and self.expected_batch_size > self.num_examples:
            raise ValueError(
                f"Expected expected_batch_size={self.expected_batch_size!r} of at most "
                f"num_examples={self.num_examples!r}."
            )
        if self.adaptive_clip is not None and (self.auto_clip or not 0 < self.adaptive_clip < 1):
            raise ValueError(
                f"Expected adaptive_clip={self.adaptive_clip!r} between 0 and 1, and auto_clip={self.auto_clip!r} to "
                "be left out beside it."
            )
        if self.head_share is not None and (self.adaptive_clip is not None or not 0 < self.head_share < 1):
            raise ValueError(
                f"Expected head_share={self.head_share!r} between 0 and 1, and adaptive_clip={self.adaptive_clip!r} to "
                "be left out beside it."
            )
        if self.basis not in DATA_FREE_KINDS:
            raise ValueError(
                f"Expected basis={self.basis!r} to be one of {', '.join(DATA_FREE_KINDS)}; one from public data is the "
                "Trainer's argument basis, and `dpsb train` has those that read private data and pay for it."
            )

    @property
    def clipping(self) -> str:
        """The plan's name for the clipping rule."""
        if self.adaptive_clip is not None:
            return "adaptive"
        return "automatic" if self.auto_clip else "flat"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
