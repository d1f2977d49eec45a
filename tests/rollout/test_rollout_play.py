"""One match: hand-played games, seats that move at once, refusals and forfeits, failures, recorded tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import closed
from odd_games import OddOneOutGame, OutbidGame, PenniesGame

from ludus.engines.base import EngineUnavailable
from ludus.engines.torch_engine import TorchEngine
from ludus.games.base import Game, IllegalAction
from ludus.games.check import check
from ludus.games.forfeit import forfeit_returns
from ludus.games.registry import make
from ludus.learner.model import load_model
from ludus.players import Ask, LanguagePlayer, Player, RandomPlayer, Reply
from ludus.rollout.play import FORFEIT_AT_ONCE, NOTHING_PARSED, HouseRules, play
from ludus.rollout.scheduler import play_all
from ludus.seeding import derive
from ludus.text.prompter import Prompter
from ludus.text.templates import detect
from ludus.text.tokenizer import Tokenizer
from ludus.types import Completion, Episode, MatchPlan, Request, Sampling, Stop

GAMES: dict[str, Game] = {g.name: g for g in (OutbidGame(), PenniesGame(), OddOneOutGame())}


@dataclass
class Scripted:
    """Says its lines one by one; a None is a reply in which nothing parses. Remembers what it was asked."""

    lines: Sequence[str | None]
    policy: str = "scripted"
    trainable: bool = False
    asked: list[Ask] = field(default_factory=list)

    async def answer(self, ask: Ask) -> Reply:
        self.asked.append(ask)
        return Reply(action=self.lines[len(self.asked) - 1])


def plan(game: str, *seats: str, episode: int = 0) -> MatchPlan:
    return MatchPlan(episode, episode, game, seats, derive("deal", episode), derive("reply", episode))


def scripted_match(
    game: Game, *scripts: Sequence[str | None], rule: HouseRules = FORFEIT_AT_ONCE
) -> tuple[Episode, list[Scripted]]:
    players = [Scripted(lines, policy=f"p{seat}") for seat, lines in enumerate(scripts)]
    seats = [p.policy for p in players]
    return asyncio.run(play(plan(game.name, *seats), game, {p.policy: p for p in players}, rule)), players


def told(episode: Episode) -> list[tuple[int, str | None, bool, int]]:
    """(seat, action, legal, attempt) per turn."""
    return [(t.seat, t.action, t.legal, t.attempt) for t in episode.turns]


# --- matches played by hand ---


@pytest.mark.parametrize("game", [OutbidGame(), PenniesGame(), PenniesGame(3), OddOneOutGame()], ids=str)
def test_the_games_of_these_tests_keep_the_rules_for_games(game: Game) -> None:
    assert [r for r in check(game) if r.passed is False] == []


def test_a_match_of_tic_tac_toe_move_by_move() -> None:
    episode, (x, o) = scripted_match(make("tic_tac_toe"), ["1", "2", "3"], ["4", "5"])
    assert told(episode) == [(s, a, True, 0) for s, a in [(0, "1"), (1, "4"), (0, "2"), (1, "5"), (0, "3")]]
    assert episode.returns == (1.0, -1.0)
    assert [t.index for t in episode.turns] == [0, 1, 2, 3, 4]
    assert [t.policy for t in episode.turns] == ["p0", "p1", "p0", "p1", "p0"]
    assert [t.role for t in episode.turns] == [episode.roles[s] for s in (0, 1, 0, 1, 0)]
    assert (episode.forfeit, episode.masked) == (None, None)
    assert x.asked[2].observation.state == "You are X.\nX X 3\nO O 6\n7 8 9"
    assert o.asked[1].observation.legal == ("3", "5", "6", "7", "8", "9")


def test_the_deal_comes_from_the_match_seed_and_decides_the_showdown() -> None:
    game = make("kuhn_poker")
    for number in range(6):
        players = {"a": Scripted(["bet"], policy="a"), "b": Scripted(["bet"], policy="b")}
        episode = asyncio.run(play(plan("kuhn_poker", "a", "b", episode=number), game, players))
        cards = [p.asked[0].observation.state.partition("Your card: ")[2][0] for p in players.values()]
        first_wins = "JQK".index(cards[0]) > "JQK".index(cards[1])
        assert episode.returns == ((2.0, -2.0) if first_wins else (-2.0, 2.0))  # ante 1, bet 1
        assert episode.seed == derive("deal", number)


def test_three_seats_take_turns() -> None:
    episode, players = scripted_match(OutbidGame(), ["1"], ["3"], ["2"])
    assert told(episode) == [(0, "1", True, 0), (1, "3", True, 0), (2, "2", True, 0)]
    assert episode.returns == (-1.0, 2.0, -1.0)
    assert episode.roles == ("first", "second", "third")
    assert players[2].asked[0].observation.events == ("Seat 0 bids 1.", "Seat 1 bids 3.")
    assert [p.asked[0].role for p in players] == ["first", "second", "third"]


def test_one_player_may_hold_several_seats() -> None:
    both = Scripted(["1", "4", "2", "5", "3"], policy="self")
    episode = asyncio.run(play(plan("tic_tac_toe", "self", "self"), make("tic_tac_toe"), {"self": both}))
    assert [a.seat for a in both.asked] == [0, 1, 0, 1, 0]
    assert [[p.observation.state for p in a.past] for a in both.asked[3:4]] == [
        [both.asked[1].observation.state]  # a seat remembers its own replies alone
    ]
    assert episode.returns == (1.0, -1.0)


def test_seats_that_move_at_once_see_nothing_of_each_others_move() -> None:
    episode, players = scripted_match(PenniesGame(rounds=2), ["heads", "heads"], ["heads", "tails"])
    assert told(episode) == [
        (0, "heads", True, 0),
        (1, "heads", True, 0),
        (0, "heads", True, 0),
        (1, "tails", True, 0),
    ]
    assert episode.returns == (0.0, 0.0)
    for player in players:
        assert [a.observation.events for a in player.asked] == [(), ("Shown: heads heads",)]


def test_three_seats_at_once() -> None:
    episode, _ = scripted_match(OddOneOutGame(), ["heads"], ["tails"], ["heads"])
    assert episode.returns == (1.0, -2.0, 1.0)
    assert [t.seat for t in episode.turns] == [0, 1, 2]


# --- refusals ---


def test_a_refused_seat_is_asked_again_with_the_reason() -> None:
    episode, (x, o) = scripted_match(
        make("tic_tac_toe"), ["1", None, "4", "2", "3"], ["4", "5"], rule=HouseRules(retries=2)
    )
    assert told(episode) == [
        (0, "1", True, 0),
        (1, "4", True, 0),
        (0, None, False, 0),
        (0, "4", False, 1),  # taken
        (0, "2", True, 2),
        (1, "5", True, 0),
        (0, "3", True, 0),
    ]
    assert episode.returns == (1.0, -1.0)
    assert [a.attempt for a in x.asked] == [0, 0, 1, 2, 0]
    assert [a.problem for a in x.asked] == [None, None, NOTHING_PARSED, "'4' is not a legal move", None]
    assert [p.problem for p in x.asked[-1].past] == [None, NOTHING_PARSED, "'4' is not a legal move", None]
    assert [a.problem for a in o.asked] == [None, None]
    assert len({a.seed for a in [*x.asked, *o.asked]}) == 7  # a retry draws anew


def test_at_once_only_the_refused_seat_is_asked_again() -> None:
    episode, (a, b) = scripted_match(
        PenniesGame(), ["tails"], [None, "edge", "tails"], rule=HouseRules(retries=2)
    )
    assert told(episode) == [
        (0, "tails", True, 0),
        (1, None, False, 0),
        (1, "edge", False, 1),
        (1, "tails", True, 2),
    ]
    assert episode.returns == (1.0, -1.0)
    assert [len(a.asked), len(b.asked)] == [1, 3]
    assert [x.problem for x in b.asked] == [None, NOTHING_PARSED, "'edge' is no side"]
    assert all(x.observation.events == () for x in b.asked)


def test_at_once_both_seats_may_be_refused_together() -> None:
    episode, _ = scripted_match(PenniesGame(), [None, "heads"], [None, "tails"], rule=HouseRules(retries=1))
    assert told(episode) == [
        (0, None, False, 0),
        (1, None, False, 0),
        (0, "heads", True, 1),
        (1, "tails", True, 1),
    ]
    assert episode.returns == (-1.0, 1.0)


def test_at_once_a_reply_may_be_refused_after_the_other_seat_has_mended_its_own() -> None:
    """The game names one offender at a time, so seat 1's first reply is looked at last."""
    episode, (_, b) = scripted_match(
        PenniesGame(), ["edge", "heads"], ["rim", "heads"], rule=HouseRules(retries=1)
    )
    assert told(episode) == [
        (0, "edge", False, 0),
        (1, "rim", False, 0),
        (0, "heads", True, 1),
        (1, "heads", True, 1),
    ]
    assert [x.problem for x in b.asked] == [None, "'rim' is no side"]
    assert [p.problem for p in b.asked[1].past] == ["'rim' is no side"]
    assert episode.returns == (1.0, -1.0)


