"""Program players: how strong they are, that they look at nothing hidden, and their names."""

from __future__ import annotations

import asyncio
from collections import Counter
from random import Random
from typing import Any

import pyspiel
import pytest

from ludus.errors import UserError
from ludus.experts import Choosy, equilibrium, make_player, names, redeal
from ludus.games.base import Game, HasSpiel, Match
from ludus.games.openspiel import SpielMatch
from ludus.games.registry import make
from ludus.players import Ask, Player
from ludus.truth.evaluate import evaluate
from ludus.truth.score import Score


def versus(game: Game, player: str, opponent: str, matches: int, seed: int = 1) -> Score:
    found = asyncio.run(
        evaluate(game, make_player(player), {"it": make_player(opponent)}, matches=matches, seed=seed)
    )
    return found["it"]


def ask(game: Game, match: Match, seed: int = 0) -> Ask:
    (seat,) = match.to_act()
    return Ask(game.name, seat, game.roles[seat], match.observe(seat), seed, 0, None, (), match)


def move(player: Player, game: Game, match: Match, seed: int = 0) -> str:
    action = asyncio.run(player.answer(ask(game, match, seed))).action
    assert action is not None
    return action


def after(game: Game, moves: str) -> Match:
    match = game.start(0)
    for text in moves.split():
        match.play({match.to_act()[0]: text})
    return match


def test_minimax_never_loses_at_tic_tac_toe() -> None:
    game = make("tic_tac_toe")
    for opponent in ("random", "mcts:100"):
        result = versus(game, "minimax", opponent, 100)
        assert result.loss == 0
        assert result.illegal_rate == 0
    assert versus(game, "minimax", "random", 100).win > 0.75
    assert versus(game, "minimax", "minimax", 20).draw == 1


@pytest.mark.parametrize(
    ("moves", "best"),
    [
        ("1 4 2 5", "3"),  # completes the top row, though 6 would block the other's
        ("1 5 2", "3"),  # blocks the top row
        ("1", "5"),  # only the centre draws against a corner
    ],
)
def test_minimax_finds_the_only_move(moves: str, best: str) -> None:
    game = make("tic_tac_toe")
    assert {move(make_player("minimax"), game, after(game, moves), seed) for seed in range(10)} == {best}


@pytest.mark.parametrize("seed", range(5))
def test_shallow_search_takes_a_win_in_connect_four(seed: int) -> None:
    game = make("connect_four")
    columns = game.start(0).observe(0).legal
    assert columns is not None
    match = after(game, " ".join(f"{columns[0]} {columns[6]}" for _ in range(3)))
    assert move(make_player("minimax"), game, match, seed) == columns[0]


def test_connect_four_search_beats_random() -> None:
    game = make("connect_four")
    assert versus(game, "minimax", "random", 6).score == 1
    assert versus(game, "mcts:50", "random", 10).score >= 0.9


@pytest.mark.parametrize(("name", "most"), [("kuhn_poker", 1e-4), ("leduc_poker", 1e-3)])
def test_cfr_is_close_to_an_equilibrium(name: str, most: float) -> None:
    game = make(name)
    assert isinstance(game, HasSpiel)
    table = pyspiel.TabularPolicy({key: list(row.items()) for key, row in equilibrium(game).items()})
    assert pyspiel.exploitability(game.spiel, table) <= most


def test_cfr_draws_from_its_table() -> None:
    game, player = make("kuhn_poker"), make_player("cfr")
    assert isinstance(game, HasSpiel)
    match = game.start(4)
    assert isinstance(match, SpielMatch)
    row = equilibrium(game)[match.spiel_state.information_state_string()]
    bets = sum(move(player, game, match, seed) == "bet" for seed in range(2000)) / 2000
    assert bets == pytest.approx(row[1], abs=0.04)


def test_cfr_loses_nothing_to_random_and_beats_it() -> None:
    result = versus(make("kuhn_poker"), "cfr", "random", 1500)
    assert result.return_ci95[0] > 0


def test_cfr_plays_the_rounds_of_a_repeated_match() -> None:
    game = make("kuhn_poker", rounds=6)
    result = versus(game, "cfr", "random", 150)
    assert result.illegal_rate == 0
    assert result.return_ci95[0] > 0


@pytest.mark.parametrize("name", ["kuhn_poker", "leduc_poker"])
@pytest.mark.parametrize("player", ["mcts:30", "cfr"])
def test_card_players_do_not_look_at_the_other_hand(name: str, player: str) -> None:
    game, who = make(name), make_player(player)
    changed = 0
    for seed in range(20):
        match = game.start(seed)
        assert isinstance(match, SpielMatch)
        twin = match.twin(0, Random(seed))
        assert twin is not None
        changed += str(twin.spiel_state) != str(match.spiel_state)
        assert move(who, game, match, seed) == move(who, game, twin, seed)
    assert changed > 10


