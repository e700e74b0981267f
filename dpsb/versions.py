"""Which software a run would be made with: what to put into a bug report, and beside a result."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "dpsb",
    "torch",
    "transformers",
    "peft",
    "opacus",
    "dp-accounting",
    "prv-accountant",
    "numpy",
    "scipy",
    "cryptography",
    "safetensors",
    "datasets",
    "tokenizers",
    "huggingface-hub",
    "accelerate",
    "trl",
    "flwr",
)
"""Distributions that a run's numbers, files or protection may depend on."""


def versions() -> dict[str, str | None]:
    """Versions of this package and of what it rests on, of Python and of the platform. Public; imports none of them.

    Returns:
      By name; None where a package is not installed. ``"platform"`` names system and processor, no host.

    Example:
      >>> found = versions()
      >>> found["python"].count("."), found["dpsb"] is not None
      (2, True)
    """
    from dpsb import __version__

    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return {
        **found,
        "dpsb": __version__,  # of the code that runs, which an installed distribution may not be
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "platform": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
    }