def test_at_once_every_refused_reply_is_marked_even_where_the_first_ends_the_match() -> None:
    episode, _ = scripted_match(OddOneOutGame(), [None], ["heads"], [None])
    assert told(episode) == [(0, None, False, 0), (1, "heads", True, 0), (2, None, False, 0)]
    assert episode.forfeit == 0
    assert episode.returns == (-2.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("game", "scripts", "forfeit", "zero_sum", "spiral"),
    [
        (make("kuhn_poker"), (["pass"], [None]), 1, (2.0, -2.0), (0.5, -1.5)),
        (make("tic_tac_toe"), (["10"], []), 0, (-1.0, 1.0), (-1.5, 0.5)),
        (make("negotiation"), (["accept"], []), 0, (-1.0, 1.0), (-1.5, 0.5)),
        (OutbidGame(), (["1"], ["4"], []), 1, (0.5, -1.0, 0.5), (0.5, -1.5, 0.5)),
        (OddOneOutGame(), (["tails"], ["tails"], ["edge"]), 2, (1.0, 1.0, -2.0), (0.5, 0.5, -1.5)),
    ],
    ids=lambda v: getattr(v, "name", None),
)
def test_a_forfeit_pays_by_the_rule_by_name(
    game: Game,
    scripts: tuple[list[str | None], ...],
    forfeit: int,
    zero_sum: tuple[float, ...],
    spiral: tuple[float, ...],
) -> None:
    for rule, expected in (("zero_sum", zero_sum), ("spiral", spiral)):
        episode, _ = scripted_match(game, *scripts, rule=HouseRules(0, rule))  # type: ignore[arg-type]
        assert episode.forfeit == forfeit
        assert episode.returns == expected
        assert episode.turns[-1].legal is False


