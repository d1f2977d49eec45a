"""The past selves of a run, kept on disk as model directories and brought into the engine when they play.

    runs/NAME/league/past_00000120/   config.json  model.safetensors  tokenizer.json  MANIFEST.json

A snapshot that was thinned out stays on disk as long as a checkpoint names it, so that a resume finds all
that it has to play against once more. A checkpoint of which a snapshot is missing or damaged is no good;
the one before it takes what came later anew, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from safetensors.torch import load_file

from ludus.config import PAST, RunConfig
from ludus.engines.base import PolicyWeights
from ludus.errors import UserError
from ludus.games.base import Game
from ludus.league.matchmaker import SELF
from ludus.league.payoffs import Payoffs
from ludus.league.population import Population, past_id
from ludus.league.seating import taken_seats
from ludus.learner.adapters import read
from ludus.model_files import is_adapter
from ludus.players import LanguagePlayer, Player
from ludus.rollout.play import HouseRules
from ludus.rollout.scheduler import Play, play_all
from ludus.seeding import derive
from ludus.train import checkpoint
from ludus.train.assemble import BASE
from ludus.types import Episode, MatchPlan


def folder(run: Path, step: int) -> Path:
    """Where the snapshot of `step` lies."""
    return run / "league" / f"past_{step:08d}"


def snapshots(run: Path) -> list[tuple[int, Path]]:
    """(step, directory) of a run's snapshots on disk, in order of steps, whole or not."""
    found = []
    for path in (run / "league").glob("past_*"):
        digits = path.name.removeprefix("past_")
        if digits.isdigit() and path.is_dir():
            found.append((int(digits), path))
    return sorted(found)


def _step(policy: str) -> int:
    return int(policy.removeprefix(PAST))


def open_past(me: LanguagePlayer, run: Path, policy: str) -> LanguagePlayer:
    """The past self `policy` ("past/120") of the run in `run`, on the engine of `me`.

    Raises UserError where it is not there, or not as it was written.
    """
    for name, weights in past_weights(me, run, policy).items():
        me.engine.load(name, weights, version=_step(policy))
    return me.named(policy)


