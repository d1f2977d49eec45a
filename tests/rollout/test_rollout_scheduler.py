"""Many matches at once: nothing about the result may depend on who was quick."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_games import OddOneOutGame, OutbidGame, PenniesGame

from ludus.engines.torch_engine import TorchEngine
from ludus.games.base import Game
from ludus.games.registry import make
from ludus.learner.model import load_model
from ludus.players import Ask, LanguagePlayer, Player, RandomPlayer, Reply
from ludus.rollout.play import HouseRules, play
from ludus.rollout.scheduler import grouped, play_all
from ludus.seeding import derive
from ludus.text.prompter import Prompter
from ludus.text.templates import detect
from ludus.text.tokenizer import Tokenizer
from ludus.types import Episode, Group, MatchPlan, Sampling

GAMES: dict[str, Game] = {
    **{name: make(name) for name in ("kuhn_poker", "tic_tac_toe", "negotiation")},
    **{game.name: game for game in (OutbidGame(), PenniesGame(3), OddOneOutGame())},
}


def plans_of(games: Sequence[str], policy: str = "random", group_size: int = 1) -> list[MatchPlan]:
    return [
        MatchPlan(
            episode=i,
            group=i // group_size,
            game=game,
            seats=(policy,) * len(GAMES[game].roles),
            match_seed=derive("deal", i // group_size),
            reply_seed=derive("reply", i),
        )
        for i, game in enumerate(games)
    ]


@dataclass
class Dawdler:
    """Plays at random, sometimes illegally, after a pause that follows no rule; counts matches under way."""

    pauses: random.Random
    policy: str = "random"
    trainable: bool = False
    now: set[int] = field(default_factory=set)
    most: int = 0

    async def answer(self, ask: Ask) -> Reply:
        self.now.add(id(ask.match))
        self.most = max(self.most, len(self.now))
        for _ in range(self.pauses.randrange(6)):
            await asyncio.sleep(0)
        rng = random.Random(ask.seed)
        action = None if rng.random() < 0.1 else ask.match.sample(ask.seat, rng)
        self.now.discard(id(ask.match))
        return Reply(action=action)


@settings(max_examples=25, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(GAMES)), min_size=1, max_size=20),
    in_flight=st.integers(1, 30),
    pauses=st.integers(0, 10**6),
)
def test_neither_order_nor_content_depends_on_speed(names: list[str], in_flight: int, pauses: int) -> None:
    plans = plans_of(names)
    rule = HouseRules(retries=1)

    async def one_after_another() -> list[Episode]:
        return [await play(p, GAMES[p.game], {"random": Dawdler(random.Random(0))}, rule=rule) for p in plans]

    player = Dawdler(random.Random(pauses))
    together = asyncio.run(play_all(plans, GAMES, {"random": player}, rule=rule, in_flight=in_flight))
    assert together == asyncio.run(one_after_another())
    assert [e.id for e in together] == [p.episode for p in plans]
    assert player.most <= in_flight


def test_matches_really_run_side_by_side() -> None:
    player = Dawdler(random.Random(1))
    asyncio.run(play_all(plans_of(["tic_tac_toe"] * 40), GAMES, {"random": player}, in_flight=12))
    assert 6 <= player.most <= 12  # whoever pauses is counted, and pauses are drawn at random


def test_a_slow_match_holds_up_no_other() -> None:
    """With room for two, one endless match must not keep the other nine from ending."""
    release = asyncio.Event()
    ended: list[int] = []

    @dataclass
    class Patient:
        policy: str = "random"
        trainable: bool = False

        async def answer(self, ask: Ask) -> Reply:
            return await RandomPlayer().answer(ask)

    @dataclass
    class Slow(Patient):
        async def answer(self, ask: Ask) -> Reply:
            await release.wait()
            return await super().answer(ask)

    @dataclass
    class Last(Patient):
        async def answer(self, ask: Ask) -> Reply:
            ended.append(ask.seed)
            if len(ended) == 9:
                release.set()
            return await super().answer(ask)

    plans = [
        MatchPlan(i, i, "odd_one_out", ("slow" if i == 0 else "quick", "random", "random"), i, i)
        for i in range(10)
    ]
    players: dict[str, Player] = {"slow": Slow(), "quick": Last(), "random": RandomPlayer()}
    episodes = asyncio.run(asyncio.wait_for(play_all(plans, GAMES, players, in_flight=2), 10))
    assert [e.id for e in episodes] == list(range(10))


def speaker(model: Path) -> LanguagePlayer:
    torch.set_num_threads(1)
    tokenizer = Tokenizer.load(model)
    engine = TorchEngine.from_model(load_model(model), slots=16, context=256)
    return LanguagePlayer(
        "self", engine, Prompter(tokenizer, detect(tokenizer), rules=False), Sampling(24), True
    )


def test_the_same_seeds_give_the_same_episodes_down_to_the_last_bit(tiny_model: Path) -> None:
    plans = plans_of(["kuhn_poker", "tic_tac_toe"] * 12, policy="self")
    first, second = (
        asyncio.run(play_all(plans, GAMES, {"self": speaker(tiny_model)}, rule=HouseRules(1)))
        for _ in range(2)
    )
    assert first == second


def test_what_a_model_says_does_not_depend_on_who_plays_beside_it(tiny_model: Path) -> None:
    """Batches of other shapes may round the last bit of a log-probability, but change no token."""
    plans = plans_of(["kuhn_poker", "tic_tac_toe"] * 8, policy="self")
    alone, together = (
        asyncio.run(
            play_all(plans, GAMES, {"self": speaker(tiny_model)}, rule=HouseRules(1), in_flight=in_flight)
        )
        for in_flight in (1, 64)
    )
    for a, b in zip(alone, together, strict=True):
        assert [(t.seat, t.action, t.completion_ids) for t in a.turns] == [
            (t.seat, t.action, t.completion_ids) for t in b.turns
        ]
        assert a.returns == b.returns
        for x, y in zip(a.turns, b.turns, strict=True):
            assert x.logprobs == pytest.approx(y.logprobs, abs=1e-5)


@dataclass
class Trap:
    """Fails in the match of one episode's seed; elsewhere it waits for ever, and counts who was stopped."""

    bad: int
    policy: str = "random"
    trainable: bool = False
    stopped: int = 0

    async def answer(self, ask: Ask) -> Reply:
        if ask.seed == self.bad:
            for _ in range(5):
                await asyncio.sleep(0)
            raise LookupError(f"seed {ask.seed}")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.stopped += 1
            raise
        raise AssertionError("nobody sets this event")


