"""Matches against fixed opponents: pairs, seats, intervals, and the whole measurement."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from table_engine import TableEngine, kuhn_equilibrium

from ludus.engines.base import EngineUnavailable
from ludus.errors import UserError
from ludus.experts import make_player
from ludus.games.base import HasSpiel
from ludus.games.openspiel import SpielMatch
from ludus.games.registry import make
from ludus.players import Ask, LanguagePlayer, Reply
from ludus.records import measured_rows
from ludus.rollout.play import HouseRules
from ludus.text.prompter import Prompter
from ludus.text.templates import detect
from ludus.text.tokenizer import Tokenizer
from ludus.train.display import evaluation_lines
from ludus.truth.evaluate import evaluate, measure
from ludus.truth.intervals import mean_interval, pair_interval, wilson
from ludus.truth.score import Score
from ludus.truth.sequence_form import sequence_form
from ludus.types import Sampling, Stop


@dataclass
class Scripted:
    """Plays what a function of the question says."""

    choose: Callable[[Ask], str | None]
    policy: str = "scripted"
    trainable: bool = False
    asks: list[Ask] = field(default_factory=list)
    deals: list[tuple[int, str]] = field(default_factory=list)

    async def answer(self, ask: Ask) -> Reply:
        self.asks.append(ask)
        assert isinstance(ask.match, SpielMatch)
        history = ask.match.spiel_state.full_history()
        self.deals.append((ask.seat, " ".join(str(s.action) for s in history if s.player < 0)))
        return Reply(action=self.choose(ask))


def run(game: str, player: Any, opponents: dict[str, Any], **options: Any) -> dict[str, Score]:
    options = {"matches": 60, "seed": 3, **options}
    return asyncio.run(evaluate(make(game), player, opponents, **options))


def test_both_seatings_of_every_deal_are_played() -> None:
    player = Scripted(lambda ask: "pass")
    result = run("kuhn_poker", player, {"random": make_player("random")}, matches=61)["random"]
    assert result.matches == 62  # whole pairs
    firsts = [deal for seat, deal in player.deals if seat == 0]
    seconds = [deal for seat, deal in player.deals if seat == 1]
    assert set(firsts) == set(seconds)
    assert len(set(firsts)) > 3
    # The same deals come in the same numbers (a seat may be asked twice in a match: count its first asks).
    opened = {seat: [a for a in player.asks if a.seat == seat and not a.past] for seat in (0, 1)}
    assert len(opened[0]) == len(opened[1]) == 31


def test_every_opponent_meets_the_same_deals() -> None:
    one, two = Scripted(lambda ask: "pass"), Scripted(lambda ask: "pass")
    run("kuhn_poker", make_player("random"), {"a": one, "b": two})
    assert sorted({d for _, d in one.deals}) == sorted({d for _, d in two.deals})
    again = Scripted(lambda ask: "pass")
    run("kuhn_poker", make_player("random"), {"other name": again}, in_flight=1)
    assert sorted({d for _, d in again.deals}) == sorted({d for _, d in one.deals})


def test_passing_twice_is_decided_by_the_cards() -> None:
    """Two players who always pass show their cards: over both seatings of a deal each wins once."""
    result = run("kuhn_poker", Scripted(lambda a: "pass"), {"same": Scripted(lambda a: "pass")})["same"]
    assert result.score == 0.5
    assert result.win == result.loss == 0.5
    assert result.draw == 0
    assert result.mean_return == 0
    assert result.return_ci95 == (0, 0)
    first, second = result.per_seat
    assert first is not None
    assert second == pytest.approx(1 - first)


def test_a_player_that_never_answers_forfeits() -> None:
    rule = HouseRules(retries=1)
    mute = run("kuhn_poker", Scripted(lambda a: None), {"random": make_player("random")}, rule=rule)["random"]
    assert mute.illegal_rate == 1.0
    assert mute.score == 0
    assert mute.mean_return == -2.0
    assert mute.per_seat == (0, 0)
    clumsy = Scripted(lambda a: "pass" if a.attempt else "raise")
    result = run("kuhn_poker", clumsy, {"random": make_player("random")}, rule=rule)["random"]
    assert result.illegal_rate == 0.5


def test_the_same_seed_is_played_again_exactly() -> None:
    players = (make_player("random"), {"mcts:5": make_player("mcts:5"), "random": make_player("random")})
    assert run("tic_tac_toe", *players) == run("tic_tac_toe", *players, in_flight=2)
    assert run("tic_tac_toe", *players) != run("tic_tac_toe", *players, seed=4)


def test_matches_that_an_engine_lost_count_nowhere() -> None:
    def choose(ask: Ask) -> str:
        if ask.seat == 1 and ask.seed % 3 == 0:
            raise EngineUnavailable("server", "timeout")
        return "pass"

    result = run("kuhn_poker", Scripted(choose), {"same": Scripted(lambda a: "pass")})["same"]
    assert 0 < result.masked < 30
    assert result.matches == 60 - result.masked

    def never(ask: Ask) -> str:
        raise EngineUnavailable("server", "timeout")

    with pytest.raises(UserError, match="timeout"):
        run("kuhn_poker", Scripted(never), {"same": Scripted(lambda a: "pass")})


def test_wilson_by_hand() -> None:
    # 8 of 10 with z = 1.959964: centre (0.8 + z^2/20) / (1 + z^2/10), half-width as in Wilson (1927).
    assert wilson(0.8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0, 0.277533), abs=1e-6)


def test_pairs_that_agree_leave_some_doubt() -> None:
    assert pair_interval([1.0] * 100) == pytest.approx(wilson(1.0, 100))
    low, high = pair_interval([0.5] * 100)  # one win each, deal after deal
    assert 0.48 < low < 0.5 < high < 0.52
    assert pair_interval([]) == (0.0, 1.0)
    coins = [1.0, 0.0] * 50
    assert pair_interval(coins) == pytest.approx(wilson(0.5, 99))  # s^2 = 25/99 against 1/4
    assert pair_interval([0.75, 0.25] * 50)[0] > pair_interval(coins)[0]


def test_mean_interval_by_hand() -> None:
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 1.959964 / 3**0.5, 2 + 1.959964 / 3**0.5))
    assert mean_interval([4.0]) == (4.0, 4.0)


def language_player(tokenizer: Tokenizer) -> LanguagePlayer:
    """Kuhn's equilibrium with alpha 0.2 as a language model that thinks one thought."""
    prompter = Prompter(tokenizer, detect(tokenizer), rules=False)
    game = make("kuhn_poker")
    assert isinstance(game, HasSpiel)
    policy = kuhn_equilibrium(0.2)
    laws = {}
    for s in sequence_form(game).sets:
        prompt = prompter.prompt(game.observe_state(s.state, s.seat))
        laws[tuple(prompt.ids)] = [
            (tuple(prompter.spell(game.action_text(s.state, a), "low")), Stop.ACTION, p)
            for a, p in policy[s.key].items()
        ]
    return LanguagePlayer("self", TableEngine(laws), prompter, Sampling(max_tokens=32))


