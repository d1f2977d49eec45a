"""The two protocols behind every game, and the errors a match may raise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