def naive(game: Game, scripts: Sequence[Sequence[str | None]], retries: int) -> dict[str, Any]:
    """The rule for illegal replies, spelt out without any concurrency: one reply at a time, seat by seat."""
    match = game.start(derive("deal", 0))
    lines: list[Iterator[str | None]] = [iter(s) for s in scripts]
    turns: list[list[Any]] = []
    while seats := match.to_act():
        held: dict[int, int] = {}  # seat -> its latest turn, refused or not
        tries = dict.fromkeys(seats, 0)
        todo = list(seats)
        while todo:
            for seat in todo:
                held[seat] = len(turns)
                turns.append([seat, next(lines[seat]), True, tries[seat]])
            todo = [seat for seat in seats if turns[held[seat]][1] is None]
            if not todo:
                try:
                    match.play({seat: turns[held[seat]][1] for seat in seats})
                except IllegalAction as e:
                    todo = [e.seat]
            for seat in todo:
                turns[held[seat]][2] = False
                tries[seat] += 1
            for seat in todo:
                if tries[seat] > retries:
                    return {"turns": turns, "forfeit": seat, "returns": forfeit_returns(game, seat)}
    return {"turns": turns, "forfeit": None, "returns": match.returns()}


@settings(max_examples=120, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(GAMES)), retries=st.integers(0, 3))
def test_refusals_agree_with_a_naive_loop_and_never_break_zero_sum(
    data: st.DataObject, name: str, retries: int
) -> None:
    game = GAMES[name]
    moves = st.sampled_from(["1", "2", "3"] if name == "outbid" else ["heads", "tails"])
    reply = st.one_of(st.none(), st.just("nonsense"), moves)
    scripts = [data.draw(st.lists(reply, min_size=8, max_size=8)) for _ in game.roles]
    episode, _ = scripted_match(game, *scripts, rule=HouseRules(retries))
    assert {
        "turns": [list(t) for t in told(episode)],
        "forfeit": episode.forfeit,
        "returns": episode.returns,
    } == naive(game, scripts, retries)
    assert sum(episode.returns) == 0.0
    assert [t.index for t in episode.turns] == list(range(len(episode.turns)))


