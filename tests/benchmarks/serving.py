"""Many tenants on one model: bytes on disk, bytes of tensors and the time of a switch, a pack against LoRA adapters.

pack        ``dpsb pack``: one basis, r*r floats a layer and a head a tenant; ``Tenants.use`` reads a tenant's file.
lora        the same adapters as plain LoRA folders; PEFT holds all of them in memory and ``set_adapter`` switches.

Tenants are one finished run's adapter with other random cores. ``aim_bytes`` is r*r floats a layer for each tenant, one
basis, and 5 %; heads, of which LoRA needs as many, are left out on both sides of that comparison. The Llama-3-8B
figures are computed from the real state dict on the meta device, without weights. Switches are timed in random order.
Tensor bytes are those of all that is held beside the base model; the pack's basis is counted twice, as it is in the
model and in the pack that was read. PEFT's adapters could be read from disk at each switch instead; that is not timed.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import torch
from peft import PeftModel
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from dpsb import fine_tune
from dpsb.adapter import lora_layers
from dpsb.demo import demo_config
from dpsb.models import add_lora, resolve_model
from dpsb.serving import pack as packs
from dpsb.serving.adapters import read_core_adapter, write_plain_adapter
from dpsb.serving.tenants import Tenants

SHORT = {"steps": 1, "expected_batch_size": 8, "max_length": 16, "eval_data": None, "targets": "all-linear"}
LLAMA_3_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)


def size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def make_tenants(scratch: Path, count: int, plain: int) -> tuple[Path, list[Path]]:
    """A pack of ``count`` tenants, and the first ``plain`` of them as plain LoRA folders."""
    run, folder = scratch / "run", scratch / "pack"
    fine_tune(demo_config(run).with_changes(SHORT))
    packs.add_to_pack(folder, {"t0000": run})
    first, claim = read_core_adapter(run), packs._claim_of(run)
    generator = torch.Generator().manual_seed(0)
    folders = []
    for index in range(count):
        R = {layer: 0.1 * torch.randn(value.shape, generator=generator) for layer, value in first.R.items()}
        adapter = replace(first, R=R)
        packs._write_tenant(folder / "tenants" / f"t{index:04}.safetensors", adapter, claim)
        if index < plain:
            folders.append(scratch / "lora" / f"t{index:04}")
            folders[-1].mkdir(parents=True)
            write_plain_adapter(adapter, folders[-1])
    return folder, folders


def disk(folder: Path, plain: Sequence[Path], count: int) -> dict[str, Any]:
    """Bytes of the pack and of as many plain adapters; these are all of one size, which is checked."""
    shared = packs.read_pack(folder).shared
    rank, layers = int(shared.config["r"]), len(shared.A)
    sizes = {size(path) for path in plain}
    if len(sizes) != 1:
        raise RuntimeError(f"Plain adapters of different sizes: {sorted(sizes)}.")
    basis, tenants = (folder / "basis.safetensors").stat().st_size, size(folder / "tenants")
    heads = count * sum(v.nbytes for v in read_head(folder).values())
    aim = 1.05 * (count * rank**2 * layers * 4 + basis)
    return {
        "tenants": count,
        "rank": rank,
        "layers": layers,
        "pack_bytes": size(folder),
        "of_that_basis": basis,
        "of_that_tokenizer_and_facts": size(folder) - basis - tenants,
        "of_that_heads": heads,
        "aim_bytes": int(aim),
        "within_aim": basis + tenants - heads <= aim,
        "lora_bytes": count * sizes.pop(),
        "lora_over_pack": round(count * size(plain[0]) / size(folder), 2),
    }


def read_head(folder: Path) -> dict[str, torch.Tensor]:
    """The head of the first tenant."""
    pack = packs.read_pack(folder)
    return dict(pack.read(pack.tenants[0]).head)


def switches(use: Callable[[str], Any], names: Sequence[str], rounds: int) -> dict[str, Any]:
    """Milliseconds of a switch, the first of each tenant (its file is new to the process) and later ones."""
    order, times = random.Random(0), []
    for _ in range(rounds):
        for name in order.sample(list(names), len(names)):
            began, cpu = time.perf_counter(), time.process_time()
            use(name)
            times.append((1e3 * (time.perf_counter() - began), 1e3 * (time.process_time() - cpu)))
    wall, cpu_times = zip(*times, strict=True)
    ordered = sorted(wall)
    return {
        "switches": len(times),
        "ms_quartiles": common.quartiles(wall),
        "ms_95_percent": round(ordered[int(0.95 * len(ordered))], 3),
        "cpu_ms_quartiles": common.quartiles(cpu_times),
        "first_round_ms_median": common.quartiles(wall[: len(names)])[1],
    }


def pack_arm(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    """``Tenants`` on a pack: time of ``use``, bytes beside the base model."""
    tenants = Tenants(folder)
    cores = sum(p.nbytes for p in tenants._own.values())
    basis = sum(v.nbytes for part in (tenants.pack.shared.A, tenants.pack.shared.B) for v in part.values())
    timed = switches(tenants.use, tenants.pack.tenants[:count], rounds)
    return {**timed, "adapter_tensor_bytes": cores + 2 * basis}


def peft_arm(folders: Sequence[Path], rounds: int) -> dict[str, Any]:
    """PEFT with every adapter loaded: time of ``set_adapter``, bytes beside the base model."""
    base = AutoModel.from_pretrained(resolve_model("minilm"))
    began = time.perf_counter()
    model = PeftModel.from_pretrained(base, str(folders[0]), adapter_name=folders[0].name)
    for path in folders[1:]:
        model.load_adapter(str(path), adapter_name=path.name)
    loading = time.perf_counter() - began
    own = sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)
    timed = switches(model.set_adapter, [path.name for path in folders], rounds)
    return {**timed, "adapter_tensor_bytes": own, "seconds_to_load_all": round(loading, 1)}


def llama(rank: int, tenants: int) -> dict[str, Any]:
    """Bytes at the shape of Llama-3-8B, all linear layers of all blocks, from the state dict on the meta device."""
    with torch.device("meta"):
        model = add_lora(LlamaForCausalLM(LLAMA_3_8B), "causal-lm", rank)
    numbers = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    layers = len(lora_layers(model))
    cores = rank**2 * layers
    return {
        "rank": rank,
        "layers": layers,
        "core_bytes_fp32": 4 * cores,
        "lora_bytes_fp32": 4 * numbers,
        "lora_bytes_bf16": 2 * numbers,
        "pack_gb": round((tenants * 4 * cores + 4 * numbers) / 1e9, 3),
        "lora_gb_fp32": round(tenants * 4 * numbers / 1e9, 1),
        "lora_gb_bf16": round(tenants * 2 * numbers / 1e9, 1),
    }


def main() -> None:
    parser = common.arguments(__doc__, tenants=1000, loaded=100, rounds=3)
    given = parser.parse_args()
    common.quiet()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder, plain = make_tenants(Path(scratch), given.tenants, given.loaded)
        result = {
            "machine": common.machine(),
            "minilm_disk": disk(folder, plain, given.tenants),
            "tenants_use": pack_arm(folder, given.loaded, given.rounds),
            "peft_set_adapter": peft_arm(plain, given.rounds),
            "llama_3_8b": [llama(rank, given.tenants) for rank in (16, 64)],
            "load_average_at_the_end": round(os.getloadavg()[0], 2),
        }
    print(json.dumps(result) if given.json else json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
