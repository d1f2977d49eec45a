"""Many matches at once: each is a coroutine that waits for nobody but its own players."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Protocol

from ludus.games.base import Game
from ludus.players import Player
from ludus.rollout.play import FORFEIT_AT_ONCE, HouseRules, play
from ludus.types import Episode, Group, MatchPlan


class Play(Protocol):
    """What `play_all` does; several processes may share it."""

    async def __call__(
        self,
        plans: Sequence[MatchPlan],
        games: Mapping[str, Game],
        players: Mapping[str, Player],
        *,
        rule: HouseRules = ...,
        in_flight: int | asyncio.Semaphore = ...,
    ) -> list[Episode]:
        """Episodes in the order of the plans."""
        ...


async def play_all(
    plans: Sequence[MatchPlan],
    games: Mapping[str, Game],
    players: Mapping[str, Player],
    *,
    rule: HouseRules = FORFEIT_AT_ONCE,
    in_flight: int | asyncio.Semaphore = 512,
) -> list[Episode]:
    """Play all plans, at most `in_flight` alive at once; episodes come back in the order of the plans.

    A semaphore in its place is shared with other calls: who comes first is let in first. The order in which
    matches end has no influence on the result: what is returned is the recipe's mix, not the mix of those
    that were quick.
    """
    gate = asyncio.Semaphore(in_flight) if isinstance(in_flight, int) else in_flight

    async def one(plan: MatchPlan) -> Episode:
        async with gate:
            return await play(plan, games[plan.game], players, rule)

    # A TaskGroup cancels the rest when one fails, so that no match goes on behind a stopped run.
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(one(plan)) for plan in plans]
    except BaseExceptionGroup as several:
        raise several.exceptions[0] from several
    return [task.result() for task in running]


def grouped(plans: Sequence[MatchPlan], episodes: Sequence[Episode]) -> list[Group]:
    """Episodes of one group brought together, in order of the groups' first appearance."""
    groups: dict[int, list[Episode]] = {}
    for plan, episode in zip(plans, episodes, strict=True):
        groups.setdefault(plan.group, []).append(episode)
    return [Group(members) for members in groups.values()]