def test_the_whole_measurement(kuhn_tokenizer: Tokenizer) -> None:
    player = language_player(kuhn_tokenizer)
    result = asyncio.run(
        measure(
            {"kuhn_poker": make("kuhn_poker")},
            player,
            {"random": make_player("random"), "cfr": make_player("cfr")},
            matches=40,
            exploitability=True,
            thoughts=4,
            seed=1,
        )
    )
    assert json.loads(json.dumps(result)) == result
    kuhn = result["games"]["kuhn_poker"]
    assert set(kuhn["opponents"]) == {"random", "cfr"}
    assert kuhn["opponents"]["random"]["illegal_rate"] == 0
    assert kuhn["opponents"]["random"]["matches"] == 40
    assert kuhn["exploitability"]["exploitability"] < 1e-9  # the scores are exact, whatever was sampled


def test_a_schedule_goes_on_where_a_model_says_nothing_legal(kuhn_tokenizer: Tokenizer) -> None:
    player = language_player(kuhn_tokenizer)
    mute = replace(player, sampling=Sampling(max_tokens=1))
    options: dict[str, Any] = {"matches": 4, "exploitability": True, "thoughts": 4, "seed": 1}
    found = asyncio.run(
        measure({"kuhn_poker": make("kuhn_poker")}, mute, {"random": make_player("random")}, **options)
    )
    kuhn = found["games"]["kuhn_poker"]
    assert kuhn["exploitability"]["exploitability"] is None
    assert kuhn["exploitability"]["illegal_mass"] == 1.0
    assert "no legal action" in kuhn["exploitability"]["reason"]
    assert kuhn["opponents"]["random"]["illegal_rate"] == 1.0
    assert [row.after for row in measured_rows(found)] == ["-", "0.0% [0.0%, 65.8%]", "100.0%"]
    assert evaluation_lines(found) == [
        "kuhn_poker: exploitability - (illegal 100.0%), score vs random 0.0% (illegal 100.0%)"
    ]


def test_games_get_the_opponents_and_figures_that_fit_them(kuhn_tokenizer: Tokenizer) -> None:
    player = language_player(kuhn_tokenizer)
    games = {"one": make("kuhn_poker"), "board": make("tic_tac_toe")}
    options: dict[str, Any] = {"matches": 4, "thoughts": 4, "seed": 1, "exploitability": False}

    def measured(*names: str) -> dict[str, Any]:
        found = asyncio.run(
            measure({"one": games["one"]}, player, {n: make_player(n) for n in names}, **options)
        )
        return found["games"]["one"]

    assert set(measured("random", "cfr")["opponents"]) == {"random", "cfr"}
    assert "exploitability" not in measured("random")
    with pytest.raises(UserError, match="'minimax' plays none of the games one"):
        measured("random", "minimax")


def test_bad_requests_are_refused() -> None:
    with pytest.raises(UserError, match="at least 2"):
        run("kuhn_poker", make_player("random"), {"random": make_player("random")}, matches=0)
