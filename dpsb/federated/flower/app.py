"""The Flower app: a folder with three small files that name the two apps of this package, and nothing else."""

from __future__ import annotations

from pathlib import Path

from dpsb import __version__

NAME = "dpsb-federation"
_PACKAGE = "dpsb_federation"
_PROJECT = f"""# Made by `dpsb federate`. The code is that of the package dpsb as it is installed at server and silos.
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{NAME}"
version = "{__version__}"
description = "A federation of dpsb silos"
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "dpsb"

[tool.flwr.app.components]
serverapp = "{_PACKAGE}.server_app:app"
clientapp = "{_PACKAGE}.client_app:app"

[tool.flwr.app.config]
federation = ""
token = ""
starter = 0
patience = 120.0
timeout = 3600.0
"""


def write_app(folder: Path) -> None:
    """Writes the app; what is there already is written anew."""
    package = folder / _PACKAGE
    package.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(_PROJECT)
    (package / "__init__.py").write_text('"""The apps of a federation."""\n')
    for part in ("server", "client"):
        line = f"from dpsb.federated.flower.{part}_app import app\n"
        (package / f"{part}_app.py").write_text(f'"""The {part} app of dpsb."""\n\n{line}\n__all__ = ["app"]\n')
