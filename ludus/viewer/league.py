"""The league of a run, out of its records alone: whom the policy met, how it fared, the payoff matrix.

A training record of a run with past selves has "league": "population", "met", "scores", and where a snapshot
was taken "matrix". docs/truth.md says what they mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ludus.config import PAST
from ludus.records import Record, percent
from ludus.viewer.charts import COLOURS, Series, line_chart
from ludus.viewer.markup import text

_SELF = "self"
_GONE = "past selves no longer kept"

_RANKS = (
    ("Nash", "nash", ".2f"),
    ("against Nash", "against_nash", "+.3f"),
    ("alpha-rank", "alpha_rank", ".2f"),
)

Margins = Sequence[Sequence[float | None]]


@dataclass(frozen=True, slots=True)
class Met:
    """One kind of opponent: `matches` over the whole run, `share` of all, and the last score per game."""

    name: str
    matches: int
    share: float
    scores: dict[str, float]


def tell(records: Sequence[Record]) -> dict[str, Any] | None:
    """What a run's records say of its league, as plain JSON; None where they say nothing.

    "step", "population", "opponents" (see `Met`; "self" is plain self-play), and "matrix", the newest: its
    "step", "names", and per game "margins" (row against column), and where every two past selves met "nash",
    "alpha_rank" and "against_nash" by name.
    """
    told = _told(records)
    if not told:
        return None
    last = told[-1]
    return {
        "step": last["step"],
        "population": last["league"]["population"],
        "opponents": [
            {"name": m.name, "matches": m.matches, "share": m.share, "scores": m.scores} for m in _met(told)
        ],
        "matrix": _newest_matrix(told),
    }


def league_section(records: Sequence[Record]) -> str:
    """The report's section; "" where the run has no league."""
    told = _told(records)
    if not told:
        return ""
    games = list(told[-1]["league"]["scores"])
    head = "".join(f"<th>{text(t)}</th>" for t in ("opponent", "matches", "share", *map(_score, games)))
    rows = "".join(
        f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in _cells(met, games))}</tr>" for met in _met(told)
    )
    note = (
        "<p>Whom the trained policy met over all steps, and how it fared against each of late: 0% loses "
        "everything, 50% is even.</p>"
    )
    charts = "".join(_chart(told, game) for game in games)
    return f"<table><tr>{head}</tr>{rows}</table>{note}{charts}{_heat_maps(told)}"


def print_league(found: dict[str, Any], console: Console) -> None:
    """Print what `tell` found."""
    console.print(f"step {found['step']}, past selves kept: {' '.join(found['population'])}", markup=False)
    games = list(dict.fromkeys(game for row in found["opponents"] for game in row["scores"]))
    table = Table(title="whom the policy met", title_justify="left")
    for column in ("opponent", "matches", "share", *map(_score, games)):
        table.add_column(Text(column), justify="left" if column == "opponent" else "right", no_wrap=True)
    for row in found["opponents"]:
        table.add_row(*map(Text, _cells(Met(**row), games)))
    console.print(table)
    matrix = found["matrix"]
    if matrix is None:
        console.print("no payoff matrix yet: it is made when a snapshot is taken (league.snapshot_every)")
        return
    for label, game in matrix["games"].items():
        console.print(_matrix_table(label, matrix, game))
        if "nash" not in game:
            console.print("not every two past selves met, so they are not ranked (league.payoff_matches)")


def _told(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if "league" in record]


def _met(told: Sequence[Record]) -> list[Met]:
    """Plain self-play, fixed opponents, the living past selves in order, and the others together."""
    last = told[-1]["league"]
    everyone = sum(game.get("matches", 0) for record in told for game in record.get("games", {}).values())
    counts: dict[str, int] = {}
    for record in told:
        for name, matches in record["league"]["met"].items():
            gone = name.startswith(PAST) and name not in last["population"]
            counts[_GONE if gone else name] = counts.get(_GONE if gone else name, 0) + matches
    counts[_SELF] = everyone - sum(counts.values())
    scored = dict.fromkeys(name for scores in last["scores"].values() for name in scores)
    fixed = sorted(n for n in {*counts, *scored} if not n.startswith(PAST) and n not in (_SELF, _GONE))
    names = [_SELF, *fixed, *last["population"], _GONE]
    return [
        Met(
            name,
            counts.get(name, 0),
            counts.get(name, 0) / everyone if everyone else 0.0,
            {game: scores[name] for game, scores in last["scores"].items() if name in scores},
        )
        for name in names
        if name in counts or name in scored
    ]


def _cells(met: Met, games: Sequence[str]) -> list[str]:
    scores = [percent(met.scores[game]) if game in met.scores else "" for game in games]
    return [met.name, f"{met.matches:,}", percent(met.share), *scores]


def _score(game: str) -> str:
    return f"score in {game}"


