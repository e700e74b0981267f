"""Where training starts: A, B and theta, kept until the run is finished and bound to its ledger by their hash."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from dpsb.adapter import Adapter, Basis, Factors, Provenance, attach
from dpsb.baselines.build import adapt, frozen_factors
from dpsb.baselines.methods import method_named
from dpsb.baselines.public_starts import LORA_GA, move_base
from dpsb.models import HEAD_NAMES
from dpsb_accounting import Ledger, Plan
from dpsb_accounting.ledger import LEDGER_NAME

START_NAME = "start.safetensors"


class StartError(ValueError):
    """The start of an interrupted run is missing or is not the one that its ledger names."""


def digest(start: bytes) -> str:
    """What the plan holds to bind the ledger to the start: its SHA-256. Public, as the start is."""
    return sha256(start).hexdigest()


def start_of(adapter: Adapter) -> bytes:
    """Frozen factors and where theta starts, as a safetensors file: what a resumed run must find again, bit for bit."""
    tensors = {f"theta/{name}": value.cpu() for name, value in adapter.state().items()}
    for name, (A, B, _) in adapter.factors().items():
        tensors |= {f"{name}.A": A.detach().cpu().contiguous(), f"{name}.B": B.detach().cpu().contiguous()}
    tensors |= {f"frozen/{name}": value.cpu().contiguous() for name, value in frozen_factors(adapter).items()}
    return bytes(save(tensors))


def cut_off(out: Path) -> str:
    """What to tell of a run that lacks what a resume needs: a ledger that holds charges is not to be deleted."""
    record = Ledger.read(out / LEDGER_NAME)
    if any(record.charged(phase.name) for phase in record.plan.phases):
        return (
            f"The run in {out} lacks what a resume needs, and steps are charged: keep its ledger, start anew in "
            "another folder, and add up the epsilons of both."
        )
    return f"The run in {out} was cut off before its first step; delete the folder and start anew."


def read_start(out: Path, plan: Plan) -> bytes:
    try:
        start = (out / START_NAME).read_bytes()
    except OSError:
        raise StartError(cut_off(out)) from None
    details: Mapping[str, Any] = plan.details
    if digest(start) != details.get("start_sha256"):
        raise StartError(f"{out / START_NAME} is not the one that the ledger's plan names; put it back or start anew.")
    return start


def attach_again(model: Any, start: bytes, plan: Plan) -> Adapter:
    """The adapter as the interrupted run began with it."""
    details: Mapping[str, Any] = plan.details
    return attach_saved(model, start, plan.basis, details.get("method", "sb"))


def attach_saved(model: Any, start: bytes, basis: Mapping[str, Any], method_name: str = "sb") -> Adapter:
    """The adapter as a start file has it; ``basis`` is its provenance.

    A base that LoRA-GA moves is moved by the file's own factors: gradients do not come out the same to the bit on every
    machine.
    """
    saved, method, provenance = load(start), method_named(method_name), Provenance.from_json(basis)
    adapter = adapt(model, method, provenance) if method.kind != "cores" else _attach_cores(model, saved, provenance)
    adapter.load_state({key.removeprefix("theta/"): v for key, v in saved.items() if key.startswith("theta/")})
    with torch.no_grad():
        for name, tensor in frozen_factors(adapter).items():
            tensor.copy_(saved[f"frozen/{name}"])
    if method.peft == LORA_GA:
        move_base(model)
    return adapter


def _attach_cores(model: Any, saved: Mapping[str, torch.Tensor], provenance: Provenance) -> Adapter:
    names = sorted({key.removesuffix(".A") for key in saved if key.endswith(".A")})
    factors = {name: Factors(A=saved[f"{name}.A"], B=saved[f"{name}.B"]) for name in names}
    return attach(model, Basis(factors=factors, provenance=provenance), allow=HEAD_NAMES)
