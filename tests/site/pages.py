"""Pages of the documentation as lists of blocks, and how a block is run.

A block is run as the reader would run it, in an empty folder, in the order of the page. A comment before a block, which
neither GitHub nor the site shows, changes that:

* ``<!-- not run: WHY -->``: only parsed; likewise ``<!-- parsed: WHY -->``;
* ``<!-- in the test: OPTIONS -->``: these are added to its commands ``dpsb train``, ``generate`` and ``audit``;
* ``<!-- fails: WHY -->``: its commands end with an exit code that is not 0.

In stated output a line of ``...`` stands for anything, and ``...`` inside a line for its rest.
"""

import doctest
import glob
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r'(?:^<!-- (.*?) -->\n)?^```(\w+)(?: title="(.*?)")?.*?\n(.*?)^```', re.MULTILINE | re.DOTALL)
_CHECK = doctest.OutputChecker()
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
_SHORTENED = ("train", "generate", "audit")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its title if it is a file, its text, and the comment before it."""

    language: str
    title: str
    text: str
    comment: str
    line: int

    @property
    def run(self):
        """Whether it is run, not only parsed."""
        return not self.comment.startswith(("not run", "parsed"))

    def commands(self):
        """Commands with the output that the page states."""
        found = []
        for part in re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            while command.endswith("\\"):
                more, _, output = output.partition("\n")
                command = command[:-1] + more
            found.append((command, output))
        return found


def blocks(page):
    """The blocks of a page, in order."""
    text = (ROOT / page).read_text()
    return [
        Block(found[2], found[3] or "", found[4], found[1] or "", text[: found.start()].count("\n") + 1)
        for found in _BLOCK.finditer(text)
    ]


@dataclass
class Reader:
    """Somebody who follows a page in the current folder."""

    names: dict = field(default_factory=lambda: {"__name__": "page"})

    def follow(self, block):
        """Writes, executes or runs a block; an AssertionError says what differs from the page."""
        if block.title:
            Path(block.title).write_text(block.text)
        elif block.language == "python" and not block.text.startswith(">>>"):
            exec(compile(block.text, f"block of line {block.line}", "exec"), self.names)
        elif block.language == "console":
            for command, output in block.commands():
                self._command(block, command, output)

    def _command(self, block, command, expected):
        words = shlex.split(command, comments=True)
        if block.comment.startswith("in the test: -") and words[1] in _SHORTENED:
            words += shlex.split(block.comment.removeprefix("in the test: "))
        words = [part for word in words for part in (sorted(glob.glob(word)) or [word])]
        result = CliRunner().invoke(application(words[0]), words[1:], prog_name=words[0])
        failed = result.exit_code != 0
        assert failed == block.comment.startswith("fails"), f"$ {command}\n{result.output}\n{result.exception!r}"
        if expected.strip():
            said = result.output if failed else result.stdout  # without progress bars
            assert _CHECK.check_output(expected, said, _FLAGS), f"$ {command}\n{said}"


def application(name):
    """The command line of that name."""
    from dpsb.cli import app
    from dpsb_accounting.cli import app as auditors

    return {"dpsb": app, "dpsb-accounting": auditors}[name]
