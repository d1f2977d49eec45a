"""Who answers a turn: the protocol, the language model, and the random player.

A player gets an `Ask` and returns a `Reply`; it knows nothing of opponents, credit or the learner.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from ludus.engines.base import Engine
from ludus.games.base import Match, Observation
from ludus.text.prompter import Prompter
from ludus.types import Completion, Request, Sampling, Stop


@dataclass(frozen=True, slots=True)
class Past:
    """One earlier reply of the same seat in the same match, for append-only dialogue."""

    observation: Observation
    prompt_ids: list[int]
    completion: Completion
    problem: str | None  # why the reply was refused, or None


@dataclass(frozen=True, slots=True)
class Ask:
    """One question to a player: it is your move.

    `match` is for players that are programs (search, minimax); a language model reads `observation` alone.
    """

    game: str
    seat: int
    role: str
    observation: Observation
    seed: int  # all randomness of the reply
    attempt: int  # 0 = first try at this move
    problem: str | None  # why the previous attempt was refused
    past: tuple[Past, ...]  # earlier replies of this seat, refused ones included
    match: Match


@dataclass(frozen=True, slots=True)
class Reply:
    """What a player answers. `action` None: nothing parsed, so nothing leaves the seat."""

    action: str | None
    prompt_ids: list[int] = field(default_factory=list)
    completion: Completion = field(default_factory=lambda: Completion([], [], Stop.EOS, 0))
    text: str = ""  # the whole reply, thought included


class Player(Protocol):
    """Answers for a seat."""

    @property
    def policy(self) -> str: ...  # policy id, written into every Turn
    @property
    def trainable(self) -> bool: ...  # whether its turns are learnt from
    async def answer(self, ask: Ask) -> Reply: ...


@dataclass(frozen=True, slots=True)
class RandomPlayer:
    """Uniform over the legal actions; over `Match.sample` where a game does not list them."""

    policy: str = "random"
    trainable: bool = False

    async def answer(self, ask: Ask) -> Reply:
        return Reply(action=ask.match.sample(ask.seat, Random(ask.seed)))


@dataclass(frozen=True, slots=True)
class LanguagePlayer:
    """A language model: renders the observation, samples a reply, parses the action."""

    policy: str
    engine: Engine
    prompter: Prompter
    sampling: Sampling
    trainable: bool = False

    async def answer(self, ask: Ask) -> Reply:
        prompt = self.prompter.prompt(
            ask.observation,
            [(p.observation, p.prompt_ids, p.completion.ids, p.problem) for p in ask.past],
        )
        completion = await self.engine.generate(
            Request(
                policy=self.policy,
                prompt_ids=prompt.ids,
                seed=ask.seed,
                sampling=self.sampling,
                stop=self.prompter.stop,
                messages=prompt.messages,
            )
        )
        if completion.text is not None:  # an engine that speaks text only
            read = self.prompter.read_text(completion.text)
        else:
            read = self.prompter.read(completion.ids)
        return Reply(action=read.action, prompt_ids=prompt.ids, completion=completion, text=read.text)
