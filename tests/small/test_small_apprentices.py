"""Apprentices: what they say is true, what they play is legal, and nothing comes from the unseen."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from ludus.errors import UserError
from ludus.games.base import Match
from ludus.games.negotiation import Deal, NegotiationGame, NegotiationMatch
from ludus.games.openspiel import SpielGame, SpielMatch
from ludus.games.registry import make
from ludus.players import Ask, Reply
from ludus.small.apprentices import Apprentice, apprentice

GAMES: list[tuple[str, dict[str, Any]]] = [
    ("kuhn_poker", {}),
    ("kuhn_poker", {"rounds": 3}),
    ("leduc_poker", {}),
    ("tic_tac_toe", {}),
    ("tic_tac_toe", {"view": "cells"}),
    ("connect_four", {}),
    ("breakthrough", {"rows": 4, "columns": 3}),
    ("negotiation", {}),
    ("negotiation", {"resources": 5}),
]
TWO = NegotiationGame()


def ask(match: Match, name: str = "", seed: int = 0) -> Ask:
    (seat,) = match.to_act()
    return Ask(name, seat, f"player_{seat}", match.observe(seat), seed, 0, None, (), match)


def answer(player: Apprentice, match: Match, seed: int = 0) -> Reply:
    return asyncio.run(player.answer(ask(match, seed=seed)))


def earnest(name: str) -> Apprentice:
    """One that always acts on what it sees, where that suggests anything."""
    return replace(apprentice(name), noise=0.0)


def after(match: Match, *moves: str) -> Match:
    for move in moves:
        match.play({match.to_act()[0]: move})
    return match


def positions(name: str, args: dict[str, Any], matches: int) -> Iterator[tuple[Match, Random]]:
    """Every position of some random matches, before it is played on from."""
    game = make(name, **args)
    for seed in range(matches):
        match, rng = game.start(seed), Random(seed)
        while match.to_act():
            yield match, rng
            (seat,) = match.to_act()
            match.play({seat: match.sample(seat, rng)})


# --- positions by hand ---


@pytest.mark.parametrize(
    ("card", "history", "moves"),
    [
        ("J", [], {"bet"}),
        ("Q", [], {"pass"}),
        ("K", [], {"bet"}),
        ("Q", ["pass"], {"pass"}),
        ("J", ["pass"], {"bet"}),
        ("K", ["pass"], {"bet"}),
        ("J", ["bet"], {"pass"}),
        ("Q", ["bet"], {"pass"}),
        ("K", ["bet"], {"bet"}),
        ("J", ["pass", "bet"], {"pass"}),
    ],
)
def test_kuhn_poker_heeds_the_card_and_the_last_move(card: str, history: list[str], moves: set[str]) -> None:
    seat = len(history) % 2
    matches = (make("kuhn_poker").start(seed) for seed in range(100))
    match = next(m for m in matches if f"Your card: {card}" in m.observe(seat).state)
    for number, move in enumerate(history):
        match.play({number % 2: move})
    replies = [answer(earnest("kuhn_poker"), match, seed) for seed in range(20)]
    assert {r.text for r in replies} == {f"I hold {card} facing {history[-1] if history else 'nothing'}."}
    assert {r.action for r in replies} == moves


@pytest.mark.parametrize("view", ["board", "cells"])
@pytest.mark.parametrize(
    ("moves", "thought", "hints"),
    [
        ("", "Quiet.", set("123456789")),
        ("1 4 2 5", "Win 3.", {"3"}),  # X has 1 2; that O has 4 5 does not matter any more
        ("1 4 2", "Block 3.", {"3"}),  # O must stop 1 2 3
        ("1 2 5 3", "Win 9.", {"9"}),
        ("1 5 9 3", "Block 7.", {"7"}),  # O has 5 3
        ("1 2 9 7 3", "Lost.", set("4568")),  # X has 1 3 9 and threatens both 5 and 6
        ("1 2 3 5 8 4 6 9", "Quiet.", {"7"}),  # the last cell, a draw
    ],
)
def test_tic_tac_toe_sees_wins_and_threats(view: str, moves: str, thought: str, hints: set[str]) -> None:
    match = after(make("tic_tac_toe", view=view).start(0), *moves.split())
    replies = [answer(earnest("tic_tac_toe"), match, seed) for seed in range(60)]
    assert {r.text for r in replies} == {thought}
    assert {r.action for r in replies} == hints


def negotiation(*moves: str) -> Match:
    """Seat 0: 2 wood worth 9, 3 gold worth 1. Seat 1: 4 wood worth 2, 1 gold worth 5."""
    return after(NegotiationMatch(TWO, Deal(((2, 3), (4, 1)), ((9, 1), (2, 5)))), *moves)


@pytest.mark.parametrize(
    ("moves", "thought", "actions"),
    [
        # Wood at 9 for gold at 1 never gains; gold for wood always does.
        ([], "I want wood.", {f"offer {x} gold for {y} wood" for x in (1, 2, 3) for y in (1, 2, 3, 4)}),
        # Seat 1 gives 1 wood (2) and gets 1 gold (5).
        (["offer 1 gold for 1 wood"], "Good, +3.", {"accept"}),
        # It gives 3 wood (6) and gets 1 gold (5). Its own gains: wood for gold at 2 against 5.
        (
            ["offer 1 gold for 3 wood"],
            "Bad, -1.",
            {
                "deny",
                *(f"offer {x} wood for {y} gold" for x in range(1, 5) for y in range(1, 4) if 5 * y > 2 * x),
            },
        ),
        # Even trades are not good: 5 wood (10) against 2 gold (10), and 5 it does not have.
        (["offer 2 gold for 5 wood"], "Too dear.", None),
        # Talk and a refused offer leave nothing pending: gold is dearer to seat 1.
        (["say hello"], "I want gold.", None),
        (["offer 1 gold for 1 wood", "deny"], "I want wood.", None),
    ],
)
def test_negotiation_weighs_the_offer(moves: list[str], thought: str, actions: set[str] | None) -> None:
    match = negotiation(*moves)
    replies = [answer(earnest("negotiation"), match, seed) for seed in range(400)]
    assert {r.text for r in replies} == {thought}
    if actions is not None:
        assert {r.action for r in replies} == actions


def test_an_even_offer_is_not_good() -> None:
    match = NegotiationMatch(TWO, Deal(((2, 2), (2, 2)), ((3, 3), (4, 2))))
    assert answer(earnest("negotiation"), after(match, "offer 2 gold for 1 wood")).text == "Bad, +0."


# --- claims checked over whole matches ---


def wins_at_once(match: SpielMatch, seat: int, move: str) -> bool:
    state = match.spiel_state
    state.apply_action(match.game.actions(state)[move])
    return bool(state.is_terminal() and state.returns()[seat] > 0)


def allows_a_win(match: SpielMatch, seat: int, move: str) -> bool:
    """Whether the other seat can win at once after `move`."""
    state = match.spiel_state
    state.apply_action(match.game.actions(state)[move])
    if state.is_terminal():
        return False
    for reply in state.legal_actions():
        child = state.clone()
        child.apply_action(reply)
        if child.is_terminal() and child.returns()[seat] < 0:
            return True
    return False


@pytest.mark.parametrize(
    ("name", "args", "matches"),
    [("tic_tac_toe", {}, 25), ("connect_four", {}, 2), ("breakthrough", {"rows": 4, "columns": 3}, 6)],
)
def test_thoughts_on_open_boards_are_true(name: str, args: dict[str, Any], matches: int) -> None:
    said: Counter[str] = Counter()
    for match, _ in positions(name, args, matches):
        assert isinstance(match, SpielMatch)
        (seat,) = match.to_act()
        legal = match.observe(seat).legal or ()
        thought = answer(apprentice(name), match).text
        kind, *moves = thought.rstrip(".").split(" ")
        said[kind] += 1
        wins = [move for move in legal if wins_at_once(match, seat, move)]
        holds = [move for move in legal if not allows_a_win(match, seat, move)]
        if wins:
            assert (kind, moves) == ("Win", wins)
        elif len(holds) == len(legal):
            assert (kind, moves) == ("Quiet", [])
        else:
            assert (kind, moves) == (("Block", holds) if holds else ("Lost", []))
    assert {"Win", "Block", "Quiet"} <= said.keys()


@pytest.mark.parametrize(("name", "args"), GAMES[:3], ids=str)
def test_thoughts_on_cards_name_the_card_in_hand(name: str, args: dict[str, Any]) -> None:
    for match, _ in positions(name, args, 30):
        now = match.current if args else match
        assert isinstance(now, SpielMatch)
        state = now.spiel_state
        card = re.search(r"\[Private: (\d)\]", state.information_state_string())
        rank = int(card[1]) if card else int(state.information_state_string()[0])
        public = re.search(r"\[Public: (\d)\]", state.information_state_string())
        hand = "JQK"[rank] + (f" with {'JQK'[int(public[1])]}" if public else "")
        thought = f"I hold {hand} facing {_last_move(state.information_state_string())}."
        assert answer(apprentice(name), match).text == thought


def test_suits_change_nothing_that_an_apprentice_says() -> None:
    said = 0
    for match, _ in positions("leduc_poker", {"suits": True}, 30):
        assert isinstance(match, SpielMatch)
        game = make("leduc_poker")
        assert isinstance(game, SpielGame)
        folded = game.spiel.new_initial_state()
        for step in match.spiel_state.full_history():
            folded.apply_action(step.action // 2 if step.player < 0 else step.action)
        plain = SpielMatch(game, folded, Random(0))
        assert answer(apprentice("leduc_poker"), match) == answer(apprentice("leduc_poker"), plain)
        said += "with" in answer(apprentice("leduc_poker"), match).text
    assert said > 10


def _last_move(key: str) -> str:
    """The last move of the current betting round, out of OpenSpiel's information state: the other seat's."""
    leduc = re.search(r"\[Round (\d)\].*\[Round1: ([\d ]*)\]\[Round2: ([\d ]*)\]", key)
    if leduc is None:
        return {"p": "pass", "b": "bet"}.get(key[-1], "nothing")
    said = leduc[2 if leduc[1] == "1" else 3].split()
    return ("fold", "call", "raise")[int(said[-1])] if said else "nothing"


@pytest.mark.parametrize("args", [{}, {"resources": 5}], ids=str)
def test_thoughts_on_offers_foretell_the_gain(args: dict[str, Any]) -> None:
    accepted = 0
    for match, _ in positions("negotiation", args, 40):
        (seat,) = match.to_act()
        seen = match.observe(seat).state
        thought = answer(apprentice("negotiation"), match).text
        if found := re.fullmatch(r"(Good|Bad), ([+-]\d+)\.", thought):
            trial = match.twin(seat, Random(0))  # type: ignore[attr-defined]
            trial.play({seat: "accept"})
            gains = [
                int(re.search(r"Your gain: ([+-]\d+)", text)[1])  # type: ignore[index]
                for text in (seen, trial.observe(seat).state)
            ]
            assert gains[1] - gains[0] == int(found[2])
            assert (found[1] == "Good") == (int(found[2]) > 0)
            accepted += 1
        elif thought == "Too dear.":
            assert "You cannot pay it." in seen
        else:
            values = {name: int(v) for name, v in re.findall(r"\d+ (\w+) worth (\d+)", seen)}
            wanted = re.fullmatch(r"I want (\w+)\.", thought)
            assert wanted is not None
            assert values[wanted[1]] == max(values.values())
    assert accepted > 20


# --- for every game ---


@pytest.mark.parametrize(("name", "args"), GAMES, ids=str)
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_every_move_is_legal(name: str, args: dict[str, Any], noise: float) -> None:
    player = replace(apprentice(name), noise=noise)
    game = make(name, **args)
    for seed in range(3):
        match, rng = game.start(seed), Random(seed)
        while match.to_act():
            action = answer(player, match, rng.getrandbits(60)).action
            assert action is not None
            match.play({match.to_act()[0]: action})  # IllegalAction fails the test


@pytest.mark.parametrize(
    ("name", "args"), [g for g in GAMES if g[0] in ("kuhn_poker", "leduc_poker", "negotiation")], ids=str
)
def test_thought_and_move_stay_the_same_when_the_others_secrets_change(
    name: str, args: dict[str, Any]
) -> None:
    changed = 0
    for match, rng in positions(name, args, 12):
        (seat,) = match.to_act()
        twin = match.twin(seat, rng)  # type: ignore[attr-defined]
        if twin is None:
            continue
        changed += twin.observe(1 - seat) != match.observe(1 - seat)
        for player in (apprentice(name), earnest(name)):
            for seed in range(4):
                assert answer(player, twin, seed) == answer(player, match, seed)
    assert changed > 10  # the secrets did change


def test_noise_is_how_often_the_sight_is_ignored() -> None:
    """Holding Q, to move first, with noise 0.5: a bet with probability 0.5 * 1/2 = 0.25."""
    matches = (make("kuhn_poker").start(seed) for seed in range(100))
    match = next(m for m in matches if "Your card: Q" in m.observe(0).state)
    player = apprentice("kuhn_poker")
    assert player.noise == 0.5
    bets = sum(answer(player, match, seed).action == "bet" for seed in range(2000))
    assert abs(bets - 500) < 97  # five standard deviations


def test_a_game_without_an_apprentice_is_told() -> None:
    with pytest.raises(UserError, match=r"no apprentice plays 'liars_dice'.*kuhn_poker"):
        apprentice("liars_dice")
