"""The two protocols behind every game, and the errors a match may raise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random
from typing import Any, Protocol, runtime_checkable


class Payoff(StrEnum):
    """How the seats' returns relate."""

    ZERO_SUM = "zero_sum"  # they sum to 0 in every match
    COMMON = "common"  # all seats get the same
    GENERAL = "general"


class IllegalAction(ValueError):
    """`play` refuses an action. The match is unchanged, for every seat."""

    def __init__(self, seat: int, reason: str) -> None:
        super().__init__(f"seat {seat}: {reason}")
        self.seat = seat
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Observation:
    """All that one seat may know at one moment.

    `rules` never changes within a game; `events` are what the seat has seen so far, in order (append-only);
    `state` is the position now, complete by itself (the `board` context shows rules and state alone);
    `legal` are the canonical action texts, or None where actions are free text or too many to list;
    `key` names the information set where one exists (for OpenSpiel games: `information_state_string`).
    """

    rules: str
    events: tuple[str, ...]
    state: str
    legal: tuple[str, ...] | None
    key: str | None = None


class Match(Protocol):
    """One play of a game, never reused. Chance lives inside, on the match's own generator."""

    def to_act(self) -> tuple[int, ...]:
        """Seats that must act now: () when over, several for a simultaneous move."""
        ...

    def observe(self, seat: int) -> Observation:
        """What `seat` may see. Pure: calling it changes nothing."""
        ...

    def play(self, actions: Mapping[int, str]) -> None:
        """Apply one action text per seat of `to_act()`.

        Raises IllegalAction and leaves the match unchanged if any of them is not legal.
        """
        ...

    def returns(self) -> tuple[float, ...]:
        """Return per seat so far; final once `to_act()` is ()."""
        ...

    def sample(self, seat: int, rng: Random) -> str:
        """A random legal action of `seat`: uniform over `legal` where listed, else as the game documents."""
        ...


@dataclass(frozen=True, slots=True)
class Account:
    """What a match says of its pay, beside its returns.

    `moves[k]` holds, per seat that acted in the k-th joint move, the named rewards paid to that action,
    besides the returns. `parts[i]` holds the named terms that the return of seat i is the sum of. `tags` say
    what kind of match it is (figures are broken down by their values) and `counts` what happened how often.
    """

    moves: Sequence[Mapping[int, Mapping[str, float]]] = ()
    parts: Sequence[Mapping[str, float]] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)


@runtime_checkable
class Paying(Protocol):
    """A match that pays named rewards to single actions, or names the parts of its returns. Optional."""

    def account(self, forfeit: Sequence[float] | None = None) -> Account:
        """What is paid so far; final once `to_act()` is (), or with the returns of the `forfeit` that ended
        the match. Pure.
        """
        ...

    def fine(self, seat: int) -> Mapping[str, float]:
        """The named rewards of a reply of `seat` that is refused, besides what a forfeit costs."""
        ...


@dataclass(frozen=True, slots=True)
class Ruling:
    """What a judge says of a request, and of the answer to it where there is one."""

    request_harmful: bool
    answer_harmful: bool = False
    refusal: bool = False  # the answer is a refusal


@runtime_checkable
class Judged(Protocol):
    """A match in which somebody outside has to be asked what was said. Optional."""

    def pending(self, forfeited: bool = False) -> tuple[str, str | None] | None:
        """A request and the answer to it, if any, that need a ruling before the match goes on; or None.

        As long as there is such a pair nobody is to act. `forfeited`: the match was broken off by a forfeit,
        and what stands unanswered needs a ruling for the account.
        """
        ...

    def settle(self, ruling: Ruling) -> None:
        """Take the ruling on what is pending."""
        ...


@runtime_checkable
class JudgedGame(Protocol):
    """A game whose matches are `Judged`, if `judges` names any."""

    @property
    def judges(self) -> tuple[str, ...]: ...  # by name: who pays, then who is asked beside it, if anybody


class Game(Protocol):
    """Rules: immutable, cheap to share between matches."""

    @property
    def name(self) -> str: ...  # registry name, such as "kuhn_poker"
    @property
    def roles(self) -> tuple[str, ...]: ...  # one per seat
    @property
    def payoff(self) -> Payoff: ...
    @property
    def max_turns(self) -> int: ...  # upper bound on joint moves in one match
    @property
    def min_return(self) -> float: ...  # the worst return a seat can get; what a forfeit costs
    def start(self, seed: int) -> Match: ...


@runtime_checkable
class FromData(Protocol):
    """A game that is played with data out of files. Optional."""

    @property
    def digest(self) -> str: ...  # of what was read; "" where nothing is: a resume must find the same


def judges_of(game: Game) -> tuple[str, ...]:
    """The names of the judges that a game asks; () for one that asks nobody."""
    return game.judges if isinstance(game, JudgedGame) else ()


@runtime_checkable
class HasSpiel(Protocol):
    """A game whose rules are one OpenSpiel game: exact best responses and search exist for it."""

    @property
    def spiel(self) -> Any: ...  # pyspiel.Game

    def action_text(self, state: object, action: int) -> str:
        """The canonical text of OpenSpiel's `action` in `state` (a pyspiel.State at a decision node)."""
        ...

    def observe_state(self, state: object, seat: int) -> Observation:
        """What `seat` reads in `state`: the same text that a match would show."""
        ...
