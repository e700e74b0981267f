"""``accelerate launch`` on one process: the plain loop and the Trainer scripts, as they are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trainers
import workbench

from dpsb_accounting import verify

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tests" / "dpsb" / "scripts"


def launch(*arguments, options=()):
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_LOG_LEVEL": "error"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu", *options]
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