def past_weights(me: LanguagePlayer, run: Path, policy: str) -> dict[str, PolicyWeights]:
    """The weights of a past self of the run in `run`, by the ids of its policies in an engine.

    Raises UserError where it is not there, or not as it was written.
    """
    step = _step(policy)
    where = folder(run, step)
    if not where.is_dir():
        there = ", ".join(past_id(number) for number, _ in snapshots(run))
        raise UserError(f"{run} has no snapshot of step {step}; it has {there or 'none'}")
    if problem := checkpoint.verify(where, step):
        raise UserError(
            f"snapshot {where} is damaged: {problem}; restore it from a copy, or go on with the run by "
            "--resume, which makes it anew where an earlier checkpoint allows that"
        )
    found: dict[str, PolicyWeights] = {}
    for own, its in zip(me.policies, me.named(policy).policies, strict=True):
        directory = where / own if me.parts else where
        if is_adapter(directory):
            found[its] = read(directory, BASE)
            continue
        # As they were written: in float32, whatever the recipe's model.dtype, for so the policy itself plays.
        found[its] = {
            name: tensor
            for file in directory.glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
    return found


class PastSelves:
    """A run's population, its payoff matrix, and the weights of those that play at present."""

    def __init__(
        self,
        config: RunConfig,
        me: LanguagePlayer,
        games: Mapping[str, Game],
        opponents: Mapping[str, Player],
        rule: HouseRules,
        play: Play = play_all,
    ) -> None:
        """`opponents` are all others, by policy id; `play` plays the matches of the payoff matrix."""
        self.config, self.me, self.games, self.rule = config, me, games, rule
        self._play = play
        league = config.league
        self.population = Population(league.snapshot_every, league.keep, league.newest)
        self.payoffs = Payoffs(
            {label: abs(game.min_return) or 1.0 for label, game in games.items()}, league.payoff_decay
        )
        self.players: dict[str, Player] = {}  # those in the engine
        # Who stands in for each rule in the steps whose matches have begun and are not counted yet.
        self.playing: dict[int, dict[str, list[str]]] = {}
        self.tables_here = True  # whether the engine of `me` plays them
        plays = {o.policy: o.games or tuple(games) for o in league.opponents}
        self._rules = {name: labels for name, labels in plays.items() if name.startswith(PAST)}
        self._plays = {name: labels for name, labels in plays.items() if name not in self._rules}
        self._taken = taken_seats(league.opponents, games)
        local = {o.policy for o in league.opponents if o.endpoint is None}
        self._others = {name: player for name, player in opponents.items() if name in local}

    def bring(self, run: Path, policies: Iterable[str]) -> None:
        """Hold the weights of exactly these past selves, and of those at a table of this process."""
        wanted = dict.fromkeys([*policies, *(self.at_table if self.tables_here else [])])
        for policy in [p for p in self.players if p not in wanted]:
            self.me.named(policy).unload()
            del self.players[policy]
        for policy in wanted:
            if policy not in self.players:
                self.players[policy] = open_past(self.me, run, policy)

    @property
    def at_table(self) -> list[str]:
        """Those whose matches have begun and are not counted yet."""
        return sorted(
            {policy for rules in self.playing.values() for drawn in rules.values() for policy in drawn}
        )

    def stand_ins(self, step: int) -> Mapping[str, Sequence[str]]:
        """For each league opponent that is a rule: the past selves that stand in for it in this step.

        They are drawn for the step, `league.resident` of them, when its matches begin, and are `at_table`
        until these are counted. A step that had begun before a resume has the same once more.
        """
        if step not in self.playing:
            self.playing[step] = self._draw(step)
        return self.playing[step]

    def _draw(self, step: int) -> dict[str, list[str]]:
        chosen: dict[str, list[str]] = {}
        for rule, games in self._rules.items():
            rng = Random(derive(self.config.seed, "past", step, rule))

            def score(policy: str, games: tuple[str, ...] = games) -> float:
                return self.payoffs.score(policy, games)

            chosen[rule] = list(self.population.draw(rule, score, self.config.league.resident, rng))
        return chosen

    def count(self, step: int, episodes: Sequence[Episode]) -> dict[str, Any]:
        """Count the matches of `step`; returns what the step's record says of the league.

        "population": the past selves that are kept. "met": matches per opponent. "scores": how the trained
        policy fares against each of them and each other opponent that it has met, game by game, see
        `Payoffs.score`.
        """
        del self.playing[step]
        self.payoffs.fade()
        names = [*self.population.ids, *self._plays]
        # Others were thinned out since these matches began: there is no score to keep of them.
        self.payoffs.count([e for e in episodes if set(e.seats) <= {SELF, *names}])
        met: dict[str, int] = {}
        for episode in episodes:
            for name in dict.fromkeys(seat for seat in episode.seats if seat != SELF):
                met[name] = met.get(name, 0) + 1
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

    async def take(self, run: Path, step: int) -> dict[str, Any]:
        """Take in the snapshot of `step`, which lies in its folder, and play its matches.

        Returns what the step's record then says of the league: "population", and "matrix", names and per game
        the mean margin of each of them against each.
        """
        earlier = self.population.ids
        self.population.add(step)
        stay = [policy for policy in earlier if policy in self.population.ids]
        self.payoffs.forget([policy for policy in earlier if policy not in stay])
        await self._fill(run, past_id(step), stay)
        names = [*self.population.ids, *self._others]
        matrix = {"names": names, "margins": self.payoffs.matrix(names)}
        return {"population": self.population.ids, "matrix": matrix}

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
                if game in self._plays.get(opponent, (game,)):
                    plans += self._pairs(game, newest, opponent, matches, len(plans))
        episodes = await self._play(
            plans,
            self.games,
            everyone,
            rule=self.rule,
            in_flight=self.config.rollout.in_flight,
        )
        self.payoffs.count([e for e in episodes if self._meets_so(e)])
        self.payoffs.count(episodes, as_row=(newest,))

    def _pairs(self, game: str, newest: str, opponent: str, matches: int, first: int) -> list[MatchPlan]:
        """Every deal once per seating: the newest in each seat, or those that the opponent leaves to it.

        The deals are the same for all pairs.
        """
        seats = range(len(self.games[game].roles))
        taken = None if opponent.startswith(PAST) else self._taken.get(opponent, {}).get(game)
        theirs = [{*seats} - {mine} for mine in seats] if taken is None else [{*taken}]
        seed = self.config.seed
        return [
            MatchPlan(
                episode=first + deal * len(theirs) + seating,
                group=first + deal,
                game=game,
                seats=tuple(opponent if seat in held else SELF for seat in seats),
                match_seed=derive(seed, "payoff", game, deal),
                reply_seed=derive(seed, "payoff", game, newest, opponent, deal, seating),
            )
            for deal in range(-(-matches // len(theirs)))
            for seating, held in enumerate(theirs)
        ]

    def _meets_so(self, episode: Episode) -> bool:
        """Whether training could seat the two so. Snapshots play each other in every seating, but how the
        policy fares against one of them is told by the seats that it really has."""
        held = tuple(i for i, name in enumerate(episode.seats) if name != SELF)
        opponent = episode.seats[held[0]]
        if not opponent.startswith(PAST):
            return True  # it was seated as it always is
        may_choose = [r for r in self._rules if r != past_id(0) or r == opponent]
        taken = [
            self._taken.get(r, {}).get(episode.game) for r in may_choose if episode.game in self._rules[r]
        ]
        return not taken or None in taken or held in taken

    def state(self) -> dict[str, Any]:
        """Plain JSON, for the checkpoint."""
        playing = {str(step): rules for step, rules in self.playing.items()}
        return {"snapshots": self.population.steps, "payoffs": self.payoffs.state(), "playing": playing}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` returned."""
        self.population.steps = list(state["snapshots"])
        self.payoffs.load_state(state["payoffs"])
        self.playing = {int(step): rules for step, rules in state["playing"].items()}

    def prune(self, run: Path) -> None:
        """Remove the snapshots that neither population, matches nor any checkpoint on disk names."""
        needed = {*self.population.steps, *map(_step, self.at_table)}
        for _, path in checkpoint.steps(run):
            needed |= set(_named(path))
        for step, path in snapshots(run):
            if step not in needed:
                checkpoint.remove(path)


def lacking(found: Path) -> str | None:
    """What is wrong with the snapshots that the checkpoint `found` needs, or None."""
    run = found.parent.parent
    for step in _named(found):
        where = folder(run, step)
        if problem := checkpoint.verify(where, step):
            return f"of its snapshot {where}, {problem}"
    return None


def _named(found: Path) -> list[int]:
    """The snapshots that a checkpoint names; none where it cannot be read, for it is no use then."""
    try:
        league = json.loads((found / "trainer" / "state.json").read_text())["league"]
        playing = [p for rules in league["playing"].values() for drawn in rules.values() for p in drawn]
        return [*map(int, league["snapshots"]), *map(_step, playing)]
    except (OSError, ValueError, KeyError, TypeError):
        return []
