"""Where tables for people are printed."""

from __future__ import annotations

from rich.console import Console


def table_console() -> Console:
    """Standard output, wide enough for whole tables where it is no terminal: a log has no edge."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    return console
