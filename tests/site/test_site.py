"""The documentation site: built with warnings as errors, nothing in it comes from another host, formulas are MathML."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}

pytestmark = pytest.mark.slow


class Loaded(HTMLParser):
    """Collects what a browser fetches by itself when it shows a page."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag in LOADS and not (tag == "link" and values.get("rel") in ("canonical", "prev", "next", "alternate")):
            self.found.append(values.get(LOADS[tag]) or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` builds it."""
    pytest.importorskip("mkdocs", reason="make docs installs what the site needs")
    pytest.importorskip("latex2mathml")
    out = tmp_path_factory.mktemp("site")
    environment = {
        **os.environ,
        "NO_MKDOCS_2_WARNING": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "accounting")]),
    }
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def pages(site):
    found = sorted(site.rglob("*.html"))
    assert len(found) > 25
    return found


def test_no_page_loads_anything_from_another_host(site):
    for page in pages(site):
        loaded = Loaded()
        loaded.feed(page.read_text())
        assert loaded.found
        assert not [name for name in loaded.found if re.match(r"(https?:)?//", name)], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", sheet.read_text()), sheet


def test_every_page_of_docs_is_in_the_site(site):
    for source in (ROOT / "docs").rglob("*.md"):
        assert (site / source.relative_to(ROOT / "docs").with_suffix(".html")).exists()


def test_formulas_are_shown_without_a_script(site):
    text = (site / "mathematics.html").read_text()
    assert text.count("<math") > 30
    assert "arithmatex" not in text
    assert r"\frac" not in text


def test_the_reference_shows_functions_and_commands(site):
    reference = (site / "reference" / "dpsb.html").read_text()
    for name in ("fine_tune", "clip_and_sum", "Tenants", "plan_upload"):
        assert f">{name}<" in reference or f"{name}</span>" in reference, name
    assert ":func:" not in reference
    commands = (site / "reference" / "commands.html").read_text()
    for name in ("dpsb train", "dpsb federate simulate", "dpsb push", "dpsb-accounting verify"):
        assert name in commands
    assert "--expected-batch-size" in commands


def test_pages_from_outside_docs_are_there_and_linked(site):
    for name in ("auditor", "changelog", "contributing", "security"):
        assert (site / "project" / f"{name}.html").exists()
    assert 'href="project/auditor.html"' in (site / "index.html").read_text()
