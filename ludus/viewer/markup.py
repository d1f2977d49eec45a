"""Text made safe for a page."""

from __future__ import annotations

from html import escape


def text(value: object) -> str:
    """Escaped for HTML, attributes included; characters that HTML forbids show as a replacement mark."""
    return escape("".join(map(_visible, str(value))), quote=True)


def _visible(c: str) -> str:
    forbidden = (c < " " and c not in "\n\t") or "\x7f" <= c < "\xa0" or "\ud800" <= c <= "\udfff"
    return "\ufffd" if forbidden else c
