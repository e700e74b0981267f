"""A release: wheel and sdist are built, hold every file, and the auditor's part works where there is no torch."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEDGER = ROOT / "tests" / "golden" / "schema-1-revision-2"
LEFT_OUT = ("tests/benchmarks/results/",)

pytestmark = pytest.mark.slow


def run(*command, **options):
    """A command in an environment of its own; its output if it ends well."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    environment = {
        **inherited,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_CONSTRAINT": str(ROOT / ".ci/constraints.txt"),
    }
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=900, env=environment, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def tracked():
    """The repository's files, as git knows them."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    return set(run("git", "ls-files", cwd=ROOT).split("\n")) - {""}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel and sdist, the wheel made from the sdist; from a copy, so that nothing is left in the checkout."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("release")
    source, out = folder / "source", folder / "dist"
    for name in tracked():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--outdir", out, source)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def clean(built, tmp_path_factory):
    """An environment with the wheel, without extras."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    run(sys.executable, "-m", "venv", folder)
    run(folder / "bin" / "pip", "install", "--quiet", built[0])
    return folder / "bin"


def test_no_file_is_missing_from_the_sdist(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {name for name in tracked() if not name.startswith(LEFT_OUT)}
    assert wanted - names == set()


def test_the_wheel_holds_both_packages_with_their_data_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as archive:
        names = set(archive.namelist())
    for name in tracked():
        if name.startswith(("dpsb/", "accounting/dpsb_accounting/")):
            assert name.removeprefix("accounting/") in names
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dpsb", "dpsb_accounting"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_auditors_part_works_without_torch(clean, tmp_path):
    shutil.copytree(LEDGER, tmp_path / "run")
    assert "No module named" in run_failing(clean / "python", "-c", "import torch")
    assert "verify" in run(clean / "dpsb-accounting", "--help")
    assert run(clean / "dpsb-accounting", "verify", "run/ledger.jsonl", cwd=tmp_path)
    found = json.loads(run(clean / "dpsb-accounting", "report", "run/ledger.jsonl", "--json", cwd=tmp_path))
    assert found["claim"] is True


def test_the_trainer_says_in_one_sentence_what_is_missing(clean):
    said = run_failing(clean / "dpsb", "--help")
    assert said.strip() == (
        "error: dpsb trains with torch, which is not installed: pip install '.[train]' in a checkout. "
        "(The auditor's package, dpsb_accounting, works without it.)"
    )


def test_the_wheel_with_the_environments_own_torch_trains(built, tmp_path):
    """With extras: the wheel's files before this environment's packages; torch is not installed twice for a test."""
    with zipfile.ZipFile(built[0]) as archive:
        archive.extractall(tmp_path / "wheel")
    code = (
        "import dpsb, sys; from dpsb.demo import demo_config; assert dpsb.__file__.startswith(sys.argv[1]); "
        "short = dict(steps=1, expected_batch_size=8, max_length=16, eval_data=None); "
        "print(dpsb.fine_tune(demo_config(sys.argv[1] + '/run').with_changes(short)).report.claim)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "wheel")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.stdout.strip() == "True", done.stderr


def run_failing(*command):
    """The error output of a command that ends badly."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    return done.stderr
