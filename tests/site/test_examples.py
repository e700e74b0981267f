"""Examples that need no accelerator and no torch; those that train are run by their neighbours' tests."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUN = """
import runpy, sys
sys.argv = {argv!r}
runpy.run_path({path!r}, run_name="__main__")
loaded = {{"torch", "dpsb"}} & set(sys.modules)
raise SystemExit(f"loaded: {{loaded}}" if loaded else 0)
"""


def test_a_ledger_is_audited_without_torch(tmp_path):
    path = str(ROOT / "examples" / "audit_a_ledger.py")
    code = RUN.format(path=path, argv=[path, "--out", str(tmp_path / "out")])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "accounting"), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 4
    assert all(line.startswith("ok: ") for line in said)
    assert "a shorter ledger is caught" in said[-1]
