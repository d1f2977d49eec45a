"""The empirical payoff matrix of a league: what everyone got against everyone else, game by game.

A margin is what a policy got above the others' mean, scaled so that in a zero-sum game it is the policy's
return: (own - mean of the others) (n - 1) / n with n seats. The matrix holds the mean margin of its row's
policy against its column's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ludus.league.matchmaker import SELF
from ludus.types import Episode


@dataclass(slots=True)
class Tally:
    """`matches` that were ever counted, and the weight and the sum of margins that are left of them."""

    matches: int = 0
    weight: float = 0.0
    total: float = 0.0


class Payoffs:
    """Counts matches of two policies. The trained policy changes, so its own row fades; all others stay.

    `stakes` is the largest margin per game, that a score is a share of; `decay` the part of the trained
    policy's row that is left after each step.
    """

    def __init__(self, stakes: Mapping[str, float], decay: float) -> None:
        self.stakes, self.decay = dict(stakes), decay
        self._tallies: dict[str, dict[str, dict[str, Tally]]] = {}  # game -> row -> column

    def fade(self) -> None:
        """Let a step pass."""
        for rows in self._tallies.values():
            for tally in rows.get(SELF, {}).values():
                tally.weight *= self.decay
                tally.total *= self.decay

    def count(self, episodes: Iterable[Episode], as_row: Sequence[str] = (SELF,)) -> None:
        """Count every match of the trained policy against one other; not the masked ones, nor self-play.

        The margins go into the rows `as_row`: a new snapshot and the trained policy are one and the same.
        """
        for episode in episodes:
            others = set(episode.seats) - {SELF}
            if episode.masked is not None or SELF not in episode.seats or len(others) != 1:
                continue
            (column,) = others
            margin = _margin(episode)
            for name in as_row:
                row_of = self._tallies.setdefault(episode.game, {}).setdefault(name, {})
                tally = row_of.setdefault(column, Tally())
                tally.matches += 1
                tally.weight += 1.0
                tally.total += margin

    def forget(self, policies: Collection[str]) -> None:
        """Strike out the rows and columns of `policies`."""
        for rows in self._tallies.values():
            for policy in policies:
                rows.pop(policy, None)
                for columns in rows.values():
                    columns.pop(policy, None)

    def margin(self, game: str, row: str, column: str) -> float | None:
        """The mean margin of `row` against `column`; None where they never met.

        What only `column` has on record against `row` counts with its sign turned.
        """
        for a, b, sign in ((row, column, 1.0), (column, row, -1.0)):
            tally = self._tallies.get(game, {}).get(a, {}).get(b)
            if tally is not None and tally.weight > 0:
                return sign * tally.total / tally.weight + 0.0  # and never -0.0
        return None

    def score(self, column: str, games: Iterable[str]) -> float:
        """How the trained policy fares against `column`, in the mean over `games`.

        0 loses all, 1/2 is even, 1 wins all. It is the share of the stake, (1 + margin / stake) / 2, after
        one more match of margin 0: so it is 1/2 for one whom it never met.
        """
        shares = []
        for game in games:
            tally = self._tallies.get(game, {}).get(SELF, {}).get(column, Tally())
            margin = tally.total / (tally.weight + 1.0)
            shares.append(min(max((1 + margin / self.stakes[game]) / 2, 0.0), 1.0))
        return sum(shares) / len(shares)

    def matrix(self, names: Sequence[str]) -> dict[str, list[list[float | None]]]:
        """Per game: the mean margin of each of `names` against each (rows against columns); None on the
        diagonal and where two never met."""
        return {
            game: [[None if a == b else self.margin(game, a, b) for b in names] for a in names]
            for game in self.stakes
        }

    def state(self) -> dict[str, Any]:
        """Everything counted, as plain JSON, from which `load_state` restores it exactly."""
        return {
            game: {
                row: {column: [t.matches, t.weight, t.total] for column, t in columns.items()}
                for row, columns in rows.items()
            }
            for game, rows in self._tallies.items()
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` returned."""
        self._tallies = {
            game: {
                row: {column: Tally(*numbers) for column, numbers in columns.items()}
                for row, columns in rows.items()
            }
            for game, rows in state.items()
        }


def _margin(episode: Episode) -> float:
    """Mean over the seats that the trained policy holds."""
    seats = len(episode.seats)
    total = sum(episode.returns)
    held = [i for i, name in enumerate(episode.seats) if name == SELF]
    mine = [episode.returns[i] for i in held]
    gaps = [own - (total - own) / (seats - 1) for own in mine]
    return sum(gaps) / len(gaps) * (seats - 1) / seats
