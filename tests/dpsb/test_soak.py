"""Random kills until a plan is spent: the small form of ``tests/benchmarks/soak.py``, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "soak.py"


@pytest.mark.slow
def test_the_ledger_equals_what_was_released_whenever_the_run_was_killed():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(SCRIPT), "--steps", "200", "--seconds", "1.5"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["steps"] == 200
    assert found["kills"] >= 2
    assert found["releases"] + found["spent_without_release"] == 200
