"""Whole runs on a CUDA device: they end where the same runs on a CPU end. Skipped where there is none."""

import json
import os
import subprocess
import sys

import pytest
import torch
import workbench
from safetensors.torch import load_file

from dpsb.artifacts import CORE_NAME
from dpsb_accounting import Ledger, verify

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def trained(out, kind="classification", /, device="0", launcher=("-m", "dpsb.cli"), **changes):
    """Theta and report of a run in a process that sees one device, or none."""
    settings = workbench.run_settings(out, kind, **{"insecure_seed": 3, **changes})
    settings = {name: value for name, value in settings.items() if value is not None}
    if "method" not in settings:
        settings.setdefault("basis", "random")  # singular vectors are free in sign, and another on each device
    command = [sys.executable, *launcher, "train", *workbench.options(settings)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": device, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert verify(out / "ledger.jsonl").ok
    files = [out / CORE_NAME] if (out / CORE_NAME).exists() else sorted(out.glob("*.safetensors"))
    theta = {name: value for file in files for name, value in load_file(file).items()}
    return theta, json.loads((out / "report.json").read_text())


def assert_same(here, there, tolerance=1e-3):
    assert here
    assert here.keys() == there.keys()
    for name, value in there.items():
        torch.testing.assert_close(here[name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "bfloat16"},
        {"auto_clip": True, "head_share": 0.5},
        {"adaptive_clip": 0.5},
        {"remember_frozen_blocks": True, "targets": r"re:.*layer\.1\..*(query|value)"},
        {"method": "lora"},
        {"method": "ffa-lora"},
        {"method": "bitfit"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "plain",
)
def test_a_run_ends_where_one_on_the_cpu_ends(tmp_path, changes):
    held_out = str(workbench.data_file(seed=9))
    here, report = trained(tmp_path / "gpu", eval_data=held_out, **changes)
    there, other = trained(tmp_path / "cpu", device="", eval_data=held_out, **changes)
    assert_same(here, there, 0.05 if changes.get("dtype") == "bfloat16" else 1e-3)
    assert report["epsilon"] == other["epsilon"]
    found, expected = (r["held_out"]["metrics"]["cross_entropy"] for r in (report, other))
    assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("basis", ["weight", "private", "public", "hybrid", "hybrid weights", "leak"])
def test_every_basis(tmp_path, basis):
    public = workbench.data_file(seed=5)
    given = {"public": f"public:{public}", "hybrid": f"hybrid:{public}", "hybrid weights": "hybrid"}.get(basis, basis)
    further = {"allow_non_private_basis": True} if basis == "leak" else {}
    _, report = trained(tmp_path, basis=given, insecure_seed=None, **further)
    ledger = Ledger.read(tmp_path / "ledger.jsonl")
    phases = {phase.name for phase in ledger.plan.phases}
    assert ("basis" in phases) == (basis in ("private", "hybrid", "hybrid weights", "leak"))
    assert report["claim"] is (basis != "leak")
    assert ledger.charged("train") == 3


def test_a_language_model(tmp_path):
    held_out = str(workbench.data_file("causal-lm", seed=9))
    here, report = trained(tmp_path / "gpu", "causal-lm", eval_data=held_out)
    there, other = trained(tmp_path / "cpu", "causal-lm", device="", eval_data=held_out)
    assert_same(here, there)
    perplexity = (r["held_out"]["metrics"]["perplexity"] for r in (report, other))
    assert next(perplexity) == pytest.approx(next(perplexity), rel=1e-3)


def test_fsdp2_on_one_gpu_ends_where_one_process_ends(tmp_path):
    """torchrun with NCCL, the base cut over a team of one: the path that several GPUs take."""
    alone, _ = trained(tmp_path / "alone")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", "dpsb.cli")
    together, _ = trained(tmp_path / "team", launcher=launch, shard_base=True)
    assert_same(together, alone, 1e-5)


def test_a_run_that_dies_is_resumed(tmp_path):
    out = tmp_path / "run"
    settings = workbench.run_settings(out, steps=6, checkpoint_every=2)
    code = (
        "import os\nfrom dpsb.config import RunConfig\nfrom dpsb.run import Callbacks, fine_tune\n"
        "callbacks = Callbacks(on_step=lambda progress: os._exit(9) if progress.step == 4 else None)\n"
        f"fine_tune(RunConfig(**{settings!r}), callbacks=callbacks)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    again = [sys.executable, "-m", "dpsb.cli", "train", "--out", str(out), "--resume"]
    assert subprocess.run(again, check=False, capture_output=True).returncode == 0
    assert Ledger.read(out / "ledger.jsonl").charged("train") == 6
    assert (out / CORE_NAME).exists()
    assert verify(out / "ledger.jsonl").ok


def test_the_self_test_passes(tmp_path):
    settings = workbench.run_settings(tmp_path, "classification")
    command = [sys.executable, "-m", "dpsb.cli", "selftest", "--model", settings["model"], "--labels", "ham,spam"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
