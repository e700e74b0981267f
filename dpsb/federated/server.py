"""The coordinator's state: what it must find again after a crash, and how a round changes theta."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dpsb.federated.messages import Receipt
from dpsb.federated.terms import Terms
from dpsb.folders import replacing
from dpsb.heads import in_head

SERVER = "server"
_SCHEMA = "dpsb-federation/1"
_BASIS = "basis.safetensors"
_BETAS, _SMALL = (0.9, 0.999), 1e-8


class ServerError(RuntimeError):
    """The coordinator's folder is not in a state for what was asked; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """What became of a round. Public.

    Args:
      round: Its number.
      silos: Whose replies were averaged.
      lost: Who gave none that could be used, with the reason.
      bytes_up: Payload of the replies that were used.
      bytes_down: Payload of the messages that were sent, repetitions included.
      notes: What else was seen.
    """

    round: int
    silos: tuple[str, ...]
    lost: Mapping[str, str]
    bytes_up: int
    bytes_down: int
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The record as JSON."""
        return {
            "round": self.round,
            "silos": list(self.silos),
            "lost": dict(self.lost),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """Everything a coordinator knows; released numbers only.

    Args:
      run_id: Of the federation's run.
      terms: What it runs.
      basis_sha256: The silos' basis.
      round: The round to be done next.
      theta: Where it starts; in the order of the adapter's parameters.
      moments: Of the server's optimizer, by moment and name.
      receipts: The last of each silo.
      left: Silos that are out of the run, with the reason.
      history: The rounds so far.
      tainted: Whether noise of the server came from a seed.
      opened: The round whose sum was opened last, and whose contributions were in it; None before. ``secagg``.
      basis: A and B that the silos paid for, once they are there; empty otherwise.
      basis_record: Whose releases the basis was made from; None otherwise. Its round is that which follows.
    """

    run_id: str
    terms: Terms
    basis_sha256: str
    round: int
    theta: Mapping[str, torch.Tensor]
    moments: Mapping[str, torch.Tensor] = field(default_factory=dict)
    receipts: Mapping[str, Receipt] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    history: tuple[RoundRecord, ...] = ()
    tainted: bool = False
    opened: tuple[int, tuple[str, ...]] | None = None
    basis: Mapping[str, torch.Tensor] = field(default_factory=dict)
    basis_record: RoundRecord | None = None


def save_state(out: Path, state: ServerState) -> None:
    """Writes the state to ``out/server``, whole or not at all."""
    facts = {
        "schema": _SCHEMA,
        "run_id": state.run_id,
        "terms": state.terms.to_json(),
        "basis_sha256": state.basis_sha256,
        "round": state.round,
        "order": list(state.theta),
        "receipts": {name: receipt.to_json() for name, receipt in state.receipts.items()},
        "left": dict(state.left),
        "history": [record.to_json() for record in state.history],
        "tainted": state.tainted,
        "opened": state.opened,
        "basis": None if state.basis_record is None else state.basis_record.to_json(),
    }
    with replacing(out / SERVER) as folder:
        save_file({name: tensor.contiguous() for name, tensor in state.theta.items()}, folder / "theta.safetensors")
        save_file(dict(state.moments), folder / "moments.safetensors")
        if state.basis:
            save_file(dict(state.basis), folder / _BASIS)
        (folder / "server.json").write_text(json.dumps(facts, indent=1))


def load_state(out: Path) -> ServerState | None:
    """The state in ``out/server``; None if there is none.

    A reader beside a running server may meet the moment in which the folder is replaced, so that it looks again.

    Raises:
      ServerError: If it cannot be read.
    """
    for pause in (0.05, 0.5):
        try:
            return _read_state(out)
        except ServerError:
            time.sleep(pause)
    return _read_state(out)


def _read_state(out: Path) -> ServerState | None:
    names = (SERVER, f"{SERVER}.old", SERVER)  # between two looks the new one may take the old one's place
    folder = next((out / name for name in names if (out / name).is_dir()), None)
    if folder is None:
        return None
    try:
        facts = json.loads((folder / "server.json").read_text())
        theta = load_file(folder / "theta.safetensors")
        moments = load_file(folder / "moments.safetensors")
        basis = load_file(folder / _BASIS) if facts.get("basis") is not None else {}
        if facts["schema"] != _SCHEMA:
            raise ServerError(f"{folder} has schema {facts['schema']!r}, not {_SCHEMA!r}.")
        return ServerState(
            run_id=facts["run_id"],
            terms=Terms.from_json(facts["terms"]),
            basis_sha256=facts["basis_sha256"],
            round=facts["round"],
            theta={name: theta[name] for name in facts["order"]},
            moments=moments,
            receipts={name: Receipt.from_json(receipt) for name, receipt in facts["receipts"].items()},
            left=facts["left"],
            history=tuple(_record(entry) for entry in facts["history"]),
            tainted=facts["tainted"],
            opened=None if facts["opened"] is None else (facts["opened"][0], tuple(facts["opened"][1])),
            basis=basis,
            basis_record=None if facts.get("basis") is None else _record(facts["basis"]),
        )
    except ServerError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ServerError(f"{folder} cannot be read ({type(error).__name__}); start a new run elsewhere.") from None


def _record(entry: Mapping[str, Any]) -> RoundRecord:
    return RoundRecord(**{**entry, "silos": tuple(entry["silos"]), "notes": tuple(entry["notes"])})


def server_step(
    theta: Mapping[str, torch.Tensor], gradient: Mapping[str, torch.Tensor], state: ServerState, *, own_rates: bool
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A step of the server's optimizer: post-processing of what was released.

    Args:
      theta: Where it starts.
      gradient: A noisy mean gradient, or theta less the silos' mean; by name. Released.
      state: Holds the terms and the moments; round t is the optimizer's step t + 1.
      own_rates: Take the terms' ``learning_rate`` and ``head_learning_rate`` (for a gradient) instead of
        ``server_learning_rate`` (for a difference to the mean).

    Returns:
      The next theta and moments.
    """
    terms, moments = state.terms, {}
    stepped: dict[str, torch.Tensor] = {}
    for name, value in theta.items():
        g = gradient[name].to(torch.float64)
        rate = terms.server_learning_rate
        if own_rates:
            rate = terms.head_learning_rate if in_head(name) else terms.learning_rate
        rate *= terms.factor(state.round)
        if terms.server_optimizer == "sgd":
            first = terms.momentum * state.moments.get(f"first/{name}", torch.zeros_like(g)) + g
            step = first
        else:
            first = _moment(state, "first", name, g, _BETAS[0])
            second = _moment(state, "second", name, g.square(), _BETAS[1])
            count = state.round + 1
            corrected = second / (1 - _BETAS[1] ** count)
            step = first / (1 - _BETAS[0] ** count) / (corrected.sqrt() + _SMALL)
            moments[f"second/{name}"] = second
        moments[f"first/{name}"] = first
        stepped[name] = (value.to(torch.float64) - rate * step).to(value.dtype)
    return stepped, moments


def _moment(state: ServerState, kind: str, name: str, value: torch.Tensor, beta: float) -> torch.Tensor:
    old = state.moments.get(f"{kind}/{name}")
    return (1 - beta) * value if old is None else beta * old + (1 - beta) * value
