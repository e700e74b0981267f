"""Differentially private fine-tuning of language models with LoRA-SB adapters.

Names are loaded when they are first used, so that ``dpsb --help`` does not wait for torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_HOME = {
    "adapter": ("Adapter", "Basis", "Factors", "Provenance", "attach", "detach", "merge", "set_gradient"),
    "capture": ("per_example_gradients",),
    "config": ("RunConfig",),
    "losses": ("causal_lm_loss", "classification_loss", "seq2seq_loss"),
    "mechanism": ("Mechanism", "clip_and_sum"),
    "plan": ("make_plan",),
    "probe": ("ProbeError",),
    "randomness": ("SeededRandomness", "SystemRandomness"),
    "run": ("Run", "fine_tune"),
    "sampling": ("microbatches", "poisson_draw"),
    "train": ("Knobs", "Progress", "fit", "private_steps"),
    "trainer.arguments": ("PrivacyArguments",),
    "trainer.hf": ("DPTrainer",),
    "trainer.mixin": ("DPTrainerMixin",),
    "trainer.sft": ("DPSFTTrainer",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__version__ = "0.1.0"
__all__ = [*sorted(_MODULE_OF), "__version__"]


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'dpsb' has no attribute {name!r}")
    return getattr(import_module(f"dpsb.{module}"), name)


def __dir__() -> list[str]:
    return __all__


if find_spec("torch") is None:
    _MISSING = (
        "dpsb trains with torch, which is not installed: pip install '.[train]' in a checkout. "
        "(The auditor's package, dpsb_accounting, works without it.)"
    )
    if Path(sys.argv[0]).name == "dpsb":  # the console script: one sentence, no traceback
        raise SystemExit(f"error: {_MISSING}")
    raise ImportError(_MISSING)
