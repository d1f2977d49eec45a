"""Players' replies written down, so that a model can learn to say the same.

    players -> matches -> lines (what a seat saw, thought and did) -> dialogues, as in docs/supervised.md

Language models think for themselves. Programs have no thoughts; what they "think" is either nothing or what
whoever calls this lets them think, such as what the game's apprentice sees in the same position.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ludus.games.base import Game, Observation
from ludus.players import Ask, LanguagePlayer, Player, Reply
from ludus.rollout.play import FORFEIT_AT_ONCE, HouseRules
from ludus.rollout.scheduler import play_all
from ludus.text.actions import THINK, unspelled
from ludus.text.prompter import Past, Prompter
from ludus.types import Episode, MatchPlan


@dataclass(frozen=True, slots=True)
class Line:
    """One reply: what its seat saw, thought and did. `text` is what a language model said, word for word."""

    game: str
    seat: int
    observation: Observation
    past: tuple[Past, ...]
    thought: str
    action: str | None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Match:
    """A finished match and its replies, in the order of `episode.turns`."""

    episode: Episode
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class Seating:
    """Who plays a match, seat by seat, and what decides its course."""

    players: tuple[Player, ...]
    match_seed: int
    reply_seed: int


Thinks = Callable[[Ask], str]


async def watch(
    label: str,
    game: Game,
    seatings: Sequence[Seating],
    *,
    thinks: Thinks | None = None,
    rule: HouseRules = FORFEIT_AT_ONCE,
    in_flight: int = 1,
) -> list[Match]:
    """Play a match per seating and write all replies down. `thinks` gives the thoughts of programs."""
    plans: list[MatchPlan] = []
    scribes: dict[str, Player] = {}
    books: list[list[Line]] = []
    for number, seating in enumerate(seatings):
        book: list[Line] = []
        seats = tuple(f"{number}/{seat}" for seat in range(len(seating.players)))
        scribes |= {
            name: _Scribe(player, thinks, book) for name, player in zip(seats, seating.players, strict=True)
        }
        plans.append(MatchPlan(number, number, label, seats, seating.match_seed, seating.reply_seed))
        books.append(book)
    episodes = await play_all(plans, {label: game}, scribes, rule=rule, in_flight=in_flight)
    return [Match(e, _in_order(e, book)) for e, book in zip(episodes, books, strict=True)]


@dataclass(slots=True)
class _Scribe:
    """Passes a player's replies on and writes them down."""

    player: Player
    thinks: Thinks | None
    book: list[Line]
    trainable: bool = False

    @property
    def policy(self) -> str:
        return self.player.policy

    async def answer(self, ask: Ask) -> Reply:
        reply = await self.player.answer(ask)
        past = tuple((p.observation, p.prompt_ids, p.completion.ids, p.problem) for p in ask.past)
        line = Line(ask.game, ask.seat, ask.observation, past, reply.text, reply.action)
        if isinstance(self.player, LanguagePlayer):
            line = replace(line, thought="", text=reply.text)
        elif self.thinks is not None and not reply.text:
            line = replace(line, thought=self.thinks(ask))
        self.book.append(line)
        return reply


def _in_order(episode: Episode, book: Sequence[Line]) -> tuple[Line, ...]:
    """The lines in the order of the turns. Of seats that move at once, whoever is ready replies first."""
    waiting = {seat: [line for line in book if line.seat == seat] for seat in range(len(episode.roles))}
    return tuple(waiting[turn.seat].pop(0) for turn in episode.turns)


class Writer:
    """Makes rows of matches, worded as `prompter` words them in play.

    `won`: only the replies of seats that won their match. `role`: only those in this role. `left` counts the
    replies that did not become rows, by reason.
    """

    def __init__(self, prompter: Prompter, *, won: bool = False, role: str | None = None) -> None:
        self.prompter = prompter
        self.won = won
        self.role = role
        self.left: Counter[str] = Counter()

    def rows(self, match: Match, seats: Iterable[int]) -> list[dict[str, Any]]:
        """What `seats` said: a row per reply, or in the `chat` context one per seat.

        Refused replies are left out, and in a dialogue all that the seat said after one.
        """
        episode = match.episode
        rows = []
        for seat in seats:
            mine = [(t, line) for t, line in zip(episode.turns, match.lines, strict=True) if t.seat == seat]
            kept = [line for turn, line in mine if turn.legal and self._sound(line)]
            if self.prompter.context == "chat":
                kept = [line for line, (_, own) in zip(kept, mine, strict=False) if line is own]
            if why := self._unwanted(episode, seat):
                kept = []
            self.left[why or "refused, or without the thought that the format wants"] += len(mine) - len(kept)
            rows += self._rows(kept, episode, seat)
        return rows

    def _unwanted(self, episode: Episode, seat: int) -> str | None:
        """Why nothing that this seat said is wanted, or None."""
        if episode.masked is not None:
            return f"in lost matches ({episode.masked})"
        if self.role not in (None, episode.roles[seat]):
            return "in another role"
        others = [value for other, value in enumerate(episode.returns) if other != seat]
        if self.won and not all(episode.returns[seat] > value for value in others):
            return "in matches that were not won"
        return None

    def _sound(self, line: Line) -> bool:
        """Whether a legal reply, written down, is still one."""
        if not self.prompter.must_think or line.action is None:
            return line.action is not None
        return unspelled(reply(line, self.prompter)) is not None

    def _rows(self, lines: Sequence[Line], episode: Episode, seat: int) -> list[dict[str, Any]]:
        pairs = [exchange(line, self.prompter) for line in lines]
        if self.prompter.context == "chat" and pairs:
            pairs = [[message for pair in pairs for message in pair]]
        about = {"game": episode.game, "role": episode.roles[seat], "return": episode.returns[seat]}
        return [{"messages": messages, **about} for messages in pairs]


def exchange(line: Line, prompter: Prompter) -> list[dict[str, str]]:
    """A legal reply as messages: what asked for it, and the reply."""
    return [
        {"role": "user", "content": prompter.message(line.observation, line.past)},
        {"role": "assistant", "content": reply(line, prompter)},
    ]


def reply(line: Line, prompter: Prompter) -> str:
    """A legal reply in words: its thought spelled out, where replies have one, and its answer.

    A language model's words stay as they are. Where it keeps its thought to itself or marks none, what it
    says before its action is the thought.
    """
    assert line.action is not None, "a legal reply has an action"
    if line.text is None:
        return prompter.written(line.action, line.thought)
    thought, closed, answer = line.text.rpartition(THINK[1])
    if not prompter.thinks:
        return answer.lstrip()
    if closed:
        return f"{thought.replace(THINK[0], '').join(THINK)}{answer}"
    return prompter.written(line.action, prompter.read_text(line.text).thought)
