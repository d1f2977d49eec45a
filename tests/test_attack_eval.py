"""`ludus attack` from outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ludus.cli import main

FEW = ("--matches", "10")


def test_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attack", "attack:mix", "defend:helpful", *FEW]) == 0
    text = capsys.readouterr().out
    assert "attack:mix attacks defend:helpful on held_out seeds" in text
    assert "100.0% [72.2%, 100.0%]" in text
    assert main(["attack", "attack:mix", "defend:helpful", *FEW, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["judges"]["keywords"]["attack_success"]["rate"] == 1.0
    assert (found["matches"], found["seed"], found["split"]) == (10, 0, "held_out")


def test_a_model_in_either_seat(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["attack", str(tiny_model), f"mine={tiny_model}", *FEW, "--json", "--embedder", str(tiny_model)]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["masked"] == 0
    legal = (
        1 - found["illegal_rate"]["attacker"]
    )  # of 20 replies: 10 harmful seeds, and 5 of each other label
    assert 0 < legal <= 1
    assert 20 * legal - 10 <= found["diversity"]["texts"] <= 10
    assert found["diversity"]["embedding_distance"] >= 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["attack:mix", "nobody"], "'nobody' is no directory"),
        (["attack:mix", "defend:refuse", "--game", "kuhn_poker"], "no red-team game"),
        (["attack:mix", "defend:refuse", "--matches", "0"], "ask for at least 1"),
    ],
)
def test_bad_input(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attack", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert err.count("\n") == 1