# --- a language model at the table ---

Table = tuple[TorchEngine, Tokenizer]


@pytest.fixture(scope="module")
def table(tiny_model: Path) -> Table:
    torch.set_num_threads(1)
    model = load_model(tiny_model)
    engine = TorchEngine.from_model(model, slots=32, context=1024)
    engine.load("frozen", model.state_dict(), version=7)
    return engine, Tokenizer.load(tiny_model)


@dataclass
class Recorder:
    """Passes everything on to a real engine and keeps what went through."""

    engine: TorchEngine
    seen: dict[int, tuple[Request, Completion]] = field(default_factory=dict)

    async def generate(self, request: Request) -> Completion:
        completion = await self.engine.generate(request)
        assert request.seed not in self.seen
        self.seen[request.seed] = (request, completion)
        return completion

    async def score(
        self, policy: str, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        return await self.engine.score(policy, prompts, continuations)

    def load(self, policy: str, weights: Mapping[str, torch.Tensor], version: int) -> None:
        self.engine.load(policy, weights, version)

    async def close(self) -> None: ...


def speaker(
    engine: Any, tokenizer: Tokenizer, policy: str = "self", context: str = "board", trainable: bool = True
) -> LanguagePlayer:
    prompter = Prompter(tokenizer, detect(tokenizer), context=context, rules=False)  # type: ignore[arg-type]
    return LanguagePlayer(policy, engine, prompter, Sampling(24), trainable)


def matches(
    game: str, players: Mapping[str, Player], seats: tuple[str, ...], count: int, retries: int = 0
) -> list[Episode]:
    plans = [plan(game, *seats, episode=i) for i in range(count)]
    return asyncio.run(play_all(plans, {game: make(game)}, players, rule=HouseRules(retries)))


@pytest.mark.parametrize("context", ["board", "chat"])
def test_tokens_are_recorded_as_the_sampler_gave_them(table: Table, context: str) -> None:
    recorder = Recorder(table[0])
    me = speaker(recorder, table[1], context=context)
    episodes = matches("tic_tac_toe", {"self": me}, ("self", "self"), 16, retries=1)
    turns = [t for e in episodes for t in e.turns]
    assert len(turns) == len(recorder.seen)
    by_prompt_and_reply = {
        (tuple(r.prompt_ids), tuple(c.ids), tuple(c.logprobs), c.stop) for r, c in recorder.seen.values()
    }
    assert {
        (tuple(t.prompt_ids), tuple(t.completion_ids), tuple(t.logprobs), t.stop) for t in turns
    } == by_prompt_and_reply
    again = asyncio.run(
        table[0].score("self", [t.prompt_ids for t in turns], [t.completion_ids for t in turns])
    )
    for turn, logprobs in zip(turns, again, strict=True):
        assert turn.logprobs == pytest.approx(logprobs, abs=1e-4)
        read = me.prompter.read(turn.completion_ids)
        assert (turn.text, turn.action) == (read.text, read.action)


def test_a_retry_in_board_context_says_why_and_forgets_it_after(table: Table) -> None:
    me = speaker(table[0], table[1], context="board")
    episodes = matches("tic_tac_toe", {"self": me}, ("self", "self"), 24, retries=3)
    turns = [t for e in episodes for t in e.turns]
    retried = [t for t in turns if t.attempt > 0]
    assert len(retried) >= 5
    for turn in turns:
        assert ("Refused: " in table[1].decode(turn.prompt_ids)) == (turn.attempt > 0)


def test_chat_context_only_appends_and_carries_the_refusals_along(table: Table) -> None:
    me = speaker(table[0], table[1], context="chat")
    episodes = matches("tic_tac_toe", {"self": me}, ("self", "self"), 24, retries=2)
    refusals = 0
    for episode in episodes:
        for seat in (0, 1):
            own = [t for t in episode.turns if t.seat == seat]
            for before, after in pairwise(own):
                whole = before.prompt_ids + before.completion_ids
                assert after.prompt_ids[: len(whole)] == whole
                new = table[1].decode(after.prompt_ids[len(whole) :])
                assert ("Refused: " in new) == (not before.legal)
                refusals += not before.legal
    assert refusals >= 5


def test_frozen_and_trainable_seats_sit_side_by_side(table: Table) -> None:
    players: dict[str, Player] = {
        "self": speaker(table[0], table[1]),
        "frozen": speaker(table[0], table[1], policy="frozen", trainable=False),
        "random": RandomPlayer(),
    }
    plans = [
        plan("kuhn_poker", *seats, episode=i)
        for i, seats in enumerate([("self", "frozen"), ("random", "self"), ("frozen", "random")] * 4)
    ]
    episodes = asyncio.run(play_all(plans, {"kuhn_poker": make("kuhn_poker")}, players))
    assert [e.seats for e in episodes] == [p.seats for p in plans]
    for turn in (t for e in episodes for t in e.turns):
        assert turn.trainable == (turn.policy == "self")
        assert turn.version == (7 if turn.policy == "frozen" else 0)
        assert bool(turn.completion_ids) == bool(turn.prompt_ids) == (turn.policy != "random")
    for episode in episodes:
        assert all(t.policy == episode.seats[t.seat] for t in episode.turns)


# --- failures ---


@dataclass
class Unreachable:
    """An engine whose server goes down after `good` requests: from then on a real connection is refused."""

    engine: TorchEngine
    port: int
    good: int
    served: int = 0

    async def generate(self, request: Request) -> Completion:
        if self.served >= self.good:
            try:
                await asyncio.open_connection("127.0.0.1", self.port)
            except OSError as e:
                raise EngineUnavailable(f"127.0.0.1:{self.port}", "refused") from e
        self.served += 1
        return await self.engine.generate(request)


@pytest.fixture
def closed_port() -> Iterator[int]:
    with closed() as port:
        yield port


def test_a_lost_engine_masks_the_episode_and_pays_nobody(table: Table, closed_port: int) -> None:
    players: dict[str, Player] = {
        "random": RandomPlayer(),
        "remote": speaker(Unreachable(table[0], closed_port, good=1), table[1], "frozen", trainable=False),
    }
    plans = [
        plan("kuhn_poker", *seats, episode=i)
        for i, seats in enumerate([("remote", "random"), ("random", "remote"), ("random", "random")])
    ]
    episodes = asyncio.run(play_all(plans, {"kuhn_poker": make("kuhn_poker")}, players, in_flight=1))
    lost = episodes[1]  # its request there is not the first
    assert (lost.masked, lost.forfeit) == ("refused", None)
    assert [(t.seat, t.legal) for t in lost.turns] == [(0, True)]  # a reply that never came is not illegal
    assert episodes[2].masked is None
    assert len(episodes[2].turns) >= 2


def test_a_lost_engine_masks_a_simultaneous_move_once_for_all_seats(table: Table, closed_port: int) -> None:
    players: dict[str, Player] = {
        "lost": speaker(Unreachable(table[0], closed_port, good=0), table[1]),
        "fine": Scripted(["heads"], policy="fine"),
    }
    for seats in (("lost", "fine"), ("fine", "lost")):
        players["fine"] = Scripted(["heads"], policy="fine")
        episode = asyncio.run(play(plan("pennies", *seats), PenniesGame(), players))
        assert (episode.masked, episode.forfeit, episode.turns) == ("refused", None, [])


@dataclass
class Aborting:
    """Passes on what a player says as if its engine had given up in the middle."""

    player: Player
    policy: str = "aborting"
    trainable: bool = True

    async def answer(self, ask: Ask) -> Reply:
        reply = await self.player.answer(ask)
        return replace(reply, completion=Completion([5], [-0.5], Stop.ABORTED, 0))


@pytest.mark.parametrize(("line", "forfeit"), [("heads", None), (None, 0)])
def test_an_aborted_reply_masks_the_episode_whatever_else_happened(
    line: str | None, forfeit: int | None
) -> None:
    players: dict[str, Player] = {
        "aborting": Aborting(Scripted([line])),
        "fine": Scripted(["heads"], policy="fine"),
    }
    episode = asyncio.run(play(plan("pennies", "aborting", "fine"), PenniesGame(), players))
    assert episode.masked == "aborted"
    assert episode.forfeit == forfeit
    assert episode.turns[0].stop is Stop.ABORTED


@dataclass
class Failing:
    """Raises an error at its first move, once the others have begun theirs."""

    error: Exception
    policy: str = "failing"
    trainable: bool = False

    async def answer(self, ask: Ask) -> Reply:
        await asyncio.sleep(0)
        raise self.error


@dataclass
class Waiting:
    """Thinks for ever, and notes whether it was stopped."""

    policy: str = "waiting"
    trainable: bool = False
    stopped: bool = False

    async def answer(self, ask: Ask) -> Reply:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.stopped = True
            raise
        raise AssertionError("nobody sets this event")


@pytest.mark.parametrize("seats", [("failing", "waiting"), ("waiting", "failing")])
def test_a_failing_player_stops_the_one_that_moves_at_once_with_it(seats: tuple[str, ...]) -> None:
    waiting = Waiting()

    async def one() -> None:
        with pytest.raises(ZeroDivisionError, match="a bug"):
            await play(
                plan("pennies", *seats),
                PenniesGame(),
                {"failing": Failing(ZeroDivisionError("a bug")), "waiting": waiting},
            )
        assert waiting.stopped  # at once, not when the event loop is closed

    asyncio.run(asyncio.wait_for(one(), 60))


def test_a_masked_match_stops_the_other_seats_too() -> None:
    waiting = Waiting()

    async def one() -> Episode:
        players: dict[str, Player] = {
            "failing": Failing(EngineUnavailable("here", "timeout")),
            "waiting": waiting,
        }
        episode = await play(plan("pennies", "waiting", "failing"), PenniesGame(), players)
        assert waiting.stopped
        return episode

    assert asyncio.run(asyncio.wait_for(one(), 60)).masked == "timeout"


@pytest.mark.parametrize("seats", [("lost", "buggy"), ("buggy", "lost")])
def test_a_bug_does_not_hide_behind_a_lost_engine(seats: tuple[str, ...]) -> None:
    players: dict[str, Player] = {
        "lost": Failing(EngineUnavailable("here", "timeout")),
        "buggy": Failing(ZeroDivisionError("a bug")),
    }
    with pytest.raises(ZeroDivisionError, match="a bug"):
        asyncio.run(play(plan("pennies", *seats), PenniesGame(), players))
