"""The one training loop, from a laptop's CPU upwards.

    plan -> play -> credit -> learn -> hand over -> (measure) -> (checkpoint)

Where `rollout.max_lag` is 0, a step is a function of the state in the last checkpoint and of the recipe,
of nothing else: neither the clock nor the order in which matches end has a say. That is what makes a resume
exact. Where it is k, the matches of the next k steps are played while the learner works, in a thread of its
own; which version of the weights samples a reply is then a matter of the clock, and stands on its turn.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TextIO, TypeVar

import torch
from safetensors.torch import load_file, save_file

from ludus.algos.estimators import State, make_estimator
from ludus.config import PAST, RunConfig
from ludus.errors import UserError
from ludus.games.base import FromData
from ludus.league.matchmaker import SELF, Matchmaker
from ludus.league.seating import taken_seats
from ludus.learner.model import trust_warning
from ludus.learner.rows import rows
from ludus.players import LanguagePlayer, Player
from ludus.records import Record, is_evaluation
from ludus.train import checkpoint, metrics
from ludus.train.assemble import check_opponents, house_rules, measure_player, open_games, open_opponents
from ludus.train.cluster.connect import end_with_launcher, heed_interrupts, placed
from ludus.train.display import Display
from ludus.train.past import PastSelves, folder, lacking
from ludus.train.policies import Policies
from ludus.train.ranks import ALONE, Ranks, SharedCrew, join
from ludus.train.rollouts import Crew, LocalCrew, Rollouts
from ludus.train.rundir import Onlooker, RunDir
from ludus.train.watch import Watch
from ludus.types import Episode

P = ParamSpec("P")
R = TypeVar("R")


def train(config: RunConfig, out: Path, resume: bool = False) -> None:
    """Train as `config` says, in run directory `out`.

    Raises UserError for bad input; nothing that exists is overwritten.
    """
    if placed():
        end_with_launcher()
        heed_interrupts()
    elif config.cluster.learners:
        raise UserError(
            f"cluster.learners = {config.cluster.learners}: it is the command `ludus train` that has Ray "
            "start learners; call that, or leave it out"
        )
    with join(config, f"--out {out}" + " --resume" * resume) as ranks:
        trainer = Trainer(config, ranks)  # before the run directory: a bad recipe leaves nothing behind
        try:
            with _open(config, out, resume, ranks) as run, open(os.devnull, "w") as nowhere:
                asyncio.run(_run(trainer, run, resume, None if ranks.first else nowhere))
        finally:
            trainer.rollouts.crew.close()


def _open(config: RunConfig, out: Path, resume: bool, ranks: Ranks) -> RunDir:
    """The run directory, as the first rank's to write and the others' to read."""
    run = None
    if ranks.first:
        run = RunDir.open(out, config) if resume else RunDir.create(out, config)
    ranks.wait()
    return run or Onlooker(out, config)


async def _run(trainer: Trainer, run: RunDir, resume: bool, shown_on: TextIO | None) -> None:
    config, ranks = trainer.config, trainer.ranks
    done = trainer.restore(run) if resume else 0
    display = Display(config, run, shown_on)
    if config.model.trust_remote_code:
        run.log(f"warning: {trust_warning(Path(config.model.path))}")
    watch = Watch(config.alarms, ranks.agree(run.records()))

    def keep(record: Record) -> None:
        """Write a record down and show it, with the alarms that it sets off."""
        record = ranks.agree(record)  # what is measured twice may differ, and alarms may end the run
        told = watch.see(record)
        run.append(record)
        if is_evaluation(record):
            display.evaluation(record)
        else:
            display.step(record, watch.sounding)
        for line in told:
            display.note(line)
            run.log(line)

    try:
        for note in trainer.notes:
            display.note(note)
            run.log(note)
        for alarm in watch.sounding:
            display.note(f"alarm, as before: {alarm}")
        if stopping := watch.stopping():
            raise stopping
        if done == 0:
            await trainer.begin(run)
            keep(await trainer.measure(run, 0))
        while done < config.train.steps:
            keep(await trainer.step(run, done))
            done += 1
            last = done == config.train.steps
            if last or (config.eval.every and done % config.eval.every == 0):
                keep(await trainer.measure(run, done))
            stopping = watch.stopping()
            if last or stopping or done % config.train.checkpoint_every == 0:
                await trainer.aside(trainer.save, run, done)
            if stopping:
                raise stopping
    finally:
        display.close()
        await trainer.close()
    display.summary()


class Trainer:
    """Everything that learns or plays in a run, and one method per stage of a step."""

    def __init__(self, config: RunConfig, ranks: Ranks = ALONE) -> None:
        self.config, self.ranks = config, ranks
        c = config
        self.games = open_games(c)
        self.rule = house_rules(ranks.own_files(c), self.games)
        self.seeds = {k: g.digest for k, g in self.games.items() if isinstance(g, FromData) and g.digest}
        self.notes: list[str] = []  # what the user should know before the first step
        self.policies = Policies(c, self.games, self.notes.append, ranks)
        self.me = self.policies.player
        opponents = open_opponents(c, self.me)
        self.players: dict[str, Player] = {SELF: self.me, **opponents}
        check_opponents(c, self.games, opponents)
        rule, play = self.rule, ranks.play
        self.past = PastSelves(c, self.me, self.games, opponents, rule, play) if c.has_past else None
        self.matchmaker = Matchmaker(
            c.seed,
            {label: len(game.roles) for label, game in self.games.items()},
            {g.label: g.weight for g in c.games},
            matches=c.rollout.matches,
            group_size=c.rollout.group_size,
            self_weight=c.league.self_weight,
            opponents={o.policy: o.weight for o in c.league.opponents},
            plays={o.policy: o.games for o in c.league.opponents if o.games},
            taken=taken_seats(c.league.opponents, self.games),
        )
        self.rollouts = Rollouts(self._crew(), c.rollout.max_lag)
        self.estimator = make_estimator(c.algo.estimator, decay=c.algo.decay, discount=c.algo.discount)
        self.credit: State = {}
        self.version = 0
        self.wall = 0.0  # seconds of training in this run, over all its resumes
        # Where the learner works while the event loop, and the engine with it, goes on.
        self._thread = ThreadPoolExecutor(
            1, "learner", _settle, (torch.get_num_threads(), self.policies.device)
        )

    def _crew(self) -> Crew:
        c, engine, past, rule, ranks = self.config, self.me.engine, self.past, self.rule, self.ranks
        if c.cluster.kind == "local":
            return LocalCrew(engine, self.games, self.players, past, rule, c.rollout.in_flight, ranks.play)
        if past is not None:
            past.tables_here = False
        crew = None
        if ranks.first:
            from ludus.train.cluster.crew import RayCrew

            crew = RayCrew(c, engine, past, rule.judges)
        return crew if crew is not None and ranks.size == 1 else SharedCrew(ranks, engine, crew)

    async def aside(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Do `work` in the learner's thread, so that matches in flight need not wait for it."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, partial(work, *args, **kwargs))

    async def begin(self, run: RunDir) -> None:
        """Take the first snapshot, where past selves play a part; for a run without steps behind it."""
        if self.past is not None:
            self._snapshot(run, 0)
            await self.past.take(run.path, 0)

    async def step(self, run: RunDir, step: int) -> dict[str, Any]:
        """Play, learn and hand over once; returns the record for metrics.jsonl."""
        watch = _Stopwatch()
        rollouts, played = self.rollouts, self.rollouts.busy
        asked = rollouts.crew.judged()
        self._begin(run, step)
        watch.lap("league")
        taken = await rollouts.take(step, self.version)
        watch.lap("rollout")
        self.me.engine.rest()
        episodes = taken.episodes
        advantages, self.credit = self.estimator(taken.groups, self.credit)
        overlap = -rollouts.busy
        learn = await self.aside(self.policies.update, rows(taken.groups, advantages))
        overlap += rollouts.busy
        watch.lap("learn")
        self.version += 1
        self._hand_over()
        watch.lap("load")
        league = await self._league(run, step, episodes)
        watch.lap("league")
        if self.config.train.save_episodes:
            await self.aside(run.write_episodes, step + 1, episodes)
        watch.lap("write")
        games = metrics.summarise(episodes)
        self.wall += watch.total
        record = {
            "step": step + 1,
            "version": self.version,
            "wall": self.wall,
            "games": games,
            "masked": metrics.masked(episodes),
            **metrics.lost_lengths(episodes),
            **metrics.judges(asked, rollouts.crew.judged()),
            "lag": taken.lag,
            "stale": taken.stale,
            **rollouts.crew.report(),
            **league,
            "learn": learn,
            "speed": {
                "games_per_s": len(episodes) / watch.total,
                "turns_per_s": sum(g["turns"] for g in games.values()) / watch.total,
                "tokens_per_s": sum(g["tokens"] for g in games.values()) / watch.total,
            },
            "seconds": {
                **watch.laps,
                "overlap": overlap,
                "idle_rollout": max(0.0, watch.total - (rollouts.busy - played)),
                "idle_learner": watch.total - watch.laps["learn"],
            },
            "memory_mib": _peak_memory_mib(),
        }
        return record

    def _begin(self, run: RunDir, step: int) -> None:
        """Begin the matches of `step`, and of those after it that the weights are new enough for."""
        last = min(step + self.config.rollout.max_lag, self.config.train.steps - 1)
        for ahead in range(step, last + 1):
            if ahead not in self.rollouts:
                stand_ins = self.past.stand_ins(ahead) if self.past else {}
                self.rollouts.crew.bring(run.path)
                self.rollouts.begin(ahead, self.matchmaker.plan(ahead, stand_ins))

    def _hand_over(self) -> None:
        """Have the matches go on with the weights as they are now."""
        for policy, weights in self.policies.weights().items():
            self.rollouts.crew.load(policy, weights, self.version)

    async def _league(self, run: RunDir, step: int, episodes: Sequence[Episode]) -> dict[str, Any]:
        """Count the step's matches and take a snapshot where one is due: the record's "league", if any."""
        if self.past is None:
            return {}
        said = self.past.count(step, episodes)
        if self.past.population.due(step + 1):
            self.policies.check_finite(step + 1)
            self._snapshot(run, step + 1)
            said |= await self.past.take(run.path, step + 1)
        return {"league": said}

    def _snapshot(self, run: RunDir, step: int) -> None:
        """Write the trained policies as they play now (not their moving averages)."""
        write = self.policies.writer(average=False)
        if self.ranks.first:
            checkpoint.write_sealed(folder(run.path, step), step, write)
        self.ranks.wait()

    async def measure(self, run: RunDir, step: int) -> dict[str, Any]:
        """Hold the policy against fixed anchors and, where the game allows, against its best response.

        Judged is what a checkpoint ships: the weights' moving average where one is kept. Games of other than
        two seats are trained on but not measured: no anchor plays them.
        """
        c = self.config.eval
        ends = step in (0, self.config.train.steps)
        began = time.perf_counter()
        games = {label: game for label, game in self.games.items() if len(game.roles) == 2}
        result: dict[str, Any] = {"games": {}}
        if games:
            judged = self.policies.hand_over_judged(self.version)
            matches = c.final_matches if ends else c.matches
            players = dict(self.players)
            if self.past is not None:
                self.past.bring(run.path, [name for name in c.opponents if name.startswith(PAST)])
                players |= self.past.players
            play = self.ranks.play
            result = await measure_player(self.config, games, judged, players, self.rule, matches, play)
            judged.unload()
        record = {"step": step, "eval": result, "seconds": {"eval": time.perf_counter() - began}}
        return record

    async def close(self) -> None:
        """Let go of what is in flight, of judges, and of every engine: the policy's and remote opponents'."""
        await self.rollouts.close()
        self._thread.shutdown()
        for player in self.players.values():
            if isinstance(player, LanguagePlayer):
                await player.engine.close()
        for judge in self.rule.judges.values():
            await judge.close()

    def save(self, run: RunDir, step: int) -> None:
        """Write everything that learns or draws into checkpoint `step`.

        Raises NonFinite, and writes nothing, where a weight or a moment is NaN or infinite.
        """
        tensors, values = self.policies.state(step)
        ship = self.policies.writer(average=True)
        state = {"credit": self.credit, "version": self.version, "wall": self.wall, "learner": values}
        if self.past is not None:
            state["league"] = self.past.state()
        if self.policies.data:
            state["supervised"] = self.policies.data
        if self.seeds:
            state["seeds"] = self.seeds

        def write(directory: Path) -> None:
            ship(directory / "model")
            (directory / "trainer").mkdir()
            for name, kept in tensors.items():
                save_file(kept, directory / "trainer" / f"{name}.safetensors")
            (directory / "trainer" / "state.json").write_text(json.dumps(state, sort_keys=True))

        if self.ranks.first:
            checkpoint.save(run.path, step, write, self.config.train.keep)
            if self.past is not None:
                self.past.prune(run.path)
        self.ranks.wait()

    def restore(self, run: RunDir) -> int:
        """Take up the newest whole checkpoint; returns the number of steps done (0: none was written yet)."""
        newest = checkpoint.latest(run.path, run.log, lacking) if self.ranks.first else None
        found = self.ranks.agree(newest and str(newest))
        step = self._take_up(run, Path(found)) if found else -1
        if self.ranks.first:
            checkpoint.drop_after(run.path, step)
            if self.past is not None:
                self.past.prune(run.path)
            run.rewind(step)
            if found:
                run.log(f"resumed from {found}")
        self.ranks.wait()
        return max(step, 0)

    def _take_up(self, run: RunDir, found: Path) -> int:
        """Become what the checkpoint `found` was taken from; returns its step."""
        state = json.loads((found / "trainer" / "state.json").read_text())
        if state.get("supervised", {}) != self.policies.data:
            raise UserError(
                f"the supervised data (sft.data) is no longer what {run.path} began with: put the files back "
                "as they were, or start anew with another --out"
            )
        if state.get("seeds", {}) != self.seeds:
            raise UserError(
                f"the seeds (games) are no longer what {run.path} began with: put the files back as they "
                "were, or start anew with another --out"
            )
        tensors = {file.stem: load_file(file) for file in (found / "trainer").glob("*.safetensors")}
        self.policies.load_state(tensors, state["learner"])
        self.credit, self.version, self.wall = state["credit"], state["version"], state["wall"]
        if self.past is not None:
            self.past.load_state(state["league"])
        self._hand_over()
        return int(found.name.removeprefix("step_"))


def _settle(threads: int, device: torch.device) -> None:
    """Threads and the present GPU are settings of a thread: those of the main one, for another."""
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)


class _Stopwatch:
    """Seconds per stage of a step."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Count the time since the last lap, or the beginning, to stage `name`."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        return sum(self.laps.values())


def _peak_memory_mib() -> float:
    """Peak resident memory of this process, MiB (macOS counts bytes, Linux KiB)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
