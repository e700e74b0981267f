"""Quantized bases: weight-only schemes pass, schemes that quantize activations are refused by their names.

The base is frozen and only called, so weights may be stored in any way. Activations are another matter: where their
scale, or the choice of which of them stay in full precision, comes from the whole batch, one example's outlier changes
the others' rows *before* clipping, and clipping then bounds nothing. The probe's synthetic tokens need not hold such an
outlier, so these schemes are known by name.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_PACKS = "support_avx512bf16_for_cpu"
_ACTIVATION_SETTINGS = ("act_quant_kwargs", "activation_quantization", "input_quant_func")


def check_quantization(model: nn.Module) -> None:
    """Refuses a model that quantizes activations with statistics of the batch, or in a way that passes no gradient.

    Guarantees:
      * Every module is looked at, adapted or not: a frozen layer couples examples as well as an adapted one.
      * What passes: full and half precision; torchao's weight-only schemes; bitsandbytes' NF4 and FP4, and its int8
        with ``llm_int8_threshold=0.0`` (one scale for each token).

    Raises:
      ValueError: With the module's name, the scheme's name and what to use instead.
    """
    for name, module in model.named_modules():
        found = _refused(module)
        if found is not None:
            raise ValueError(f"{name} is quantized by {found}")


def keep_gradients_exact(model: nn.Module) -> None:
    """Stops bitsandbytes from packing 4-bit weights for inference on a processor, as an evaluation would do.

    With bfloat16 instructions a forward pass in eval mode packs them anew, for good, and the backward pass of the next
    step then unpacks them wrongly: gradients were off by 85 %, without a word.
    """
    for module in model.modules():
        if _is_four_bit(module) and getattr(module, _PACKS, False):
            setattr(module, _PACKS, False)


def _is_four_bit(module: nn.Module) -> bool:
    return type(module).__module__.startswith("bitsandbytes") and hasattr(module, _PACKS)


def _refused(module: nn.Module) -> str | None:
    """What is wrong with the way a module is quantized, as the end of a sentence; None if nothing is."""
    home = type(module).__module__
    if home.startswith("bitsandbytes") and type(module).__name__ == "Linear8bitLt":
        threshold = getattr(module.state, "threshold", 0.0)
        if threshold:
            return (
                f"LLM.int8 with llm_int8_threshold={threshold}: an outlier in one example takes a feature of all "
                "examples out of the int8 product, which couples them. Set llm_int8_threshold=0.0, or load in 4 bit."
            )
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if _is_four_bit(module) and getattr(state, "packing_format_for_cpu", False):
        return (
            "bitsandbytes and packed for inference on this processor by a forward pass in eval mode, after which its "
            "gradients are wrong. Load the model anew, and attach before evaluating."
        )
    if home.startswith("transformer_engine"):
        return "Transformer Engine: FP8 scales come from the largest activation of the batch. Use bfloat16 modules."
    if home.startswith("torch.") and "quantized" in home:
        return "torch's eager int8: its scale is the whole batch's, and it passes no gradient. Use weight-only int8."
    for weight in module.parameters(recurse=False):
        found = _torchao_activations(weight)
        if found is not None:
            return found
    return None


def _torchao_activations(weight: Any) -> str | None:
    if not type(weight).__module__.startswith("torchao."):
        return None
    settings = next(
        (value for name in _ACTIVATION_SETTINGS if (value := getattr(weight, name, None)) is not None), None
    )
    if settings is None:
        return None
    kind = f"torchao with quantized activations ({type(weight).__name__}"
    if "PerTensor" in str(settings):
        return (
            f"{kind}, per tensor): one scale for the whole batch, so an outlier in one example moves the others. Use a "
            "weight-only scheme."
        )
    return f"{kind}): no gradient passes through it, so layers below would not learn. Use a weight-only scheme."
