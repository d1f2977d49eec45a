"""Text faces over OpenSpiel: the texts carry the whole game, and nothing but the game."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from fractions import Fraction
from random import Random
from typing import Any

import pyspiel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ludus.games.base import HasSpiel, IllegalAction, Observation, Payoff
from ludus.games.openspiel import SpielGame, SpielMatch
from ludus.games.registry import make

SPIEL_GAMES = ["breakthrough", "connect_four", "kuhn_poker", "leduc_poker", "liars_dice", "tic_tac_toe"]


def spiel_game(name: str, **args: Any) -> SpielGame:
    game = make(name, **args)
    assert isinstance(game, SpielGame)
    return game


def decisions(game: SpielGame) -> Iterator[tuple[Any, int]]:
    """Every decision node of the tree, with the player to move."""
    stack = [game.spiel.new_initial_state()]
    while stack:
        state = stack.pop()
        if state.is_terminal():
            continue
        if not state.is_chance_node():
            yield state, state.current_player()
        actions = [a for a, _ in state.chance_outcomes()] if state.is_chance_node() else state.legal_actions()
        stack += [state.child(a) for a in actions]


def value(game: SpielGame, state: Any, policy: Callable[[int, Observation, str], Fraction]) -> Fraction:
    """Expected chips of seat 0 when everybody reads texts and plays `policy(seat, observation, action)`."""
    if state.is_terminal():
        return Fraction(state.returns()[0])
    if state.is_chance_node():
        chances = [(Fraction(p).limit_denominator(100), a) for a, p in state.chance_outcomes()]
        return sum((p * value(game, state.child(a), policy) for p, a in chances), Fraction(0))
    seat = state.current_player()
    seen = game.observe_state(state, seat)
    total = Fraction(0)
    for text, action in game.actions(state).items():
        total += policy(seat, seen, text) * value(game, state.child(action), policy)
    return total


def kuhn_equilibrium(seat: int, seen: Observation, action: str) -> Fraction:
    """The equilibrium with alpha = 1/3 (Kuhn 1950), keyed by the words of the state."""
    bet = {
        "You are player 0. Your card: J. Moves: none.": Fraction(1, 3),
        "You are player 0. Your card: Q. Moves: none.": Fraction(0),
        "You are player 0. Your card: K. Moves: none.": Fraction(1),
        "You are player 1. Your card: J. Moves: pass.": Fraction(1, 3),
        "You are player 1. Your card: Q. Moves: pass.": Fraction(0),
        "You are player 1. Your card: K. Moves: pass.": Fraction(1),
        "You are player 1. Your card: J. Moves: bet.": Fraction(0),
        "You are player 1. Your card: Q. Moves: bet.": Fraction(1, 3),
        "You are player 1. Your card: K. Moves: bet.": Fraction(1),
        "You are player 0. Your card: J. Moves: pass bet.": Fraction(0),
        "You are player 0. Your card: Q. Moves: pass bet.": Fraction(2, 3),
        "You are player 0. Your card: K. Moves: pass bet.": Fraction(1),
    }[seen.state]
    return bet if action == "bet" else 1 - bet


def best_response(game: SpielGame, me: int, policy: Callable[[int, Observation, str], Fraction]) -> Fraction:
    """The best that `me` can get, by trying all 2^6 ways to map its six texts to moves."""
    mine = sorted({game.observe_state(s, p).state for s, p in decisions(game) if p == me})
    values = []
    for moves in itertools.product(("pass", "bet"), repeat=len(mine)):
        plan = dict(zip(mine, moves, strict=True))

        def play(seat: int, seen: Observation, action: str, plan: dict[str, str] = plan) -> Fraction:
            return Fraction(plan[seen.state] == action) if seat == me else policy(seat, seen, action)

        values.append(value(game, game.spiel.new_initial_state(), play) * (1 if me == 0 else -1))
    return max(values)


def test_kuhn_has_twelve_information_sets_each_with_its_own_text() -> None:
    game = spiel_game("kuhn_poker")
    pairs = {(s.information_state_string(p), game.observe_state(s, p).state) for s, p in decisions(game)}
    assert len(pairs) == len({key for key, _ in pairs}) == len({text for _, text in pairs}) == 12


def test_kuhn_value_is_minus_one_eighteenth_through_our_texts() -> None:
    game = spiel_game("kuhn_poker")
    assert value(game, game.spiel.new_initial_state(), kuhn_equilibrium) == Fraction(-1, 18)
    assert best_response(game, 0, kuhn_equilibrium) == Fraction(-1, 18)
    assert best_response(game, 1, kuhn_equilibrium) == Fraction(1, 18)


def test_kuhn_uniform_nash_conv_is_eleven_twelfths_through_our_texts() -> None:
    game = spiel_game("kuhn_poker")

    def uniform(seat: int, seen: Observation, action: str) -> Fraction:
        assert seen.legal is not None
        return Fraction(1, len(seen.legal))

    conv = best_response(game, 0, uniform) + best_response(game, 1, uniform)
    assert conv == Fraction(11, 12)  # 0.916667
    assert float(conv) == pytest.approx(
        pyspiel.nash_conv(game.spiel, pyspiel.UniformRandomPolicy(game.spiel))
    )


@pytest.mark.parametrize(("suits", "sets"), [(False, 288), (True, 936)])
def test_leduc_texts_and_information_sets_are_one_to_one_over_the_whole_tree(suits: bool, sets: int) -> None:
    game = spiel_game("leduc_poker", suits=suits)
    text_of: dict[tuple[int, str], str] = {}
    key_of: dict[str, tuple[int, str]] = {}
    for state, seat in decisions(game):
        key = (seat, state.information_state_string(seat))
        text = game.observe_state(state, seat).state
        assert text_of.setdefault(key, text) == text
        assert key_of.setdefault(text, key) == key
    assert len(text_of) == sets


def test_leduc_cards_name_their_suits_and_pay_by_ranks() -> None:
    game = spiel_game("leduc_poker", suits=True)
    names = []
    for card in range(6):
        state = game.spiel.new_initial_state()
        for outcome in (card, (card + 1) % 6):
            state.apply_action(outcome)
        names.append(game.observe_state(state, 0).state.partition("Your card: ")[2][:2])
    assert names == ["Js", "Jh", "Qs", "Qh", "Ks", "Kh"]
    state = game.spiel.new_initial_state()
    for action in (2, 5, 1, 1, 3, 1, 2, 1):  # Qs, Kh; call, call; public Qh; call, raise, call
        state.apply_action(action)
    match = SpielMatch(game, state, Random(0))
    assert match.returns() == (5.0, -5.0)  # a pair, whatever the suits
    assert match.observe(1).events[-2:] == ("Their card: Qs.", "Result: -5")
    assert "Public card: Qh." in match.observe(1).events


def test_tic_tac_toe_random_play_favours_the_first_player() -> None:
    game = spiel_game("tic_tac_toe")
    rng = Random(0)
    results = []
    for seed in range(3000):
        match = game.start(seed)
        while match.to_act():
            (seat,) = match.to_act()
            match.play({seat: match.sample(seat, rng)})
        results.append(match.returns())
    first, second, draw = (sum(r[0] == x for r in results) / len(results) for x in (1.0, -1.0, 0.0))
    assert first == pytest.approx(0.585, abs=0.03)
    assert second == pytest.approx(0.288, abs=0.03)
    assert draw == pytest.approx(0.127, abs=0.03)


def deal_kuhn(game: SpielGame, cards: tuple[int, int]) -> SpielMatch:
    state = game.spiel.new_initial_state()
    for card in cards:
        state.apply_action(card)
    return SpielMatch(game, state, Random(0))


def test_kuhn_texts_by_hand() -> None:
    match = deal_kuhn(spiel_game("kuhn_poker"), (2, 0))
    match.play({0: "pass"})
    match.play({1: "bet"})
    seen = match.observe(0)
    assert seen.state == "You are player 0. Your card: K. Moves: pass bet."
    assert seen.legal == ("pass", "bet")
    assert seen.events == ("You are player 0. Your card: K.", "You: pass", "They: bet")
    assert match.observe(1).legal == ()
    match.play({0: "bet"})
    assert match.to_act() == ()
    assert match.returns() == (2.0, -2.0)
    assert match.observe(1).events[-2:] == ("Their card: K.", "Result: -2")


def test_kuhn_fold_keeps_the_card_hidden_for_ever() -> None:
    game = spiel_game("kuhn_poker")
    views = []
    for other in (1, 2):  # seat 0 holds J; the folding seat 1 holds Q or K
        match = deal_kuhn(game, (0, other))
        match.play({0: "bet"})
        match.play({1: "pass"})
        assert match.returns() == (1.0, -1.0)
        views.append(match.observe(0))
    assert views[0] == views[1]


def test_kuhn_showdown_shows_the_card_only_when_the_rules_do() -> None:
    game = spiel_game("kuhn_poker")
    queen, king = (deal_kuhn(game, (0, other)) for other in (1, 2))
    for match in (queen, king):
        match.play({0: "pass"})
    assert queen.observe(0) == king.observe(0)
    for match in (queen, king):
        match.play({1: "pass"})
    assert queen.observe(0).events[-2] == "Their card: Q."
    assert king.observe(0).events[-2] == "Their card: K."


def test_sign_payoff_is_the_sign_of_the_chips() -> None:
    chips, sign = spiel_game("kuhn_poker"), spiel_game("kuhn_poker", payoff="sign")
    assert (chips.min_return, sign.min_return) == (-2.0, -1.0)
    for game, paid in ((chips, (2.0, -2.0)), (sign, (1.0, -1.0))):
        match = deal_kuhn(game, (2, 0))
        match.play({0: "bet"})
        assert match.returns() == (0.0, 0.0)
        match.play({1: "bet"})
        assert match.returns() == paid


def test_leduc_text_names_pot_cards_and_rounds() -> None:
    game = spiel_game("leduc_poker")
    state = game.spiel.new_initial_state()
    for outcome in (2, 0):  # K and J
        state.apply_action(outcome)
    match = SpielMatch(game, state, Random(0))
    assert match.observe(0).legal == ("call", "raise")
    match.play({0: "raise"})
    assert "Pot: 4." in match.observe(1).state  # two antes of 1 and a raise of 2
    match.play({1: "call"})
    seen = match.observe(0)
    assert seen.state.startswith("You are player 0. Your card: K. Public card: ")
    assert seen.state.endswith("Pot: 6.\nRound 1: raise call. Round 2: none.")
    assert seen.events[-1].startswith("Public card: ")
    match.play({0: "raise"})
    match.play({1: "fold"})
    assert match.returns() == (3.0, -3.0)
    assert not any("Their card" in event for event in match.observe(0).events)


def test_leduc_equal_cards_split_as_the_rules_say() -> None:
    game = spiel_game("leduc_poker")
    state = game.spiel.new_initial_state()
    for action in (1, 1, 2, 1, 0, 2, 1):  # Q, Q; raise, call; public J; raise, call
        state.apply_action(action)
    match = SpielMatch(game, state, Random(0))
    assert match.returns() == (0.0, 0.0)
    assert match.observe(0).events[-2:] == ("Their card: Q.", "Result: +0")


@pytest.mark.parametrize(
    ("dice", "bid", "true"),
    [
        ((5, 2), "2 of 3", True),
        ((5, 5), "2 of 3", True),
        ((4, 2), "2 of 3", False),
        ((2, 4), "1 of 6", False),
    ],
)
def test_liars_dice_sixes_are_wild_as_the_rules_say(dice: tuple[int, int], bid: str, true: bool) -> None:
    game = spiel_game("liars_dice")
    state = game.spiel.new_initial_state()
    for roll in dice:  # outcome 5 is a six
        state.apply_action(roll)
    match = SpielMatch(game, state, Random(0))
    assert match.observe(0).state == f"You are player 0. Your dice: {dice[0] + 1}. Bids: none."
    assert "liar" not in (match.observe(0).legal or ())
    match.play({0: bid})
    assert match.observe(1).state == f"You are player 1. Your dice: {dice[1] + 1}. Bids: {bid}."
    match.play({1: "liar"})
    assert match.returns() == ((1.0, -1.0) if true else (-1.0, 1.0))
    assert match.observe(0).events[-2] == f"Their dice: {dice[1] + 1}."


def test_liars_dice_with_two_dice_names_own_dice_only() -> None:
    game = spiel_game("liars_dice", dice=2)
    state = game.spiel.new_initial_state()
    for roll in (5, 0, 3, 3):
        state.apply_action(roll)
    assert game.observe_state(state, 0).state == "You are player 0. Your dice: 1 6. Bids: none."
    assert game.observe_state(state, 1).state == "You are player 1. Your dice: 4 4. Bids: none."
    assert game.observe_state(state, 0).legal is not None
    assert "4 of 6" in (game.observe_state(state, 0).legal or ())


def test_tic_tac_toe_cells_say_whose_each_is() -> None:
    match = make("tic_tac_toe", view="cells").start(0)
    assert match.observe(0).state == "You are X. Yours: none. Theirs: none."
    for seat, cell in ((0, "5"), (1, "1"), (0, "3")):
        match.play({seat: cell})
    assert match.observe(1).state == "You are O. Yours: 1. Theirs: 3 5."
    assert match.observe(0).state == "You are X. Yours: 3 5. Theirs: 1."


def test_tic_tac_toe_board_numbers_empty_cells() -> None:
    match = spiel_game("tic_tac_toe").start(0)
    match.play({0: "1"})
    match.play({1: "5"})
    assert match.observe(0).state == "You are X.\nX 2 3\n4 O 6\n7 8 9"
    assert match.observe(1).state == "You are O.\nX 2 3\n4 O 6\n7 8 9"
    assert match.observe(0).legal == ("2", "3", "4", "6", "7", "8", "9")
    for seat, move in ((0, "2"), (1, "4"), (0, "3")):
        match.play({seat: move})
    assert match.returns() == (1.0, -1.0)
    assert match.observe(1).state.endswith("Result: -1")


def test_connect_four_columns_count_from_the_left() -> None:
    match = spiel_game("connect_four").start(0)
    for i in range(6):
        match.play({i % 2: "12"[i % 2]})
    assert match.observe(0).state.splitlines()[-3:] == ["X O . . . . ."] * 3
    match.play({0: "1"})
    assert match.returns() == (1.0, -1.0)


def test_breakthrough_squares_are_those_of_the_drawn_board() -> None:
    match = spiel_game("breakthrough", rows=4, columns=3).start(0)
    for seat, move in ((0, "b4b3"), (1, "a1a2")):
        match.play({seat: move})
    assert match.observe(0).state == "You are b, moving down.\n4 b . b\n3 . b .\n2 w . .\n1 . w w\n  a b c"
    assert "b3a2" in (match.observe(0).legal or ())  # a capture, spelt like any move
    match.play({0: "b3a2"})
    assert match.observe(1).state.splitlines()[3] == "2 b . ."


@pytest.mark.parametrize("name", SPIEL_GAMES)
def test_a_match_shows_what_observe_state_shows(name: str) -> None:
    game = spiel_game(name)
    assert isinstance(game, HasSpiel)
    assert game.payoff is Payoff.ZERO_SUM
    rng = Random(name)
    for seed in range(5):
        match = game.start(seed)
        while True:
            for seat in (0, 1):
                assert match.observe(seat) == game.observe_state(match.spiel_state, seat)
            if not match.to_act():
                break
            (seat,) = match.to_act()
            match.play({seat: match.sample(seat, rng)})
        assert match.returns() == tuple(match.spiel_state.returns())


@pytest.mark.parametrize("name", SPIEL_GAMES)
def test_action_text_does_not_depend_on_when_it_is_read(name: str) -> None:
    """Events spell old actions in the light of a later state: the words must be those that were played."""
    game = spiel_game(name)
    match, rng = game.start(4), Random(4)
    played = []
    while match.to_act():
        (seat,) = match.to_act()
        played.append(match.sample(seat, rng))
        match.play({seat: played[-1]})
    told = [e.partition(": ")[2] for e in match.observe(0).events if e.startswith(("You: ", "They: "))]
    assert told == played


def test_spiel_state_is_a_copy() -> None:
    match = spiel_game("tic_tac_toe").start(0)
    match.spiel_state.apply_action(0)
    assert match.observe(0).legal is not None
    assert len(match.observe(0).legal or ()) == 9


@pytest.mark.parametrize("text", ["BET", " bet", "bet ", "ｂｅｔ", "", "1", "call", "bet\n", "bet bet"])
def test_kuhn_refuses_other_spellings(text: str) -> None:
    match = deal_kuhn(spiel_game("kuhn_poker"), (0, 1))
    before = match.observe(0)
    with pytest.raises(IllegalAction) as caught:
        match.play({0: text})
    assert caught.value.seat == 0
    assert caught.value.reason.isascii()
    assert match.observe(0) == before


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=4) | st.sampled_from(["１", "١", "0", "10", "+1", "1.", "01"]))
def test_tic_tac_toe_takes_nine_texts_and_no_others(text: str) -> None:
    match = spiel_game("tic_tac_toe").start(0)
    if text in list("123456789"):
        match.play({0: text})
        assert match.to_act() == (1,)
    else:
        with pytest.raises(IllegalAction):
            match.play({0: text})
        assert match.to_act() == (0,)


def test_wrong_seats_are_refused() -> None:
    match = spiel_game("tic_tac_toe").start(0)
    for joint in ({1: "1"}, {0: "1", 1: "2"}):
        with pytest.raises(IllegalAction) as caught:
            match.play(joint)
        assert caught.value.seat == 1
    with pytest.raises(ValueError, match="no action given for seat 0"):
        match.play({})
    with pytest.raises(IllegalAction):
        match.sample(1, Random(0))
    assert len(match.observe(0).legal or ()) == 9


def test_deals_are_uniform_and_depend_on_the_seed_alone() -> None:
    game = spiel_game("kuhn_poker")
    cards = [(game.start(s).observe(0).key, game.start(s).observe(1).key) for s in range(600)]
    assert cards == [(game.start(s).observe(0).key, game.start(s).observe(1).key) for s in range(600)]
    counts = {pair: cards.count(pair) for pair in set(cards)}
    assert len(counts) == 6
    assert all(70 <= n <= 130 for n in counts.values())  # 100 expected, deviation 9