@pytest.mark.parametrize(("own", "others"), [(0, (1, 2)), (1, (0, 2)), (2, (0, 1))])
def test_a_redeal_is_fair(own: int, others: tuple[int, int]) -> None:
    """Seat 1 of Kuhn poker holds `own` and heard a bet: the other hand is one of two, evenly."""
    state = pyspiel.load_game("kuhn_poker").new_initial_state()
    for action in (others[0], own, 1):
        state.apply_action(action)
    rng = Random(1)
    drawn = Counter(redeal(state, 1, rng).full_history()[0].action for _ in range(2000))
    assert set(drawn) == set(others)
    assert drawn[others[0]] / 2000 == pytest.approx(0.5, abs=0.04)


def test_search_plays_liars_dice_legally() -> None:
    assert versus(make("liars_dice"), "mcts:20", "random", 20).illegal_rate == 0


def test_more_simulations_play_better() -> None:
    game = make("tic_tac_toe")
    assert versus(game, "mcts:200", "mcts:5", 60).ci95[0] > 0.5


def test_the_fair_trader_gains_against_random() -> None:
    for resources in (2, 5):
        result = versus(make("negotiation", resources=resources), "fair_trader", "random", 80)
        assert result.illegal_rate == 0
        assert result.ci95[0] > 0.6


def test_the_fair_trader_takes_gains_and_refuses_losses() -> None:
    game, player = make("negotiation"), make_player("fair_trader")
    taken = refused = 0
    for seed in range(60):
        match = game.start(seed)
        match.play({0: match.sample(0, Random(seed))})
        seen = match.observe(1).state
        worth = int(seen.partition("Worth to you: ")[2].split(".")[0])
        answer = move(player, game, match)
        assert (answer == "accept") == (worth > 0 and "You cannot pay it" not in seen)
        taken += answer == "accept"
        refused += answer != "accept"
    assert taken > 5
    assert refused > 5


def test_the_fair_traders_offers_gain_it_something() -> None:
    game, player = make("negotiation", resources=5, payoff="difference"), make_player("fair_trader")
    offers = 0
    for seed in range(40):
        match = game.start(seed)
        offer = move(player, game, match)
        match.play({0: offer})
        if not offer.startswith("offer"):
            continue
        offers += 1
        give, get = (int(part.split()[0]) for part in offer.removeprefix("offer ").split(" for "))
        assert get <= give
        match.play({1: "accept"})  # it never asks for more than the other owns
        assert "Your gain: +" in match.observe(0).state
    assert offers > 30


def test_who_plays_what() -> None:
    games = {name: make(name) for name in ("kuhn_poker", "liars_dice", "tic_tac_toe", "negotiation")}
    games["rounds"] = make("kuhn_poker", rounds=3)
    able = {
        name: {label for label, game in games.items() if _plays(make_player(name), game)}
        for name in ("random", "minimax", "cfr", "mcts:10", "fair_trader")
    }
    assert able == {
        "random": set(games),
        "minimax": {"tic_tac_toe"},
        "cfr": {"kuhn_poker", "rounds"},
        "mcts:10": {"kuhn_poker", "rounds", "liars_dice", "tic_tac_toe"},
        "fair_trader": {"negotiation"},
    }
    with pytest.raises(UserError, match="'cfr' cannot play 'tic_tac_toe'"):
        move(make_player("cfr"), games["tic_tac_toe"], games["tic_tac_toe"].start(0))


def _plays(player: Any, game: Game) -> bool:
    return not isinstance(player, Choosy) or player.plays(game)


def test_large_games_have_no_table() -> None:
    game = make("connect_four")
    assert isinstance(game, HasSpiel)
    with pytest.raises(UserError, match="connect_four"):
        equilibrium(game)


@pytest.mark.parametrize("name", ["random", "minimax", "cfr", "fair_trader", "mcts:7"])
def test_players_carry_their_names(name: str) -> None:
    player = make_player(name)
    assert player.policy == name
    assert not player.trainable
    assert name.partition(":")[0] in {known.partition(":")[0] for known in names()}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("minmax", "did you mean 'minimax'"),
        ("stockfish", "known players: random, minimax, cfr, fair_trader, attack:plain, .*, mcts:N"),
        ("mcts", "write mcts:N"),
        ("mcts:0", "write mcts:N"),
        ("mcts:²", "write mcts:N"),
        ("mcts:1e3", "write mcts:N"),
    ],
)
def test_unknown_players_are_refused(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_player(name)