def test_the_error_of_one_match_stops_all_others_and_comes_out_as_it_was() -> None:
    plans = plans_of(["kuhn_poker"] * 8)
    trap = Trap(bad=derive(plans[5].reply_seed, 0))

    async def run() -> None:
        with pytest.raises(LookupError, match=f"seed {trap.bad}"):
            async with asyncio.timeout(60):
                await play_all(plans, GAMES, {"random": trap}, in_flight=7)
        assert trap.stopped >= 6  # the others that were under way
        assert asyncio.all_tasks() == {asyncio.current_task()}  # and nothing goes on behind our back

    asyncio.run(run())


def test_no_plans_are_no_episodes() -> None:
    assert asyncio.run(play_all([], GAMES, {})) == []


def test_groups_come_together_in_the_order_of_their_first_match() -> None:
    plans = [
        MatchPlan(i, group, "kuhn_poker", ("random",) * 2, 0, i) for i, group in enumerate([7, 3, 7, 5, 3])
    ]
    episodes = asyncio.run(play_all(plans, GAMES, {"random": RandomPlayer()}))
    assert grouped(plans, episodes) == [
        Group([episodes[0], episodes[2]]),
        Group([episodes[1], episodes[4]]),
        Group([episodes[3]]),
    ]
    with pytest.raises(ValueError, match="shorter"):
        grouped(plans, episodes[:-1])


def test_matches_of_a_group_share_the_deal_and_differ_in_the_replies() -> None:
    plans = plans_of(["negotiation"] * 8, group_size=4)
    episodes = asyncio.run(play_all(plans, GAMES, {"random": RandomPlayer()}))
    for group in grouped(plans, episodes):
        assert len({e.seed for e in group.episodes}) == 1
        assert len({tuple(t.action for t in e.turns) for e in group.episodes}) == 4
    assert episodes[0].seed != episodes[4].seed
