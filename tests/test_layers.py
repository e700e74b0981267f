"""Imports run one way, and the private core knows neither data, models nor the command line."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = {path.stem: path for path in (ROOT / "dpsb").glob("*.py")}
AUDITOR = sorted((ROOT / "accounting" / "dpsb_accounting").rglob("*.py"))
CHAINS = (("randomness", "mechanism", "train", "run", "cli"), ("adapter", "capture", "probe", "train"))
CORE = ("capture", "mechanism", "sampling", "randomness")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it; ``from a import b`` counts as a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def reaches(name: str) -> set[str]:
    """The modules of dpsb that ``dpsb.name`` imports, directly or not."""
    seen, todo = set(), [name] if name in FILES else []
    while todo:
        direct = {part.split(".")[1] for part in imports(FILES[todo.pop()]) if part.startswith("dpsb.")}
        todo += [new for new in direct - seen if new in FILES]
        seen |= direct
    return seen


@pytest.mark.parametrize("chain", CHAINS)
def test_imports_run_one_way(chain):
    for i, lower in enumerate(chain):
        assert not reaches(lower) & set(chain[i + 1 :])


@pytest.mark.parametrize("name", CORE)
def test_private_core_stands_alone(name):
    assert not reaches(name) & {"data", "models", "run", "cli", "train", "losses"}
    assert "transformers" not in {part.split(".")[0] for part in imports(FILES[name])}


@pytest.mark.parametrize("path", AUDITOR, ids=lambda path: path.stem)
def test_auditor_imports_neither_torch_nor_dpsb(path):
    assert not {part.split(".")[0] for part in imports(path)} & {
        "torch",
        "dpsb",
        "transformers",
        "peft",
        "opacus",
    }
