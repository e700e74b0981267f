"""The auditor's package stands alone: no torch, no dpsb, and quick to import."""

import os
import subprocess
import sys
from pathlib import Path

import dpsb_accounting

FOLDER = Path(dpsb_accounting.__file__).parent
MODULES = sorted(f"dpsb_accounting.{file.stem}" for file in FOLDER.glob("*.py") if file.stem != "__init__")
ALONE = {**os.environ, "PYTHONPATH": str(FOLDER.parent)}


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ALONE, check=False)


def test_every_module_imports_and_works_without_torch_and_dpsb():
    done = run(f"""
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "dpsb", "opacus", "transformers"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
for name in {MODULES!r}:
    importlib.import_module(name)
from dpsb_accounting import PoissonGaussian, epsilon
event = PoissonGaussian(noise_multiplier=1, sampling_prob=0.01)
print(f"{{epsilon([(event, 1000)], 1e-5).upper:.3f}}")
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1.828\n"


def test_no_module_mentions_torch_or_dpsb_when_imported():
    done = run(f"""
import importlib, sys
sys.modules["torch"] = sys.modules["dpsb"] = None
for name in {MODULES!r}:
    importlib.import_module(name)
""")
    assert done.returncode == 0, done.stderr


def test_importing_it_brings_no_heavy_engine():
    done = run(
        "import sys, dpsb_accounting; print([n for n in ('numpy', 'scipy', 'dp_accounting') if n in sys.modules])"
    )
    assert done.stdout == "[]\n", done.stderr


def test_every_public_name_is_there():
    assert sorted(dpsb_accounting.__all__) == sorted(set(dpsb_accounting.__all__))
    for name in dpsb_accounting.__all__:
        assert getattr(dpsb_accounting, name) is not None


def test_files_stay_small():
    for file in FOLDER.glob("*.py"):
        assert len(file.read_text().splitlines()) <= 400, file.name
