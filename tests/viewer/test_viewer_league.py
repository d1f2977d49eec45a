"""The league out of records: shares, scores, the matrix and its ranking, in the page and on the terminal."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from ludus.viewer.league import league_section, print_league, tell


def record(step: int, met: dict[str, int], population: list[str], **said: Any) -> dict[str, Any]:
    """Ten matches of Kuhn poker."""
    scores = said.pop("scores", {"kuhn": dict.fromkeys(met, 0.5)})
    league = {"population": population, "met": met, "scores": scores, **said}
    return {"step": step, "learn": {}, "games": {"kuhn": {"matches": 10}}, "league": league}


def matrix(*names: str, margins: list[list[float | None]]) -> dict[str, Any]:
    return {"names": list(names), "margins": {"kuhn": margins}}


# past/10 beats past/0, which beats past/20, which beats past/10; all of them beat the program.
CYCLE: list[list[float | None]] = [
    [None, -1.0, 1.0, 2.0],
    [1.0, None, -1.0, 0.5],
    [-1.0, 1.0, None, 0.5],
    [-2.0, -0.5, -0.5, None],
]
RECORDS = [
    record(1, {"past/0": 4}, ["past/0"]),
    record(10, {"past/0": 2, "cfr": 1}, ["past/0", "past/5"], matrix=matrix("past/0", margins=[[None]])),
    {"step": 10, "eval": {"games": {}}},
    record(
        20,
        {"past/5": 3, "cfr": 1, "past/10": 1},
        ["past/0", "past/10", "past/20"],
        scores={"kuhn": {"past/0": 0.75, "past/5": 0.4, "past/10": 0.5, "cfr": 0.25}},
        matrix=matrix("past/0", "past/10", "past/20", "cfr", margins=CYCLE),
    ),
]


def found(records: list[dict[str, Any]]) -> dict[str, Any]:
    told = tell(records)
    assert told is not None
    return told


def printed(records: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    print_league(found(records), Console(file=out, width=200))
    return out.getvalue()


def test_whom_the_policy_met_adds_up() -> None:
    told = found(RECORDS)
    assert (told["step"], told["population"]) == (20, ["past/0", "past/10", "past/20"])
    assert [(o["name"], o["matches"], round(o["share"], 3)) for o in told["opponents"]] == [
        ("self", 18, 0.6),
        ("cfr", 2, 0.067),
        ("past/0", 6, 0.2),
        ("past/10", 1, 0.033),
        ("past selves no longer kept", 3, 0.1),
    ]
    assert [o["scores"] for o in told["opponents"]] == [{}, {"kuhn": 0.25}, {"kuhn": 0.75}, {"kuhn": 0.5}, {}]


def test_a_cycle_is_ranked_alike_and_the_program_is_held_against_it() -> None:
    newest = found(RECORDS)["matrix"]
    assert (newest["step"], newest["names"]) == (20, ["past/0", "past/10", "past/20", "cfr"])
    game = newest["games"]["kuhn"]
    assert game["margins"] == CYCLE
    assert game["nash"] == pytest.approx({f"past/{n}": 1 / 3 for n in (0, 10, 20)}, abs=1e-6)
    assert game["alpha_rank"] == pytest.approx({f"past/{n}": 1 / 3 for n in (0, 10, 20)}, abs=1e-6)
    # The program loses 2, 1/2 and 1/2 to the three.
    assert game["against_nash"] == pytest.approx(
        {"past/0": 0, "past/10": 0, "past/20": 0, "cfr": -1.0}, abs=1e-6
    )


def test_who_beats_all_others_is_all_of_the_mixture() -> None:
    margins: list[list[float | None]] = [[None, -0.5], [0.5, None]]
    told = found(
        [record(9, {"past/0": 1}, ["past/0", "past/9"], matrix=matrix("past/0", "past/9", margins=margins))]
    )
    game = told["matrix"]["games"]["kuhn"]
    assert game["nash"] == pytest.approx({"past/0": 0.0, "past/9": 1.0})
    assert game["alpha_rank"] == {"past/0": 0.0, "past/9": 1.0}
    assert game["against_nash"] == pytest.approx({"past/0": -0.5, "past/9": 0.0})


@pytest.mark.parametrize(
    ("names", "margins"),
    [(["past/0"], [[None]]), (["past/0", "past/5"], [[None, None], [None, None]])],
    ids=["one past self", "no payoff matches"],
)
def test_what_cannot_be_ranked_is_not(names: list[str], margins: list[list[float | None]]) -> None:
    records = [record(5, {"past/0": 1}, names, matrix=matrix(*names, margins=margins))]
    assert set(found(records)["matrix"]["games"]["kuhn"]) == {"margins"}
    assert "so they are not ranked" in printed(records)


def test_without_past_selves_there_is_nothing_to_tell() -> None:
    plain = [{"step": 1, "learn": {}, "games": {}}, {"step": 1, "eval": {"games": {}}}]
    assert tell(plain) is tell([]) is None
    assert league_section(plain) == league_section([]) == ""


def test_without_snapshots_there_is_no_matrix() -> None:
    assert found(RECORDS[:1])["matrix"] is None
    assert "no payoff matrix yet" in printed(RECORDS[:1])
    section = league_section(RECORDS[:1])
    assert "<td>past/0</td><td>4</td><td>40.0%</td><td>50.0%</td>" in section
    assert "heat" not in section


def test_the_page_has_shares_curves_and_a_heat_map() -> None:
    section = league_section(RECORDS)
    assert "<td>past/0</td><td>6</td><td>20.0%</td><td>75.0%</td>" in section
    assert "kuhn: score against the league" in section
    assert re.findall(r'class="key c\d">([^<]*)<', section) == ["cfr", "past/0", "past/10"]
    assert '<th>past/0</th><td></td><td><i class="lost" style="opacity:0.30"></i>-1.000</td>' in section
    assert '<td><i class="won" style="opacity:0.60"></i>+2.000</td>' in section
    assert section.count("<i class=") == 12
    assert "<script" not in section


def test_curves_are_as_many_as_colours_and_reach_from_the_first_to_the_newest() -> None:
    names = [f"past/{n}" for n in range(12)]
    scores = {"kuhn": dict.fromkeys([*names, "cfr"], 0.5)}
    section = league_section([record(12, {}, names, scores=scores), record(13, {}, names, scores=scores)])
    assert re.findall(r'class="key c\d">([^<]*)<', section) == [
        "cfr",
        "past/0",
        "past/3",
        "past/6",
        "past/8",
        "past/11",
    ]


def test_names_out_of_a_recipe_stay_text() -> None:
    hostile = "<script>alert(1)</script>[red]"
    margins: list[list[float | None]] = [[None, 1.0], [-1.0, None]]
    said = matrix("past/0", hostile, margins=margins)
    said["margins"] = {hostile: margins}
    records = [
        record(1, {hostile: 2}, ["past/0"], scores={hostile: {hostile: 0.5, "past/0": 0.5}}, matrix=said)
    ]
    section = league_section(records)
    assert "<script" not in section
    assert section.count("&lt;script&gt;alert(1)&lt;/script&gt;[red]") >= 5
    assert hostile in printed(records)


def test_the_terminal_shows_the_same() -> None:
    rows = [re.sub("[│┃]", " ", line).split() for line in printed(RECORDS).splitlines()]
    assert ["past/0", "6", "20.0%", "75.0%"] in rows
    assert ["past/10", "+1.000", "-1.000", "+0.500", "0.33"] in [row[:5] for row in rows]
    assert ["cfr", "-2.000", "-0.500", "-0.500", "-1.000"] in rows
