"""Players that are programs: fixed opponents of known strength, never trained.

    random      uniform over the legal actions
    minimax     perfect-information games: exact where a game is short (tic-tac-toe), else a search of about
                5,000 positions that counts what lies behind its horizon as a draw (connect four: 4 plies)
    cfr         the average policy of CFR+ (Tammelin 2014): Kuhn and Leduc poker, close to an equilibrium
    mcts:N      N simulations a move: UCT where all is open, ISMCTS (Cowling et al. 2012) where cards are
                hidden, which looks at nothing that its seat may not see
    fair_trader negotiation: accepts what gains it something, offers trades that do and that look fair
    attack:F, defend:H  the red-team game: see `ludus.scripted`

In a match of several rounds they play each round by itself. All randomness of a reply comes from `Ask.seed`,
so the same match is played again exactly.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random
from typing import Any, Protocol, runtime_checkable

import pyspiel
from numpy.random import RandomState
from open_spiel.python.algorithms import ismcts, mcts

from ludus.errors import UserError
from ludus.games.base import Game, HasSpiel
from ludus.games.openspiel import SpielMatch
from ludus.games.repeated import RepeatedGame, RepeatedMatch
from ludus.players import Ask, Player, RandomPlayer, Reply
from ludus.scripted import PROGRAMS
from ludus.seeding import derive

SEARCH_POSITIONS = 5_000  # looked at per move where a game is too long to be solved
EXACT_PLIES = 9  # games of at most so many moves are solved
CFR_TARGET = 1e-4  # exploitability (chips) at which CFR+ stops
CFR_ITERATIONS = 1_000  # at most; Leduc poker is then within 0.0005 of an equilibrium
_CFR_HISTORIES = 20_000  # largest game that is solved
_QUICK = 0.99  # a win is worth a little less per ply, so that searches win soon and lose late


@runtime_checkable
class Choosy(Protocol):
    """A player that cannot play every game."""

    def plays(self, game: Game) -> bool:
        """Whether it can take a seat in `game`."""
        ...


def names() -> tuple[str, ...]:
    """The names that `make_player` knows; N stands for a number."""
    return (*_MAKERS, *PROGRAMS, "mcts:N")


def make_player(name: str) -> Player:
    """The program player of that name. Raises UserError for an unknown one."""
    if name in _MAKERS:
        return _MAKERS[name]()
    if name in PROGRAMS:
        return PROGRAMS[name]
    kind, colon, number = name.partition(":")
    if kind == "mcts":
        if not colon or not number.isascii() or not number.isdigit() or not 1 <= int(number) <= 1_000_000:
            raise UserError(
                f"player {name!r}: write mcts:N with N simulations a move, 1 to 1000000, such as mcts:100"
            )
        return SearchPlayer(int(number))
    near = difflib.get_close_matches(name, names(), n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"unknown player {name!r}; {hint}known players: {', '.join(names())}")


@dataclass(frozen=True, slots=True)
class MinimaxPlayer:
    """Best play by search, uniform among equally good moves."""

    policy: str = "minimax"
    trainable: bool = False
    _solved: dict[str, dict[str, float]] = field(default_factory=dict, repr=False, compare=False)

    def plays(self, game: Game) -> bool:
        """Two-player, zero-sum, deterministic, nothing hidden."""
        rules = _rules(game)
        if rules is None:
            return False
        kind = rules.spiel.get_type()
        return bool(
            kind.information == pyspiel.GameType.Information.PERFECT_INFORMATION
            and kind.chance_mode == pyspiel.GameType.ChanceMode.DETERMINISTIC
            and kind.utility == pyspiel.GameType.Utility.ZERO_SUM
            and rules.spiel.num_players() == 2
        )

    async def answer(self, ask: Ask) -> Reply:
        game, state = _position(ask, self, self.policy)
        moves, seat, longest = state.legal_actions(), state.current_player(), game.spiel.max_game_length()
        children = [state.child(move) for move in moves]
        if longest <= EXACT_PLIES:
            plies, seen = longest, self._solved.setdefault(str(game.spiel), {})
        else:  # a fresh table: what a shallow search found must not pass for what a deep one would find
            wide = max(2, len(moves), *(len(child.legal_actions()) for child in children))
            plies, seen = max(1, int(math.log(SEARCH_POSITIONS) / math.log(wide))), {}
        values = [-_negamax(child, 1 - seat, plies - 1, seen) for child in children]
        best = [m for m, v in zip(moves, values, strict=True) if v > max(values) - 1e-12]
        return Reply(action=game.action_text(state, Random(ask.seed).choice(best)))


@dataclass(frozen=True, slots=True)
class CfrPlayer:
    """Draws from the average policy of CFR+, solved once per process and game."""

    policy: str = "cfr"
    trainable: bool = False

    def plays(self, game: Game) -> bool:
        """Two-player zero-sum games small enough to be solved."""
        rules = _rules(game)
        return rules is not None and solvable(rules)

    async def answer(self, ask: Ask) -> Reply:
        game, state = _position(ask, self, self.policy)
        row = equilibrium(game)[state.information_state_string()]
        action = Random(ask.seed).choices(list(row), list(row.values()))[0]
        return Reply(action=game.action_text(state, action))


@dataclass(frozen=True, slots=True)
class SearchPlayer:
    """Monte Carlo tree search with random roll-outs, `simulations` of them a move."""

    simulations: int
    trainable: bool = False

    @property
    def policy(self) -> str:
        return f"mcts:{self.simulations}"

    def plays(self, game: Game) -> bool:
        """OpenSpiel games; with hidden information only two-player zero-sum ones."""
        rules = _rules(game)
        return rules is not None and (not hidden(rules) or unfit(rules.spiel) is None)

    async def answer(self, ask: Ask) -> Reply:
        game, state = _position(ask, self, self.policy)
        search = _search_hidden if hidden(game) else _search_open
        return Reply(action=game.action_text(state, search(game.spiel, state, self.simulations, ask.seed)))


@dataclass(frozen=True, slots=True)
class FairTrader:
    """Negotiation: takes every offer that gains it something, and never gives worth away.

    It offers one resource for another so that it gains, asking for no more units than it gives: as the
    other's values are unknown and all alike on average, that is fair on average. Among those it picks the
    one that gains it most. It reads its own observation alone.
    """

    policy: str = "fair_trader"
    trainable: bool = False

    def plays(self, game: Game) -> bool:
        """Negotiation only."""
        return game.name == "negotiation"

    async def answer(self, ask: Ask) -> Reply:
        text = ask.observation.state
        goods = [(int(n), name, int(worth)) for n, name, worth in _GOODS.findall(text)]
        if not goods:
            raise UserError(f"fair_trader plays negotiation only, not {ask.game!r}")
        pending = _PENDING.search(text)
        if pending is not None and int(pending[1]) > 0 and pending[2] is None:
            return Reply(action="accept")
        theirs = next(line for line in text.splitlines() if line.startswith("They have"))
        owned = {name: int(n) for n, name in re.findall(r"(\d+) (\w+)", theirs)}
        offers = [
            (y * high - x * low, f"offer {x} {give} for {y} {get}")
            for have, give, low in goods
            for _, get, high in goods
            if give != get
            for x in range(1, have + 1)
            for y in range(1, min(x, owned[get]) + 1)
            if y * high > x * low
        ]
        if offers:
            most = max(offers)[0]
            best = [offer for gain, offer in offers if gain == most]
            return Reply(action=Random(ask.seed).choice(best))
        return Reply(action="deny" if pending is not None else "say no trade")


def equilibrium(game: HasSpiel) -> dict[str, dict[int, float]]:
    """CFR+'s average policy of a small game, {information state: {action: probability}}, solved once.

    It is run until its exploitability is at most `CFR_TARGET` chips, or for `CFR_ITERATIONS`. Raises
    UserError where the game is too large or of another kind.
    """
    if not solvable(game):
        raise UserError(
            f"{game.spiel.get_type().short_name} is no small two-player zero-sum game: no CFR+ policy"
        )
    return _cfr_plus(str(game.spiel))


def solvable(game: HasSpiel) -> bool:
    """Whether `equilibrium` can solve `game`."""
    return _solvable(str(game.spiel))


def unfit(game: Any) -> str | None:
    """Why a pyspiel.Game cannot be solved exactly, or None. Its size shows only in the walk."""
    kind = game.get_type()
    if game.num_players() != 2:
        return f"has {game.num_players()} players, not two"
    if kind.dynamics != pyspiel.GameType.Dynamics.SEQUENTIAL:
        return "has simultaneous moves"
    if kind.utility != pyspiel.GameType.Utility.ZERO_SUM:
        return "is not zero-sum"
    if kind.chance_mode == pyspiel.GameType.ChanceMode.SAMPLED_STOCHASTIC:
        return "does not list its chance outcomes"
    if not kind.provides_information_state_string:
        return "has no information sets"
    return None


@lru_cache(maxsize=8)
def _cfr_plus(game: str) -> dict[str, dict[int, float]]:
    spiel = pyspiel.load_game(game)
    solver = pyspiel.CFRPlusSolver(spiel)
    for iteration in range(1, CFR_ITERATIONS + 1):
        solver.evaluate_and_update_policy()
        if iteration % 100 == 0 and pyspiel.exploitability(spiel, solver.average_policy()) <= CFR_TARGET:
            break
    table = solver.tabular_average_policy().policy_table()
    return {key: dict(row) for key, row in table.items()}


@lru_cache(maxsize=32)
def _solvable(game: str) -> bool:
    spiel = pyspiel.load_game(game)
    if unfit(spiel) is not None:
        return False
    stack, histories = [spiel.new_initial_state()], 0
    while stack and histories <= _CFR_HISTORIES:
        state = stack.pop()
        histories += 1
        if not state.is_terminal():
            stack += [state.child(action) for action in state.legal_actions()]
    return not stack


def _search_open(spiel: Any, state: Any, simulations: int, seed: int) -> int:
    tree, rollouts = (derive(seed, part) % 2**31 for part in ("tree", "rollouts"))
    evaluator = pyspiel.RandomRolloutEvaluator(1, rollouts)
    bot = pyspiel.MCTSBot(spiel, evaluator, _uct(spiel), simulations, 256, True, tree, False)
    return int(bot.step(state))


def _search_hidden(spiel: Any, state: Any, simulations: int, seed: int) -> int:
    # OpenSpiel's Python ISMCTS: its C++ one breaks ties in the order of a hash table, which differs from one
    # search to the next.
    tree, rollouts = (RandomState(derive(seed, part) % 2**32) for part in ("tree", "rollouts"))
    bot = ismcts.ISMCTSBot(
        spiel,
        mcts.RandomRolloutEvaluator(1, rollouts),
        _uct(spiel),
        simulations,
        random_state=tree,
        final_policy_type=ismcts.ISMCTSFinalPolicyType.MAX_VISIT_COUNT,
    )
    deals = Random(derive(seed, "deals"))
    bot.set_resampler(lambda at, seat: redeal(at, seat, deals))
    return int(bot.step(state))


def redeal(state: Any, seat: int, rng: Random) -> Any:
    """A state that `seat` cannot tell from `state`: chance is drawn anew, the players' moves stay.

    The law is that of chance given all that `seat` has seen of it and that the moves were possible; what the
    other seat's moves say about its hand is left out, as in ISMCTS.
    """
    history = state.full_history()
    told = state.information_state_string(seat)
    while True:
        drawn = state.get_game().new_initial_state()
        for step in history:
            action = step.action
            if drawn.is_chance_node():
                outcomes, weights = zip(*drawn.chance_outcomes(), strict=True)
                action = rng.choices(outcomes, weights)[0]
            elif action not in drawn.legal_actions():
                break
            drawn.apply_action(action)
        else:
            if drawn.information_state_string(seat) == told:
                return drawn


def _uct(spiel: Any) -> float:
    """The exploration constant, on the scale of the game's utilities."""
    return 2.0 * float(spiel.max_utility())


