"""Loading a Hugging Face model and putting a plain LoRA adapter on it."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from dpsb.heads import HEAD_NAMES as HEAD_NAMES
from dpsb.heads import in_head as in_head
from dpsb.losses import measure_head
from dpsb.packaged import PackagedModelError, packaged_folder

HEAD_INIT_STD = 0.3
HEAD_FILE = "head.safetensors"
"""Where the head of a mean-pooled classifier is saved, beside its plain LoRA adapter."""


class ModelError(ValueError):
    """A model that cannot be loaded or adapted; the message says what to change."""


class QuantizedConfigError(ModelError):
    """A quantized model, whose config does not tell what its weights are."""


class MeanPooledClassifier(nn.Module):
    """An encoder, the mean over each example's own tokens, and a linear head: what sentence encoders are made for.

    Args:
      encoder: Returns ``last_hidden_state`` of shape ``(n, t, f)``.
      num_labels: K.
    """

    def __init__(self, encoder: nn.Module, num_labels: int) -> None:
        super().__init__()
        config: Any = encoder.config
        self.config = config
        self.encoder = encoder
        self.classifier = nn.Linear(config.hidden_size, num_labels)

    def forward(self, attention_mask: torch.Tensor, **inputs: torch.Tensor) -> Any:
        """Logits of shape ``(n, K)``; each row is a function of its own example."""
        from transformers.modeling_outputs import SequenceClassifierOutput

        hidden = self.encoder(attention_mask=attention_mask, **inputs).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return SequenceClassifierOutput(logits=self.classifier(pooled.to(self.classifier.weight.dtype)))


def resolve_model(model: str) -> str:
    """The folder or id to load ``model`` from; ``"minilm"`` and ``"smollm2"`` come in packages."""
    try:
        return packaged_folder(model) or model
    except PackagedModelError as error:
        raise ModelError(str(error)) from None


def config_labels(model: str) -> tuple[str, ...] | None:
    """The label names that a classification checkpoint declares in its config, if it declares any."""
    from transformers import AutoConfig

    names = _load(AutoConfig, resolve_model(model)).id2label or {}
    ordered = tuple(str(names[key]) for key in sorted(names))
    return None if not ordered or ordered[0].startswith("LABEL_") else ordered


def usual_task(model: str) -> str:
    """``causal-lm`` where the model's config names a head that writes, otherwise ``classification``."""
    from transformers import AutoConfig

    names = _load(AutoConfig, resolve_model(model)).architectures or ()
    return "causal-lm" if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names) else "classification"


def load_base(
    model: str,
    task: str,
    labels: Sequence[str] = (),
    *,
    dtype: torch.dtype = torch.float32,
    pooling: str = "auto",
    head_init_std: float = HEAD_INIT_STD,
) -> tuple[nn.Module, Any]:
    """The frozen base model for ``task`` and its tokenizer.

    Args:
      model: Folder, Hub id or ``"minilm"``.
      task: ``"classification"`` or ``"causal-lm"``.
      labels: Public label set, for classification.
      dtype: Compute type of the frozen weights.
      pooling: For classification: ``"native"`` is transformers' own sequence-classification class, ``"mean"`` is
        :class:`MeanPooledClassifier`; ``"auto"`` takes the mean for sentence encoders that were trained with it.
      head_init_std: Standard deviation of the new head's weights. Large enough that the cores get a gradient from the
        first step on: with transformers' own 0.02 noise alone would move them.

    Raises:
      ModelError: If it cannot be loaded, or has no way to pad.
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    path = resolve_model(model)
    tokenizer = _load(AutoTokenizer, path)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"The tokenizer of {model} has neither a padding nor an end token to pad with.")
        tokenizer.pad_token = tokenizer.eos_token
    with _quiet_transformers():
        if task == "classification" and (pooling == "mean" or (pooling == "auto" and _is_mean_pooled(path))):
            base: nn.Module = MeanPooledClassifier(_load(AutoModel, path, dtype=dtype), len(labels))
        elif task == "classification":
            base = _load(
                AutoModelForSequenceClassification,
                path,
                dtype=dtype,
                num_labels=len(labels),
                id2label=dict(enumerate(labels)),
                label2id={label: i for i, label in enumerate(labels)},
                ignore_mismatched_sizes=True,
            )
        else:
            base = _load(AutoModelForCausalLM, path, dtype=dtype)
            measure_head(base)
    if task == "classification":
        _start_head(base, head_init_std)
    embedded = _embedding_rows(base)
    if len(tokenizer) > embedded:
        raise ModelError(
            f"The tokenizer of {model} has {len(tokenizer)} tokens, the model embeds {embedded}: a text with one of "
            "the others would end the run. Resize the embeddings and save the model again."
        )
    settings: Any = base.config
    settings.pad_token_id = tokenizer.pad_token_id
    return base, tokenizer


def empty_base(model: str, task: str, num_labels: int, dtype: torch.dtype, pooling: str = "auto") -> nn.Module:
    """The base model from its config alone, on whatever device is the default: on ``meta`` it holds no weights.

    Raises:
      QuantizedConfigError: If the checkpoint is quantized.
      ModelError: If the config cannot be loaded.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    path = resolve_model(model)
    config = _load(AutoConfig, path)
    if getattr(config, "quantization_config", None) is not None:
        raise QuantizedConfigError(f"{model} is quantized; what its weights take cannot be told from the config.")
    if task != "classification":
        made: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    elif pooling == "mean" or (pooling == "auto" and _is_mean_pooled(path)):
        made = MeanPooledClassifier(AutoModel.from_config(config, dtype=dtype), num_labels)
    else:
        config.num_labels = num_labels
        made = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    return made


