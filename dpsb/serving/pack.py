"""One basis, many tenants: a folder that holds A and B once and r*r floats a layer for each adapter.

A LoRA adapter of a weight (out, in) has r (in + out) numbers, a core r*r. A thousand tenants of one model differ in
their cores and heads only, if they were trained on one basis (data-free ones are the same for everybody).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from dpsb.folders import check_new, new_folder
from dpsb.run import SETTINGS_NAME, RunError
from dpsb.serving.adapters import TOKENIZER_FILES, CoreAdapter, copy_plain_files, read_core_adapter, write_plain_adapter
from dpsb_accounting import Ledger, LedgerError, make_report
from dpsb_accounting.files import write_whole
from dpsb_accounting.ledger import LEDGER_NAME

SCHEMA, CLAIM = "dpsb-pack/1", "dpsb_claim"
_PACK, _BASIS, _TENANTS = "pack.json", "basis.safetensors", "tenants"
_SHARED = ("model", "task", "labels", "rank", "targets", "pooling", "max_length", "dtype", "basis")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Pack:
    """A pack on disk.

    Args:
      folder: Where it is.
      shared: The adapter's shared parts; its ``R`` is empty.
      settings: Settings of the runs that have to do with the model: public.
    """

    folder: Path
    shared: CoreAdapter
    settings: Mapping[str, Any]

    @property
    def tenants(self) -> list[str]:
        """Names, in order."""
        return sorted(path.stem for path in (self.folder / _TENANTS).glob("*.safetensors"))

    def read(self, tenant: str) -> CoreAdapter:
        """A tenant's adapter.

        Raises:
          RunError: If there is none of that name, or its file does not fit the pack.
        """
        tensors = self._tensors(tenant)
        layers = list(self.shared.A)
        cores = tensors.pop("cores", torch.empty(0))
        rank = int(self.shared.config["r"])
        if cores.shape != (len(layers), rank, rank):
            raise RunError(f"The file of tenant {tenant!r} holds cores of shape {tuple(cores.shape)}: not this pack's.")
        parts: dict[str, dict[str, torch.Tensor]] = {"direct": {}, "head": {}}
        for name, value in tensors.items():
            part, _, key = name.partition("/")
            if part not in parts:
                raise RunError(f"The file of tenant {tenant!r} holds {name!r}, which no pack has.")
            parts[part][key] = value
        return replace(self.shared, R=dict(zip(layers, cores, strict=True)), **parts)

    def claim(self, tenant: str) -> dict[str, Any]:
        """What the tenant's report claimed when it was packed: epsilon, delta, unit, relation, ledger. Public."""
        with self._open(tenant) as file:
            found: dict[str, Any] = json.loads((file.metadata() or {}).get(CLAIM, "{}"))
        return found

    def unpack(self, tenant: str, out: Path) -> None:
        """Writes a tenant's adapter as a plain LoRA adapter with its tokenizer and its claim (``claim.json``).

        Raises:
          RunError: If there is no such tenant.
          FileExistsError: If ``out`` holds something.
        """
        check_new(out)
        adapter = self.read(tenant)
        with new_folder(out) as new:
            write_plain_adapter(adapter, new)
            (new / "claim.json").write_text(json.dumps(self.claim(tenant), indent=1) + "\n")
            copy_plain_files(self.folder / "tokenizer", "*", new)

    def _path(self, tenant: str) -> Path:
        path = self.folder / _TENANTS / f"{tenant}.safetensors"
        if not _NAME.fullmatch(tenant) or not path.exists():
            few = ", ".join(self.tenants[:5]) + (" ..." if len(self.tenants) > 5 else "")
            raise RunError(f"{self.folder} holds no tenant {tenant!r}; there are {few or 'none'}.")
        return path

    def _open(self, tenant: str) -> Any:
        try:
            return safe_open(self._path(tenant), "pt")
        except SafetensorError:
            raise RunError(f"The file of tenant {tenant!r} in {self.folder} is damaged.") from None

    def _tensors(self, tenant: str) -> dict[str, torch.Tensor]:
        with self._open(tenant) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def read_pack(folder: Path) -> Pack:
    """Opens a pack.

    Raises:
      RunError: If the folder holds none.
    """
    try:
        facts = json.loads((folder / _PACK).read_text())
        tensors = load_file(folder / _BASIS)
        layers, config, settings = facts["layers"], facts["adapter_config"], facts["settings"]
        if facts["schema"] != SCHEMA:
            raise RunError(f"{folder} is a pack of another version ({facts['schema']!r}); this one reads {SCHEMA!r}.")
        A, B = ({layer: tensors[f"{layer}.{part}"] for layer in layers} for part in "AB")
    except (OSError, ValueError, KeyError, SafetensorError):
        raise RunError(f"{folder} holds no pack, or a damaged one.") from None
    return Pack(folder, CoreAdapter(config, A, B, {}, {}, {}, facts.get("details", {})), settings)


