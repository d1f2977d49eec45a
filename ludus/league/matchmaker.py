"""Which game, which seed, who sits where."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from random import Random

from ludus.errors import UserError
from ludus.seeding import derive
from ludus.types import MatchPlan

SELF = "self"  # policy id of the policy that is trained


def shares(weights: Sequence[float], total: int) -> list[int]:
    """`total` split into whole parts in proportion to `weights` (largest remainder, first one wins ties)."""
    exact = [w * total / sum(weights) for w in weights]
    parts = [int(x) for x in exact]
    order = sorted(range(len(weights)), key=lambda i: (parts[i] - exact[i], i))
    for i in order[: total - sum(parts)]:
        parts[i] += 1
    return parts


class Matchmaker:
    """Plans the matches of a step: a function of the run's seed, the step and who stands in for whom.

    Each step has the same mix of games (the recipe's weights, in whole groups). Against a fixed opponent the
    trained policy's seat alternates from one group of a game to that game's next, over the steps too, so that
    it learns every seat; unless the opponent has seats of its own.
    """

    def __init__(
        self,
        seed: int,
        seats: Mapping[str, int],
        weights: Mapping[str, float],
        *,
        matches: int,
        group_size: int,
        self_weight: float,
        opponents: Mapping[str, float],
        plays: Mapping[str, Collection[str]] | None = None,
        taken: Mapping[str, Mapping[str, Collection[int]]] | None = None,
    ) -> None:
        """`seats`: number of seats per game; `opponents`: weight per policy id beside plain self-play;
        `plays`: the games that a policy id sits in, where these are not all; `taken`: the seats,
        per game, that it always has, where it has such.

        Raises UserError where a game would get no match.
        """
        self.seed, self.seats, self.weights = seed, dict(seats), dict(weights)
        self.matches, self.group_size = matches, group_size
        self.taken = dict(taken or {})
        everyone = {SELF: self_weight, **opponents}
        only = plays or {}
        self.opponents = {
            game: {name: w for name, w in everyone.items() if game in only.get(name, (game,))}
            for game in weights
        }
        for name, groups in zip(weights, self._parts(), strict=True):
            if not groups:
                raise UserError(
                    f"game {name!r} gets none of the {matches} matches of a step; raise its weight or "
                    "rollout.matches, or leave it out"
                )

    def _parts(self) -> list[int]:
        return shares(list(self.weights.values()), self.matches // self.group_size)

    def plan(self, step: int, stand_ins: Mapping[str, Sequence[str]] | None = None) -> list[MatchPlan]:
        """The matches of `step`, groups contiguous; episode ids continue those of the step before.

        `stand_ins`: opponents that are a choice of several, such as "past/uniform", with the policy ids of
        which one (each alike) takes the seat in each group.
        """
        parts = self._parts()
        # Each group with its number among the groups of its game, counted over the whole run.
        games = [(name, step * n + i) for name, n in zip(self.weights, parts, strict=True) for i in range(n)]
        plans: list[MatchPlan] = []
        for k, (game, number) in enumerate(games):
            group = step * len(games) + k
            seats = self._seats(game, group, number % self.seats[game], stand_ins or {})
            match_seed = derive(self.seed, "match", group)
            for _ in range(self.group_size):
                episode = step * self.matches + len(plans)
                reply_seed = derive(self.seed, "reply", episode)
                plans.append(MatchPlan(episode, group, game, seats, match_seed, reply_seed))
        return plans

    def _seats(
        self, game: str, group: int, mine: int, stand_ins: Mapping[str, Sequence[str]]
    ) -> tuple[str, ...]:
        rng = Random(derive(self.seed, "opponent", group))
        opponents = self.opponents[game]
        opponent = rng.choices(list(opponents), weights=list(opponents.values()))[0]
        everybody = range(self.seats[game])
        theirs = self.taken.get(opponent, {}).get(game) or {*everybody} - {mine}
        if opponent in stand_ins:
            opponent = rng.choice(stand_ins[opponent])
        return tuple(opponent if seat in theirs else SELF for seat in everybody)
