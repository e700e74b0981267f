"""Saving and resuming, such that the ledger always wins.

A checkpoint is a folder with theta and the optimizer's state (safetensors) and a JSON file that says how long the
ledger was and what its last hash was. Both tensors saw released gradients only. No random state is saved: a resumed
run draws new noise for new charges.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dpsb.folders import replacing
from dpsb_accounting import Ledger, LedgerError

if TYPE_CHECKING:
    from dpsb.adapter import Adapter
    from dpsb.rebasing import Rebasing

_SCHEMA = "dpsb-checkpoint/1"
_CURRENT, _OLD = "checkpoint", "checkpoint.old"
CHECKPOINT_NAMES = (_CURRENT, _OLD, f"{_CURRENT}.new")
THETA_NAME, STATE_NAME = "theta.safetensors", "checkpoint.json"


def save_checkpoint(
    run_dir: Path,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    ledger: Ledger,
    l2_clip_norm: float | None = None,
    rebasing: Rebasing | None = None,
) -> None:
    """Writes theta, the optimizer and the ledger's position to ``run_dir/checkpoint``, atomically.

    ``l2_clip_norm`` is where an adaptive C stands: a released number, like theta. ``rebasing`` adds its
    windows.

    Raises:
      OSError: If the disk does not take it; the checkpoint before it stays.
    """
    try:
        with replacing(run_dir / _CURRENT) as folder:
            write_state(folder, adapter, optimizer, ledger, l2_clip_norm)
            if rebasing is not None:
                rebasing.save(folder, adapter)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"A checkpoint in {run_dir} cannot be written ({error}); charged steps are spent, a resumed run goes on "
            "from the checkpoint before."
        ) from None


def write_state(
    folder: Path,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    ledger: Ledger,
    l2_clip_norm: float | None = None,
) -> None:
    """Writes what :func:`read_state` needs into ``folder``: released tensors and public facts, nothing else."""
    tensors, structure = _flatten(optimizer.state_dict())
    facts = {
        "schema": _SCHEMA,
        "run_id": ledger.run_id,
        "ledger_length": ledger.length,
        "ledger_head": ledger.head,
        "optimizer": structure,
        **({} if l2_clip_norm is None else {"l2_clip_norm": l2_clip_norm}),
    }
    save_file(adapter.state(), folder / THETA_NAME)
    save_file(tensors, folder / "optimizer.safetensors")
    (folder / STATE_NAME).write_text(json.dumps(facts, indent=1))


def load_checkpoint(
    run_dir: Path,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    ledger: Ledger,
    rebasing: Rebasing | None = None,
) -> bool:
    """Puts the last checkpoint of ``run_dir`` into ``adapter`` and ``optimizer``. Returns False if there is none.

    Steps that the ledger holds beyond the checkpoint are spent and their updates lost.

    Raises:
      LedgerError: If the checkpoint cannot be read, the ledger is of another run, or is shorter than when the
        checkpoint was written: somebody put an old ledger back.
    """
    folder = next((run_dir / name for name in (_CURRENT, _OLD) if (run_dir / name).is_dir()), None)
    if folder is None:
        return False
    read_state(folder, adapter, optimizer, ledger)
    if rebasing is not None:
        try:
            rebasing.load(folder, adapter)
        except (OSError, KeyError, RuntimeError, SafetensorError) as error:
            raise _unreadable(folder, error) from None
    return True


def read_state(folder: Path, adapter: Adapter, optimizer: torch.optim.Optimizer, ledger: Ledger) -> float | None:
    """Puts what :func:`write_state` wrote into ``adapter`` and ``optimizer``; the ledger wins.

    Returns:
      Where an adaptive C stood; None where C is fixed by the plan.

    Raises:
      LedgerError: As for :func:`load_checkpoint`.
    """
    try:
        facts = json.loads((folder / STATE_NAME).read_text())
        theta, tensors = load_file(folder / THETA_NAME), load_file(folder / "optimizer.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(folder, error) from None
    if facts.get("schema") != _SCHEMA or facts.get("run_id") != ledger.run_id:
        raise LedgerError(f"{folder} does not belong to the ledger beside it; start a new run in another folder.")
    ledger.check_not_behind(facts["ledger_length"], facts["ledger_head"])
    adapter.load_state(theta)
    optimizer.load_state_dict(_unflatten(tensors, facts["optimizer"]))
    value = facts.get("l2_clip_norm")
    return None if value is None else float(value)


def saved_clip_norm(run_dir: Path) -> float | None:
    """Where an adaptive C stood at the last checkpoint, which :func:`load_checkpoint` has checked; None without one."""
    for name in (_CURRENT, _OLD):
        if (run_dir / name).is_dir():
            value = json.loads((run_dir / name / STATE_NAME).read_text()).get("l2_clip_norm")
            return None if value is None else float(value)
    return None


def remove_checkpoint(run_dir: Path) -> None:
    """Deletes what only a resume needs, once the run's results are on disk."""
    for name in CHECKPOINT_NAMES:
        shutil.rmtree(run_dir / name, ignore_errors=True)


def _unreadable(folder: Path, error: Exception) -> LedgerError:
    return LedgerError(f"{folder} cannot be read ({type(error).__name__}); start a new run elsewhere.")


def _flatten(value: Any, path: str = "") -> tuple[dict[str, torch.Tensor], Any]:
    """Splits an optimizer's ``state_dict`` into named tensors and plain JSON that refers to them."""
    if isinstance(value, torch.Tensor):
        return {path: value.detach().clone().contiguous()}, {"tensor": path}
    tensors: dict[str, torch.Tensor] = {}
    if isinstance(value, dict):
        pairs = []
        for key, item in value.items():
            inner, plain = _flatten(item, f"{path}/{key}")
            tensors |= inner
            pairs.append([key, plain])
        return tensors, {"dict": pairs}
    if isinstance(value, (list, tuple)):
        items = []
        for index, item in enumerate(value):
            inner, plain = _flatten(item, f"{path}/{index}")
            tensors |= inner
            items.append(plain)
        return tensors, {"list": items}
    return {}, {"value": value}


def _unflatten(tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> Any:
    ((kind, content),) = plain.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unflatten(tensors, item) for key, item in content}
    if kind == "list":
        return [_unflatten(tensors, item) for item in content]
    return content
