"""Where training starts: A, B and theta, kept until the run is finished and bound to its ledger by their hash."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from dpsb.adapter import Adapter, Basis, Factors, Provenance, attach
from dpsb.models import HEAD_NAMES
from dpsb_accounting import Plan

START_NAME = "start.safetensors"
CUT_OFF = "The run in {out} was cut off before its first step; delete the folder and start anew."


class StartError(ValueError):
    """The start of an interrupted run is missing or is not the one that its ledger names."""


def digest(start: bytes) -> str:
    """What the plan holds to bind the ledger to the start: its SHA-256. Public, as the start is."""
    return sha256(start).hexdigest()


def start_of(adapter: Adapter) -> bytes:
    """A, B and where theta starts, as a safetensors file: what a resumed run must find again, bit for bit."""
    tensors = {f"theta/{name}": value.cpu() for name, value in adapter.state().items()}
    for name, (A, B, _) in adapter.factors().items():
        tensors |= {f"{name}.A": A.detach().cpu().contiguous(), f"{name}.B": B.detach().cpu().contiguous()}
    return bytes(save(tensors))


def read_start(out: Path, plan: Plan) -> bytes:
    try:
        start = (out / START_NAME).read_bytes()
    except OSError:
        raise StartError(CUT_OFF.format(out=out)) from None
    details: Mapping[str, Any] = plan.details
    if digest(start) != details.get("start_sha256"):
        raise StartError(f"{out / START_NAME} is not the one that the ledger's plan names; put it back or start anew.")
    return start


def attach_again(model: Any, start: bytes, plan: Plan) -> Adapter:
    """The adapter as the interrupted run began with it."""
    saved = load(start)
    names = sorted({key.removesuffix(".A") for key in saved if key.endswith(".A")})
    factors = {name: Factors(A=saved[f"{name}.A"], B=saved[f"{name}.B"]) for name in names}
    basis = Basis(factors=factors, provenance=Provenance.from_json(plan.basis))
    adapter = attach(model, basis, allow=HEAD_NAMES)
    adapter.load_state({key.removeprefix("theta/"): v for key, v in saved.items() if key.startswith("theta/")})
    return adapter
