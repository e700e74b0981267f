"""Hooks of the documentation site: pages from outside ``docs/``, the commands' reference, formulas, links into code.

mkdocs calls the functions named ``on_...``. Nothing here reads a network; formulas become MathML, which browsers show
without a script.
"""

from __future__ import annotations

import posixpath
import re
from html import unescape
from pathlib import Path
from typing import Any

import click
import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File
from typer.main import get_command

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "accounting/README.md": "project/auditor.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
}
"""Where pages that live elsewhere in the repository stand in the site."""
_LINK = re.compile(r"\[([^\]]*)\]\(((?!https?://|#)[^)\s]+)\)")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_ROLE = re.compile(r":(?:func|class|mod|meth|attr|data):(?=<code>)")
_MATH_ROLE = re.compile(r":math:<code>(.*?)</code>", re.DOTALL)


class Sections(griffe.Extension):
    """Lets "Example:" be what the docstring reader knows as "Examples:", so that its lines are shown as code."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Called for every function and class that is read."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(?m)^(\s*)Example:$", r"\1Examples:", obj.docstring.value)


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages from outside and the reference of the commands."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    files.append(File.generated(config, "reference/commands.md", content=commands()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Points links at pages of the site; a link to a file of the repository becomes its name."""
    del config, files
    here = page.file.src_uri
    source = next((outside for outside, inside in OUTSIDE.items() if inside == here), f"docs/{here}")

    def linked(match: re.Match[str]) -> str:
        text, target = match.groups()
        path, _, anchor = target.partition("#")
        whole = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (ROOT / whole).exists() and not whole.startswith("docs/"):
            return match.group()  # mkdocs warns
        inside = OUTSIDE.get(whole) or (whole.removeprefix("docs/") if whole.startswith("docs/") else None)
        if inside is None:
            return f"`{whole}`"
        back = posixpath.relpath(inside, posixpath.dirname(here) or ".")
        return f"[{text}]({back}{'#' + anchor if anchor else ''})"

    return _LINK.sub(linked, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Formulas as MathML; roles of other documentation systems in docstrings go."""
    del page, config, files

    def formula(match: re.Match[str]) -> str:
        display = "block" if match.group(2) == "[" else "inline"
        return convert(unescape(match.group(3)).strip(), display=display)

    html = _MATH_ROLE.sub(lambda match: convert(unescape(match.group(1)), display="inline"), html)
    return _ROLE.sub("", _FORMULA.sub(formula, html))


def commands() -> str:
    """A page on every command of ``dpsb`` and ``dpsb-accounting``, from the help that they print."""
    from dpsb.cli import app
    from dpsb_accounting.cli import app as auditors

    found = ["# Commands", "Made from the same text as `--help`.", ""]
    for name, application in (("dpsb", app), ("dpsb-accounting", auditors)):
        found += [f"## {name}", ""]
        for words, command in _leaves(get_command(application), (name,)):
            found += [f"### `{' '.join(words)}`", "", _plain(command.help or ""), "", *_options(command), ""]
    return "\n".join(found)


def _leaves(command: Any, words: tuple[str, ...]) -> list[tuple[tuple[str, ...], Any]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        return [(words, command)]
    return [leaf for name, part in inner.items() for leaf in _leaves(part, (*words, name))]


def _options(command: Any) -> list[str]:
    rows = []
    for parameter in command.params:
        if isinstance(parameter, click.Argument) or hasattr(parameter, "help"):
            name = " ".join(f"`{option}`" for option in parameter.opts)
            if not name.startswith("`-"):
                name = f"`{parameter.name.upper()}`"
            text = _plain(getattr(parameter, "help", "") or "").replace("|", "\\|").replace("\n", " ")
            rows.append(f"| {name} | {text} |")
    return ["| option | |", "|---|---|", *rows] if rows else []


def _plain(text: str) -> str:
    """Rich's markup and click's marks taken out, what looks like HTML kept as text."""
    text = re.sub(r"\[(/?)bold\]", "`", text).replace("\\[", "[").replace("\b", "")
    return "\n".join(line.strip() for line in text.replace("<", "&lt;").splitlines())
