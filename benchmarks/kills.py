"""Kill a training run with SIGKILL at random moments, resume it, and compare it with an undisturbed run.

    python benchmarks/kills.py [--kills 50] [--seed 0] [--recipe FILE] [--model DIR] [key=value ...]

First one run is left in peace; it lasts T seconds. Then, again and again: a run is started, killed after a
time drawn uniformly from 0 to T, resumed, killed after another such time, and so on until it is done before
its time is up. Every run that is done is held against the undisturbed one: final weights, optimizer,
baselines and payoff matrix, all snapshots of past selves and nothing else beside them, all transcripts, and
all metrics except what clocks and memory say. It ends when enough kills have struck.

The recipe is the demo's, made smaller (see SMALLER); without --model a small model is made first. The
process loads the libraries once and forks for each life of a run, so that kills strike the training and not
the import of torch. Prints one line per kill and per run; the exit status is 1 if anything differs.

A league of several kinds of opponents, with more snapshots than checkpoints and more than are kept:

    python benchmarks/kills.py league.snapshot_every=1 league.keep=4 league.payoff_matches=8 \\
        'league.opponents=[{policy="past/hard"}, {policy="past/latest:2"}, {policy="random"}]'
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import zstandard

from ludus import config as configuration
from ludus.config import RunConfig
from ludus.records import episode_files, read_metrics
from ludus.small.make import Course, SmallSpec, make
from ludus.train import checkpoint
from ludus.train.loop import train
from ludus.train.rundir import CONFIG

DEMO = Path(__file__).parents[1] / "recipes" / "spiral_cpu.toml"
SMALLER = (
    "rollout.matches=56",
    "train.steps=12",
    "train.checkpoint_every=2",
    "eval.every=6",
    "eval.matches=20",
    "eval.final_matches=40",
    "eval.thoughts=4",
)
COURSES = (
    Course("kuhn_poker", 800),
    Course("tic_tac_toe", 1_600, {"view": "cells"}),
    Course("negotiation", 1_600),
)
OF_THE_CLOCK = ("wall", "speed", "seconds", "memory_mib")  # keys of metrics that no two runs share


def main() -> int:
    args = _arguments()
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    model = args.model
    if model is None:
        model = folder / "model"
        _expect(_Life(lambda: make(model, SmallSpec(COURSES)), folder / "make.txt").wait())
    smaller = SMALLER if args.recipe == DEMO else ()
    config = configuration.load(args.recipe, [f'model.path="{model}"', *smaller, *args.overrides])

    undisturbed = folder / "undisturbed"
    began = time.perf_counter()
    _expect(_life(config, undisturbed, resume=False).wait())
    whole = time.perf_counter() - began
    matches = config.train.steps * config.rollout.matches
    print(f"undisturbed: {config.train.steps} steps, {matches} matches, {whole:.1f} s")
    print(f"seed {args.seed}: moments drawn uniformly from 0 to {whole:.1f} s after each start", flush=True)

    bad = _experiment(config, folder, undisturbed, whole, args.kills, random.Random(args.seed))
    if bad:
        print(f"the runs are kept in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


def _experiment(
    config: RunConfig, folder: Path, undisturbed: Path, whole: float, kills: int, rng: random.Random
) -> int:
    """Run until `kills` have struck and the last run is done; returns how many runs differ."""
    began = time.perf_counter()
    struck = runs = bad = 0
    print(
        f"{'kill':>4} {'run':>4} {'after s':>8} {'step':>5} {'checkpoint':>10}  half written or half removed"
    )
    while struck < kills:
        runs += 1
        out = folder / f"run_{runs}"
        here, done = 0, False
        while not done:
            life = _life(config, out, resume=(out / CONFIG).exists())
            moment = rng.uniform(0.0, whole)
            done = life.wait(moment if struck < kills else None)
            if not done:
                struck, here = struck + 1, here + 1
                print(f"{struck:4} {runs:4} {moment:8.2f} {_left_behind(out)}", flush=True)
        different = differences(out, undisturbed)
        bad += bool(different)
        print(f"run {runs}: {here} kills, {'; '.join(different) if different else 'identical'}", flush=True)
        if not different:
            shutil.rmtree(out)
    seconds = time.perf_counter() - began
    print(f"{struck} kills in {runs} runs: {runs - bad} identical, {bad} different; {seconds:.0f} s")
    return bad


class _Life:
    """A forked process that does `work`, with its output in `log`."""

    def __init__(self, work: Callable[[], None], log: Path) -> None:
        self.log = log
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            with log.open("ab") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            work()
            sys.stdout.flush()
            status = 0
        except BaseException:  # noqa: BLE001  # a child must never get back into its parent's code
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)

    def wait(self, at_most: float | None = None) -> bool:
        """Whether it came to its end by itself; after `at_most` seconds it is killed.

        Raises RuntimeError with the end of its log where it failed.
        """
        began = time.perf_counter()
        while True:
            pid, status = os.waitpid(self.pid, 0 if at_most is None else os.WNOHANG)
            if pid:
                break
            if at_most is not None and time.perf_counter() - began >= at_most:
                os.kill(self.pid, signal.SIGKILL)
                _, status = os.waitpid(self.pid, 0)
                break
            time.sleep(0.002)
        code = os.waitstatus_to_exitcode(status)
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"{self.log} ends with status {code}:\n{self.log.read_text()[-4000:]}")
        return code == 0


def _life(config: RunConfig, out: Path, resume: bool) -> _Life:
    return _Life(lambda: train(config, out, resume), out.with_name(f"{out.name}.txt"))


def _expect(done: bool) -> None:
    if not done:
        raise RuntimeError("somebody else killed a process of this experiment")


def _left_behind(out: Path) -> str:
    """Last step in the metrics, newest checkpoint, and what was being written: what a kill has left."""
    steps = [record["step"] for record in read_metrics(out / "metrics.jsonl")]
    whole = [step for step, _ in checkpoint.steps(out)]
    half = ", ".join(p.name for name in ("checkpoints", "league") for p in (out / name).glob(".*"))
    return f"{steps[-1] if steps else '-':>5} {whole[-1] if whole else '-':>10}  {half}"


def differences(run: Path, other: Path) -> list[str]:
    """What differs between two finished runs; [] where nothing does."""
    found = []
    mine, theirs = (dict(episode_files(path)) for path in (run, other))
    if mine.keys() != theirs.keys():
        found.append(f"episodes of steps {sorted(mine)} against {sorted(theirs)}")
    found += [
        f"episodes of step {step}"
        for step in sorted(mine.keys() & theirs.keys())
        if _unpacked(mine[step]) != _unpacked(theirs[step])
    ]
    mine, theirs = (dict(checkpoint.steps(path)[-1:]) for path in (run, other))
    if mine.keys() != theirs.keys():
        return [*found, f"last checkpoint {sorted(mine)} against {sorted(theirs)}"]
    for step in mine:
        tensors = [
            sorted(p.relative_to(at) for p in at.rglob("*.safetensors")) for at in (mine[step], theirs[step])
        ]
        if tensors[0] != tensors[1]:
            found.append(f"files of step {step}")
        found += [
            f"{name} of step {step}"
            for name in set(tensors[0]) & set(tensors[1])
            if (mine[step] / name).read_bytes() != (theirs[step] / name).read_bytes()
        ]
        if _state(mine[step]) != _state(theirs[step]):
            found.append(f"trainer/state.json of step {step}")
    if _league(run) != _league(other):
        found.append("league")
    if _metrics(run) != _metrics(other):
        found.append("metrics")
    return found


def _unpacked(path: Path) -> bytes:
    unpacked: bytes = zstandard.ZstdDecompressor().decompress(path.read_bytes())
    return unpacked


def _league(run: Path) -> dict[str, bytes]:
    """Every file of every snapshot, and of what a kill may have left beside them."""
    folder = run / "league"
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _state(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((path / "trainer" / "state.json").read_text())
    return {key: value for key, value in state.items() if key not in OF_THE_CLOCK}


def _metrics(run: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in record.items() if key not in OF_THE_CLOCK}
        for record in read_metrics(run / "metrics.jsonl")
    ]


def _arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--recipe", type=Path, default=DEMO)
    parser.add_argument("--model", type=Path, help="directory of the model (default: a small one is made)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