def add_to_pack(folder: Path, runs: Mapping[str, Path]) -> Pack:
    """Puts finished R-only runs into a pack, which is made if it is not there.

    Args:
      folder: The pack.
      runs: Tenant names and folders of their runs. All must have the pack's basis, bit for bit.

    Returns:
      The pack.

    Raises:
      RunError: If a run is not finished, is not R-only, has another basis, or a name is taken; nothing is added then.
    """
    for name in runs:
        if not _NAME.fullmatch(name):
            raise RunError(f"Expected the tenant name {name!r} to be letters, digits, '.', '_' and '-', at most 100.")
    adapters = {name: read_core_adapter(path) for name, path in runs.items()}
    claims = {name: _claim_of(path) for name, path in runs.items()}
    if (folder / _PACK).exists():
        pack = read_pack(folder)
        first, of = replace(pack.shared, direct={}, head={}), "the pack"
        if taken := sorted(set(pack.tenants) & set(runs)):
            raise RunError(f"{folder} holds a tenant {taken[0]!r} already; give another name, as in NAME=FOLDER.")
        if pack.tenants:
            first = pack.read(pack.tenants[0])
    else:
        if folder.exists() and any(folder.iterdir()):
            raise RunError(f"{folder} is neither empty nor a pack; choose another folder.")
        first, of = next(iter(adapters.values())), next(iter(runs))
    for name, adapter in adapters.items():
        if (odd := first.same_basis(adapter)) is not None:
            raise RunError(f"{name} cannot share a pack with {of}: they differ in {odd}.")
    if not (folder / _PACK).exists():
        _write_shared(folder, first, next(iter(runs.values())))
    for name, adapter in adapters.items():
        _write_tenant(folder / _TENANTS / f"{name}.safetensors", adapter, claims[name])
    return read_pack(folder)


def _claim_of(run: Path) -> dict[str, Any]:
    try:
        ledger = Ledger.read(run / LEDGER_NAME)
    except LedgerError as error:
        raise RunError(f"The ledger in {run} cannot be read: {error}") from None
    report = make_report(ledger).to_json()
    names = ("claim", "epsilon", "delta", "unit", "neighboring", "num_examples", "taints")
    several = bool(ledger.plan.details.get("part_of_sweep"))  # then what all runs of the sweep cost together is more
    facts = {name: report.get(name) for name in names} | {"part_of_sweep": several}
    return facts | {"run_id": ledger.run_id, "ledger_head": ledger.head}


def _write_shared(folder: Path, adapter: CoreAdapter, run: Path) -> None:
    settings = json.loads((run / SETTINGS_NAME).read_text()) if (run / SETTINGS_NAME).exists() else {}
    plan = Ledger.read(run / LEDGER_NAME).plan
    details = plan.details
    known = {**settings, **{name: details[name] for name in ("labels", "pooling") if name in details}}
    known["basis"] = dict(plan.basis)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _TENANTS).mkdir(exist_ok=True)
    tensors = {f"{layer}.A": value.contiguous() for layer, value in adapter.A.items()}
    tensors |= {f"{layer}.B": value.contiguous() for layer, value in adapter.B.items()}
    save_file(tensors, folder / _BASIS, metadata={"format": "pt"})
    (folder / "tokenizer").mkdir(exist_ok=True)
    for pattern in TOKENIZER_FILES:
        copy_plain_files(run, pattern, folder / "tokenizer")
    facts = {
        "schema": SCHEMA,
        "layers": list(adapter.A),
        "adapter_config": dict(adapter.config),
        "details": dict(adapter.details),
        "settings": {name: known[name] for name in _SHARED if name in known},
    }
    write_whole(folder / _PACK, (json.dumps(facts, indent=1) + "\n").encode())


def _write_tenant(path: Path, adapter: CoreAdapter, claim: Mapping[str, Any]) -> None:
    tensors = {"cores": torch.stack([adapter.R[layer] for layer in adapter.A])}
    tensors |= {f"direct/{name}": value.contiguous() for name, value in adapter.direct.items()}
    tensors |= {f"head/{name}": value.contiguous() for name, value in adapter.head.items()}
    new = path.with_name(f"{path.name}.new")
    save_file(tensors, new, metadata={"format": "pt", CLAIM: json.dumps(claim)})
    new.replace(path)
