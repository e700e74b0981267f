"""``accelerate launch``: the plain loop and the Trainer scripts, as they are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trainers
import workbench

from dpsb_accounting import Ledger, verify

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tests" / "dpsb" / "scripts"


def launch(*arguments, options=()):
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_LOG_LEVEL": "error"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu", *options]
    return subprocess.run(
        [*command, *map(str, arguments)], env=os.environ | quiet, capture_output=True, text=True, timeout=300
    )


def torchrun(processes, *arguments):
    """What ``accelerate launch`` is on several GPUs; on processors it wants MPI."""
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    here = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), *here]
    return subprocess.run(
        [*command, *map(str, arguments)], env=os.environ | quiet, capture_output=True, text=True, timeout=300
    )


def claims(out):
    assert verify(out / "ledger.jsonl").ok
    assert json.loads((out / "report.json").read_text())["claim"] is True
    assert (out / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_a_plain_loop(tmp_path):
    done = launch(ROOT / "examples" / "plain_loop.py", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out loss") == 6
    claims(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_a_chat_model_on_one_gpu(tmp_path, family):
    """examples/one_gpu.py with its tiny model of the same class: bf16, checkpointing, plain LoRA files.

    opacus#827, PR #830: no tutorial for private LoRA on a causal language model.
    """
    command = [sys.executable, ROOT / "examples" / "one_gpu.py", "--out", tmp_path, "--family", family, "--steps", "2"]
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=os.environ | quiet, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "answer:" in done.stdout
    assert "-differentially private for each single example" in done.stdout
    claims(tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert json.loads((tmp_path / "base" / "config.json").read_text())["model_type"].startswith(family)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "model", "data", "options"),
    [
        ("trainer_script_private", workbench.bert_folder, "classification", ()),
        ("sft_script_private", workbench.llama_folder, "pairs", ("--mixed_precision", "bf16")),
    ],
)
def test_a_trainer_script(tmp_path, script, model, data, options):
    assert trainers.NAMES == ("ham", "spam"), "the scripts' labels"
    done = launch(SCRIPTS / f"{script}.py", model(), workbench.data_file(data), tmp_path / "run", options=options)
    assert done.returncode == 0, done.stderr
    claims(tmp_path / "run")


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path):
    """opacus#444: under DDP every process drew. Here one draws, charges and adds noise, and all compute."""
    facts = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        done = torchrun(processes, SCRIPTS / "team_trainer.py", out)
        assert done.returncode == 0, done.stderr[-3000:]
        facts[processes] = [json.loads((out / f"facts-{rank}.json").read_text()) for rank in range(processes)]
        assert Ledger.read(out / "ledger.jsonl").charged("train") == 4
        assert (out / "adapter_model.safetensors").exists()
        assert not list(out.rglob("*.pt")) + list(out.rglob("*.pth")) + list(out.rglob("*.bin"))
    (alone,), (first, second) = facts[1], facts[2]
    assert first["theta"] == second["theta"]
    assert first["theta"] == pytest.approx(alone["theta"], rel=1e-5, abs=1e-6)
    assert first["eval_loss"] == pytest.approx(alone["eval_loss"], rel=0.05)  # means of means
    assert second["steps"] == 4
