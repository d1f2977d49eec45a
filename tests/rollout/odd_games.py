"""Games that the catalogue lacks: three seats in turn, and two or three seats that move at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from ludus.games.base import IllegalAction, Observation, Payoff


@dataclass(frozen=True)
class OutbidGame:
    """Three seats in turn bid 1, 2 or 3, all in the open. A sole highest bid takes 1 from each other seat."""

    name: str = "outbid"
    roles: tuple[str, ...] = ("first", "second", "third")
    payoff: Payoff = Payoff.ZERO_SUM
    max_turns: int = 3
    min_return: float = -1.0

    def start(self, seed: int) -> OutbidMatch:
        return OutbidMatch()


class OutbidMatch:
    def __init__(self) -> None:
        self.bids: list[str] = []

    def to_act(self) -> tuple[int, ...]:
        return (len(self.bids),) if len(self.bids) < 3 else ()

    def observe(self, seat: int) -> Observation:
        events = tuple(f"Seat {i} bids {bid}." for i, bid in enumerate(self.bids))
        legal = ("1", "2", "3") if seat in self.to_act() else ()
        state = f"You are seat {seat}. Bids: {' '.join(self.bids) or 'none'}."
        return Observation("Outbid the others.", events, state, legal, state)

    def play(self, actions: Mapping[int, str]) -> None:
        for seat, text in actions.items():
            if seat not in self.to_act():
                raise IllegalAction(seat, "not your turn")
            if text not in ("1", "2", "3"):
                raise IllegalAction(seat, f"{text!a} is no bid")
        self.bids.append(actions[len(self.bids)])

    def returns(self) -> tuple[float, ...]:
        best = max(self.bids, default="")
        if len(self.bids) < 3 or self.bids.count(best) > 1:
            return (0.0, 0.0, 0.0)
        return tuple(2.0 if bid == best else -1.0 for bid in self.bids)

    def sample(self, seat: int, rng: Random) -> str:
        return rng.choice(("1", "2", "3"))


@dataclass(frozen=True)
class PenniesGame:
    """Two seats show a side at once, `rounds` times. Seat 0 wins 1 where they match, else loses 1."""

    rounds: int = 1
    name: str = "pennies"
    roles: tuple[str, ...] = ("matcher", "mismatcher")
    payoff: Payoff = Payoff.ZERO_SUM

    @property
    def max_turns(self) -> int:
        return self.rounds

    @property
    def min_return(self) -> float:
        return -float(self.rounds)

    def start(self, seed: int) -> AtOnceMatch:
        return AtOnceMatch(2, self.rounds)


@dataclass(frozen=True)
class OddOneOutGame:
    """Three seats show a side at once. Who shows what no other shows pays 1 to each of the others."""

    name: str = "odd_one_out"
    roles: tuple[str, ...] = ("a", "b", "c")
    payoff: Payoff = Payoff.ZERO_SUM
    max_turns: int = 1
    min_return: float = -2.0

    def start(self, seed: int) -> AtOnceMatch:
        return AtOnceMatch(3, 1)


class AtOnceMatch:
    def __init__(self, seats: int, rounds: int) -> None:
        self.seats, self.rounds = seats, rounds
        self.shown: list[tuple[str, ...]] = []

    def to_act(self) -> tuple[int, ...]:
        return tuple(range(self.seats)) if len(self.shown) < self.rounds else ()

    def observe(self, seat: int) -> Observation:
        events = tuple("Shown: " + " ".join(sides) for sides in self.shown)
        state = f"You are seat {seat}. Round {len(self.shown) + 1} of {self.rounds}. " + " ".join(events)
        legal = ("heads", "tails") if self.to_act() else ()
        return Observation("Show a side.", events, state, legal, state)

    def play(self, actions: Mapping[int, str]) -> None:
        for seat in sorted(actions):
            if seat not in self.to_act():
                raise IllegalAction(seat, "not your turn")
            if actions[seat] not in ("heads", "tails"):
                raise IllegalAction(seat, f"{actions[seat]!a} is no side")
        self.shown.append(tuple(actions[seat] for seat in range(self.seats)))

    def returns(self) -> tuple[float, ...]:
        totals = [0.0] * self.seats
        for sides in self.shown:
            for seat, paid in enumerate(self._one_round(sides)):
                totals[seat] += paid
        return tuple(totals)

    def _one_round(self, sides: tuple[str, ...]) -> tuple[float, ...]:
        if self.seats == 2:
            return (1.0, -1.0) if sides[0] == sides[1] else (-1.0, 1.0)
        odd = [seat for seat, side in enumerate(sides) if sides.count(side) == 1]
        return tuple((-2.0 if seat in odd else 1.0) if odd else 0.0 for seat in range(3))

    def sample(self, seat: int, rng: Random) -> str:
        return rng.choice(("heads", "tails"))
