"""What a reader can paste: every command parses, all Python compiles and imports what exists; pages are followed."""

import ast
import importlib
import json
import re
import shlex
import tomllib

import pytest
from click import UsageError
from pages import ROOT, Reader, application, blocks
from typer.main import get_command

from dpsb import demo

PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "accounting" / "README.md")
)
FOLLOWED = (
    "docs/start.md",
    "docs/howto.md",
    "docs/serving.md",
    "docs/tutorials/mail.md",
    "docs/tutorials/notes.md",
    "docs/tutorials/silos.md",
    "docs/tutorials/audit.md",
)
SHORT = {**demo.SETTINGS, "steps": 2, "expected_batch_size": 16, "max_length": 16}
OURS = ("dpsb", "dpsb-accounting")


def command_problem(words):
    """Why a command line would be refused before it does anything; None if it would not."""
    command, context = get_command(application(words[0])), None
    rest = words[1:]
    while True:
        try:
            with command.make_context(words[0], list(rest), parent=context, resilient_parsing=False) as made:
                if not hasattr(command, "resolve_command"):
                    return None
                protected = [*getattr(made, "_protected_args", []), *made.args]
                name, command, rest = command.resolve_command(made, protected)
                context = made
                if name is None:
                    return None
        except UsageError as error:
            return error.format_message()


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_that_exists(page):
    for block in blocks(page):
        if block.language != "console":
            continue
        for line, _ in block.commands():
            words = shlex.split(line, comments=True)
            if words[0] in OURS and "--version" not in words:
                words = words[: words.index(">")] if ">" in words else words
                assert command_problem(words) is None, f"{page}: $ {line}: {command_problem(words)}"


def test_a_wrong_option_is_seen():
    assert "No such option" in command_problem(["dpsb", "train", "--epsilom", "3"])
    assert "No such command" in command_problem(["dpsb", "trian"])


@pytest.mark.parametrize("page", PAGES)
def test_python_compiles_and_imports_what_is_there(page):
    for block in blocks(page):
        if block.language != "python":
            continue
        lines = block.text.splitlines()
        if block.text.startswith(">>>"):
            lines = [line[4:] for line in lines if re.match(r">>> (from|import) ", line)]
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in ("dpsb", "dpsb_accounting"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{page}: {node.module}.{alias.name}"


@pytest.mark.parametrize("page", PAGES)
def test_toml_and_json_can_be_read(page):
    for block in blocks(page):
        if block.language in ("toml", "json"):
            {"toml": tomllib.loads, "json": json.loads}[block.language](block.text)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", FOLLOWED)
def test_a_page_is_followed_to_its_end(page, tmp_path, monkeypatch):
    """In one folder, from top to bottom; long commands are shortened as the page's comments say."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")
    if page == "docs/start.md":  # its `dpsb demo` takes minutes; the tutorials use the settings as they are
        monkeypatch.setattr(demo, "SETTINGS", SHORT)
    reader, found = Reader(), [block for block in blocks(page) if block.run]
    assert found
    for block in found:
        reader.follow(block)
