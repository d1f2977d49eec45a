"""Repeated matches: seats alternate, chips add up, and the chip leader wins."""

from __future__ import annotations

from random import Random

import pytest

from ludus.games.base import Game, IllegalAction, Match
from ludus.games.openspiel import SpielGame
from ludus.games.registry import make
from ludus.games.repeated import RepeatedGame


def play_out(game: Game, seed: int) -> tuple[Match, list[tuple[int, str]]]:
    match, rng = game.start(seed), Random(seed)
    moves = []
    while match.to_act():
        (seat,) = match.to_act()
        text = match.sample(seat, rng)
        moves.append((seat, text))
        match.play({seat: text})
    return match, moves


def results(match: Match, seat: int) -> list[float]:
    """The rounds' results as `seat` was told them."""
    told = match.observe(seat).events
    return [float(e.removeprefix("Result: ")) for e in told if e.startswith("Result: ")]


def test_one_round_is_the_plain_game() -> None:
    assert isinstance(make("kuhn_poker", rounds=1), SpielGame)
    assert isinstance(make("kuhn_poker", rounds=2), RepeatedGame)


@pytest.mark.parametrize("name", ["kuhn_poker", "leduc_poker", "liars_dice"])
def test_chips_are_the_sum_of_the_rounds(name: str) -> None:
    game = make(name, rounds=4)
    for seed in range(20):
        match, _ = play_out(game, seed)
        assert len(results(match, 0)) == 4
        assert match.returns() == (sum(results(match, 0)), sum(results(match, 1)))
        assert sum(match.returns()) == 0
        assert min(match.returns()) >= game.min_return


def test_the_chip_leader_wins_not_the_winner_of_the_last_round() -> None:
    chips, sign = make("kuhn_poker", rounds=3), make("kuhn_poker", rounds=3, payoff="sign")
    differ = 0
    for seed in range(200):
        match, moves = play_out(chips, seed)
        signed, same_moves = play_out(sign, seed)
        assert moves == same_moves
        lead = match.returns()[0]
        assert signed.returns() == ((lead > 0) - (lead < 0), (lead < 0) - (lead > 0))
        last = results(match, 0)[-1]
        differ += ((last > 0) - (last < 0)) != signed.returns()[0]
    assert 30 <= differ <= 90  # about 30% of random matches: pitfall 14


def test_seats_take_turns_to_move_first() -> None:
    match, rng = make("kuhn_poker", rounds=4).start(3), Random(3)
    first: dict[int, int] = {}
    while match.to_act():
        (seat,) = match.to_act()
        seen = match.observe(seat)
        number = int(seen.state.split()[1])
        first.setdefault(number, seat)
        position = 0 if seat == first[number] else 1
        assert f"You are player {position}." in seen.state
        match.play({seat: match.sample(seat, rng)})
    assert first == {1: 0, 2: 1, 3: 0, 4: 1}


def test_a_match_by_hand() -> None:
    match = make("kuhn_poker", rounds=2).start(3)
    cards = [match.observe(seat).state.split("card: ")[1][0] for seat in (0, 1)]
    match.play({0: "bet"})
    assert match.observe(1).state == (
        f"Round 1 of 2. Chips: you +0, they +0.\nYou are player 1. Your card: {cards[1]}. Moves: bet."
    )
    match.play({1: "pass"})
    assert match.to_act() == (1,)
    assert match.returns() == (1.0, -1.0)
    assert match.observe(0).state.startswith("Round 2 of 2. Chips: you +1, they -1.\nYou are player 1.")
    assert match.observe(1).state.startswith("Round 2 of 2. Chips: you -1, they +1.\nYou are player 0.")
    match.play({1: "pass"})
    match.play({0: "bet"})
    match.play({1: "pass"})
    assert match.to_act() == ()
    assert match.returns() == (2.0, -2.0)
    assert match.observe(0).state == "Round 2 of 2. Chips: you +2, they -2. The match is over."


def test_a_folded_card_stays_hidden_in_later_rounds() -> None:
    """Two matches that differ only in a card that was folded look alike to the other seat for good."""
    game = make("kuhn_poker", rounds=2)
    assert isinstance(game, RepeatedGame)
    for seed in range(20):
        match = game.start(seed)
        twin = game.start(seed).twin(0, Random(seed))
        assert twin is not None
        assert twin.observe(1) != match.observe(1)
        for m in (match, twin):
            m.play({0: "bet"})
            m.play({1: "pass"})
        old = match.observe(0).events[: match.observe(0).events.index("Round 2 of 2.")]
        assert old == twin.observe(0).events[: len(old)]
        assert not any("Their card" in event for event in old)


def test_a_shown_card_is_told_to_both() -> None:
    match = make("kuhn_poker", rounds=2).start(0)
    cards = [match.observe(seat).state.split("card: ")[1][0] for seat in (0, 1)]
    match.play({0: "pass"})
    match.play({1: "pass"})
    assert f"Their card: {cards[1]}." in match.observe(0).events
    assert f"Their card: {cards[0]}." in match.observe(1).events


def test_refusals_name_the_seat_of_the_match() -> None:
    match = make("kuhn_poker", rounds=2).start(0)
    match.play({0: "bet"})
    match.play({1: "pass"})
    with pytest.raises(IllegalAction) as caught:
        match.play({1: "fold"})
    assert caught.value.seat == 1
    for wrong in (0, 3, -1):
        with pytest.raises(IllegalAction):
            match.play({wrong: "bet"})
        with pytest.raises(IllegalAction):
            match.sample(wrong, Random(0))


def test_the_base_must_pay_chips() -> None:
    base = make("kuhn_poker", payoff="sign")
    assert isinstance(base, SpielGame)
    with pytest.raises(ValueError, match="must pay chips"):
        RepeatedGame(base, 3)
