"""Settings of a run from a file."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpsb.config import ConfigError, check_keys

DATA_AT = "data_at"
"""What a run's own file says beside its settings: where ``data`` was, from whatever folder it was typed. Stays here."""


_SHORT = {"lr": "learning_rate", "head_lr": "head_learning_rate", "warm_start_lr": "warm_start_learning_rate"}
"""Settings that the command line has a shorter name for."""


def read_config(path: str | Path) -> dict[str, Any]:
    """The settings in a ``.toml`` or ``.json`` file.

    Raises:
      ConfigError: If the file is missing or malformed, or a key is unknown.
    """
    file = Path(path)
    try:
        text = file.read_text()
        settings = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read as settings: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{file} must hold one table of settings.")
    settings.pop(DATA_AT, None)
    settings = long_names(settings, str(file))
    check_keys(settings, str(file))
    return {name: math.inf if value == "inf" else value for name, value in settings.items()}


def long_names(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings with ``lr`` as ``learning_rate``, and so on.

    Raises:
      ConfigError: If one is there under both names.
    """
    for short, name in _SHORT.items():
        if short in settings and name in settings:
            raise ConfigError(f"{where} has both {short!r} and {name!r}, which are one setting; leave one out.")
    return {_SHORT.get(name, name): value for name, value in settings.items()}
