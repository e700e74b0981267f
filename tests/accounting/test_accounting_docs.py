"""Every ```console block of the auditor's documentation is run, and what it says the output is, is compared.

The commands see one folder, `run`, a finished and signed run (the newest golden one), a file for each ```json block
that is given a name, and what earlier blocks of the same page wrote. In the stated output a line of `...` stands for
anything, and `...` inside a line for its rest.
"""

import doctest
import re
import shlex
import shutil
from pathlib import Path

import pytest

from dpsb_accounting import cli

ROOT = Path(__file__).parents[2]
PAGES = ("docs/accounting.md", "accounting/README.md")
CHECK = doctest.OutputChecker()
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(page):
    """The commands of a page with the output that it states; "" where it states none."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            while command.endswith("\\"):
                more, _, output = output.partition("\n")
                command = command[:-1] + more
            found.append((command, output))
    return found


def files(page):
    """The named JSON blocks of a page: name, content."""
    return re.findall(r"^```json (\S+)\n(.*?)^```", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_console_blocks_say_what_happens(page, tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "tests" / "golden" / "schema-1-revision-2", tmp_path / "run")
    for name, content in files(page):
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    commands = blocks(page)
    assert commands
    for command, expected in commands:
        words = shlex.split(command, comments=True)
        if words[0] == "cp":
            shutil.copyfile(words[1], words[2])
            continue
        assert words[0] == "dpsb-accounting", command
        into = None
        if ">" in words:
            words, into = words[: words.index(">")], words[-1]
        with pytest.raises(SystemExit) as stop:
            cli.main(words[1:])
        captured = capsys.readouterr()
        if into is not None:
            Path(into).write_text(captured.out)
        said = ("" if into else captured.out) + captured.err
        assert "error: " in expected or not stop.value.code, (command, said)
        if expected.strip():
            assert CHECK.check_output(expected, said, FLAGS), f"$ {command}\n{said}"


def test_every_command_of_the_auditor_is_documented():
    text = (ROOT / "docs" / "accounting.md").read_text()
    known = {command.name for command in cli.app.registered_commands}
    assert known == {name for name in known if f"dpsb-accounting {name}" in text}
