"""Who answers a turn: the protocol, the language model, and the random player.

A player gets an `Ask` and returns a `Reply`; it knows nothing of opponents, credit or the learner.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Protocol

from ludus.engines.base import Engine
from ludus.errors import UserError
from ludus.games.base import Match, Observation
from ludus.text.prompter import Prompter
from ludus.types import Completion, Dialogue, Request, Sampling, Stop


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
    dialogue: Dialogue | None = None  # of this seat in this match


@dataclass(frozen=True, slots=True)
class Reply:
    """What a player answers. `action` None: nothing parsed, so nothing leaves the seat."""

    action: str | None
    prompt_ids: list[int] = field(default_factory=list)
    completion: Completion = field(default_factory=lambda: Completion([], [], Stop.EOS, 0))
    text: str = ""  # the whole reply, thought included
    policy: str = ""  # which of a player's several policies answered; "": the player's one


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
    """A language model: renders the observation, samples a reply, parses the action.

    Or several that share an engine and a tokenizer: `parts` then says which policy plays which (game, role);
    ("", role) is that role in whatever game.
    """

    policy: str
    engine: Engine
    prompter: Prompter
    sampling: Sampling
    trainable: bool = False
    parts: Mapping[tuple[str, str], str] = field(default_factory=dict)

    @property
    def policies(self) -> tuple[str, ...]:
        """The ids of all its policies in the engine."""
        return tuple(dict.fromkeys(self.parts.values())) or (self.policy,)

    @property
    def sole(self) -> str:
        """The id of its one policy, where no game is played. Raises UserError where there are several."""
        if self.parts:
            raise UserError(
                f"{', '.join(self.policies)} are several policies, each with roles of its own; ask one of "
                "them, by its directory: checkpoints/step_N/model/NAME"
            )
        return self.policy

    def policy_of(self, game: str, role: str) -> str:
        """The policy that plays `role` in `game`."""
        if not self.parts:
            return self.policy
        return self.parts.get((game, role)) or self.parts["", role]

    def alone(self, policy: str) -> LanguagePlayer:
        """The one policy `policy` of the same engine in every role. It does not learn."""
        return replace(self, policy=policy, parts={}, trainable=False)

    def named(self, policy: str) -> LanguagePlayer:
        """This player with other weights under another name, which do not learn: "past/3" for "self", and
        "past/3/NAME" for each of several policies."""
        parts = {part: f"{policy}/{name}" for part, name in self.parts.items()}
        return replace(self, policy=policy, parts=parts, trainable=False)

    def playing(self, game: str) -> LanguagePlayer:
        """This player as it plays `game`, whatever that is called by whoever seats it."""
        return replace(
            self, parts={("", role): p for (label, role), p in self.parts.items() if label == game}
        )

    def unload(self) -> None:
        """Take its policies out of the engine."""
        for policy in self.policies:
            self.engine.unload(policy)

    async def answer(self, ask: Ask) -> Reply:
        policy = self.policy_of(ask.game, ask.role)
        prompt = self.prompter.prompt(
            ask.observation,
            [(p.observation, p.prompt_ids, p.completion.ids, p.problem) for p in ask.past],
        )
        completion = await self.engine.generate(
            Request(
                policy=policy,
                prompt_ids=prompt.ids,
                seed=ask.seed,
                sampling=self.sampling,
                stop=self.prompter.stop,
                messages=prompt.messages,
                dialogue=ask.dialogue if self.prompter.context == "chat" else None,
            )
        )
        if completion.text is not None:  # an engine that speaks text only
            read = self.prompter.read_text(completion.text)
        else:
            read = self.prompter.read(completion.ids)
        return Reply(read.action, prompt.ids, completion, read.text, policy)
