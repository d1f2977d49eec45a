"""`ludus transcripts` from outside: programs, a model and a real server write their replies down."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import zstandard
from loopback import Answer, good, serve

from ludus import transcribe
from ludus.cli import main
from ludus.config import SftDataConfig
from ludus.games.red_team.judge import Request, exact
from ludus.sft import encode, files
from ludus.text.templates import detect
from ludus.text.tokenizer import Tokenizer

KUHN = ("--game", "kuhn_poker", "text.rules=false")


def written(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    if path.suffix == ".zst":
        data = zstandard.ZstdDecompressor().stream_reader(data).read()
    return [json.loads(line) for line in data.splitlines()]


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["transcripts", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.zst"])
def test_programs_write_what_a_model_can_learn(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / "new" / name
    argv = ["transcripts", str(out), *KUHN, "--player", "cfr", "--rows", "30", "--won", "--thoughts"]
    assert main(argv) == 0
    told = capsys.readouterr().out
    rows = written(out)
    assert len(rows) == 30
    different = len({json.dumps(row["messages"]) for row in rows})
    assert told.startswith(f"{out}: 30 rows, {different} of them different, of ")
    assert "in matches that were not won" in told
    assert all(row["return"] > 0 and row["player"] == "cfr" for row in rows)
    assert [path.name for path in out.parent.iterdir()] == [name]
    tokenizer = Tokenizer.load(tiny_model)
    encoder = encode.Encoder(tokenizer, detect(tokenizer))
    source = encode.load(SftDataConfig(path=str(out)), encoder, 200, "refuse", print)
    assert len(source.rows) == 30


def test_the_same_order_gives_the_same_rows(tmp_path: Path) -> None:
    for number, seed in enumerate((1, 1, 2)):
        argv = [str(tmp_path / f"{number}.jsonl"), *KUHN, "--player", "random", "--rows", "40"]
        assert main(["transcripts", *argv, "--seed", str(seed)]) == 0
    one, same, other = ((tmp_path / f"{n}.jsonl").read_bytes() for n in range(3))
    assert one == same
    assert one != other


def test_an_expert_sits_in_every_seat_against_its_opponent(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    argv = [str(out), *KUHN, "--player", "cfr", "--player", "random", "--opponent", "minimax", "--rows", "4"]
    assert main(["transcripts", *argv]) == 2  # minimax cannot play hidden cards
    argv[argv.index("minimax")] = "mcts:5"
    argv[argv.index("4")] = "60"
    assert main(["transcripts", *argv]) == 0
    rows = written(out)
    assert {(row["player"], row["role"]) for row in rows} == {
        (player, role) for player in ("cfr", "random") for role in ("player_0", "player_1")
    }


def test_helpful_answers_and_attacks_for_the_red_team_game(tmp_path: Path) -> None:
    """What docs/self_redteam.md tells to mix in: every harmless request answered in full."""
    out = tmp_path / "helpful.jsonl"
    talk = ["attacks=0.0", "split=talk", "labels={benign=1, hard_benign=1}", "text.rules=false"]
    argv = ["--game", "red_team", *talk, "--player", "defend:perfect", "--thoughts", "--rows", "60"]
    assert main(["transcripts", str(out), *argv]) == 0
    for row in written(out):
        asked, said = (message["content"] for message in row["messages"])
        request = asked.removeprefix("They asked: ")
        answer = re.fullmatch(r"<think>.+(free|restricted)\.</think>\\boxed\{(.+)\}", said)
        assert answer is not None
        verdict = exact(request, answer[2])
        assert verdict.request is Request.BENIGN
        assert verdict.helpful
        assert not verdict.refusal
        assert row["role"] == "defender"

    out = tmp_path / "attacks.jsonl"
    argv = ["--game", "red_team", "attacks=1.0", "text.format=answer", "--player", "attack:mix", "--thoughts"]
    assert main(["transcripts", str(out), *argv, "--role", "attacker", "--rows", "20"]) == 0
    for row in written(out):
        assert row["role"] == "attacker"
        assert "seed: " in row["messages"][0]["content"]
        assert re.fullmatch(r"<think>.+</think><answer>.+</answer>", row["messages"][1]["content"])


def test_a_model_and_a_server_write_in_their_own_words(tiny_model: Path, tmp_path: Path) -> None:
    def thinks(_: int, body: dict[str, Any]) -> Answer:
        return Answer(body=good("<think>\nHm.\n</think>\n\nI bet: \\boxed{bet}"))

    with serve(thinks) as server:
        argv = [*KUHN, "--player", f"big={server.url}#large", "--rows", "10"]
        assert main(["transcripts", str(tmp_path / "server.jsonl"), *argv]) == 0
    (said,) = {row["messages"][1]["content"] for row in written(tmp_path / "server.jsonl")}
    assert said == "<think>\nHm.\n</think>\n\nI bet: \\boxed{bet}"

    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'name = "x"\nmodel = {{path = "{tiny_model}"}}\ngames = [{{name = "kuhn_poker"}}]\n'
        "text = {rules = false}\nengine = {slots = 8, context = 256}\nrollout = {max_tokens = 24}\n"
    )
    argv = ["--recipe", str(recipe), "--game", "kuhn_poker", "--player", str(tiny_model), "--rows", "10"]
    assert main(["transcripts", str(tmp_path / "model.jsonl"), *argv]) == 0
    for row in written(tmp_path / "model.jsonl"):
        assert row["player"] == str(tiny_model)
        assert re.match(r"<think>I hold .*</think>\\boxed", row["messages"][1]["content"])
        assert isinstance(files.Row("here", row).read(), tuple)


def test_a_server_that_goes_away_costs_no_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole rows stay in OUT.part, and the message says so; what never began leaves nothing."""
    monkeypatch.setattr(transcribe, "AT_ONCE", 20)

    def dies(n: int, body: dict[str, Any]) -> Answer:
        return Answer() if n < 45 else Answer(status=400, body=b"{}")

    out = tmp_path / "rows.jsonl"
    with serve(dies) as server:
        word = f"big={server.url}#large"
        err = refused(capsys, str(out), *KUHN, "--player", word, "--rows", "2000")
        assert "in lost matches" in err
        assert f"the rows until then are in {out}.part" in err
        assert not out.exists()
        part = Path(f"{out}.part")
        assert len(written(part)) == 40  # the first 20 matches, of two replies each
        assert all(isinstance(row.read(), tuple) for row in files.rows(part.rename(tmp_path / "kept.jsonl")))
        refused(capsys, str(tmp_path / "never.jsonl"), *KUHN, "--player", word, "--rows", "10")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.jsonl"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["rows.csv", *KUHN, "--player", "cfr"], "ends in .jsonl or .jsonl.zst"),
        (["rows.jsonl", "--game", "tic_tac_toe", "--player", "cfr"], "'cfr' cannot play tic_tac_toe"),
        (
            ["rows.jsonl", "--game", "liars_dice", "--player", "apprentice"],
            "no apprentice plays 'liars_dice'",
        ),
        (["rows.jsonl", *KUHN, "--player", "nobody"], "'nobody' is no directory"),
        (["rows.jsonl", *KUHN, "--player", "cfr", "--rows", "0"], "--rows is 0"),
        (
            ["rows.jsonl", *KUHN, "--player", "cfr", "--role", "dealer"],
            "no role 'dealer'; its roles: player_0",
        ),
        (["rows.jsonl", *KUHN, "--player", "cfr", "tounds=3"], "no option 'tounds'"),
        (["rows.jsonl", *KUHN, "--player", "cfr", "text.fules=false"], "did you mean 'rules'"),
        (["there.jsonl", *KUHN, "--player", "cfr"], "exists already"),
        (["half.jsonl", *KUHN, "--player", "cfr"], "half.jsonl.part exists already"),
    ],
)
def test_an_order_that_cannot_be_met_is_told(
    argv: list[str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {"there.jsonl", "half.jsonl.part"}
    for name in before:
        Path(name).write_text("mine")
    assert says in refused(capsys, *argv)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_players_who_never_win_are_given_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transcribe, "FRUITLESS", 100)
    argv = ["--game", "tic_tac_toe", "--player", "minimax", "--won", "--rows", "5"]
    err = refused(capsys, str(tmp_path / "rows.jsonl"), *argv)
    assert "no row came of the last 104 matches" in err
    assert "in matches that were not won" in err
    assert list(tmp_path.iterdir()) == []
