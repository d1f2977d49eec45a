"""A match of N rounds of one OpenSpiel game: seats alternate, chips add up, the chip leader wins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from ludus.games.base import IllegalAction, Observation, Payoff
from ludus.games.moves import Payout, signs, sole_action
from ludus.games.openspiel import SpielGame, SpielMatch, deal


@dataclass(frozen=True, slots=True, eq=False)
class RepeatedGame:
    """`rounds` rounds of `base`; seat 0 moves first in round 1, seat 1 in round 2, and so on.

    Within a round a seat reads the plain game's text, where player 0 is whoever moves first in that round.
    `payout` "chips" returns the sum over the rounds; "sign" pays +1 to the seat with more chips over all
    rounds and -1 to the other, or 0 to both. What a round hid stays hidden when it is over: events carry a
    hidden card on only if the plain game's own rules showed it.
    """

    base: SpielGame
    rounds: int
    payout: Payout = "chips"

    def __post_init__(self) -> None:
        if self.base.payout != "chips":
            raise ValueError(
                "the base game of a repeated match must pay chips: they are summed over the rounds"
            )

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def roles(self) -> tuple[str, ...]:
        return self.base.roles

    @property
    def payoff(self) -> Payoff:
        return Payoff.ZERO_SUM

    @property
    def max_turns(self) -> int:
        return self.rounds * self.base.max_turns

    @property
    def min_return(self) -> float:
        return self.rounds * float(self.base.spiel.min_utility()) if self.payout == "chips" else -1.0

    @property
    def rules(self) -> str:
        goal = "Win the most chips" if self.payout == "chips" else "Have more chips than the other"
        return f"{self.base.face.rules} {goal} over {self.rounds} rounds; player 0 of each round moves first."

    def start(self, seed: int) -> RepeatedMatch:
        """A new match; one generator, seeded with `seed`, deals all rounds."""
        return RepeatedMatch(self, Random(seed))


class RepeatedMatch:
    """One play of a RepeatedGame."""

    def __init__(self, game: RepeatedGame, rng: Random) -> None:
        self.game = game
        self._rng = rng
        self._chips = (0.0, 0.0)  # of the finished rounds, per seat
        self._past: tuple[tuple[str, ...], tuple[str, ...]] = (
            (),
            (),
        )  # events of the finished rounds, per seat
        self._round = 0
        self._now = self._deal()

    def to_act(self) -> tuple[int, ...]:
        if self._over:
            return ()
        return tuple(self._player(p) for p in self._now.to_act())

    def observe(self, seat: int) -> Observation:
        """As in the plain game, below the number of the round and the chips so far.

        `key` is None: a repeated match's information sets include all rounds and have no short name.
        """
        mine, theirs = self._chips[seat], self._chips[1 - seat]
        shown = self.game.rounds if self._over else self._round + 1
        head = f"Round {shown} of {self.game.rounds}. Chips: you {mine:+g}, they {theirs:+g}."
        if self._over:
            return Observation(self.game.rules, self._past[seat], f"{head} The match is over.", ())
        seen = self._now.observe(self._player(seat))
        return Observation(
            rules=self.game.rules,
            events=(*self._past[seat], self._title(), *seen.events),
            state=f"{head}\n{seen.state}",
            legal=seen.legal,
        )

    def play(self, actions: Mapping[int, str]) -> None:
        seat, text = sole_action(self.to_act(), actions)
        try:
            self._now.play({self._player(seat): text})
        except IllegalAction as e:
            raise IllegalAction(seat, e.reason) from e
        if not self._now.to_act():
            self._finish_round()

    def returns(self) -> tuple[float, ...]:
        return self._chips if self.game.payout == "chips" else signs(self._chips)

    def sample(self, seat: int, rng: Random) -> str:
        """Uniform over the legal actions."""
        if seat not in self.to_act():
            raise IllegalAction(seat, "not your turn")
        return self._now.sample(self._player(seat), rng)

    @property
    def current(self) -> SpielMatch:
        """The round being played, or the last one; its player 0 is whoever moved first in it."""
        return self._now

    def twin(self, seat: int, rng: Random) -> RepeatedMatch | None:
        """This match with the other seat's secrets of the current round redrawn."""
        now = self._now.twin(self._player(seat), rng)
        if now is None or self._over:
            return None
        twin = RepeatedMatch(self.game, rng)
        twin._chips, twin._past, twin._round, twin._now = self._chips, self._past, self._round, now
        return twin

    @property
    def _over(self) -> bool:
        return self._round == self.game.rounds

    def _player(self, seat: int) -> int:
        """Seat -> player of the current round, and back: with two seats the swap is its own inverse."""
        return (seat + self._round) % 2

    def _title(self) -> str:
        return f"Round {self._round + 1} of {self.game.rounds}."

    def _deal(self) -> SpielMatch:
        base = self.game.base
        return SpielMatch(base, deal(base.spiel.new_initial_state(), self._rng), self._rng)

    def _finish_round(self) -> None:
        views = [self._now.observe(self._player(seat)) for seat in (0, 1)]
        chips = self._now.returns()
        self._past = (
            (*self._past[0], self._title(), *views[0].events),
            (*self._past[1], self._title(), *views[1].events),
        )
        self._chips = (
            self._chips[0] + chips[self._player(0)],
            self._chips[1] + chips[self._player(1)],
        )
        self._round += 1
        if not self._over:
            self._now = self._deal()
