"""The past selves of a run, kept on disk as model directories and brought into the engine when they play.

    runs/NAME/league/past_00000120/   config.json  model.safetensors  tokenizer.json  MANIFEST.json

A snapshot that was thinned out stays on disk as long as a checkpoint names it, so that a resume finds all
that it has to play against once more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from ludus.config import PAST, RunConfig
from ludus.errors import UserError
from ludus.experts import Choosy
from ludus.games.base import Game
from ludus.league.matchmaker import SELF
from ludus.league.payoffs import Payoffs
from ludus.league.population import Population, past_id
from ludus.learner.model import load_model
from ludus.players import LanguagePlayer, Player
from ludus.rollout.scheduler import play_all
from ludus.seeding import derive
from ludus.train import checkpoint
from ludus.train.assemble import illegal_rule
from ludus.types import Episode, MatchPlan


def folder(run: Path, step: int) -> Path:
    """Where the snapshot of `step` lies."""
    return run / "league" / f"past_{step:08d}"


def open_past(config: RunConfig, me: LanguagePlayer, run: Path, policy: str) -> LanguagePlayer:
    """The past self `policy` ("past/120") of the run in `run`, on the engine of `me`.

    Raises UserError where it is not there, or not as it was written.
    """
    step = int(policy.removeprefix(PAST))
    where = folder(run, step)
    if not where.is_dir():
        there = sorted(int(path.name.removeprefix("past_")) for path in where.parent.glob("past_*"))
        raise UserError(
            f"{run} has no snapshot of step {step}; it has " + (", ".join(map(past_id, there)) or "none")
        )
    if problem := checkpoint.verify(where, step):
        raise UserError(f"snapshot {where} is damaged: {problem}; restore it from a copy, or start anew")
    return _enter(config, me, where, step)


def _enter(config: RunConfig, me: LanguagePlayer, where: Path, step: int) -> LanguagePlayer:
    policy = past_id(step)
    me.engine.load(policy, load_model(where, config.model.dtype).state_dict(), version=step)
    return replace(me, policy=policy, trainable=False)


class PastSelves:
    """A run's population, its payoff matrix, and the weights of those that play in the present step."""

    def __init__(
        self,
        config: RunConfig,
        me: LanguagePlayer,
        games: Mapping[str, Game],
        opponents: Mapping[str, Player],
    ) -> None:
        """`opponents` are all others, by policy id."""
        self.config, self.me, self.games = config, me, games
        league = config.league
        self.population = Population(league.snapshot_every, league.keep)
        self.payoffs = Payoffs(
            {label: abs(game.min_return) or 1.0 for label, game in games.items()}, league.payoff_decay
        )
        self.players: dict[str, LanguagePlayer] = {}  # those in the engine
        local = {o.policy for o in league.opponents if o.endpoint is None}
        self._others = {name: player for name, player in opponents.items() if name in local}
        self._rules = {
            o.policy: o.games or tuple(games) for o in league.opponents if o.policy.startswith(PAST)
        }

    def bring(self, run: Path, policies: Iterable[str]) -> None:
        """Hold the weights of exactly these past selves. None of them may be in the middle of a reply."""
        wanted = dict.fromkeys(policies)
        for policy in [p for p in self.players if p not in wanted]:
            self.me.engine.unload(policy)
            del self.players[policy]
        for policy in wanted:
            if policy not in self.players:
                step = int(policy.removeprefix(PAST))
                self.players[policy] = _enter(self.config, self.me, folder(run, step), step)

    def stand_ins(self, run: Path, step: int) -> dict[str, Sequence[str]]:
        """For each league opponent that is a rule: the past selves that stand in for it in this step.

        They are drawn for the step, `league.resident` of them, and brought into the engine.
        """
        chosen: dict[str, Sequence[str]] = {}
        for rule, games in self._rules.items():
            rng = Random(derive(self.config.seed, "past", step, rule))

            def score(policy: str, games: tuple[str, ...] = games) -> float:
                return self.payoffs.score(policy, games)

            chosen[rule] = self.population.draw(rule, score, self.config.league.resident, rng)
        self.bring(run, sorted({policy for drawn in chosen.values() for policy in drawn}))
        return chosen

    def count(self, episodes: Sequence[Episode]) -> dict[str, Any]:
        """Count a step's matches; returns what the step's record says of the league.

        "met": matches per opponent. "scores": how the trained policy fares against each living past self and
        each other opponent that it has met, game by game, see `Payoffs.score`.
        """
        self.payoffs.fade()
        self.payoffs.count(episodes)
        met: dict[str, int] = {}
        for episode in episodes:
            for name in dict.fromkeys(seat for seat in episode.seats if seat != SELF):
                met[name] = met.get(name, 0) + 1
        names = [*self.population.ids, *self._others]
        return {
            "population": self.population.ids,
            "met": dict(sorted(met.items())),
            "scores": {
                game: {
                    name: self.payoffs.score(name, [game])
                    for name in names
                    if self.payoffs.margin(game, SELF, name) is not None
                }
                for game in self.games
            },
        }

    async def take(self, run: Path, step: int, write: Callable[[Path], None]) -> dict[str, Any]:
        """Take the snapshot of `step` (`write(directory)` puts the model's files in) and play its matches.

        Returns the payoff matrix for the step's record: names, and per game the mean margin of each of them
        against each.
        """
        checkpoint.write_sealed(folder(run, step), step, write)
        earlier = self.population.ids
        self.population.add(step)
        await self._fill(run, past_id(step), [p for p in earlier if p in self.population.ids])
        names = [*self.population.ids, *self._others]
        return {"names": names, "margins": self.payoffs.matrix(names)}

    async def _fill(self, run: Path, newest: str, earlier: Sequence[str]) -> None:
        """Play the new snapshot, which is the trained policy as it is now, against everyone else."""
        matches = self.config.league.payoff_matches
        if not matches:
            return
        several = self.config.league.resident
        for i in range(0, len(earlier), several):
            await self._meet(run, newest, earlier[i : i + several], matches)
        if self._others:
            await self._meet(run, newest, list(self._others), matches)

    async def _meet(self, run: Path, newest: str, opponents: Sequence[str], matches: int) -> None:
        self.bring(run, [p for p in opponents if p.startswith(PAST)])
        everyone: dict[str, Player] = {
            SELF: replace(self.me, trainable=False),
            **self.players,
            **self._others,
        }
        plans: list[MatchPlan] = []
        for game in self.games:
            for opponent in opponents:
                player = everyone[opponent]
                if not isinstance(player, Choosy) or player.plays(self.games[game]):
                    plans += self._pairs(game, newest, opponent, matches, len(plans))
        episodes = await play_all(
            plans,
            self.games,
            everyone,
            rule=illegal_rule(self.config),
            in_flight=self.config.rollout.in_flight,
        )
        self.payoffs.count(episodes, SELF, as_row=(SELF, newest))

    def _pairs(self, game: str, newest: str, opponent: str, matches: int, first: int) -> list[MatchPlan]:
        """Every deal once per seat of the newest. The deals are the same for all pairs."""
        seats = len(self.games[game].roles)
        seed = self.config.seed
        return [
            MatchPlan(
                episode=first + deal * seats + mine,
                group=first + deal,
                game=game,
                seats=tuple(SELF if seat == mine else opponent for seat in range(seats)),
                match_seed=derive(seed, "payoff", game, deal),
                reply_seed=derive(seed, "payoff", game, newest, opponent, deal, mine),
            )
            for deal in range(-(-matches // seats))
            for mine in range(seats)
        ]

    def state(self) -> dict[str, Any]:
        """Plain JSON, for the checkpoint."""
        return {"snapshots": self.population.steps, "payoffs": self.payoffs.state()}

    def load_state(self, run: Path, state: Mapping[str, Any]) -> None:
        """Take up what `state` returned. Raises UserError where a snapshot is missing or damaged."""
        self.population.steps = list(state["snapshots"])
        self.payoffs.load_state(state["payoffs"])
        for step in self.population.steps:
            where = folder(run, step)
            if problem := checkpoint.verify(where, step):
                raise UserError(
                    f"snapshot {where}, which the newest whole checkpoint needs, is damaged: {problem}; "
                    "restore it from a copy, or start anew with another --out"
                )

    def prune(self, run: Path) -> None:
        """Remove the snapshots that neither the population nor any checkpoint on disk names."""
        needed = set(self.population.steps)
        for _, path in checkpoint.steps(run):
            needed |= set(_named(path / "trainer" / "state.json"))
        for path in sorted((run / "league").glob("past_*")):
            if int(path.name.removeprefix("past_")) not in needed:
                checkpoint.remove(path)


def _named(state: Path) -> list[int]:
    """The snapshots that a checkpoint's state names; none where it cannot be read, for it is no use then."""
    try:
        return list(json.loads(state.read_text())["league"]["snapshots"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
