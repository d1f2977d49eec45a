"""A searched best response: how to win against one particular player, found by asking that player.

Against an opponent that does not change, a match is a problem of one: the opponent is a part of the world,
like the deal of the cards. A Monte Carlo tree search of that world, in which the opponent moves by its own
replies, approaches a best response to it as simulations grow. (Search as it is usually done, `mcts:N`,
expects good play instead and walks past what this opponent does wrong.)

    belief     where cards are hidden: deals that fit what the seat has seen, each weighed by how likely the
               opponent is to have moved as it did with that hand
    tree       one node per information set of the seat; UCT picks its moves (as in POMCP, Silver and Veness
               2010), the opponent answers with one of its replies to that position; an illegal one forfeits
    roll-out   beyond the tree both move at random, which costs no question

Only belief and tree ask the opponent, at most `replies` times per position; all searches share the answers.
Reply k to a position is drawn from a seed of its own, so a search finds the same whatever runs beside it.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any

from ludus.engines.base import EngineUnavailable
from ludus.experts import hidden, redeal
from ludus.games.moves import signs
from ludus.games.openspiel import SpielGame, SpielMatch
from ludus.players import Ask, Player, Reply
from ludus.seeding import derive
from ludus.types import Stop

PARTICLES = 64  # deals drawn for a belief
_UNSEEN = 0.5  # added to the count of each action: what was not seen in a few replies is not impossible


class Questions:
    """Replies of one player in positions of one game, each asked for once and kept.

    `replies` are kept per position, drawn from `seed`; a refused one is asked for again `retries` times, as a
    match does. A position is what OpenSpiel calls one: in the `chat` context, where a reply depends on the
    thoughts before it too, what is kept is the reply of a player that has just sat down.
    """

    def __init__(self, game: SpielGame, player: Player, *, replies: int, seed: int, retries: int = 0) -> None:
        self.game, self.player = game, player
        self.replies, self.retries = replies, retries
        self._seed = seed
        self._hidden = hidden(game)
        self._kept: dict[tuple[str, int], int | None] = {}
        self._asked: dict[tuple[str, int], asyncio.Task[int | None]] = {}  # not answered yet

    async def draw(self, state: Any, rng: Random) -> int | None:
        """What the player to move in `state` does, as OpenSpiel's action; None: it forfeits."""
        return await self._reply(state, self._key(state), rng.randrange(self.replies))

    async def likelihood(self, state: Any, action: int) -> float:
        """The probability that the player to move in `state` takes `action`, from all `replies`."""
        key = self._key(state)
        missing = [k for k in range(self.replies) if (key, k) not in self._kept]
        await asyncio.gather(*(self._reply(state, key, k) for k in missing))
        seen = sum(self._kept[key, k] == action for k in range(self.replies))
        return (seen + _UNSEEN) / (self.replies + _UNSEEN * len(state.legal_actions()))

    async def _reply(self, state: Any, key: str, number: int) -> int | None:
        at = (key, number)
        if at not in self._kept:
            if at not in self._asked:
                self._asked[at] = asyncio.create_task(self._ask(state.clone(), key, number))
            try:
                self._kept[at] = await self._asked[at]
            finally:  # a server that is lost now may answer the next time
                self._asked.pop(at, None)
        return self._kept[at]

    async def _ask(self, state: Any, key: str, number: int) -> int | None:
        seat = state.current_player()
        legal = self.game.actions(state)
        for attempt in range(1 + self.retries):
            reply = await self.player.answer(
                Ask(
                    game=self.game.name,
                    seat=seat,
                    role=self.game.roles[seat],
                    observation=self.game.observe_state(state, seat),
                    seed=derive(self._seed, key, number, attempt),
                    attempt=0,
                    problem=None,
                    past=(),
                    match=SpielMatch(self.game, state, Random(0)),
                )
            )
            if reply.completion.stop is Stop.ABORTED:
                raise EngineUnavailable(self.player.policy, "aborted")
            if reply.action in legal:
                return legal[reply.action]
        return None

    def _key(self, state: Any) -> str:
        known = state.information_state_string() if self._hidden else state
        return f"{state.current_player()} {known}"


