"""The frame of every page that is written: it opens offline, runs no script and loads nothing."""

from __future__ import annotations

import html
from collections.abc import Iterable

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def document(title: str, style: str, body: Iterable[str]) -> str:
    """Returns one HTML file.

    Args:
        title: Of the window, not escaped.
        style: CSS.
        body: HTML, whatever is quoted in it escaped.
    """
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>",
            *body,
            "</body>\n</html>\n",
        ]
    )
