"""Replies written down: whose, in which words, and that a model would read them as they were meant."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest

from ludus.engines.base import EngineUnavailable
from ludus.experts import make_player
from ludus.games import registry
from ludus.games.base import IllegalAction, Observation, Payoff
from ludus.games.red_team.game import DEFENDER
from ludus.players import Ask, LanguagePlayer, Player, Reply
from ludus.rollout.play import HouseRules
from ludus.sft.encode import Encoder
from ludus.sft.files import Row
from ludus.sft.transcripts import Line, Match, Seating, Writer, reply, watch
from ludus.small.apprentices import apprentice
from ludus.text.prompter import Prompter
from ludus.text.templates import detect
from ludus.text.tokenizer import Tokenizer, byte_tokenizer
from ludus.types import Sampling


def prompter(**settings: Any) -> Prompter:
    tokenizer = byte_tokenizer("<think>", "</think>")
    return Prompter(tokenizer, detect(tokenizer, "plain"), **{"rules": False, **settings})


def played(
    name: str, players: tuple[Player, ...], count: int = 1, rule: HouseRules | None = None, **args: Any
) -> list[Match]:
    game = registry.make(name, **args)
    seatings = [Seating(players, k, 100 + k) for k in range(count)]
    return asyncio.run(watch(name, game, seatings, rule=rule or HouseRules(), in_flight=4))


@dataclass(frozen=True)
class Scripted:
    """Says what it is told to, in order; None for nothing that parses, "gone" for a lost engine."""

    replies: tuple[str | None, ...]
    policy: str = "scripted"
    trainable: bool = False
    said: list[None] = field(default_factory=list)

    async def answer(self, ask: Ask) -> Reply:
        action = self.replies[len(self.said) % len(self.replies)]
        self.said.append(None)
        if action == "gone":
            raise EngineUnavailable("http://nowhere", "timeout")
        return Reply(action=action, text="As told.")


def texts(rows: list[dict[str, Any]]) -> list[list[str]]:
    return [[message["content"] for message in row["messages"]] for row in rows]


# --- whose replies ---


def test_a_row_holds_what_a_seat_read_and_said() -> None:
    (match,) = played("kuhn_poker", (Scripted(("pass",)), Scripted(("bet", "bet"))))
    rows = Writer(prompter()).rows(match, (0, 1))
    assert [row["role"] for row in rows] == ["player_0", "player_0", "player_1"]
    assert all(row["game"] == "kuhn_poker" for row in rows)
    assert all(row["return"] == match.episode.returns[int(row["role"][-1])] for row in rows)
    for row in rows:
        asked, said = row["messages"]
        assert asked["role"] == "user"
        assert asked["content"].startswith("You are player ")
        assert asked["content"].endswith("Legal: pass bet")
        assert said["role"] == "assistant"
        assert said["content"].startswith("<think>As told.</think>\\boxed{")


@pytest.mark.parametrize("winner", [0, 1])
def test_only_winners_are_written_where_winners_are_wanted(winner: int) -> None:
    """The one who folds loses."""
    players = (
        Scripted(("bet",) if winner == 0 else ("pass",)),
        Scripted(("pass",) if winner == 0 else ("bet",)),
    )
    (match,) = played("kuhn_poker", players)
    writer = Writer(prompter(), won=True)
    rows = writer.rows(match, (0, 1))
    assert {row["role"] for row in rows} == {f"player_{winner}"}
    lost = sum(turn.seat != winner for turn in match.episode.turns)
    assert writer.left["in matches that were not won"] == lost
    assert len(rows) + lost == len(match.episode.turns)


def test_nobody_wins_a_draw() -> None:
    players = (make_player("minimax"), make_player("minimax"))
    (match,) = played("tic_tac_toe", players)
    assert match.episode.returns == (0.0, 0.0)
    assert Writer(prompter(), won=True).rows(match, (0, 1)) == []


def test_only_the_asked_seats_and_role_are_written() -> None:
    (match,) = played("red_team", (make_player("attack:mix"), make_player("defend:perfect")), attacks=1.0)
    writer = Writer(prompter(), role="defender")
    assert [row["role"] for row in writer.rows(match, (0, 1))] == ["defender"]
    assert writer.left == {"in another role": 1, "refused, or without the thought that the format wants": 0}
    assert Writer(prompter()).rows(match, (DEFENDER,)) == writer.rows(match, (DEFENDER,))


def test_refused_replies_and_lost_matches_are_left_out_and_counted() -> None:
    stubborn = (Scripted((None, "fly", "pass")), Scripted(("bet",)))
    (match,) = played("kuhn_poker", stubborn, rule=HouseRules(retries=2))
    writer = Writer(prompter())
    rows = writer.rows(match, (0, 1))
    refused = "refused, or without the thought that the format wants"
    assert writer.left[refused] == sum(not turn.legal for turn in match.episode.turns) >= 2
    assert len(rows) == sum(turn.legal for turn in match.episode.turns)
    assert "Refused: 'fly'" in str(texts(rows)) or "Refused: " in str(texts(rows))

    (match,) = played("kuhn_poker", (Scripted(("pass",)), Scripted(("gone",))))
    writer = Writer(prompter())
    assert writer.rows(match, (0, 1)) == []
    assert writer.left == {"in lost matches (timeout)": 1}


class Twice:
    """Both seats move at once, twice."""

    name, roles, payoff = "twice", ("left", "right"), Payoff.ZERO_SUM
    max_turns, min_return = 2, -1.0

    def start(self, seed: int) -> TwiceMatch:
        return TwiceMatch()


class TwiceMatch:
    def __init__(self) -> None:
        self.moves: list[dict[int, str]] = []

    def to_act(self) -> tuple[int, ...]:
        return (0, 1) if len(self.moves) < 2 else ()

    def observe(self, seat: int) -> Observation:
        legal = ("a", "b") if self.to_act() else ()
        return Observation("Choose.", (), f"Move {len(self.moves)} of seat {seat}.", legal, None)

    def play(self, actions: Mapping[int, str]) -> None:
        for seat, action in actions.items():
            if action not in ("a", "b"):
                raise IllegalAction(seat, "a or b")
        self.moves.append(dict(actions))

    def returns(self) -> tuple[float, ...]:
        return (1.0, -1.0)

    def sample(self, seat: int, rng: Random) -> str:
        return rng.choice("ab")


@dataclass(frozen=True)
class Slow:
    """The left seat answers after the right one."""

    policy: str = "slow"
    trainable: bool = False

    async def answer(self, ask: Ask) -> Reply:
        for _ in range(5 if ask.seat == 0 else 0):
            await asyncio.sleep(0)
        return Reply(action="ab"[ask.seat], text=ask.observation.state)


def test_replies_to_simultaneous_moves_keep_to_their_turns() -> None:
    (match,) = asyncio.run(watch("twice", Twice(), [Seating((Slow(), Slow()), 0, 0)], in_flight=2))
    assert [line.seat for line in match.lines] == [turn.seat for turn in match.episode.turns]
    for turn, line in zip(match.episode.turns, match.lines, strict=True):
        assert (line.action, line.thought) == (turn.action, turn.text)
        assert f"seat {turn.seat}" in line.observation.state


# --- in which words ---


def test_programs_think_nothing_or_what_the_apprentice_sees() -> None:
    game, look = registry.make("kuhn_poker"), apprentice("kuhn_poker").look
    seatings = [Seating((make_player("cfr"),) * 2, k, k) for k in range(5)]
    silent = asyncio.run(watch("kuhn_poker", game, seatings))
    seeing = asyncio.run(watch("kuhn_poker", game, seatings, thinks=lambda ask: look(ask).thought))
    assert [match.episode.returns for match in silent] == [match.episode.returns for match in seeing]
    for one, other in zip(silent, seeing, strict=True):
        for line, with_thought in zip(one.lines, other.lines, strict=True):
            assert line.thought == ""
            assert with_thought.thought.startswith("I hold ")
            assert line.action == with_thought.action


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "<think>Hm.</think>\\boxed{bet}"),
        ({"think": False}, "Hm. \\boxed{bet}"),
        ({"format": "answer"}, "<think>Hm.</think><answer>bet</answer>"),
    ],
)
def test_a_programs_reply_is_worded_as_in_play(settings: dict[str, Any], text: str) -> None:
    seen = Observation("", (), "Your card: K.", ("pass", "bet"), None)
    assert reply(Line("kuhn_poker", 0, seen, (), "Hm.", "bet"), prompter(**settings)) == text


@pytest.mark.parametrize(
    ("said", "thinking", "silent"),
    [
        ("I see.</think>So: \\boxed{bet}", "<think>I see.</think>So: \\boxed{bet}", "So: \\boxed{bet}"),
        (
            "<think>\nI see.\n</think>\n\n\\boxed{bet}",
            "<think>\nI see.\n</think>\n\n\\boxed{bet}",
            "\\boxed{bet}",
        ),
        ("Let me see. \\boxed{bet}", "<think>Let me see.</think>\\boxed{bet}", "Let me see. \\boxed{bet}"),
        ("\\boxed{bet}", "<think></think>\\boxed{bet}", "\\boxed{bet}"),
    ],
)
def test_a_models_words_stay_as_they_are(said: str, thinking: str, silent: str) -> None:
    seen = Observation("", (), "Your card: K.", ("pass", "bet"), None)
    line = Line("kuhn_poker", 0, seen, (), "", "bet", said)
    assert reply(line, prompter()) == thinking
    assert reply(line, prompter(think=False)) == silent


def test_a_format_that_wants_thoughts_takes_no_reply_without() -> None:
    (match,) = played("kuhn_poker", (make_player("random"),) * 2)
    assert Writer(prompter(format="answer")).rows(match, (0, 1)) == []
    assert Writer(prompter(format="answer", think=False)).rows(match, (0, 1)) != []


def test_a_seats_dialogue_is_one_row_up_to_its_first_refusal() -> None:
    players = (make_player("minimax"), make_player("random"))
    (match,) = played("tic_tac_toe", players, view="cells")
    (row,) = Writer(prompter(context="chat")).rows(match, (0,))
    mine = [turn for turn in match.episode.turns if turn.seat == 0]
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * len(mine)
    assert [m["content"] for m in row["messages"][1::2]] == [
        f"<think></think>\\boxed{{{turn.action}}}" for turn in mine
    ]
    assert "They: " in row["messages"][2]["content"]

    stubborn = (Scripted(("1", "1", "2", "3")), Scripted(("9", "8", "7")))
    (match,) = played("tic_tac_toe", stubborn, rule=HouseRules(retries=1), view="cells")
    writer = Writer(prompter(context="chat"))
    (row,) = writer.rows(match, (0,))
    assert [m["content"] for m in row["messages"][1::2]] == ["<think>As told.</think>\\boxed{1}"]
    mine = [turn for turn in match.episode.turns if turn.seat == 0]
    assert sum(writer.left.values()) == len(mine) - 1


# --- the way back ---


@pytest.mark.parametrize("context", ["board", "chat"])
@pytest.mark.parametrize("format", ["boxed", "answer"])
def test_rows_encode_to_what_is_met_in_play(tiny_model: Path, context: Any, format: Any) -> None:
    """Every learnt stretch is a reply that reads as the action that was played, with the thought."""
    tokenizer = Tokenizer.load(tiny_model)
    wording = Prompter(tokenizer, detect(tokenizer), context=context, rules=False, format=format)
    encoder = Encoder(tokenizer, wording.template)
    matches = played("kuhn_poker", (apprentice("kuhn_poker"),) * 2, count=5)
    learnt = 0
    for match in matches:
        for seat in (0, 1):
            lines = iter([line for line in match.lines if line.seat == seat])
            for row in Writer(wording).rows(match, (seat,)):
                content = Row("here", row).read()
                (encoded,) = encoder.rows(content)
                for start, end in encoded.trained:
                    line = next(lines)
                    read = wording.read(encoded.tokens.tolist()[start:end])
                    assert (read.action, read.thought) == (line.action, line.thought)
                    learnt += 1
                if context == "board":
                    prompt = wording.prompt(line.observation).ids
                    assert encoded.tokens.tolist()[: encoded.trained[0][0]] == prompt
    assert learnt == sum(len(match.lines) for match in matches)


def test_a_models_own_replies_come_back_word_for_word(tiny_model: Path) -> None:
    """Encoded again, a reply may be split into other tokens than were sampled; its words stay the same."""
    from ludus.engines.torch_engine import TorchEngine
    from ludus.learner.model import load_model

    tokenizer = Tokenizer.load(tiny_model)
    wording = Prompter(tokenizer, detect(tokenizer), rules=False)
    engine = TorchEngine.from_model(load_model(tiny_model), slots=8, context=256)
    player = LanguagePlayer("self", engine, wording, Sampling(24))
    encoder = Encoder(tokenizer, wording.template)
    for match in played("kuhn_poker", (player, player), count=10):
        turns = [turn for turn in match.episode.turns if turn.legal]
        rows = Writer(wording).rows(match, (0, 1))
        assert len(rows) == len(turns)
        by_seat = sorted(turns, key=lambda turn: turn.seat)
        for row, turn in zip(rows, by_seat, strict=True):
            (encoded,) = encoder.rows(Row("here", row).read())
            ((start, end),) = encoded.trained
            ids = encoded.tokens.tolist()
            assert ids[:start] == turn.prompt_ids
            assert tokenizer.decode(ids[start : end - 1]) == turn.text
