"""Lower bounds against exact values: they hold, and the search gets near."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import pyspiel
import pytest
from table_engine import Law, TableEngine, kuhn_equilibrium

from ludus.engines.base import EngineUnavailable
from ludus.errors import UserError
from ludus.experts import make_player
from ludus.games.base import Game, HasSpiel, Payoff
from ludus.games.negotiation import NegotiationGame
from ludus.games.registry import make
from ludus.players import Ask, LanguagePlayer, Player, Reply
from ludus.text.prompter import Prompter
from ludus.text.templates import detect
from ludus.text.tokenizer import Tokenizer
from ludus.truth import lower_bound as module
from ludus.truth.exploitability import exploitability
from ludus.truth.lower_bound import LowerBound, lower_bound
from ludus.truth.policy_table import tabulate
from ludus.truth.sequence_form import sequence_form
from ludus.types import MatchPlan, Sampling, Stop


def bound(game: Game | str, player: Player | str, **options: Any) -> LowerBound:
    played = make(game) if isinstance(game, str) else game
    options = {"matches": 100, "simulations": 30, "replies": 16, "seed": 4, **options}
    measured = make_player(player) if isinstance(player, str) else player
    found = asyncio.run(lower_bound(played, measured, **options))
    stake = -played.min_return
    low, high = found.ci95
    assert -stake <= low <= found.lower_bound <= high <= stake
    assert found.lower_bound == pytest.approx(sum(found.per_seat) / 2)
    return found


def best_against_random(seat: int) -> float:
    """What a perfect player earns in `seat` of tic-tac-toe against uniformly random play, by brute force."""

    seen: dict[str, float] = {}

    def value(state: Any) -> float:
        if state.is_terminal():
            return float(state.returns()[seat])
        board = str(state)
        if board not in seen:
            values = [value(state.child(action)) for action in state.legal_actions()]
            mine = state.current_player() == seat
            seen[board] = max(values) if mine else sum(values) / len(values)
        return seen[board]

    return value(pyspiel.load_game("tic_tac_toe").new_initial_state())


def test_the_search_gets_near_the_best_response_to_random_tic_tac_toe() -> None:
    exact = [best_against_random(seat) for seat in (0, 1)]
    assert exact == pytest.approx([0.994792, 0.924868], abs=1e-6)
    found = bound("tic_tac_toe", "random", matches=300, simulations=200)
    assert found.ci95[0] <= sum(exact) / 2
    assert found.lower_bound > sum(exact) / 2 - 0.08
    assert found.per_seat[0] > 0.9


@pytest.mark.parametrize(("name", "matches", "near"), [("kuhn_poker", 600, 0.7), ("leduc_poker", 160, 0.5)])
def test_a_bound_lies_below_the_exact_value_and_not_far(name: str, matches: int, near: float) -> None:
    game = make(name)
    assert isinstance(game, HasSpiel)
    uniform = {s.key: {a: 1 / len(s.actions) for a in s.actions} for s in sequence_form(game).sets}
    exact = exploitability(game, uniform).exploitability
    found = bound(name, "random", matches=matches, simulations=80)
    assert found.responder == "respond:80"
    assert found.ci95[0] <= exact
    assert found.lower_bound > near * exact


def test_the_bound_of_an_equilibrium_says_nothing() -> None:
    found = bound("kuhn_poker", "cfr", matches=1000, simulations=50)
    assert found.ci95[0] <= 1e-3


def test_bounds_hold_on_many_seeds() -> None:
    """A lower end of 97.5% may lie above the truth in one of 40 tries; four of 40 would be bad luck."""
    exact = 11 / 24  # uniform play in Kuhn poker
    lows = [bound("kuhn_poker", "random", seed=seed, simulations=60).ci95[0] for seed in range(10)]
    assert sum(low > exact for low in lows) <= 1


def test_a_coward_is_robbed_of_every_ante() -> None:
    """Against one who always passes the best response wins 1 in either seat, whatever the cards are."""

    class Coward:
        policy, trainable = "coward", False

        async def answer(self, ask: Ask) -> Reply:
            return Reply("pass")

    found = bound("kuhn_poker", Coward(), simulations=100)
    assert found.per_seat == (1.0, 1.0)
    assert found.ci95[1] == pytest.approx(1.0, abs=0.1)
    assert found.illegal_rate == found.forfeits == 0


def test_illegal_replies_of_a_model_count_as_the_exact_figure_counts_them(kuhn_tokenizer: Tokenizer) -> None:
    """A language model whose law is known: an equilibrium that is lost for words a fifth of the time."""
    game = make("kuhn_poker")
    assert isinstance(game, HasSpiel)
    prompter = Prompter(kuhn_tokenizer, detect(kuhn_tokenizer), rules=False, think=False)
    policy = kuhn_equilibrium(0.2)

    def law(key: str) -> Law:
        words = [(("pass", "bet")[a], 0.8 * p) for a, p in policy[key].items()]
        return [(tuple(prompter.spell(word)), Stop.ACTION, p) for word, p in [*words, ("raise", 0.2)]]

    engine = TableEngine(
        {
            tuple(prompter.prompt(game.observe_state(s.state, s.seat)).ids): law(s.key)
            for s in sequence_form(game).sets
        }
    )
    sampling = Sampling(32)
    table = asyncio.run(tabulate(game, engine, "me", prompter, sampling, thoughts=200, seed=1))
    exact = exploitability(game, table)
    found = bound(game, LanguagePlayer("me", engine, prompter, sampling), matches=600, simulations=100)
    assert exact.exploitability < 0.1  # but for the forfeits it is an equilibrium, or nearly so
    assert found.ci95[0] <= exact.exploitability_with_forfeits
    assert found.lower_bound > 0.6 * exact.exploitability_with_forfeits
    assert found.illegal_rate == pytest.approx(0.2, abs=0.05)
    assert 0.2 < found.forfeits < 0.4


@pytest.mark.parametrize("in_flight", [1, 7])
def test_the_same_seed_gives_the_same_bound(in_flight: int) -> None:
    options = {"matches": 24, "simulations": 20, "seed": 9}
    assert bound("kuhn_poker", "random", **options) == bound(
        "kuhn_poker", "random", in_flight=in_flight, **options
    )
    assert bound("kuhn_poker", "random", **options) != bound("kuhn_poker", "random", **{**options, "seed": 8})


def test_the_choice_is_made_on_other_deals_than_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    played: list[set[int]] = []
    real = module.play_all

    async def noted(plans: Sequence[MatchPlan], *args: Any, **options: Any) -> Any:
        played.append({plan.match_seed for plan in plans} | {plan.reply_seed for plan in plans})
        return await real(plans, *args, **options)

    monkeypatch.setattr(module, "play_all", noted)
    found = bound("kuhn_poker", "random", matches=40)
    assert len(played) == 3
    assert not played[2] & (played[0] | played[1])
    assert found.tried.keys() == {"mcts:30", "respond:30"}
    assert found.responder in found.tried


@pytest.mark.parametrize(
    ("lead", "chosen"), [((0.0, 1.0, -1.0), "first"), ((0.2, 0.3, 0.25), "second"), ((-1.0, -1.0), "first")]
)
def test_the_second_responder_must_be_told_apart(lead: tuple[float, ...], chosen: str) -> None:
    @dataclass
    class Deal:
        number: int
        mean: float

    tries = {
        "first": [Deal(k, 0.1 * k) for k in range(len(lead))],
        "second": [Deal(k, 0.1 * k + more) for k, more in enumerate(lead)],
    }
    assert module._choose(["first", "second"], tries) == chosen  # type: ignore[arg-type]
    del tries["second"][0]  # a deal that was lost
    assert module._choose(["first", "second"], tries) == chosen  # type: ignore[arg-type]


def test_other_games_have_other_responders() -> None:
    rounds = bound(make("kuhn_poker", rounds=3), "random", simulations=60)
    assert (rounds.responder, rounds.tried) == ("mcts:60", {})
    assert rounds.lower_bound > 0
    trade = bound("negotiation", "random")
    assert trade.responder == "fair_trader"
    assert trade.tried.keys() == {"random", "fair_trader"}
    assert trade.ci95[0] > 0.2
    paid = bound(make("kuhn_poker", payoff="sign"), "random")
    assert 0 < paid.lower_bound < 1


def test_the_json_never_says_exploitability() -> None:
    found = bound("tic_tac_toe", "random", matches=10)
    data = json.loads(json.dumps(found.to_json()))
    assert data["lower_bound"] == found.lower_bound
    assert tuple(data["ci95"]) == found.ci95
    assert not any("exploitab" in key or "nash" in key for key in data)


@dataclass(frozen=True)
class Mumbler:
    """Says one thing for ever."""

    text: str
    policy: str = "mumbler"
    trainable: bool = False

    async def answer(self, ask: Ask) -> Reply:
        return Reply(action=None, text=self.text)


def test_a_player_that_says_nothing_legal_is_no_player() -> None:
    with pytest.raises(UserError) as caught:
        bound("connect_four", Mumbler("I play \n the middle \u2603 " + "x" * 200))
    assert "100.0% of the model's replies hold no legal action" in str(caught.value)
    assert r"'I play \n the middle \u2603 xxx" in str(caught.value)
    assert "x" * 100 not in str(caught.value)
    with pytest.raises(UserError, match="nothing at all"):
        bound("negotiation", Mumbler(""))


@dataclass(frozen=True)
class Unpaired(NegotiationGame):
    """Negotiation in which both may gain."""

    @property
    def payoff(self) -> Payoff:
        return Payoff.GENERAL


def test_games_without_such_a_bound_are_refused() -> None:
    with pytest.raises(UserError, match="zero-sum game of two seats"):
        bound(Unpaired(), "random")
    with pytest.raises(UserError, match="at least 2"):
        bound("kuhn_poker", "random", matches=1)


def test_lost_matches_are_counted_and_their_deals_left_out() -> None:
    @dataclass
    class Lost:
        lost: int  # replies in 8 that do not come
        policy: str = "lost"
        trainable: bool = False

        async def answer(self, ask: Ask) -> Reply:
            if ask.seed % 8 < self.lost:
                raise EngineUnavailable("server", "timeout")
            return Reply(ask.match.sample(ask.seat, Random(ask.seed)))

    found = bound(make("kuhn_poker", rounds=2), Lost(1), matches=100)
    assert found.masked > 10
    assert found.matches + found.masked == 100
    with pytest.raises(UserError, match="timeout"):
        bound(make("kuhn_poker", rounds=2), Lost(8))
