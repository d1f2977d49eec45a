"""What runs in a rollout actor: an engine, the players, and as many matches as it is sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ludus import config as configuration
from ludus.config import PAST
from ludus.engines.base import Adapter
from ludus.judges.base import Stats
from ludus.league.matchmaker import SELF
from ludus.players import Player
from ludus.rollout.scheduler import play_all
from ludus.train.assemble import house_rules, open_games, open_model, open_opponents, open_player
from ludus.train.cluster.buckets import Bucket, Layout, unpack
from ludus.train.cluster.group import Group, Meeting
from ludus.types import Episode, MatchPlan


class RolloutActor:
    """Plays matches with the weights that it was sent last.

    It keeps nothing that is not sent again to the actor that takes its place.
    """

    async def open(self, settings: Mapping[str, Any], in_flight: int) -> None:
        """Get ready, as a run's configuration says; at most `in_flight` matches are alive.

        Raises UserError.
        """
        config = configuration.validate(settings, where="cluster")
        self.games = open_games(config)
        self.rule = house_rules(config, self.games)
        self.told = {name: judge.stats() for name, judge in self.rule.judges.items()}
        self.me = open_player(config, open_model(config), trainable=True)
        self.players: dict[str, Player] = {SELF: self.me, **open_opponents(config, self.me)}
        self.gate = asyncio.Semaphore(in_flight)
        self.versions: dict[str, int] = {}  # of the weights that were sent
        self.group: Group | None = None  # in which weights are broadcast

    async def here(self) -> None:
        """A sign of life."""

    async def load(self, policy: str, version: int, adapter: Adapter | None, *buckets: Bucket) -> None:
        """From now on, replies of `policy` begin with these weights: those of `adapter`, if it is one."""
        self._take(policy, version, adapter, unpack(buckets))

    async def join(self, meeting: Meeting, rank: int) -> None:
        """Take part in a group in which weights are broadcast, and no longer in one before."""
        if self.group is not None:
            await self.part(self.group.meeting)
        self.group = await asyncio.to_thread(Group, meeting, rank)

    async def part(self, meeting: Meeting) -> None:
        """Leave that group, if this one is there."""
        if self.group is not None and self.group.meeting == meeting:
            self.group.leave()
            self.group = None

    async def receive(
        self, policy: str, version: int, adapter: Adapter | None, layouts: Sequence[Layout]
    ) -> None:
        """`load` of what is broadcast now. Raises RuntimeError, with nothing changed, where that fails."""
        if self.group is None:
            raise RuntimeError("an actor has not joined the group")
        group, tensors = self.group, dict[str, Tensor]()
        for layout in layouts:
            room = layout.room(group.device)
            await asyncio.to_thread(group.broadcast, room)
            tensors |= layout.read(room)
        self._take(policy, version, adapter, tensors)

    def _take(
        self, policy: str, version: int, adapter: Adapter | None, tensors: Mapping[str, Tensor]
    ) -> None:
        """Ray keeps no order between calls: what is older than what is here already came too late."""
        if version < self.versions.get(policy, version):
            return
        self.versions[policy] = version
        weights = tensors if adapter is None else replace(adapter, tensors=tensors)
        self.me.engine.load(policy, weights, version)

    async def unload(self, policy: str) -> None:
        """Forget the weights of `policy`, which nobody plays any more."""
        self.versions.pop(policy, None)
        self.me.engine.unload(policy)

    async def play(self, plans: Sequence[MatchPlan]) -> AsyncIterator[tuple[list[Episode], dict[str, Stats]]]:
        """Play all plans; whole groups come back as they end, several at once where they end together.

        Beside them: what each judge of this actor has done since anything came back last.
        """
        past = {name for plan in plans for name in plan.seats if name.startswith(PAST)}
        players = self.players | {name: self.me.named(name) for name in past}
        groups: dict[int, list[MatchPlan]] = {}
        for plan in plans:
            groups.setdefault(plan.group, []).append(plan)
        ended: asyncio.Queue[asyncio.Task[list[Episode]]] = asyncio.Queue()
        tasks = [
            asyncio.create_task(play_all(group, self.games, players, rule=self.rule, in_flight=self.gate))
            for group in groups.values()
        ]
        try:
            for task in tasks:
                task.add_done_callback(ended.put_nowait)
            left = len(tasks)
            while left:
                done = [await ended.get()]
                while not ended.empty():
                    done.append(ended.get_nowait())
                left -= len(done)
                yield [episode for task in done for episode in task.result()], self._judged()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _judged(self) -> dict[str, Stats]:
        before, self.told = self.told, {name: judge.stats() for name, judge in self.rule.judges.items()}
        return {name: now - before[name] for name, now in self.told.items()}