def _chart(told: Sequence[Record], game: str) -> str:
    """The score against fixed opponents and living past selves, as many as there are colours."""
    last = told[-1]["league"]
    fixed = [name for name in last["scores"][game] if not name.startswith(PAST)]
    past = [name for name in last["population"] if name in last["scores"][game]]
    series = []
    for name in [*fixed, *_spread(past, max(COLOURS - len(fixed), 1))][:COLOURS]:
        points = [
            (record["step"], scores[name])
            for record in told
            if name in (scores := record["league"]["scores"].get(game, {}))
        ]
        series.append(Series(name, points))
    return line_chart(f"{game}: score against the league", series, percent)


def _spread(names: Sequence[str], most: int) -> list[str]:
    """At most that many of them, from the first to the last at even distances."""
    if len(names) <= most:
        return list(names)
    return [names[round(k * (len(names) - 1) / max(most - 1, 1))] for k in range(most)]


def _newest_matrix(told: Sequence[Record]) -> dict[str, Any] | None:
    taken = [record for record in told if "matrix" in record["league"]]
    if not taken:
        return None
    matrix = taken[-1]["league"]["matrix"]
    names = matrix["names"]
    games = {
        game: {"margins": margins, **_ranked(names, margins)} for game, margins in matrix["margins"].items()
    }
    return {"step": taken[-1]["step"], "names": names, "games": games}


def _ranked(names: Sequence[str], margins: Margins) -> dict[str, dict[str, float]]:
    """Nash averaging and alpha-rank over the past selves, and everyone's margin against that Nash mixture.

    Fixed opponents do not meet each other, so they take no part in the mixture. Both take the mean margins as
    they are, without intervals. {} where two past selves never met.
    """
    import numpy as np

    from ludus.league.ratings import alpha_rank, nash_average

    past = [i for i, name in enumerate(names) if name.startswith(PAST)]
    known = [[0.0 if i == j else margins[i][j] for j in past] for i in past]
    if len(past) < 2 or any(cell is None for row in known for cell in row):
        return {}
    payoffs = np.array(known, dtype=np.float64)
    nash = nash_average(payoffs)
    against = {}
    for i, name in enumerate(names):
        row = [0.0 if i == j else margins[i][j] for j in past]
        if None not in row:
            against[name] = float(np.array(row, dtype=np.float64) @ nash)
    shares = alpha_rank(payoffs)
    return {
        "nash": {names[i]: float(p) for i, p in zip(past, nash, strict=True)},
        "alpha_rank": {names[i]: float(p) for i, p in zip(past, shares, strict=True)},
        "against_nash": against,
    }


def _matrix_table(label: str, matrix: dict[str, Any], game: dict[str, Any]) -> Table:
    title = f"{label}: mean margin of row against column, at step {matrix['step']}"
    table = Table(title=Text(title), title_justify="left")
    table.add_column("")
    for name in matrix["names"]:
        table.add_column(Text(name), justify="right", no_wrap=True)
    ranks = [rank for rank in _RANKS if rank[1] in game]
    for title, _, _ in ranks:
        table.add_column(title, justify="right", no_wrap=True)
    for name, row in zip(matrix["names"], game["margins"], strict=True):
        ranked = [format(game[key][name], form) if name in game[key] else "" for _, key, form in ranks]
        table.add_row(Text(name), *["" if x is None else f"{x:+.3f}" for x in row], *ranked)
    return table


def _heat_maps(told: Sequence[Record]) -> str:
    taken = [record for record in told if "matrix" in record["league"]]
    if not taken:
        return ""
    matrix = taken[-1]["league"]["matrix"]
    note = (
        f"<p>The payoff matrix at step {taken[-1]['step']}: the mean margin per match of the row against the "
        "column. A past self is named by the step after which it was taken.</p>"
    )
    maps = "".join(
        f"<h3>{text(game)}</h3>{_heat_map(matrix['names'], margins)}"
        for game, margins in matrix["margins"].items()
    )
    return note + maps


def _heat_map(names: Sequence[str], margins: Margins) -> str:
    largest = max((abs(x) for row in margins for x in row if x is not None), default=0.0) or 1.0
    head = "".join(f"<th>{text(name)}</th>" for name in names)
    rows = "".join(
        f"<tr><th>{text(name)}</th>{''.join(_heat(x, largest) for x in row)}</tr>"
        for name, row in zip(names, margins, strict=True)
    )
    return f'<div class="wide"><table class="heat"><tr><th></th>{head}</tr>{rows}</table></div>'


def _heat(margin: float | None, largest: float) -> str:
    if margin is None:
        return "<td></td>"
    kind = "won" if margin > 0 else "lost"
    return f'<td><i class="{kind}" style="opacity:{0.6 * abs(margin) / largest:.2f}"></i>{margin:+.3f}</td>'
