"""The real command, several processes, kill -9, and the same command again."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import workbench

from dpsb_accounting import Ledger, epsilon
from dpsb_accounting.ledger import in_use

STEPS = 150


def content(folder):
    return {
        path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in folder.iterdir()
        if path.is_file()
    }


@pytest.mark.slow
def test_killed_and_started_again(tmp_path):
    """Finished cells stay to the byte, running ones go on, workers die with the sweep, every ledger counts."""
    settings = workbench.run_settings("x", steps=STEPS, eval_data=str(workbench.data_file(seed=5)))
    given = {name: value for name, value in settings.items() if name not in ("out", "epsilon")}
    command = [sys.executable, "-m", "dpsb.cli", "curve", "--out", str(tmp_path), *workbench.options(given)]
    command += ["--methods", "head-only,sb,lora", "--epsilons", "8", "--repeats", "2", "--processes", "2", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    cells = tmp_path / "cells"
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as first:
        last = time.monotonic() + 240
        while time.monotonic() < last and first.poll() is None:
            begun = [p for p in cells.glob("*/ledger.jsonl") if not (p.parent / "report.json").exists()]
            if list(cells.glob("*/report.json")) and any(10 < workbench.charged(path) < STEPS - 10 for path in begun):
                break
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert first.returncode == -signal.SIGKILL
    finished = {path.parent: content(path.parent) for path in cells.glob("*/report.json")}
    last = time.monotonic() + 10
    while any(in_use(path) for path in cells.glob("*/ledger.jsonl")) and time.monotonic() < last:
        time.sleep(0.05)
    assert not any(in_use(path) for path in cells.glob("*/ledger.jsonl")), "a worker outlived the sweep"
    before = {path: path.read_bytes() for path in cells.glob("*/ledger.jsonl")}
    unfinished = [path for path in before if path.parent not in finished]
    assert finished
    assert unfinished

    second = subprocess.run(command, env=environment, capture_output=True, timeout=300, check=False)
    assert second.returncode == 0, second.stderr.decode()
    facts = json.loads(second.stdout)
    for folder, files in finished.items():
        assert content(folder) == files
    for path, lines in before.items():
        after = path if path.read_bytes().startswith(lines[: lines.rfind(b"\n") + 1]) else None
        moved = [p for p in tmp_path.glob("abandoned/*/ledger.jsonl") if p.read_bytes() == lines]
        assert after or moved, "what was charged is kept, in its cell or moved aside"
    ledgers = [Ledger.read(path) for path in tmp_path.glob("*/*/ledger.jsonl")]
    assert all(ledger.charged("train") <= STEPS for ledger in ledgers)
    assert facts["composed"]["runs"]["curve"] == 6
    assert facts["composed"]["runs"]["all"] == len(ledgers)
    events = [(phase.event, phase.count) for ledger in ledgers for phase in ledger.plan.phases]
    assert facts["composed"]["epsilon"]["upper"] == epsilon(events, facts["composed"]["delta"], "zero_out").upper
    assert [point["n"] for point in facts["points"]] == [2, 2, 2]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds children in /proc")
def test_a_worker_that_dies_costs_its_cell_only(tmp_path):
    settings = workbench.run_settings("x", steps=STEPS, eval_data=str(workbench.data_file(seed=5)))
    given = {name: value for name, value in settings.items() if name not in ("out", "epsilon")}
    command = [sys.executable, "-m", "dpsb.cli", "curve", "--out", str(tmp_path), *workbench.options(given)]
    command += ["--methods", "head-only,sb,lora", "--epsilons", "8", "--processes", "2", "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes) as sweep:
        victim, last = None, time.monotonic() + 240
        while victim is None and time.monotonic() < last and sweep.poll() is None:
            time.sleep(0.02)
            for path in tmp_path.glob("cells/*/ledger.jsonl"):
                if workbench.charged(path) > 10 and in_use(path):
                    victim = path
        holders = [pid for pid in children(sweep.pid) if holds(pid, victim)]
        os.kill(holders[0], signal.SIGKILL)
        output, errors = sweep.communicate(timeout=300)
    assert sweep.returncode == 1
    facts = json.loads(output)
    assert [entry["folder"] for entry in facts["failed"]] == [f"cells/{victim.parent.name}"]
    assert "its process died (SIGKILL)" in " ".join(errors.decode().split())
    assert sorted(point["n"] for point in facts["points"]) == [0, 1, 1]
    assert facts["composed"]["runs"] == {
        "all": 3,
        "curve": 2,
        "tuning": 0,
        "abandoned": 0,
        "unfinished": 1,
        "non_private": 0,
    }


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def holds(pid, path):
    links = (os.path.join(f"/proc/{pid}/fd", name) for name in os.listdir(f"/proc/{pid}/fd"))
    return any(os.path.realpath(link) == str(path) for link in links)
