"""A tournament as tables and pictures."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from matplotlib.image import imread
from rich.console import Console

from ludus.viewer.standings import print_tournament, short_names, write_heatmap


def entry(name: str, place: tuple[int, int], rating: float) -> dict[str, Any]:
    return {
        "name": name,
        "rating": rating,
        "rating_ci95": [rating - 10, rating + 12],
        "place": list(place),
        "margin": rating / 1000,
        "margin_ci95": [rating / 1000 - 0.1, rating / 1000 + 0.1],
        "win": 0.5,
        "draw": 0.25,
        "loss": 0.25,
        "alpha_rank": 0.5,
        "nash": 1.0,
        "against_nash": 0.0,
        "matches": 8,
    }


def cell(mean: float) -> dict[str, Any]:
    return {"mean_return": mean, "return_ci95": [mean - 0.2, mean + 0.2]}


GAME: dict[str, Any] = {
    "standings": [entry("[red]a", (1, 2), 120.0), entry("b<&$>$", (1, 2), -20.0), entry("c", (3, 3), -100.0)],
    "ties": [["[red]a", "b<&$>$"]],
    "misfit": 0.123,
    "absent": ["gone"],
    "payoffs": {
        "[red]a": {"b<&$>$": cell(0.5), "c": None, "gone": None},
        "b<&$>$": {"[red]a": cell(-0.5), "c": cell(1.25), "gone": None},
        "c": {"[red]a": None, "b<&$>$": cell(-1.25), "gone": None},
        "gone": {"[red]a": None, "b<&$>$": None, "c": None},
    },
}


def printed(game: dict[str, Any]) -> str:
    out = io.StringIO()
    print_tournament({"games": {"one/game": game}}, Console(file=out, width=200))
    return out.getvalue()


def test_the_tables_say_who_stands_where() -> None:
    text = printed(GAME)
    rows = [line.replace("│", " ").split() for line in text.splitlines()]
    assert ["1-2", "[red]a", "+120", "[+110,", "+132]", "+0.120", "[+0.020,", "+0.220]"] in [
        r[:8] for r in rows
    ]
    assert ["3", "c", "-100"] in [r[:3] for r in rows]
    assert "not separable: [red]a = b<&$>$" in text
    assert "within 0.123" in text
    assert "played nothing: gone" in text
    assert ["c", "-1.250", "[-1.45,", "-1.05]"] in rows


def test_columns_are_headed_by_what_tells_entrants_apart() -> None:
    runs = [
        "runs/a/league/past_00000000",
        "runs/a/league/past_00000015",
        "runs/b/league/past_00000015",
        "cfr",
    ]
    assert list(short_names(runs).values()) == [
        "past_00000000",
        "a/league/past_00000015",
        "b/league/past_00000015",
        "cfr",
    ]
    assert short_names(["x/a", "a", "/"]) == {"x/a": "x/a", "a": "a", "/": "/"}
    long = ["runs/of/some/length/league/past_00000000", "runs/of/some/length/league/past_00000015"]
    game = {
        **GAME,
        "standings": [entry(name, (1, 2), 0.0) for name in long],
        "payoffs": {a: {b: None if a == b else cell(0.5) for b in long} for a in long},
    }
    rows = [re.sub("[┃│]", " ", line).split() for line in printed(game).splitlines()]
    assert ["past_00000000", "past_00000015"] in rows


def test_nothing_played_is_said() -> None:
    assert printed({**GAME, "standings": []}) == "one/game: no match was played to its end\n"


def test_the_heat_map_holds_every_payoff_and_is_the_same_each_time(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    files = write_heatmap("one/game", GAME, tmp_path)
    assert [f.name for f in files] == ["one_game.png", "one_game.svg"]
    assert imread(files[0]).shape[0] > 300
    written = [e.text for e in ElementTree.parse(files[1]).iter("{http://www.w3.org/2000/svg}text")]
    for word in ("+0.50", "-0.50", "+1.25", "-1.25", "[red]a", "b<&$>$", "c"):
        assert written.count(word) == (1 if word[0] in "+-" else 2)
    assert "gone" not in written
    for a, b in zip(files, write_heatmap("one/game", GAME, tmp_path / "two"), strict=True):
        assert a.read_bytes() == b.read_bytes()
