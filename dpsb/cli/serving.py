"""``dpsb pack``, ``dpsb unpack``, ``dpsb combine``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dpsb.cli._shared import Json, app, guarded


@app.command()
def pack(
    runs: Annotated[list[str], typer.Argument(help="Folders of finished R-only runs; NAME=FOLDER names the tenant.")],
    out: Annotated[Path, typer.Option(help="The pack; tenants are added if it is there.")] = Path("pack"),
    as_json: Json = False,
) -> None:
    """Puts many adapters on one basis into one folder: A and B once, r*r floats a layer for each tenant.

    All runs must have the same model, targets, rank and basis, as data-free bases give them.

    Example: [bold]dpsb pack runs/ward-1 runs/ward-2 --out pack[/bold]
    """

    def run() -> None:
        from dpsb.serving.pack import add_to_pack

        named = [given.rpartition("=") for given in runs]
        folders = {name or Path(folder).name: Path(folder) for name, _, folder in named}
        if len(folders) < len(runs):
            raise ValueError("Two of the runs have the same name; give others, as in NAME=FOLDER.")
        made = add_to_pack(out, folders)
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        facts = {"pack": str(out), "tenants": len(made.tenants), "bytes": size}
        typer.echo(json.dumps(facts) if as_json else f"{out}: {facts['tenants']} tenants, {size:,} bytes")

    guarded(run)


@app.command()
def unpack(
    folder: Annotated[Path, typer.Argument(help="The pack.")],
    tenant: Annotated[str, typer.Argument(help="Whose adapter.")],
    out: Annotated[Path, typer.Option(help="New folder for a plain LoRA adapter.")],
) -> None:
    """Writes one tenant's adapter as a plain LoRA adapter that PEFT loads without dpsb.

    Example: [bold]dpsb unpack pack ward-1 --out ward-1-adapter[/bold]
    """

    def run() -> None:
        from dpsb.serving.pack import read_pack

        read_pack(folder).unpack(tenant, out)
        typer.echo(f"wrote {out}")

    guarded(run)


@app.command()
def combine(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished R-only runs on one basis.")],
    out: Annotated[Path, typer.Option(help="New folder for a plain LoRA adapter.")],
    weights: Annotated[str | None, typer.Option(help="'0.7,0.3'; by default all the same, 1 together.")] = None,
    disjoint_people: Annotated[
        bool,
        typer.Option(
            "--disjoint-people", help="You vouch that nobody has data in two of the runs: their epsilons do not add."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Adds adapters on one basis, and says what epsilon the sum has, from the runs' ledgers.

    Example: [bold]dpsb combine runs/2024 runs/2025 --out both[/bold]
    """

    def run() -> None:
        from dpsb.serving.combine import combine as combined

        try:
            shares = None if weights is None else [float(part) for part in weights.split(",")]
        except ValueError:
            raise ValueError(f"Expected weights={weights!r} to be numbers separated by commas.") from None
        claim = combined(runs, out, weights=shares, disjoint_people=disjoint_people)
        if as_json:
            typer.echo(json.dumps(claim, indent=1))
            return
        from dpsb.display import rounded_up

        typer.echo(
            f"epsilon <= {rounded_up(claim['epsilon']['upper'])} at delta {claim['delta']:g}, per {claim['unit']}, "
            f"{claim['neighboring']} ({claim['composition']})\nwrote {out}"
        )

    guarded(run)
