"""Per-example losses: functions from (model, batch) to one number per example, each of that example alone.

Any function of that kind can be given to ``dpsb.fit``. The command line uses the first two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dpsb.layers import is_plain
from dpsb.modes import evaluation_mode

IGNORED = -100
"""Label of what is not part of the loss: a padding or prompt token, or a whole example with an undeclared label."""

LossFn = Callable[[nn.Module, Mapping[str, torch.Tensor]], torch.Tensor]

_LOGIT_TRANSFORMS = (
    "final_logit_softcapping",
    "output_logit_soft_cap",
    "logits_soft_cap",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
)
"""Settings of a model by which its logits are more than what its head returns."""
_CHUNK_LOGITS = 1 << 22
_HEAD_IS_ALL: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""What was measured of a model."""


def classification_loss(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of each example's label.

    Guarantees:
      * Entry i depends on example i alone; an example labelled ``IGNORED`` has loss and gradient zero.

    Args:
      model: Returns an object with ``logits`` of shape ``(n, K)``.
      batch: Model inputs and ``labels`` of shape ``(n,)``. Sensitive.

    Returns:
      Losses, shape ``(n,)``, fp32. Sensitive.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits
    return F.cross_entropy(logits.float(), batch["labels"], ignore_index=IGNORED, reduction="none")


def causal_lm_loss(
    model: nn.Module, batch: Mapping[str, torch.Tensor], *, tokens_per_example: int | None = None
) -> torch.Tensor:
    r"""Next-token cross-entropy of each example, averaged over *its own* labelled tokens.

    :math:`\ell_i = \frac{1}{m_i}\sum_{t} -\log p(y_{it}\mid y_{i,<t})` over the :math:`m_i` tokens whose label is not
    ``IGNORED``; with ``tokens_per_example`` = K, the sum divided by the constant K. Never the mean over the batch's
    tokens, which would let one example rescale the gradients of the others.

    Guarantees:
      * Entry i depends on example i alone; an example without labelled tokens has loss and gradient zero.
      * The logits of the whole batch never exist at once: vocabulary scores are made and used for a few tokens at a
        time. Not so where they are more than what the model's head makes of its backbone's states (a cap, a scale, a
        transform), which is measured where ``dpsb`` loads or probes a model, and for a model that it did neither with.

    Args:
      model: A causal language model of transformers, PEFT-wrapped or not.
      batch: ``input_ids``, ``attention_mask``, ``labels``, each ``(n, t)``. Sensitive.
      tokens_per_example: Divide by this public constant instead of by the example's own number of labelled tokens.

    Returns:
      Losses, shape ``(n,)``, fp32. Sensitive.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    token_losses = _token_losses(model, inputs, labels)
    if tokens_per_example is not None:
        return token_losses.sum(dim=1) / tokens_per_example
    return token_losses.sum(dim=1) / (labels != IGNORED).sum(dim=1).clamp(min=1)


def seq2seq_loss(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    r"""Cross-entropy of each example's target tokens under an encoder-decoder, averaged over *its own* tokens.

    :math:`\ell_i = \frac{1}{m_i}\sum_{t} -\log p(y_{it}\mid y_{i,<t}, x_i)` over the :math:`m_i` labels that are not
    ``IGNORED``. The decoder reads the labels shifted by one, as the model's own class makes them.

    Guarantees:
      * Entry i depends on example i alone; an example without labels has loss and gradient zero. What pads a target
        stands behind it, where a causal decoder does not look.

    Args:
      model: An encoder-decoder of transformers (T5, BART), PEFT-wrapped or not.
      batch: ``input_ids`` and ``attention_mask``, each ``(n, t)``, and ``labels`` of shape ``(n, u)``. Sensitive.

    Returns:
      Losses, shape ``(n,)``, fp32. Sensitive.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"]
    shifted = _unwrapped(model).prepare_decoder_input_ids_from_labels(labels=labels)
    token_losses = _scored(nn.Identity(), model(**inputs, decoder_input_ids=shifted, use_cache=False).logits, labels)
    return token_losses.sum(dim=1) / (labels != IGNORED).sum(dim=1).clamp(min=1)


def _token_losses(model: nn.Module, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every position, zero where ignored, shape ``(n, t)``."""
    causal_lm, head, backbone = _parts(model)
    if head is None or backbone is None or not _HEAD_IS_ALL.get(causal_lm, False):
        return _scored(nn.Identity(), model(**inputs).logits, labels)
    hidden = backbone(**inputs, use_cache=False).last_hidden_state
    if hidden.shape[:2] != labels.shape:  # otherwise a token would be scored by another example's state
        raise ValueError(f"Expected one hidden state per token, {tuple(labels.shape)}; got {tuple(hidden.shape[:2])}.")
    tokens = max(1, _CHUNK_LOGITS // head.weight.shape[0])
    plain = type(head) is nn.Linear and is_plain(head.weight)
    if plain and not any(parameter.requires_grad for parameter in head.parameters()):
        counted = torch.nonzero(labels.flatten() != IGNORED)[:, 0]  # prompts and padding need no scores
        states, targets = hidden.flatten(0, 1)[counted], labels.flatten()[counted]
        losses = cast(torch.Tensor, _FrozenHeadLosses.apply(states, head, targets, tokens))
        return losses.new_zeros(labels.numel()).index_copy(0, counted, losses).view_as(labels)
    score, each = partial(_scored, head), max(1, tokens // hidden.shape[0])
    chunks = zip(hidden.split(each, dim=1), labels.split(each, dim=1), strict=True)  # a row stays a row for its hooks
    return torch.cat([checkpoint(score, h, y, use_reentrant=False) for h, y in chunks], dim=1)


def measure_head(model: nn.Module) -> None:
    """Finds out, on a few tokens that mean nothing, whether a causal model's logits are what its head alone makes.

    What stands behind a head (a cap, a scale) or before it is not always a setting with a known name. Called where a
    model is loaded and where it is probed, and never by the loss: hooks that watch a pass would see another one. A
    model that was never measured is taken at its own logits.
    """
    causal_lm, head, backbone = _parts(model)
    if head is None or backbone is None:
        return
    with torch.no_grad(), evaluation_mode(causal_lm):
        try:
            rows, width = causal_lm.get_input_embeddings().weight.shape[0], 16
            ids = torch.arange(1, width + 1, device=next(causal_lm.parameters()).device)[None] % rows
            few = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            own = causal_lm(**few).logits.float()
            made = head(backbone(**few, use_cache=False).last_hidden_state).float()
            alike = own.shape == made.shape and torch.allclose(own, made, rtol=1e-5, atol=1e-6)
            same = alike and hasattr(head, "weight")
        except Exception:  # noqa: BLE001 - a model that is called in another way, or on another device
            same = False
    _HEAD_IS_ALL[causal_lm] = same


def assume_head(model: nn.Module) -> None:
    """For an estimate of memory from shapes alone, of a model that was not measured."""
    _HEAD_IS_ALL.setdefault(_parts(model)[0], True)


def _unwrapped(model: nn.Module) -> Any:
    """The model without PEFT's wrapper."""
    wrapped: Any = model
    return wrapped.get_base_model() if hasattr(model, "get_base_model") else wrapped


def _parts(model: nn.Module) -> tuple[Any, Any, Any]:
    """A causal model without PEFT's wrapper, its head and its backbone.

    None in their place where more than the head may stand between the backbone and the logits: a known setting of
    theirs, a third part (ModernBERT, Electra), or a head inside of another module (BERT).
    """
    causal_lm = _unwrapped(model)
    head = causal_lm.get_output_embeddings() if hasattr(causal_lm, "get_output_embeddings") else None
    backbone = getattr(causal_lm, getattr(causal_lm, "base_model_prefix", ""), None)
    config = getattr(causal_lm, "config", None)
    settings = (config, getattr(config, "text_config", None))  # the latter where images come in too (Gemma 4)
    transformed = any(getattr(part, name, None) for part in settings for name in _LOGIT_TRANSFORMS)
    plain = {id(child) for child in causal_lm.children()} == {id(backbone), id(head)}
    return (causal_lm, head, backbone) if plain and not transformed else (causal_lm, None, None)


def _scored(head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = head(hidden).float()
    flat = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return flat.view_as(labels)


class _FrozenHeadLosses(torch.autograd.Function):
    r"""Token losses under a frozen linear head, which never makes its logits twice.

    The gradient of token t's loss with respect to its hidden state is :math:`(p_t - e_{y_t})^\top W`. It is computed
    chunk by chunk while the logits are there, and only it is kept: as large as the hidden states, whatever the
    vocabulary. The backward pass scales it.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: nn.Linear, targets: torch.Tensor, tokens: int) -> torch.Tensor:
        losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), tokens):
            part = slice(start, start + tokens)
            target = targets[part, None]
            log_p = head(hidden[part]).float().log_softmax(dim=-1)
            losses[part] = -log_p.gather(-1, target)[:, 0]
            if slope is not None:
                p = log_p.exp_()
                p.scatter_add_(-1, target, torch.full_like(target, -1.0, dtype=p.dtype))
                slope[part] = p.to(head.weight.dtype) @ head.weight
        if slope is not None:
            ctx.save_for_backward(slope)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (gradients[0][..., None] * slope).to(slope.dtype), None, None, None


def check_losses(losses: torch.Tensor, num_examples: int) -> torch.Tensor:
    """Returns ``losses`` if it holds one number per example.

    Raises:
      ValueError: If the shape is not ``(num_examples,)``. A scalar is what Hugging Face models return as ``.loss``:
        a mean over the batch, with which the clipping bounds nothing.
    """
    if losses.shape != (num_examples,):
        raise ValueError(
            f"Expected loss_fn to return one loss per example, shape ({num_examples},); got {tuple(losses.shape)}. "
            "A scalar `.loss` of a Hugging Face model is a mean over the batch, and [n, 1] broadcasts: return a "
            "vector, e.g. cross_entropy(logits, labels, reduction='none')."
        )
    return losses
