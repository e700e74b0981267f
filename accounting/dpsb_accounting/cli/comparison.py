"""The command that compares noise on the weights at equal privacy: `compare`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dpsb_accounting import noise, shapes
from dpsb_accounting.cli._shared import AsJson, NoiseMultiplier, app

_SHAPE = re.compile(r"(\d+)x(\d+)(?:\*(\d+))?")
_FACTORS = ("orthonormal", "peft_start")
_NAMES = {
    "r_only": "R-only",
    "fed_sb": "Fed-SB",
    "ffa_lora": "FFA-LoRA",
    "lora": "LoRA",
    "full_matrix": "whole matrix",
    "fedsvd": "FedSVD",
    "fedit": "FedIT",
    "fedex_lora": "FedEx-LoRA",
    "flora": "FLoRA",
}
_NOT_INFORMATION = (
    "Equal epsilon: all rows have the same noise multiplier, sampling and steps. Equal clip norm is not equal "
    "information: how much of the gradient each method keeps within the clip norm has to be measured."
)


@app.command("compare")
def compare_command(
    noise_multiplier: NoiseMultiplier = 1.0,
    l2_clip_norm: Annotated[float, typer.Option(help="Clip norm C of each example's (or client's) vector.")] = 1.0,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="Shape of a target weight, OUTxIN or OUTxIN*COUNT; give it once per different shape."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank r of the adapter.")] = None,
    layers: Annotated[int, typer.Option(help="How many blocks of the model have these weights.")] = 1,
    layers_file: Annotated[
        Path | None,
        typer.Option(help="JSON array of layers instead of --layer: out_features, in_features, rank, count, norm_a..."),
    ] = None,
    factors: Annotated[
        str,
        typer.Option(help="Size of LoRA's factors: orthonormal, or peft_start (B = 0, A as PEFT draws it)."),
    ] = "orthonormal",
    expected_batch_size: Annotated[float, typer.Option(help="Divisor of the noisy sum of gradients.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Steps of plain SGD whose noise adds up (between two averages).")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of that SGD.")] = 1.0,
    clients: Annotated[int, typer.Option(help="1 compares central runs; more compare federated averages.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Compare how much noise reaches the weights at the same privacy; nothing is trained.

    Every method releases a vector with the same noise on each number. R-only
    releases r*r numbers per weight, and its noise arrives on the weight as it is:
    energy r^2. Where A or B itself is trained, the noise is multiplied by the
    other factor and spread over a whole side of the weight; where both are, their
    noises are multiplied with each other too.

    The energy is the expected squared length of the noise on all target weights,
    and its squared part is what comes from products of noises. Numbers and bytes
    are those of one release; down is what the server sends each client back.

    Example:  dpsb-accounting compare --layer 768x768*2 --layers 12 --rank 16

    Example:  dpsb-accounting compare --layers-file shapes.json --clients 10
    """
    rows = noise.compare(
        _layers(layer, layers_file, rank, layers, factors),
        noise_multiplier=noise_multiplier,
        l2_clip_norm=l2_clip_norm,
        expected_batch_size=expected_batch_size,
        steps=steps,
        learning_rate=learning_rate,
        clients=clients,
    )
    if as_json:
        content = {"rows": [row.to_json() for row in rows], "note": _NOT_INFORMATION}
        typer.echo(json.dumps(content, indent=2))
        return
    title = f"Noise on the weights, noise {rows[0].noise_std:.4g} on each released number"
    if clients > 1:
        title += f" of each of {clients} clients"
    table = Table(title=title, title_justify="left")
    table.add_column("method", no_wrap=True)
    last = ("bytes up", "bytes down") if clients > 1 else ("numbers", "bytes")
    for name in ("energy", "squared", "x R-only", *last):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        up, down = _size(row.bytes_released), _size(row.bytes_received)
        table.add_row(
            _NAMES[row.method],
            f"{row.energy:.3g}",
            f"{row.product:.3g}" if row.product else "-",
            f"{row.ratio_to_r_only:.4g}",
            *((up, down) if clients > 1 else (f"{row.dimension:,}", up)),
        )
    Console().print(table)
    typer.echo(_NOT_INFORMATION)


def _size(number: float) -> str:
    """A number of bytes in the largest unit that leaves at least 1."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def _layers(
    sizes: list[str] | None, file: Path | None, rank: int | None, blocks: int, factors: str
) -> tuple[shapes.Layer, ...]:
    if bool(sizes) == (file is not None):
        raise ValueError("give the target weights either by --layer OUTxIN or by --layers-file FILE.json")
    if factors not in _FACTORS:
        raise ValueError(f"factors must be one of {', '.join(map(repr, _FACTORS))}, not {factors!r}")
    if blocks < 1:
        raise ValueError(f"layers must be at least 1, not {blocks!r}")
    if file is not None:
        if factors != "orthonormal" or blocks != 1:
            raise ValueError("--layers-file states its own norms and counts; leave --factors and --layers out")
        return shapes.layers_from_json(_json(file), rank)
    if rank is None:
        raise ValueError("rank must be given with --layer")
    found = []
    for shape in sizes or []:
        match = _SHAPE.fullmatch(shape)
        if match is None:
            raise ValueError(f"layer must be OUTxIN or OUTxIN*COUNT, such as 768x768*2, not {shape!r}")
        rows, columns, count = int(match[1]), int(match[2]), int(match[3] or 1) * blocks
        if factors == "peft_start":
            found.append(shapes.Layer.at_peft_start(rows, columns, rank, count))
        else:
            found.append(shapes.Layer(out_features=rows, in_features=columns, rank=rank, count=count))
    return tuple(found)


def _json(file: Path) -> object:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
