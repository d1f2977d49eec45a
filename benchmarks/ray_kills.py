"""Kill rollout actors with SIGKILL at random moments of a training run on Ray, and see what is lost.

    python benchmarks/ray_kills.py --model DIR [--kills 20] [--actors 2] [--seed 0] [--recipe F] [key=value]

The run has a cluster of its own on this machine, and two steps for every kill. After every other step, a
moment later (drawn uniformly from 0 to 1 second), one of the actors that are there is killed, so that at
times none is left. At the end the run directory is held against the recipe: every match that it plans is
there once, in its step, with its game and deal; no turn was sampled by weights older than rollout.max_lag
allows; and as many deaths were counted as there were kills.

Prints what was found; the exit status is 1 if anything of it does not hold. Without --recipe it is the
demo's, made smaller as in benchmarks/kills.py.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from ludus import config as configuration
from ludus.config import RunConfig
from ludus.league.matchmaker import shares
from ludus.records import Record, episode_files, read_episodes, read_metrics
from ludus.seeding import derive
from ludus.train.loop import train

DEMO = Path(__file__).parents[1] / "recipes" / "spiral_cpu.toml"
SMALLER = ("rollout.matches=56", "eval.every=0", "eval.final_matches=2", "eval.exploitability=false")


def main() -> int:
    args = _arguments()
    smaller = SMALLER if args.recipe == DEMO else ()
    settings = [f'model.path="{args.model}"', "cluster.kind=ray", f"cluster.actors={args.actors}"]
    length = f"train.steps={2 * args.kills + 4}"
    config = configuration.load(args.recipe, [*smaller, *settings, length, *args.overrides])
    run = Path(tempfile.mkdtemp(prefix="ray-kills-")) / "run"
    killer = Killer(run, [2 * i + 1 for i in range(args.kills)], args.seed)
    killer.start()
    began = time.monotonic()
    train(config, run)
    seconds = time.monotonic() - began
    killer.join(timeout=5.0)

    records = trained(run)
    crews = [record["crew"] for record in records]
    found = problems(config, run)
    deaths = sum(crew["deaths"] for crew in crews)
    if deaths != len(killer.killed) or deaths < args.kills:
        found.append(f"{args.kills} kills wanted, {len(killer.killed)} struck, {deaths} deaths counted")
    matches = config.train.steps * config.rollout.matches
    print(
        f"{len(killer.killed)} kills, {deaths} deaths counted; {len(records)} steps, {matches} matches, "
        f"{sum(crew['played_again'] for crew in crews)} of them played again; {seconds:.0f} s"
    )
    print("\n".join(found) or "every match is there, once, as the recipe plans it")
    print(f"run directory: {run}")
    return 1 if found else 0


def actors() -> list[psutil.Process]:
    """The rollout actors of a cluster that this process has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "".join(process.cmdline()[:1]).startswith("ray::RolloutActor"):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


class Killer(threading.Thread):
    """Kills an actor, chosen at random, a moment after each of the steps `after` has been written down."""

    def __init__(self, run: Path, after: Sequence[int], seed: int = 0) -> None:
        super().__init__(daemon=True)
        self.killed: list[int] = []  # process ids
        self._run, self._after, self._rng = run, after, random.Random(seed)

    def run(self) -> None:
        for step in self._after:
            _until(lambda step=step: len(trained(self._run)) >= step)  # type: ignore[misc]
            time.sleep(self._rng.random())
            victims: list[int] = []
            while not victims:
                time.sleep(0.1)
                victims = sorted({process.pid for process in actors()} - set(self.killed))
            victim = self._rng.choice(victims)
            os.kill(victim, signal.SIGKILL)
            self.killed.append(victim)


def problems(config: RunConfig, run: Path) -> list[str]:
    """What in a finished run is not as the recipe plans it; [] where nothing. It must have no past selves."""
    found = []
    matches, steps, lag = config.rollout.matches, config.train.steps, config.rollout.max_lag
    labels = [game.label for game in config.games]
    size = config.rollout.group_size
    parts = shares([game.weight for game in config.games], matches // size)
    mix = dict(zip(labels, (size * part for part in parts), strict=True))
    files = dict(episode_files(run))
    if sorted(files) != list(range(1, steps + 1)):
        found.append(f"episodes of steps {sorted(files)}")
    for step, path in files.items():
        played = read_episodes(path)
        if [e.id for e in played] != list(range(matches * (step - 1), matches * step)):
            found.append(f"step {step}: matches {[e.id for e in played]}")
        if dict(Counter(e.game for e in played)) != mix:
            found.append(f"step {step}: the mix is {Counter(e.game for e in played)}, not {mix}")
        if any(e.seed != derive(config.seed, "match", e.id // size) for e in played):
            found.append(f"step {step}: a deal that the recipe does not plan")
        ages = [step - 1 - t.version for e in played for t in e.turns if t.trainable]
        if not all(0 <= age <= lag for age in ages):
            found.append(f"step {step}: versions {min(ages)} to {max(ages)} behind")
    records = trained(run)
    if [record["step"] for record in records] != list(range(1, steps + 1)):
        found.append(f"records of steps {[record['step'] for record in records]}")
    return found


def trained(run: Path) -> list[Record]:
    """The training records that a run has written so far."""
    return [record for record in read_metrics(run / "metrics.jsonl") if "learn" in record]


def _until(there: Callable[[], bool]) -> None:
    while not there():
        time.sleep(0.2)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="such as ludus make-model makes")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", type=Path, default=DEMO)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
