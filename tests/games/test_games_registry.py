"""Games by name, their options, and games of other packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ludus.errors import UserError
from ludus.games.registry import describe, make, names

OURS = (
    "breakthrough",
    "connect_four",
    "kuhn_poker",
    "leduc_poker",
    "liars_dice",
    "negotiation",
    "tic_tac_toe",
)


def test_all_games_are_known_and_made() -> None:
    assert set(OURS) <= set(names())
    for name in OURS:
        game = make(name)
        assert game.name == name
        assert game.roles == ("player_0", "player_1")


def test_options_reach_the_game() -> None:
    assert make("kuhn_poker", rounds=3).max_turns == 9
    assert make("kuhn_poker", rounds=3, payoff="sign").min_return == -1.0
    assert make("liars_dice", dice=2).max_turns == 25
    assert make("breakthrough", rows=4, columns=3).start(0).observe(0).state.endswith("a b c")
    assert make("negotiation").max_turns == 8
    assert make("negotiation", resources=5).max_turns == 10
    assert make("negotiation", turns=3).max_turns == 3


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("kuhn_pokr", {}, "unknown game 'kuhn_pokr'; did you mean 'kuhn_poker'?"),
        ("zzz", {}, "known games: breakthrough, "),
        ("kuhn_poker", {"round": 3}, "has no option 'round'; did you mean 'rounds'?"),
        ("connect_four", {"rounds": 3}, "has no option 'rounds'; it takes none"),
        ("kuhn_poker", {"zzz": 3}, "options: rounds, payoff"),
        (
            "kuhn_poker",
            {"rounds": "3"},
            "option 'rounds' of game 'kuhn_poker': Input should be a valid integer",
        ),
        ("kuhn_poker", {"rounds": True}, "valid integer"),
        ("kuhn_poker", {"rounds": 2.0}, "valid integer"),
        ("kuhn_poker", {"rounds": 0}, "greater than or equal to 1"),
        ("kuhn_poker", {"payoff": "chip"}, "'chips' or 'sign' (got 'chip')"),
        ("negotiation", {"resources": 3}, "2 or 5"),
        ("liars_dice", {"dice": 0}, "greater than or equal to 1"),
        ("breakthrough", {"rows": 99}, "less than or equal to 8"),
    ],
)
def test_bad_names_and_options(name: str, args: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        make(name, **args)
    assert said in str(caught.value)


def test_descriptions_name_options_and_defaults() -> None:
    rows = {row.name: row for row in describe()}
    assert rows["kuhn_poker"].options == {"rounds": "1", "payoff": "'chips'"}
    assert rows["connect_four"].options == {}
    assert all(rows[name].problem is None and rows[name].summary for name in OURS)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package on the path that registers one good game and several bad ones."""
    info = tmp_path / "othergames-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: othergames\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[ludus.games]\n"
        "small_kuhn = othergames_good:small_kuhn\n"
        "kuhn_poker = othergames_good:small_kuhn\n"
        "not_callable = othergames_good:VALUE\n"
        "no_game = othergames_good:no_game\n"
        "fails = othergames_good:fails\n"
        "missing = othergames_absent:game\n"
        "explodes = othergames_broken:game\n"
    )
    (tmp_path / "othergames_good.py").write_text(
        "from ludus.games.registry import make\n"
        "VALUE = 3\n"
        "def small_kuhn(*, stake: int, rounds: int = 2):\n"
        "    'Somebody else\\'s game.'\n"
        "    return make('kuhn_poker', rounds=rounds)\n"
        "def no_game(**anything):\n"
        "    return 3\n"
        "def fails():\n"
        "    raise KeyError('deck')\n"
    )
    (tmp_path / "othergames_broken.py").write_text("raise RuntimeError('no licence')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("installed")
def test_other_packages_register_games() -> None:
    assert "small_kuhn" in names()
    assert make("small_kuhn", stake=1).max_turns == 6
    assert make("small_kuhn", stake=1, rounds=4).max_turns == 12
    for args, said in (
        ({}, "needs the option 'stake'"),
        ({"stake": 1, "round": 2}, "did you mean 'rounds'"),
        ({"stake": "1"}, "valid integer"),
    ):
        with pytest.raises(UserError, match=said):
            make("small_kuhn", **args)


@pytest.mark.usefixtures("installed")
def test_a_broken_package_hurts_no_other_and_is_reported() -> None:
    problems = {row.name: row.problem for row in describe() if row.problem}
    assert "RuntimeError: no licence" in problems["explodes"]
    assert "No module named 'othergames_absent'" in problems["missing"]
    assert "not callable" in problems["not_callable"]
    assert "Ludus has a game of this name" in problems["kuhn_poker"]
    assert "small_kuhn" not in problems
    assert make("kuhn_poker").max_turns == 3  # ours
    for name, said in (
        ("explodes", "no licence"),
        ("missing", "othergames_absent"),
        ("no_game", "returned int, which is no Game"),
        ("fails", "failed to start: KeyError: 'deck'"),
    ):
        with pytest.raises(UserError, match=said):
            make(name)


@pytest.mark.usefixtures("installed")
def test_names_import_nothing() -> None:
    sys.modules.pop("othergames_good", None)
    assert "explodes" in names()
    assert "othergames_good" not in sys.modules


def test_games_load_without_torch() -> None:
    code = (
        "import sys, ludus.games, ludus.games.registry as r, ludus.games.check, ludus.games.forfeit\n"
        "[r.make(d.name).start(0) for d in r.describe() if 'required' not in d.options.values()]\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
