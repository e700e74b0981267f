"""Several processes under torchrun: the same run as one process, whatever happens to one of them."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import workbench
from forked import wait_until
from safetensors.torch import load_file

from dpsb.data import Collator
from dpsb.distributed.lead import digest_of
from dpsb.distributed.work import Work
from dpsb.losses import classification_loss
from dpsb_accounting import Ledger, verify

ENVIRONMENT = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def command(settings, processes=2, extra=()):
    train = ["-m", "dpsb.cli", "train", *workbench.options(settings), *extra]
    if processes == 1:
        return [sys.executable, *train]
    here = ["--nproc-per-node", str(processes), "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    return [sys.executable, "-m", "torch.distributed.run", *here, "--local-addr", "127.0.0.1", *train]


def trained(settings, processes=2, extra=(), file="dpsb_core.safetensors"):
    done = subprocess.run(
        command(settings, processes, extra), env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(f"{settings['out']}/{file}"), done


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"shard_base": True}], ids=["copies", "sharded"])
def test_two_processes_train_what_one_trains(tmp_path, changes):
    settings = workbench.run_settings(tmp_path / "one", insecure_seed=3, eval_data=str(workbench.data_file(seed=9)))
    alone, _ = trained(settings, 1)
    together, done = trained({**settings, "out": str(tmp_path / "two"), **changes})
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-6, atol=1e-6)
    assert done.stdout.count("reading data and model") == 1  # one process speaks
    assert '"accuracy"' in (tmp_path / "two" / "report.json").read_text()
    one, two = (Ledger.read(tmp_path / name / "ledger.jsonl") for name in ("one", "two"))
    assert (one.plan, one.charged("train")) == (two.plan, two.charged("train"))
    assert verify(tmp_path / "two" / "ledger.jsonl").ok


@pytest.mark.slow
def test_a_base_that_the_start_moves_is_moved_alike_on_every_process(tmp_path):
    """The follower takes factors and base from the leader's start; their digests would differ otherwise."""
    method = f"peft:lora_ga:{workbench.data_file(seed=9)}"
    settings = workbench.run_settings(tmp_path / "one", insecure_seed=3, method=method)
    alone, _ = trained(settings, 1, file="adapter_model.safetensors")
    together, _ = trained({**settings, "out": str(tmp_path / "two")}, file="adapter_model.safetensors")
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-5, atol=1e-5)


def test_what_all_processes_must_have_alike_is_in_one_digest(tiny):
    """With another token budget a process would cut the draw elsewhere, and a row could be in two parts of the sum."""
    adapter = tiny.adapter(tiny.base("bert"))
    work = Work(
        adapter=adapter,
        dataset=workbench.examples(),
        loss_fn=classification_loss,
        collate=Collator(0),
        buckets=(16,),
        token_budget=64,
        sharded=False,
    )
    digest = digest_of(work)
    assert digest == digest_of(replace(work, dataset=workbench.examples()))
    for changes in (
        {"token_budget": 32},
        {"buckets": (8, 16)},
        {"sharded": True},
        {"dataset": workbench.examples()[::-1]},
        {"adapter": tiny.adapter(tiny.base("bert", seed=2))},
    ):
        assert digest_of(replace(work, **changes)) != digest


@pytest.mark.slow
def test_sums_of_any_draw_are_those_of_one_process(tmp_path):
    """Empty draws, draws with work for one of two processes only, both with copies of the base and cut over them."""
    script = Path(__file__).with_name("team_cases.py")
    launch = command({}, extra=())[: command({}).index("-m", 3)]
    done = subprocess.run(
        [*launch, str(script)], env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cases = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [(case["sharded"], case["drawn"]) for case in cases] == [(s, n) for s in (False, True) for n in (0, 1, 2, 7)]
    for case in cases:
        assert case["moved"] <= 1e-6 * max(1.0, case["norm"]), case
        assert case["theta_equal"], case
        assert (case["norm"] > 0) == (case["drawn"] > 0), case


@pytest.mark.slow
def test_processes_with_other_rows_are_refused_before_a_charge(tmp_path):
    """Each reads its own copy of the file, as machines do; one copy has its rows in another order."""
    rows = workbench.data_file().read_text().splitlines(keepends=True)
    for rank, order in (("0", rows), ("1", rows[::-1])):
        (tmp_path / rank).mkdir()
        (tmp_path / rank / "rows.jsonl").write_text("".join(order))
    settings = workbench.run_settings(tmp_path / "run", insecure_seed=3, data="rows.jsonl")
    whole = command(settings)
    start = whole.index("-m", 3)
    inner = [
        sys.executable,
        "-c",
        f"import os; os.chdir({str(tmp_path)!r} + '/' + os.environ['RANK']);"
        f"from dpsb.cli import main; import sys; sys.argv = ['dpsb', *{whole[start + 2 :]!r}]; main()",
    ]
    (tmp_path / "start.py").write_text(inner[2])
    done = subprocess.run(
        [*whole[:start], str(tmp_path / "start.py")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode != 0
    assert "read different training rows" in done.stderr
    assert Ledger.read(tmp_path / "run" / "ledger.jsonl").charged("train") == 0


@pytest.mark.slow
def test_a_process_that_is_killed_takes_its_step_with_it(tmp_path):
    """Nothing is released after the kill, nothing is uncharged, and one process alone can finish the run."""
    out = tmp_path / "run"
    settings = workbench.run_settings(out, steps=150)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command(settings), env=ENVIRONMENT, start_new_session=True, **quiet) as running:
        try:
            assert wait_until(lambda: workbench.charged(out / "ledger.jsonl") >= 5, 240, running)
            os.kill(_process_of(running.pid, rank=1), signal.SIGKILL)
            assert running.wait(timeout=120) != 0
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
    charged = Ledger.read(out / "ledger.jsonl").charged("train")
    assert 5 <= charged < 150
    assert not (out / "report.json").exists()
    checkpoint = next((out / "checkpoint").glob("*.json"))
    released = json.loads(checkpoint.read_text())
    assert charged - 2 <= max(v for v in released.values() if isinstance(v, int)) <= charged, released
    trained(settings, 1, ["--resume"])
    assert Ledger.read(out / "ledger.jsonl").charged("train") == 150
    assert verify(out / "ledger.jsonl").ok


def _process_of(parent, rank):
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            facts = (folder / "stat").read_text().rpartition(")")[2].split()
            surroundings = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(facts[1]) == parent and f"RANK={rank}".encode() in surroundings:
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")
