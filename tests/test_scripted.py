"""Scripted attackers and defenders: what they say, and against whom they win."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ludus.errors import UserError
from ludus.experts import make_player, names
from ludus.games import registry
from ludus.games.red_team.judge import exact
from ludus.games.red_team.vocabulary import BY_NAME
from ludus.players import Player
from ludus.rollout.scheduler import play_all
from ludus.scripted import PROGRAMS, RedTeamProgram
from ludus.types import Episode, MatchPlan


def meet(attacker: str, defender: str, matches: int = 60, **args: Any) -> list[Episode]:
    game = registry.make("red_team", **{"attacks": 1.0, **args})
    players: dict[str, Player] = {"a": make_player(attacker), "d": make_player(defender)}
    plans = [MatchPlan(k, k, "red_team", ("a", "d"), k, 1000 + k) for k in range(matches)]
    return asyncio.run(play_all(plans, {"red_team": game}, players))


def total(episodes: list[Episode], count: str) -> int:
    return sum(e.counts[count] for e in episodes)


@pytest.mark.parametrize("attacker", [name for name in PROGRAMS if name.startswith("attack:")])
def test_attacks_are_faithful_and_beat_the_helpful_alone(attacker: str) -> None:
    split = "held_out" if attacker == "attack:held_out" else "train"
    for defender, broken in (("defend:helpful", 1.0), ("defend:perfect", 0.0), ("defend:refuse", 0.0)):
        harmful = meet(attacker, defender, 30, split=split, labels={"harmful": 1.0})
        assert total(harmful, "harmful_requests") == 30
        assert total(harmful, "harmful_answers") == 30 * broken
    benign = meet(attacker, "defend:perfect", 30, split=split, labels={"benign": 1.0, "hard_benign": 1.0})
    assert total(benign, "harmful_requests") == total(benign, "off_grammar") == total(benign, "refusals") == 0
    assert total(benign, "helpful_answers") == 30
    stern = meet(attacker, "defend:refuse", 30, split=split, labels={"hard_benign": 1.0})
    assert total(stern, "wrong_refusals") == 30
    assert all(e.returns[0] == 0.0 for e in stern)  # refused, though harmless: -1 + 1


def test_the_held_out_attacker_says_nothing_of_the_training_part() -> None:
    trained = {thing.words[0] for thing in BY_NAME.values()} | {thing.signs[0] for thing in BY_NAME.values()}
    for episode in meet("attack:held_out", "defend:perfect", 100, split="held_out"):
        assert not any(mark in str(episode.turns[0].action) for mark in trained)


def test_each_takes_the_other_seat_too() -> None:
    swapped = meet("defend:helpful", "attack:plain", 30, labels={"harmful": 1.0})
    assert total(swapped, "harmful_requests") == 30
    assert total(swapped, "harmful_answers") == 0


def test_a_request_off_the_grammar_is_no_reason_to_stop() -> None:
    class Mumbler:
        policy, trainable = "mumbler", False

        async def answer(self, ask: Any) -> Any:
            from ludus.players import Reply

            return Reply(action="mumble")

    game = registry.make("red_team", attacks=1.0)
    for name in ("defend:helpful", "defend:perfect", "defend:refuse"):
        plan = MatchPlan(0, 0, "red_team", ("a", "d"), 0, 0)
        players: dict[str, Player] = {"a": Mumbler(), "d": make_player(name)}
        (episode,) = asyncio.run(play_all([plan], {"red_team": game}, players))
        answer = episode.turns[1].action
        assert answer is not None
        assert exact("mumble", answer).refusal == (name == "defend:refuse")


def test_they_are_known_by_name_and_play_red_team_alone() -> None:
    assert set(PROGRAMS) < set(names())
    program = make_player("attack:roleplay")
    assert isinstance(program, RedTeamProgram)
    assert program.plays(registry.make("red_team"))
    assert not program.plays(registry.make("kuhn_poker"))
    with pytest.raises(UserError, match="did you mean 'attack:roleplay'"):
        make_player("attack:roleplays")


def test_another_game_is_refused_in_words() -> None:
    game = registry.make("kuhn_poker")
    plan = MatchPlan(0, 0, "kuhn_poker", ("a", "a"), 0, 0)
    with pytest.raises(UserError, match="plays red_team only, not 'kuhn_poker'"):
        asyncio.run(play_all([plan], {"kuhn_poker": game}, {"a": make_player("attack:mix")}))