def _embedding_rows(base: nn.Module) -> int:
    inner: Any = base.encoder if isinstance(base, MeanPooledClassifier) else base
    return int(inner.get_input_embeddings().weight.shape[0])


def _is_mean_pooled(path: str) -> bool:
    """Whether a folder is a sentence encoder that says it averages its tokens."""
    pooling = Path(path) / "1_Pooling" / "config.json"
    return pooling.exists() and bool(json.loads(pooling.read_text()).get("pooling_mode_mean_tokens"))


def _start_head(base: nn.Module, std: float) -> None:
    """Draws the last linear layer of the head from a fixed public generator, with no bias."""
    generator = torch.Generator().manual_seed(0)
    head = head_of(base)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * std)
        if head.bias is not None:
            head.bias.zero_()


def head_of(base: nn.Module) -> nn.Linear:
    """The last linear layer of a classifier's head, which is the one that has a row for each label.

    Raises:
      ModelError: If there is none by a known name.
    """
    heads = [m for n, m in base.named_modules() if isinstance(m, nn.Linear) and in_head(n)]
    if not heads:
        raise ModelError(f"The model has no classification head named {' or '.join(HEAD_NAMES)}.")
    return heads[-1]


def peft_task(base: nn.Module, task: str) -> TaskType:
    """What PEFT calls the task; it trains a head of transformers' own, and none on a bare encoder."""
    if task != "classification":
        return TaskType.CAUSAL_LM
    return TaskType.FEATURE_EXTRACTION if isinstance(base, MeanPooledClassifier) else TaskType.SEQ_CLS


def add_lora(
    base: nn.Module,
    task: str,
    rank: int,
    targets: str | Sequence[str] = "all-linear",
    *,
    init: bool | str = True,
) -> nn.Module:
    """A plain LoRA adapter of uniform rank, scale 1 and no dropout on ``base``, ready for :func:`dpsb.attach`.

    Args:
      rank: r, at most the smaller side of every target weight.
      targets: ``"all-linear"``, names of modules such as ``["query", "value"]``, or one regular expression that the
        whole name must match.
      init: PEFT's ``init_lora_weights``.

    Raises:
      ModelError: If a target does not exist or is smaller than ``rank``.
    """
    pooled = isinstance(base, MeanPooledClassifier)
    names = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=names,
        exclude_modules=".*pooler.*" if pooled else None,  # not used when the tokens are averaged
        task_type=peft_task(base, task),
        init_lora_weights=init,
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT asks transformers 5 by old names
            adapted = get_peft_model(base.encoder if isinstance(base, MeanPooledClassifier) else base, config)
    except ValueError as error:
        linear = sorted({name.rpartition(".")[2] for name, part in base.named_modules() if isinstance(part, nn.Linear)})
        raise ModelError(
            f"targets={names!r} do not fit this model ({error}); its linear layers are called {', '.join(linear)}."
        ) from None
    for name, module in adapted.named_modules():
        if hasattr(module, "lora_A") and rank > min(module.in_features, module.out_features):
            raise ModelError(
                f"rank={rank} exceeds the smaller side of {name} ({module.out_features} x {module.in_features})."
            )
    if isinstance(base, MeanPooledClassifier):
        base.encoder = adapted
        return base
    return adapted


def peft_part(model: nn.Module) -> PeftModel:
    """The PEFT model inside what :func:`add_lora` returned."""
    return model.encoder if isinstance(model, MeanPooledClassifier) else model


def block_lists(model: nn.Module) -> list[nn.ModuleList]:
    """The outermost lists of a transformer's blocks."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not inside:
            found.append((name, module))
    return [module for _, module in found]


def target_shapes(model: nn.Module) -> list[dict[str, int]] | None:
    """The shapes of the weights that the adapter is added to, each with how often it occurs. Public.

    Returns:
      Objects with ``out_features``, ``in_features`` and ``count``, sorted; None if the model has no LoRA layer.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    found = Counter((int(layer.out_features), int(layer.in_features)) for layer in layers)
    rows = [{"out_features": out, "in_features": into, "count": count} for (out, into), count in sorted(found.items())]
    return rows or None


def longest_input(base: nn.Module, tokenizer: Any) -> int | None:
    """The most tokens the model's position embeddings allow, if they are limited."""
    limits = [getattr(base.config, "max_position_embeddings", None), tokenizer.model_max_length]
    for name, module in base.named_modules():  # RoBERTa and its kin start counting after the padding index
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    usable = [int(limit) for limit in limits if limit is not None and 0 < limit < 10**9]
    return min(usable, default=None)


def _load(auto_class: Any, path: str, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(path, use_safetensors=True, **options)  # a pickle may run code
    except (OSError, ValueError) as error:
        if not Path(path).exists() and path.startswith((".", "/", "~")):
            raise ModelError(f"The model folder {path!r} does not exist.") from None
        kind = "folder" if Path(path).exists() else "model id (is there a network?)"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path!r} cannot be loaded as a {kind}: {reason}") from None


@contextmanager
def _quiet_transformers() -> Any:
    """Hides the notice that the classification head is new, and transformers' own progress bar."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
