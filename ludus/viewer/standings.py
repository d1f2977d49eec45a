"""A tournament for people: tables in the terminal, and a heat map of the payoffs as PNG and SVG."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_COLUMNS = (
    "place",
    "entrant",
    "rating [95%]",
    "per match [95%]",
    "won/drawn/lost",
    "alpha-rank",
    "Nash",
    "against Nash",
)


def print_tournament(found: Mapping[str, Any], console: Console) -> None:
    """Print every game of a tournament (the content of tournament.json)."""
    for label, game in found["games"].items():
        if not game["standings"]:
            console.print(f"{label}: no match was played to its end", markup=False)
            continue
        console.print(_standings(label, game))
        for line in _remarks(game):
            console.print(line, markup=False)
        console.print(_payoffs(label, game))


def write_heatmap(label: str, game: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what each entrant got against each other one, best rated first. Same data, same bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = [s["name"] for s in game["standings"]]
    cells = [[(game["payoffs"][a].get(b) or {}).get("mean_return") for b in names] for a in names]
    largest = max((abs(cell) for row in cells for cell in row if cell is not None), default=0.0) or 1.0
    inches = 2.4 + 0.8 * len(names)
    figure = Figure(figsize=(inches + 1, inches), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        [[float("nan") if cell is None else cell for cell in row] for row in cells],
        cmap="RdBu",
        vmin=-largest,
        vmax=largest,
    )
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            if cell is not None:
                ink = "white" if abs(cell) > 0.6 * largest else "black"
                axes.text(x, y, f"{cell:+.2f}", ha="center", va="center", color=ink)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_title(f"{label}: mean return of row against column", parse_math=False)
    figure.colorbar(image, ax=axes, shrink=0.8)
    stem = re.sub(r"[^\w.-]", "_", label)
    paths = [folder / f"{stem}.png", folder / f"{stem}.svg"]
    with rc_context({"svg.hashsalt": "ludus", "svg.fonttype": "none"}):
        figure.savefig(paths[0], dpi=150, metadata={"Software": None})
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def _standings(label: str, game: Mapping[str, Any]) -> Table:
    table = Table(title=label, title_justify="left")
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "entrant" else "right", no_wrap=True)
    for s in game["standings"]:
        best, worst = s["place"]
        low, high = s["rating_ci95"]
        least, most = s["margin_ci95"]
        table.add_row(
            str(best) if best == worst else f"{best}-{worst}",
            Text(s["name"]),
            f"{s['rating']:+.0f} [{low:+.0f}, {high:+.0f}]",
            f"{s['margin']:+.3f} [{least:+.3f}, {most:+.3f}]",
            "/".join(f"{100 * s[key]:.0f}" for key in ("win", "draw", "loss")) + "%",
            f"{s['alpha_rank']:.2f}",
            f"{s['nash']:.2f}",
            f"{s['against_nash']:+.3f}",
        )
    return table


def _remarks(game: Mapping[str, Any]) -> list[str]:
    lines = ["not separable: " + " = ".join(group) for group in game["ties"]]
    lines.append(f"the ratings predict what a pair gains per match to within {game['misfit']:.3f}")
    if game["absent"]:
        lines.append(f"played nothing: {', '.join(game['absent'])}")
    return lines


def _payoffs(label: str, game: Mapping[str, Any]) -> Table:
    """What the row got per match against the column, with its 95% interval."""
    names = [s["name"] for s in game["standings"]]
    short = short_names(names)
    table = Table(title=f"{label}: mean return of row against column", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(Text(short[name]), justify="right", overflow="fold")
    for a in names:
        table.add_row(Text(short[a]), *[_cell(game["payoffs"][a].get(b)) for b in names])
    return table


def short_names(names: Sequence[str]) -> dict[str, str]:
    """As many last parts of each name, as of a path, as tell it from the others: the columns are narrow."""
    parts = {name: name.rstrip("/").split("/") for name in names}
    short = {}
    for name, own in parts.items():
        others = [other for known, other in parts.items() if known != name]
        kept = next((k for k in range(1, len(own)) if all(o[-k:] != own[-k:] for o in others)), None)
        short[name] = name if kept is None else "/".join(own[-kept:])
    return short


def _cell(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return ""
    low, high = score["return_ci95"]
    return f"{score['mean_return']:+.3f} [{low:+.2f}, {high:+.2f}]"
