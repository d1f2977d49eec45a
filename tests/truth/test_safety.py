"""Safety figures of defenders whose habits are known."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest

from ludus.engines.base import EngineUnavailable
from ludus.experts import make_player
from ludus.games import registry
from ludus.games.red_team.game import RedTeamGame
from ludus.games.red_team.world import Family, words_of
from ludus.players import Ask, Player, Reply
from ludus.records import measured_rows
from ludus.scripted import PROGRAMS
from ludus.truth.intervals import wilson
from ludus.truth.safety import safety


def figures(player: Player, matches: int = 50, **args: Any) -> dict[str, Any]:
    game = registry.make("red_team")
    assert isinstance(game, RedTeamGame)
    return asyncio.run(safety(game, player, matches=matches, seed=1, **args))


@pytest.mark.parametrize(
    ("name", "broken", "refused", "answered"),
    [("defend:helpful", 1.0, 0.0, 1.0), ("defend:refuse", 0.0, 1.0, 0.0), ("defend:perfect", 0.0, 0.0, 1.0)],
)
def test_known_habits(name: str, broken: float, refused: float, answered: float) -> None:
    found = figures(make_player(name))
    assert (found["split"], found["agreement"], found["illegal_rate"], found["masked"]) == (
        "held_out",
        1,
        0,
        0,
    )
    for judge in ("exact", "keywords"):
        told = found["judges"][judge]
        assert told["attack_success"] == {"rate": broken, "ci95": list(wilson(broken, 50)), "n": 50}
        for family in Family:
            assert told[f"attack_success/{family}"]["rate"] == broken
            assert told[f"attack_success/{family}"]["n"] == 10
        for label in ("benign", "hard_benign"):
            assert told[f"over_refusal/{label}"] == {
                "rate": refused,
                "ci95": list(wilson(refused, 25)),
                "n": 25,
            }
            assert told[f"answered/{label}"]["rate"] == answered


@dataclass
class Listener:
    """A defender that looks for single words: by them it refuses, says nothing legal, or loses its engine."""

    policy: str = "listener"
    trainable: bool = False
    seen: tuple[str, ...] = ()

    async def answer(self, ask: Ask) -> Reply:
        request = ask.observation.state
        self.seen = (*self.seen, request)
        words = words_of(request)
        if "poet" in words or "robot" in words or "baker" in words:
            return Reply(action=None)
        if "song" in words:
            raise EngineUnavailable("there", "timeout")
        known = {"make", "brew", "use", "work"} & set(words)
        return Reply(action="I must refuse." if known else "Let me think.")


def test_what_is_illegal_or_lost_is_told_apart() -> None:
    listener = Listener()
    found = figures(listener, matches=200)
    assert found["masked"] > 0
    assert 0 < found["illegal_rate"] < 0.2
    told = found["judges"]["exact"]
    assert told["attack_success"]["rate"] == 0.0
    assert told["attack_success"]["n"] + told["over_refusal/benign"]["n"] * 2 < 400
    assert 0 < told["over_refusal/benign"]["rate"] < told["over_refusal/hard_benign"]["rate"] < 1
    assert told["answered/benign"]["rate"] == 0.0


def test_the_same_requests_every_time() -> None:
    one, two = Listener(), Listener()
    figures(one)
    figures(two)
    assert one.seen == two.seen
    assert len(set(one.seen)) > 40


def test_only_held_out_words_unless_asked_otherwise() -> None:
    listener = Listener()
    figures(listener, split="train")
    assert not any("brew" in words_of(request) for request in listener.seen)
    held = Listener()
    figures(held)
    assert any("brew" in words_of(request) for request in held.seen)
    assert not any("build" in words_of(request) for request in held.seen)


def test_nothing_left_is_no_rate() -> None:
    class Gone:
        policy, trainable = "gone", False

        async def answer(self, ask: Ask) -> Reply:
            raise EngineUnavailable("there", "lost")

    found = figures(Gone(), matches=5)
    assert found["masked"] == 15
    assert found["agreement"] is None
    assert found["judges"]["exact"]["attack_success"] == {"rate": None, "ci95": [0.0, 1.0], "n": 0}


def test_the_rows_of_a_report() -> None:
    found = figures(PROGRAMS["defend:helpful"])
    rows = measured_rows({"games": {"red_team": {"opponents": {}, "safety": found}}})
    assert [(row.figure, row.after.split()[0]) for row in rows] == [
        ("attack success", "100.0%"),
        ("over refusal, benign", "0.0%"),
        ("over refusal, hard benign", "0.0%"),
        ("answered, benign", "100.0%"),
        ("answered, hard benign", "100.0%"),
    ]
