"""Many tenants in one loaded model: switching copies a few kilobytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpsb.adapter import Adapter, Basis, Factors, Provenance, attach, lora_layers
from dpsb.models import HEAD_NAMES, add_lora, load_base
from dpsb.prepare import targets_of
from dpsb.run import RunError
from dpsb.serving.adapters import CoreAdapter
from dpsb.serving.pack import read_pack


class Tenants:
    """A model with a pack's basis, computing for one tenant at a time.

    Not for threads that serve different tenants at once: :meth:`use` writes into the model.

    Args:
      folder: A pack.

    Example:
      tenants = Tenants(Path("pack"))
      tenants.use("ward-7")
      logits = tenants.model(**batch).logits
    """

    def __init__(self, folder: Path) -> None:
        self.pack = read_pack(folder)
        settings: Any = self.pack.settings
        base, self.tokenizer = load_base(
            settings["model"],
            settings["task"],
            tuple(settings.get("labels", ())),
            dtype=getattr(torch, settings.get("dtype", "float32")),
            pooling=settings.get("pooling", "auto"),
        )
        self.model: nn.Module = add_lora(base, settings["task"], settings["rank"], targets_of(settings["targets"]))
        A, B = self.pack.shared.A, self.pack.shared.B
        self._layers = {name: _layer_of(name, A) for name in lora_layers(self.model)}
        factors = {name: Factors(A=A[layer], B=B[layer]) for name, layer in self._layers.items()}
        basis = Basis(factors=factors, provenance=Provenance.from_json(settings["basis"]))
        self._adapter: Adapter = attach(self.model, basis, allow=HEAD_NAMES)
        self._own = dict(self._adapter.named_parameters())
        self.tenant: str | None = None
        self.model.eval()

    def use(self, tenant: str) -> None:
        """Makes the model this tenant's: its cores and head are read from the pack and copied in.

        Raises:
          RunError: If there is no such tenant, or its file does not fit the model; the model is then what it was.
        """
        adapter = self.pack.read(tenant)
        new = {f"{core.name}.R": adapter.R[self._layers[core.name]] for core in self._adapter.cores}
        for name, value in _direct(adapter):
            own = next((own for own in self._own if own.endswith(name)), name)
            if own not in self._own or self._own[own].shape != value.shape:
                raise RunError(f"The file of tenant {tenant!r} holds {name}, which this model does not train.")
            new[own] = value
        if missing := sorted(set(self._own) - set(new)):
            raise RunError(f"The file of tenant {tenant!r} lacks {missing[0]}.")
        self.tenant = None
        with torch.no_grad():
            for name, value in new.items():
                self._own[name].copy_(value)
        self.tenant = tenant


def _direct(adapter: CoreAdapter) -> Iterator[tuple[str, torch.Tensor]]:
    """What is trained besides the cores, under the end of its name in the model."""
    for name, value in adapter.direct.items():
        module, _, part = name.rpartition(".")
        yield f"{module.rpartition('.')[2]}.modules_to_save.default.{part}", value
    for name, value in adapter.head.items():
        yield f"classifier.{name}", value


def _layer_of(name: str, layers: Any) -> str:
    found = next((layer for layer in layers if name == layer or name.endswith(f".{layer}")), None)
    if found is None:
        raise RunError(f"The pack's basis has no factors for {name}; it was made with another model or targets.")
    return str(found)