def hidden(game: HasSpiel) -> bool:
    """Whether a seat may not see all of the position."""
    return bool(game.spiel.get_type().information != pyspiel.GameType.Information.PERFECT_INFORMATION)


def _negamax(state: Any, seat: int, plies: int, seen: dict[str, float]) -> float:
    """Value for `seat`, whose turn it is or would be, in the game's utilities; a draw behind the horizon."""
    if state.is_terminal():
        return float(state.returns()[seat])
    if plies == 0:
        return 0.0
    key = f"{state}\n{seat} {plies}"
    if key not in seen:
        moves = state.legal_actions()
        seen[key] = _QUICK * max(-_negamax(state.child(move), 1 - seat, plies - 1, seen) for move in moves)
    return seen[key]


def _rules(game: Game) -> HasSpiel | None:
    """The OpenSpiel rules behind `game`, those of a single round for a repeated match; None without any."""
    if isinstance(game, RepeatedGame):
        return game.base
    return game if isinstance(game, HasSpiel) else None


def _position(ask: Ask, player: Choosy, name: str) -> tuple[HasSpiel, Any]:
    """The rules and the state that `ask` is about. Raises UserError if `player` cannot play them."""
    match = ask.match.current if isinstance(ask.match, RepeatedMatch) else ask.match
    if not isinstance(match, SpielMatch) or not player.plays(match.game):
        raise UserError(f"player {name!r} cannot play {ask.game!r}; choose another: {', '.join(names())}")
    return match.game, match.spiel_state


_GOODS = re.compile(r"(\d+) (\w+) worth (\d+)")
_PENDING = re.compile(r"Pending: they give .*Worth to you: ([+-]\d+)\.( You cannot pay it\.)?")
_MAKERS: dict[str, Callable[[], Player]] = {
    "random": RandomPlayer,
    "minimax": MinimaxPlayer,
    "cfr": CfrPlayer,
    "fair_trader": FairTrader,
}
