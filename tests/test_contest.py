"""`ludus tournament` from outside: programs, models and a real server on the loopback device at one table."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from loopback import Answer, good, serve

from ludus import config as configuration
from ludus import contest
from ludus.cli import main

FEW = ("--game", "kuhn_poker", "--matches", "6")


def first_legal(_: int, body: dict[str, Any]) -> Answer:
    """An endpoint whose model plays the first legal move that it reads."""
    legal = re.search(r"Legal: (\w+)", body["messages"][-1]["content"])
    assert legal is not None
    return Answer(body=good(f"I hold a card. \\boxed{{{legal[1]}}}"))


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["tournament", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ludus: ")
    assert err.count("\n") == 1
    return err


def test_table_picture_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["tournament", "random", "cfr", "mcts:3", *FEW, "--out", str(tmp_path)]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "mean return of row against column" in text
    assert text.endswith(f"results: {tmp_path}\n")
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(files) == {
        "kuhn_poker.png",
        "kuhn_poker.svg",
        "matches.jsonl",
        "settings.json",
        "tournament.json",
    }
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(files["tournament.json"])
    assert (found["seed"], found["matches"], found["problems"]) == (0, 6, [])
    assert {s["name"] for s in found["games"]["kuhn_poker"]["standings"]} == {"random", "cfr", "mcts:3"}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files  # nothing was played again


def test_models_programs_and_a_server_play_each_other(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SERVER_API_KEY", "sk-secret")
    recipe = tmp_path / "small.toml"
    recipe.write_text(
        f"""
name = "small"
threads = 1
[model]
path = "{tiny_model}"
[[games]]
name = "kuhn_poker"
label = "kuhn"
args = {{rounds = 1}}
[text]
rules = false
[engine]
slots = 16
context = 256
[rollout]
max_tokens = 32
[[league.opponents]]
policy = "twin"
model = "{tiny_model}"
"""
    )
    with serve(first_legal) as server:
        entrants = ["random", str(tiny_model), "twin", f"my-server={server.url}#first"]
        argv = [
            *entrants,
            "--recipe",
            str(recipe),
            "--matches",
            "6",
            "--out",
            str(tmp_path / "out"),
            "--json",
        ]
        assert main(["tournament", *argv]) == 0
        found = json.loads(capsys.readouterr().out)
        assert set(server.keys) == {"Bearer sk-secret"}
        body = server.seen[0]
        assert (body["model"], body["max_tokens"]) == ("first", 32)
        asked = len(server.seen)
        assert main(["tournament", *argv, "--game", "kuhn"]) == 0  # the same game, by its label
        assert len(server.seen) == asked
    kuhn = found["games"]["kuhn"]
    names = ["random", str(tiny_model), "twin", "my-server"]
    assert {s["name"] for s in kuhn["standings"]} == set(names)
    assert all(kuhn["payoffs"][a][b]["matches"] == 6 for a in names for b in names if a != b)
    assert kuhn["payoffs"]["my-server"]["random"]["illegal_rate"] == 0
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())["entrants"]
    assert settings["twin"] == settings[str(tiny_model)]
    assert set(settings["twin"]["files"]) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert "sk-secret" not in "".join(p.read_text(errors="replace") for p in (tmp_path / "out").iterdir())


def test_a_missing_endpoint_is_told_and_the_rest_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "endpoint.toml"
    recipe.write_text(
        """
name = "endpoint"
[model]
path = "none"
[[games]]
name = "kuhn_poker"
[[league.opponents]]
policy = "far"
endpoint = {base_url = "http://127.0.0.1:9/v1", model = "m", retries = 0}
"""
    )
    argv = ["random", "cfr", "far", "--recipe", str(recipe), "--matches", "6", "--out", str(tmp_path / "out")]
    assert main(["tournament", *argv]) == 2
    out, err = capsys.readouterr()
    assert "played nothing: far" in out
    assert (
        "12 matches could not be played (kuhn_poker, cfr against far; kuhn_poker, far against random)" in err
    )
    assert "http://127.0.0.1:9/v1/chat/completions: connection" in err
    assert err.count("\n") == 1
    found = json.loads((tmp_path / "out" / "tournament.json").read_text())["games"]["kuhn_poker"]
    assert found["payoffs"]["cfr"]["random"]["matches"] == 6
    assert found["payoffs"]["cfr"]["far"] is None


def test_a_model_takes_part_under_a_name_of_its_own(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["tournament", f"old={tiny_model}", "random", *FEW, "--out", str(tmp_path / "a"), "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)["games"]["kuhn_poker"]
    assert {s["name"] for s in found["standings"]} == {"old", "random"}
    # The same name for another player would mix their results.
    assert "entrants: old was" in refused(capsys, "old=cfr", "random", *FEW, "--out", str(tmp_path / "a"))


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["random", *FEW], "at least two entrants, and random is alone"),
        (["random", "random", *FEW], "'random' is named twice"),
        (["random", "minimax", *FEW], "entrant 'minimax' cannot play 'kuhn_poker'"),
        (
            ["random", "fair_trader", "--game", "tic_tac_toe"],
            "entrant 'fair_trader' cannot play 'tic_tac_toe'",
        ),
        (["random", "minmax", *FEW], "did you mean 'minimax'?"),
        (["random", "absent/run", *FEW], "entrant 'absent/run' is no directory"),
        (["random", "tests", *FEW], "neither a run directory"),
        (["random", "a=", *FEW], "not of the form NAME=PATH"),
        (["random", "a=http://127.0.0.1:9/v1", *FEW], "names no model; write a=http://127.0.0.1:9/v1#MODEL"),
        (["random", "cfr"], "name what is played"),
        (["random", "cfr", "--game", "khun_poker"], "did you mean 'kuhn_poker'?"),
        (["random", "cfr", "--game", "kuhn_poker", "--matches", "0"], "at least 2"),
        (["random", "cfr", "--recipe", "absent.toml"], "cannot read recipe absent.toml"),
    ],
)
def test_bad_input_is_one_clear_line(
    argv: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(capsys, *argv, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_games_are_those_of_the_runs_at_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, view in (("a", "cells"), ("b", "cells"), ("c", "board")):
        game = {"name": "tic_tac_toe", "weight": 3, "args": {"view": view}}
        settled = configuration.validate(
            {"name": name, "model": {"path": "m"}, "games": [game, {"name": "kuhn_poker"}]}, "test"
        )
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text(configuration.dump(settled))
    a, b, c = (str(tmp_path / name) for name in "abc")
    asked, _ = contest.settings(None, ["tic_tac_toe", "liars_dice"], [a, f"old={b}", "random"])
    assert [(g.label, g.args, g.weight) for g in asked.games] == [
        ("tic_tac_toe", {"view": "cells"}, 1.0),
        ("liars_dice", {}, 1.0),
    ]
    out = str(tmp_path / "out")
    told = refused(capsys, a, c, "--game", "tic_tac_toe", "--out", out)
    assert f"{a} and {c} play 'tic_tac_toe' with different options" in told
    assert "no checkpoint yet" in refused(capsys, a, c, "--game", "kuhn_poker", "--out", out)
