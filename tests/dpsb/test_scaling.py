"""What several processes take, on paper: held to the shapes of real models on the meta device."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
import workbench
from typer.testing import CliRunner

from dpsb.cli import app
from dpsb.distributed.scaling import scaling_plan
from dpsb.memory import memory_plan
from dpsb.plan import make_plan

PLAN = make_plan(epsilon=3, delta=1e-6, num_examples=50_000, expected_batch_size=1024, steps=100, noise_multiplier=1.0)


@pytest.fixture(scope="module")
def eight_billion(tmp_path_factory):
    """The config of a Llama-3-8B; nothing of that size is made."""
    folder = tmp_path_factory.mktemp("llama-8b")
    workbench.LLAMA_3_8B.save_pretrained(folder)
    return memory_plan(str(folder), "causal-lm", dtype=torch.bfloat16, token_budgets=(4096,), max_length=512)


def test_a_llama_of_8_billion(eight_billion):
    memory = eight_billion
    assert memory.parameters == 8_030_261_248
    alone = scaling_plan(PLAN, memory, world_size=1)
    assert alone.total_bytes == memory.by_budget[0]["total"]
    whole = scaling_plan(PLAN, memory, world_size=8)
    cut = scaling_plan(PLAN, memory, world_size=8, sharded=True, teraflops=100)
    assert whole.weights_bytes == memory.base_bytes
    outside = memory.base_bytes - memory.blocks_bytes
    assert outside == 2 * (2 * 128256 * 4096 + 4096) + 2 * 64 * 4  # embeddings, head, last norm; rotary frequencies
    assert cut.weights_bytes == pytest.approx(outside + memory.blocks_bytes / 8 + memory.blocks_bytes / 32, rel=1e-6)
    assert whole.sent_per_step == 16 * memory.dimension
    assert memory.dimension == 224 * 256
    microbatches = 1024 / 8 / 8
    assert cut.sent_per_step == pytest.approx(16 * memory.dimension + 2 * microbatches * memory.blocks_bytes * 7 / 8)
    slower = scaling_plan(PLAN, memory, world_size=8, teraflops=100, checkpointing=True)
    assert slower.seconds == pytest.approx(1.5 * cut.seconds)
    assert cut.seconds == pytest.approx(100 * 4 * memory.parameters * 1024 / 8 * 512 / 1e14)


def test_the_share_of_a_process_falls_with_their_number(eight_billion):
    plans = [scaling_plan(PLAN, eight_billion, world_size=size, sharded=True) for size in (1, 2, 8, 64)]
    for one, next_one in itertools.pairwise(plans):
        assert next_one.total_bytes < one.total_bytes
        assert next_one.flops_per_step < one.flops_per_step


def test_bad_input_is_one_sentence(eight_billion):
    for changes, message in (
        ({"world_size": 0}, "world_size=0"),
        ({"world_size": 2, "token_budget": 5}, "token_budget=5 to be one of 4096"),
        ({"world_size": 2, "teraflops": -1.0}, r"teraflops=-1\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            scaling_plan(PLAN, eight_billion, **changes)
    assert replace(eight_billion, blocks_bytes=0).blocks_bytes == 0


def test_the_command():
    common = ["plan", "--epsilon", "3", "--num-examples", "4000", "--steps", "20"]
    given = [
        *common,
        "--model",
        str(workbench.llama_folder()),
        "--max-length",
        "16",
        "--world-size",
        "4",
        "--shard-base",
    ]
    facts = json.loads(CliRunner().invoke(app, [*given, "--json"]).stdout)
    assert facts["scaling"]["world_size"] == 4
    assert facts["scaling"]["total_bytes"] < facts["memory"]["by_budget"][2]["total"]
    told = CliRunner().invoke(app, [*given, "--teraflops", "0.1"]).stdout
    assert "4 processes, blocks cut over them" in told
    assert "hours at that speed" in told
    assert CliRunner().invoke(app, [*common, "--world-size", "4"]).exit_code == 1
