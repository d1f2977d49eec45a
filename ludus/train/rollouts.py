"""The matches of the coming steps: begun in order, played while the learner works, taken in the same order.

    begin(step, plans) -> a crew plays them -> take(step, version) -> the step's groups, none of them too old

Everything is taken in the order of its step and not as it ends: so a step's mix of games is the recipe's, and
no match counts because it was short. How far the matches run ahead of the learner is the caller's choice: who
begins step s when the weights of step s - k are there has no group that lags more than k versions behind
(the bound of AReaL, arXiv 2505.24298). A group that does nevertheless, because an engine took new weights
late, is dropped, counted and played again from the same seeds.
"""

from __future__ import annotations

import asyncio
import time
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from ludus.engines.base import Engine, PolicyWeights
from ludus.errors import UserError
from ludus.games.base import Game
from ludus.judges.base import Stats
from ludus.players import Player
from ludus.rollout.play import HouseRules
from ludus.rollout.scheduler import Play, grouped, play_all
from ludus.train.past import PastSelves
from ludus.types import Episode, Group, MatchPlan


class Crew(Protocol):
    """Who plays the matches, and where."""

    async def play(self, plans: Sequence[MatchPlan]) -> list[Episode]:
        """Play all plans; episodes in the order of the plans."""
        ...

    def load(self, policy: str, weights: PolicyWeights, version: int) -> None:
        """From now on, replies of `policy` begin with these weights."""
        ...

    def bring(self, run: Path) -> None:
        """Have at hand the weights of all past selves whose matches have begun."""
        ...

    def judged(self) -> dict[str, Stats]:
        """What each judge of the run has done so far."""
        ...

    def report(self) -> dict[str, Any]:
        """What a step's record says of the crew, if anything."""
        ...

    def close(self) -> None:
        """Let go of machines. Called once, outside of any event loop."""
        ...


class LocalCrew:
    """Plays in this process, with the players and the engine that it is given."""

    def __init__(
        self,
        engine: Engine,
        games: Mapping[str, Game],
        players: Mapping[str, Player],
        past: PastSelves | None,
        rule: HouseRules,
        in_flight: int,
        play: Play = play_all,
    ) -> None:
        """`past` brings its players to the table by itself; at most `in_flight` of all matches are alive."""
        self.engine, self.games, self.past, self.rule = engine, games, past, rule
        self.players = ChainMap(dict(players), past.players if past else {})
        self._gate, self._play = asyncio.Semaphore(in_flight), play

    async def play(self, plans: Sequence[MatchPlan]) -> list[Episode]:
        return await self._play(plans, self.games, self.players, rule=self.rule, in_flight=self._gate)

    def load(self, policy: str, weights: PolicyWeights, version: int) -> None:
        self.engine.load(policy, weights, version)

    def bring(self, run: Path) -> None:
        if self.past is not None:
            self.past.bring(run, [])

    def judged(self) -> dict[str, Stats]:
        return {name: judge.stats() for name, judge in self.rule.judges.items()}

    def report(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        """The engine is its owner's to close."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What was played for a step."""

    groups: list[Group]
    stale: int  # groups that were dropped as too old, and played again
    lag: dict[str, float]  # versions between sampler and learner: "mean" over the trained turns, and "max"

    @property
    def episodes(self) -> list[Episode]:
        return [episode for group in self.groups for episode in group.episodes]


class Rollouts:
    """The steps whose matches have begun. All that `crew` plays goes through here."""

    def __init__(self, crew: Crew, max_lag: int) -> None:
        self.crew, self.max_lag = crew, max_lag
        self._steps: dict[int, tuple[Sequence[MatchPlan], asyncio.Task[list[Episode]]]] = {}
        self._alive = 0
        self._busy = 0.0
        self._since = 0.0  # when the crew began to work, where it works

    def __contains__(self, step: int) -> bool:
        return step in self._steps

    def begin(self, step: int, plans: Sequence[MatchPlan]) -> None:
        """Have the matches of `step` played from now on; groups lie together in `plans`."""
        self._steps[step] = plans, asyncio.create_task(self._play(plans))

    async def take(self, step: int, version: int) -> Taken:
        """The matches of `step`, once all are played; `version` is the learner's.

        Raises UserError where a group is too old and comes back too old once more.
        """
        plans, task = self._steps.pop(step)
        groups = grouped(plans, await task)
        late = self._late(groups, version)
        if late:
            names = list(dict.fromkeys(plan.group for plan in plans))  # as `grouped` orders them
            again = {names[i] for i in late}
            wanted = [plan for plan in plans if plan.group in again]
            fresh = grouped(wanted, await self._play(wanted))
            for i, group in zip(late, fresh, strict=True):
                groups[i] = group
            if self._late(groups, version):
                raise UserError(
                    f"step {step + 1}: the learner's weights are of version {version}, and the engine's, a "
                    f"second time, more than rollout.max_lag = {self.max_lag} behind; raise rollout.max_lag, "
                    "or mend what keeps new weights from the engine"
                )
        lags = [version - t.version for g in groups for e in g.episodes for t in e.turns if t.trainable]
        lag = {"mean": fmean(lags), "max": float(max(lags))} if lags else {}
        return Taken(groups, len(late), lag)

    @property
    def busy(self) -> float:
        """Seconds so far in which any match was alive."""
        return self._busy + (time.perf_counter() - self._since if self._alive else 0.0)

    async def close(self) -> None:
        """Give up what has begun: it is played again, from its seeds, where the run is taken up again."""
        tasks = [task for _, task in self._steps.values()]
        self._steps.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _play(self, plans: Sequence[MatchPlan]) -> list[Episode]:
        if not self._alive:
            self._since = time.perf_counter()
        self._alive += 1
        try:
            return await self.crew.play(plans)
        finally:
            self._alive -= 1
            if not self._alive:
                self._busy += time.perf_counter() - self._since

    def _late(self, groups: Sequence[Group], version: int) -> list[int]:
        """Which groups have a trained turn that is more than `max_lag` versions old."""
        return [
            i
            for i, group in enumerate(groups)
            if any(version - t.version > self.max_lag for e in group.episodes for t in e.turns if t.trainable)
        ]
