"""The methods by name. Needs no torch, so that settings can be checked at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

METHODS = {
    "sb": "R-only (this package): W0 + B R A with A and B frozen and orthonormal, only R trained",
    "lora-xs": "R-only in the weight's singular directions with the singular values in A, as LoRA-XS was published",
    "lora": "LoRA: A and B trained, B = 0 at the start",
    "lora-plus": "LoRA with a larger learning rate for B",
    "ffa-lora": "FFA-LoRA: A frozen, random and orthonormal; B trained",
    "bitfit": "the biases of linear and normalization layers",
    "head-only": "the classification head on the frozen model",
    "full": "every linear and normalization layer; embedding tables stay frozen",
}
PEFT_INITS = {
    "pissa": "LoRA from the weight's leading singular triples",
    "olora": "LoRA from a QR factorization of the weight",
    "orthogonal": "LoRA with orthogonal factors whose product is 0",
    "mica": "LoRA in the weight's smallest singular directions, A trained",
}
"""Starts of PEFT's LoRA that need no data, for ``peft:NAME``."""
PUBLIC_STARTS = {
    "eva": "LoRA, A from the leading singular directions of each layer's inputs over public rows",
    "lora_ga": "LoRA from the leading singular vectors of each weight's mean gradient over public rows",
}
"""Starts of LoRA's that read data, for ``peft:NAME:FILE`` with a file that is public."""
INITS_THAT_MOVE_THE_BASE = ("pissa", "olora", "lora_ga")
"""Starts with B0 A0 in the factors and W0 - B0 A0 in the frozen weight: the factors must begin there."""

_BARE = (
    "it trains bare tensors, for which Opacus has no exact per-example rule (its fallback would build per-example "
    "gradients of the frozen weights)"
)
_NO_ROWS = "its trained tensors do not see the examples in dimension 0, so there are no per-example gradients of them"
_VARIANT = "it is an option of PEFT's LoraConfig, not a method of its own, and is not offered here"
_BARE_METHODS = """
Adamss AdaLora Beft BOFT C3A Deft Delora FourierFT Frod Glora Gralora Hira HRA IA3 LoHa LoKr Miss OSF Poly Pvera
RandLora Road Shira Supertuning TinyLora TrainableTokens UniLora VBLoRA Vera WaveFT
"""
_PROMPT_METHODS = """
AdaptionPrompt Cartridge CPT MultitaskPromptTuning PrefixTuning PromptEncoder PromptTuning
"""
REFUSED = {
    **dict.fromkeys(_BARE_METHODS.split(), _BARE),
    **dict.fromkeys(_PROMPT_METHODS.split(), _NO_ROWS),
    "OFT": "it keeps its factor orthogonal, and noise on every coordinate leaves that set",
    "Psoft": "it trains a bare matrix, which is orthogonal unless psoft_orth is False, and noise on every coordinate "
    "leaves that set; the free one between the weight's singular directions is 'sb' on basis 'weight', so use sb",
    "Lily": "it routes by an average over the whole batch, so that one example moves the gradients of the others",
    "XLora": "it weighs adapters that were trained before, by a second pass through the model; train one adapter here",
    **dict.fromkeys(("Arrow", "BdLora", "Kasa", "Monteclora", "Velora"), _VARIANT),
    "Peanut": "it multiplies with its factors without calling them as layers, so that their rows are never seen",
    "Shadow": "it copies normalization layers for which Opacus has no exact per-example rule",
    "corda": "its start reads data; from public data start only 'peft:eva:FILE' and 'peft:lora_ga:FILE'",
    "loftq": "it quantizes the base weights as it starts; quantize the model first and use 'lora'",
}
"""Why a method of PEFT is not offered, by the name of its ``PeftConfig`` (without "Config") or of LoRA's start."""


class MethodError(ValueError):
    """A method that does not exist or cannot be made private exactly; the message says why and which there are."""


@dataclass(frozen=True)
class Method:
    """How a model is trained.

    Args:
      name: As the user gave it; a start of LoRA's as it is listed.
      kind: ``"cores"`` (R-only), ``"peft"`` (an adapter of PEFT's) or ``"model"`` (parts of the model itself).
      peft: For ``peft:NAME``: the name of a start of LoRA's or of a ``PeftConfig`` class, see :func:`plain_name`.
      source: For ``peft:NAME:FILE``: the public file that the factors start from.
    """

    name: str
    kind: str
    peft: str | None = None
    source: str | None = None

    @property
    def has_basis(self) -> bool:
        """Whether the user chooses the basis."""
        return self.name == "sb"

    @property
    def label(self) -> str:
        """As a reader sees it: ``"lora"``, ``"peft:eva (near.csv)"``."""
        return self.name if self.source is None else f"peft:{self.peft} ({Path(self.source).name})"


def method_named(name: str) -> Method:
    """The method of that name.

    Raises:
      MethodError: If there is none, or it has no exact per-example gradients.

    Example:
      >>> method_named("lora").kind
      'peft'
      >>> method_named("peft:LoRA-GA:near.csv").name
      'peft:lora_ga:near.csv'
      >>> method_named("peft:IA3Config")
      Traceback (most recent call last):
      dpsb.baselines.methods.MethodError: method='peft:IA3Config' is refused: it trains bare tensors, ...
    """
    family, _, rest = name.partition(":")
    if family == "peft":
        start, _, source = rest.partition(":")
        plain = plain_name(start)
        if not plain:
            raise MethodError(f"Expected method={name!r} to name a start of LoRA or a PeftConfig; {_listed()}.")
        for refused, reason in REFUSED.items():
            if plain == plain_name(refused):
                raise MethodError(f"method={name!r} is refused: {reason}.")
        for public in PUBLIC_STARTS:
            if plain == plain_name(public):
                return _public_start(name, public, source)
        if source:
            raise MethodError(f"method={name!r} takes no file; those that do are {', '.join(_with_files())}.")
        return Method(f"peft:{plain}" if plain in PEFT_INITS else name, "peft", plain)
    if rest or family not in METHODS:
        raise MethodError(f"Expected method={name!r} to be one of those that exist: {_listed()}.")
    kinds = {"sb": "cores", "lora-xs": "cores", "bitfit": "model", "head-only": "model", "full": "model"}
    return Method(name, kinds.get(name, "peft"))


def plain_name(name: str) -> str:
    """A name of PEFT's without what people spell differently.

    Example:
      >>> plain_name("LoraGAConfig"), plain_name("lora-ga"), plain_name("LN_Tuning")
      ('loraga', 'loraga', 'lntuning')
    """
    return name.replace("-", "").replace("_", "").lower().removesuffix("config")


def _public_start(name: str, start: str, source: str) -> Method:
    if not source.strip():
        raise MethodError(f"method={name!r} needs a file of public data, which its start reads: peft:{start}:FILE.")
    if "," in source:
        raise MethodError(f"method={name!r} takes one public file, got {source!r}.")
    return Method(f"peft:{start}:{source.strip()}", "peft", start, source.strip())


def _with_files() -> list[str]:
    return [f"peft:{start}:FILE" for start in PUBLIC_STARTS]


def _listed() -> str:
    starts = [*(f"peft:{start}" for start in PEFT_INITS), *_with_files()]
    return f"{', '.join([*METHODS, *starts])}, peft:<name of a PeftConfig>"
