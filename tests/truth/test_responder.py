"""The searched best response: what it finds out about its opponent, and what it may not look at."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest

from ludus.engines.base import EngineUnavailable
from ludus.experts import make_player
from ludus.games.openspiel import SpielGame, SpielMatch
from ludus.games.registry import make
from ludus.players import Ask, Player, Reply
from ludus.truth.responder import Questions, Responder
from ludus.types import Completion, Stop


@dataclass
class Scripted:
    """Plays what a function of the question says."""

    choose: Callable[[Ask], str | None]
    policy: str = "scripted"
    trainable: bool = False
    asks: list[Ask] = field(default_factory=list)

    async def answer(self, ask: Ask) -> Reply:
        self.asks.append(ask)
        await asyncio.sleep(0)
        return Reply(action=self.choose(ask))


def spiel_game(name: str, **args: Any) -> SpielGame:
    game = make(name, **args)
    assert isinstance(game, SpielGame)
    return game


def responder(game: SpielGame, opponent: Player, simulations: int, **options: Any) -> Responder:
    return Responder(Questions(game, opponent, **{"replies": 16, "seed": 1, **options}), simulations)


def move(player: Player, game: SpielGame, match: SpielMatch, seed: int = 0) -> str:
    (seat,) = match.to_act()
    asked = Ask(game.name, seat, game.roles[seat], match.observe(seat), seed, 0, None, (), match)
    action = asyncio.run(player.answer(asked)).action
    assert action is not None
    return action


def after(game: SpielGame, moves: str, *deal: int) -> SpielMatch:
    """The match after `moves`, with chance as in `deal`."""
    state = game.spiel.new_initial_state()
    for outcome in deal:
        state.apply_action(outcome)
    match = SpielMatch(game, state, Random(0))
    for text in moves.split():
        match.play({match.to_act()[0]: text})
    return match


def test_it_bluffs_against_one_who_always_folds() -> None:
    """With the jack an equilibrium bets a third of the time at most; against a coward one always does."""
    game = spiel_game("kuhn_poker")
    coward = responder(game, Scripted(lambda ask: "pass"), 60)
    caller = responder(game, Scripted(lambda ask: "bet"), 60)
    for seed in range(5):
        assert move(coward, game, after(game, "", 0, 2), seed) == "bet"
        assert move(caller, game, after(game, "", 0, 2), seed) == "pass"
        assert move(caller, game, after(game, "", 2, 0), seed) == "bet"


def test_it_reads_the_hand_out_of_the_moves() -> None:
    """Whoever bets the king alone is not called with the queen; one who bets the jack alone is."""
    game = spiel_game("kuhn_poker")

    def bets_with(card: str) -> Player:
        return Scripted(lambda ask: "bet" if f"Your card: {card}" in ask.observation.state else "pass")

    facing_a_bet = after(game, "bet", 2, 1)  # a redeal gives the other seat J or K alike
    for seed in range(5):
        assert move(responder(game, bets_with("K"), 100), game, facing_a_bet, seed) == "pass"
        assert move(responder(game, bets_with("J"), 100), game, facing_a_bet, seed) == "bet"


def test_it_sets_the_trap_that_this_opponent_walks_into() -> None:
    """An opponent who takes the lowest cell never blocks on 7 8 9: play there first, though the centre is
    what a search for good play prefers."""
    game = spiel_game("tic_tac_toe")
    lowest = Scripted(lambda ask: min(ask.observation.legal or ()))
    for seed in range(3):
        me, match = responder(game, lowest, 300), after(game, "")
        while match.to_act():
            (seat,) = match.to_act()
            match.play(
                {seat: move(me, game, match, seed) if seat == 0 else min(match.observe(1).legal or ())}
            )
        assert match.returns() == (1.0, -1.0)


def test_it_makes_the_opponent_say_what_is_illegal() -> None:
    """The opponent is lost for words once the corner 9 is taken: that wins at once."""
    game = spiel_game("tic_tac_toe")
    mute = Scripted(
        lambda ask: None if "9" not in (ask.observation.legal or ()) else min(ask.observation.legal or ())
    )
    assert {
        move(responder(game, mute, 100), game, after(game, "1 2 4 3 5 6"), seed) for seed in range(3)
    } <= {
        "7",
        "9",
    }  # 7 and 9 both complete a line
    assert {move(responder(game, mute, 300), game, after(game, ""), seed) for seed in range(5)} == {"9"}


@pytest.mark.parametrize("name", ["kuhn_poker", "leduc_poker", "liars_dice"])
def test_it_does_not_look_at_the_other_hand(name: str) -> None:
    game = spiel_game(name)
    who = responder(game, make_player("random"), 20, replies=8)
    changed = 0
    for seed in range(15):
        match = game.start(seed)
        if seed % 2:  # seat 1 moves: there are moves of the opponent to be weighed
            match.play({0: match.sample(0, Random(seed))})
        (seat,) = match.to_act()
        twin = match.twin(seat, Random(seed))
        assert twin is not None
        changed += str(twin.spiel_state) != str(match.spiel_state)
        assert move(who, game, match, seed) == move(who, game, twin, seed)
    assert changed > 8


def test_a_position_is_asked_at_most_so_often_and_never_twice_with_one_seed() -> None:
    game = spiel_game("kuhn_poker")
    opponent = Scripted(lambda ask: "bet")
    me = responder(game, opponent, 200, replies=8)
    for seed in range(6):
        move(me, game, game.start(seed), seed)
    counts = Counter((ask.seat, ask.observation.key) for ask in opponent.asks)
    assert set(counts.values()) == {8}
    assert len({ask.seed for ask in opponent.asks}) == len(opponent.asks)


def test_what_it_finds_does_not_depend_on_what_runs_beside_it() -> None:
    game = spiel_game("leduc_poker")
    alone = [move(responder(game, make_player("random"), 30), game, game.start(s), s) for s in range(8)]

    async def together() -> list[str | None]:
        me = responder(game, make_player("random"), 30)

        async def one(seed: int) -> str | None:
            match = game.start(seed)
            return (await me.answer(Ask(game.name, 0, "", match.observe(0), seed, 0, None, (), match))).action

        return list(await asyncio.gather(*map(one, reversed(range(8)))))

    assert asyncio.run(together()) == alone[::-1]


def test_likelihoods_are_those_of_the_replies() -> None:
    game = spiel_game("kuhn_poker")
    questions = Questions(game, Scripted(lambda ask: "bet" if ask.seed % 4 else "pass"), replies=400, seed=2)
    state = after(game, "", 0, 1).spiel_state
    bet, passing = (asyncio.run(questions.likelihood(state, action)) for action in (1, 0))
    assert bet == pytest.approx(0.75, abs=0.07)
    assert bet + passing == pytest.approx(1)
    silent = Questions(game, Scripted(lambda ask: None), replies=10, seed=2)
    assert asyncio.run(silent.likelihood(state, 1)) == pytest.approx(0.5 / 11)  # illegal replies are neither


def test_a_refused_reply_is_asked_for_again_as_in_a_match() -> None:
    game = spiel_game("kuhn_poker")
    state = after(game, "", 0, 1).spiel_state
    for retries, said in ((0, None), (1, 1)):
        opponent = Scripted(lambda ask: "bet")
        opponent.choose = lambda ask, it=opponent: "bet" if len(it.asks) > 1 else "raise"
        questions = Questions(game, opponent, replies=1, seed=1, retries=retries)
        assert asyncio.run(questions.draw(state, Random(0))) == said
        assert len(opponent.asks) == 1 + retries


def test_a_lost_server_is_asked_again_later() -> None:
    game = spiel_game("kuhn_poker")
    state = after(game, "", 0, 1).spiel_state

    class Flaky:
        policy, trainable, lost = "flaky", False, True

        async def answer(self, ask: Ask) -> Reply:
            stop = Stop.ABORTED if self.lost else Stop.EOS
            return Reply("bet", completion=Completion([], [], stop, 0))

    flaky = Flaky()
    questions = Questions(game, flaky, replies=1, seed=1)

    async def twice() -> int | None:
        with pytest.raises(EngineUnavailable, match="aborted"):
            await questions.draw(state, Random(0))
        flaky.lost = False
        return await questions.draw(state, Random(0))

    assert asyncio.run(twice()) == 1