@dataclass(frozen=True, slots=True)
class Responder:
    """Plays by `simulations` of a match against the player behind `questions`, at each of its moves."""

    questions: Questions
    simulations: int
    trainable: bool = False

    @property
    def policy(self) -> str:
        return f"respond:{self.simulations}"

    async def answer(self, ask: Ask) -> Reply:
        game, match = self.questions.game, ask.match
        assert isinstance(match, SpielMatch), "a responder plays the game that its questions are about"
        search = _Search(self.questions, ask.seat, Random(ask.seed))
        action = await search.best(match.spiel_state, self.simulations)
        return Reply(action=game.action_text(match.spiel_state, action))


@dataclass(slots=True)
class _Node:
    """What is known of the seat's moves at one of its information sets."""

    moves: list[int]
    visits: list[int] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.visits = [0] * len(self.moves)
        self.totals = [0.0] * len(self.moves)

    def pick(self, spread: float, rng: Random) -> int:
        """Index of the move to try next: one never tried, else the best upper bound (UCB1).

        Returns differ by up to `spread`, which sets the scale of the bound.
        """
        untried = [k for k, n in enumerate(self.visits) if not n]
        if untried:
            return rng.choice(untried)
        log = math.log(sum(self.visits))
        bounds = [
            total / n + spread * math.sqrt(log / n) for total, n in zip(self.totals, self.visits, strict=True)
        ]
        return bounds.index(max(bounds))


class _Search:
    """One search, for one move of `seat`."""

    def __init__(self, questions: Questions, seat: int, rng: Random) -> None:
        self.game, self.questions, self.seat, self.rng = questions.game, questions, seat, rng
        self.hidden = hidden(self.game)
        self.nodes: dict[str, _Node] = {}
        self.low, self.high = math.inf, -math.inf  # returns seen so far

    async def best(self, state: Any, simulations: int) -> int:
        """The move that was tried most often."""
        if len(state.legal_actions()) == 1:
            return int(state.legal_actions()[0])
        starts, weights = await self._belief(state)
        for _ in range(simulations):
            await self._simulate(self.rng.choices(starts, weights)[0].clone())
        root = self.nodes[self._key(state)]
        return root.moves[root.visits.index(max(root.visits))]

    async def _belief(self, state: Any) -> tuple[list[Any], list[float]]:
        """States that the seat may be in, and their weights."""
        if not self.hidden:
            return [state], [1.0]
        drawn = [redeal(state, self.seat, self.rng) for _ in range(PARTICLES)]
        counts = Counter(tuple(start.history()) for start in drawn)
        starts = {tuple(start.history()): start for start in drawn}
        likely = await asyncio.gather(*(self._likelihood(start) for start in starts.values()))
        return list(starts.values()), [counts[history] * p for history, p in zip(starts, likely, strict=True)]

    async def _likelihood(self, start: Any) -> float:
        """How likely the opponent's moves are, given the cards in `start`."""
        state, likelihood = self.game.spiel.new_initial_state(), 1.0
        for step in start.full_history():
            if step.player == 1 - self.seat:
                likelihood *= await self.questions.likelihood(state, step.action)
            state.apply_action(step.action)
        return likelihood

    async def _simulate(self, state: Any) -> None:
        path: list[tuple[_Node, int]] = []
        grown = forfeited = False
        while not state.is_terminal():
            if state.is_chance_node():
                outcomes, odds = zip(*state.chance_outcomes(), strict=True)
                action = self.rng.choices(outcomes, odds)[0]
            elif grown:
                action = self.rng.choice(state.legal_actions())
            elif state.current_player() == self.seat:
                node = self.nodes.get(self._key(state))
                grown = node is None  # one new node per simulation
                if node is None:
                    node = self.nodes[self._key(state)] = _Node(state.legal_actions())
                tried = node.pick(self.high - self.low, self.rng)
                path.append((node, tried))
                action = node.moves[tried]
            else:
                action = await self.questions.draw(state, self.rng)
                if action is None:
                    forfeited = True
                    break
            state.apply_action(action)
        value = -self.game.min_return if forfeited else self._return(state)
        self.low, self.high = min(self.low, value), max(self.high, value)
        for node, tried in path:
            node.visits[tried] += 1
            node.totals[tried] += value

    def _return(self, state: Any) -> float:
        chips = state.returns()
        return float((chips if self.game.payout == "chips" else signs(chips))[self.seat])

    def _key(self, state: Any) -> str:
        return str(state.information_state_string(self.seat)) if self.hidden else str(state)
