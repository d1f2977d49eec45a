"""Train every variant of a recipe with every seed, and compare them.

    python experiments/sweep.py experiments/settling.toml --out runs/settling
    python experiments/sweep.py experiments/settling.toml --out runs/settling --report

A sweep file names a recipe, seeds, overrides for all runs, and variants with overrides of their own: the
same `key=value` that `ludus train` takes; {seed} in one stands for the run's own. Each variant and seed is
one `ludus train` in a process of its own, pinned to cores of its own, in OUT/VARIANT/seed_S; what it prints
goes to OUT/VARIANT/seed_S.log. What is finished is not run again, what was interrupted is resumed.
Afterwards, or alone with --report, the runs' metrics become OUT/summary.json, summary.md and figure.svg.
Paths in a sweep file are as seen from where the command runs.

Exit status: 0 done; 1 a run failed (the others went on); 2 bad input; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator
from summary import Axis, Figure, Run, draw, markdown, summarise
from thoughts import thought_tokens

from ludus import config as configuration
from ludus.config import RunConfig, Section
from ludus.errors import UserError
from ludus.records import is_evaluation, read_metrics
from ludus.train import checkpoint
from ludus.train.rundir import CONFIG, METRICS, refuse_changes, stored_config

THOUGHTS = "thoughts"  # figures by this name come from the episodes: metrics do not tell them
TAIL = 12  # lines of a failed run's log that are shown


class Variant(Section):
    """One thing to compare."""

    name: Annotated[str, Field(pattern=r"^[\w+-][\w.+ -]*$")]  # also its directory
    overrides: tuple[str, ...] = ()


class Sweep(Section):
    """A sweep file."""

    recipe: Path
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    overrides: tuple[str, ...] = ()  # of every variant; a variant's own come after them
    axis: Axis = "step"  # what the curves are drawn over
    variants: Annotated[tuple[Variant, ...], Field(min_length=1)]
    figures: Annotated[tuple[Figure, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _distinct(self) -> Sweep:
        for what, given in (
            ("variants", [v.name for v in self.variants]),
            ("seeds", [str(s) for s in self.seeds]),
            ("figures", [f.path for f in self.figures]),
        ):
            if twice := [name for name in given if given.count(name) > 1]:
                raise ValueError(f"{what}: {twice[0]} is there twice")
        return self


@dataclass(frozen=True, slots=True)
class Job:
    """One run of the sweep."""

    name: str  # as people read it
    arguments: tuple[str, ...]  # recipe and overrides
    config: RunConfig
    path: Path  # its run directory

    @property
    def log(self) -> Path:
        return self.path.with_name(f"{self.path.name}.log")

    @property
    def started(self) -> bool:
        return (self.path / CONFIG).exists()

    @property
    def finished(self) -> bool:
        """Whether the last step is there, measured and saved."""
        return self.started and _reached(self.path) >= self.config.train.steps


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        sweep = load(args.sweep)
        every = plan(sweep, args.out)
        chosen = _chosen(sweep, every, args.only, args.seeds)
        failed: list[str] = []
        if not args.report:
            slots = cores(chosen, args.jobs, args.cores)
            args.out.mkdir(parents=True, exist_ok=True)
            failed = run_all(chosen, slots)
        report(sweep, args.out)
    except UserError as e:
        print(f"sweep: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sweep: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def load(file: Path) -> Sweep:
    """Read a sweep file. Raises UserError that names what is wrong in it."""
    try:
        return Sweep.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except OSError as e:
        raise UserError(f"cannot read {file}: {e.strerror}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{file} is not valid TOML: {e}") from e
    except ValidationError as e:
        wrong = "; ".join(_told(".".join(map(str, x["loc"])), x["msg"]) for x in e.errors())
        raise UserError(f"{file}: {wrong}") from e


def _told(place: str, message: str) -> str:
    message = message.removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def plan(sweep: Sweep, out: Path) -> dict[tuple[str, int], Job]:
    """Every run of the sweep, the first seed of all variants first.

    Raises UserError for a configuration or figure that cannot be, and where OUT holds a run by another one:
    all before anything is started.
    """
    jobs = {}
    for seed in sweep.seeds:
        for variant in sweep.variants:
            given = [*sweep.overrides, *variant.overrides, "seed={seed}"]
            overrides = tuple(override.replace("{seed}", str(seed)) for override in given)
            try:
                config = configuration.load(sweep.recipe, overrides)
            except UserError as e:
                raise UserError(f"variant {variant.name!r}: {e}") from e
            path = out / variant.name / f"seed_{seed}"
            job = Job(f"{variant.name}, seed {seed}", (str(sweep.recipe), *overrides), config, path)
            if job.started:
                refuse_changes(stored_config(path), config, str(path))
            jobs[variant.name, seed] = job
    played = {game.label for job in jobs.values() for game in job.config.games}
    for figure in sweep.figures:
        first, _, rest = figure.path.removeprefix("eval.").partition(".")
        if first in ("games", THOUGHTS) and (label := rest.partition(".")[0]) not in played:
            raise UserError(
                f"figure {figure.path!r}: no variant plays {label!r}; played: {', '.join(sorted(played))}"
            )
    return jobs


def cores(jobs: Sequence[Job], at_once: int | None, each: int) -> list[tuple[int, ...]]:
    """The cores of each run that goes on at the same time. Raises UserError where they do not suffice."""
    mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    most = max((job.config.threads for job in jobs), default=0)
    if most > each:
        raise UserError(
            f"the recipe asks for {most} threads and --cores gives a run {each}: say --cores {most}, or "
            "threads=... among its overrides"
        )
    at_once = at_once or max(1, len(mine) // each)
    if at_once * each > len(mine):
        raise UserError(f"there are {len(mine)} cores, not {at_once} times {each}: lower --jobs or --cores")
    return [tuple(mine[k * each : (k + 1) * each]) for k in range(at_once)]


def run_all(jobs: Sequence[Job], slots: Sequence[tuple[int, ...]]) -> list[str]:
    """Run what is not finished, one per slot at a time; returns the names of those that failed."""
    waiting = deque(job for job in jobs if not job.finished)
    print(f"{len(jobs)} runs, {len(jobs) - len(waiting)} of them finished", flush=True)
    free = list(slots)
    running: list[_Going] = []
    failed = []
    try:
        while waiting or running:
            while waiting and free:
                running.append(_Going(waiting.popleft(), free.pop(0)))
            time.sleep(0.1)
            for going in [g for g in running if g.process.poll() is not None]:
                running.remove(going)
                free.append(going.slot)
                if not going.tell():
                    failed.append(going.job.name)
    finally:
        for going in running:  # only where something went wrong here; a run survives its end at any moment
            going.process.terminate()
        for going in running:
            going.process.wait()
    return failed


class _Going:
    """A run in its process."""

    def __init__(self, job: Job, slot: tuple[int, ...]) -> None:
        self.job, self.slot = job, slot
        self.began = time.monotonic()
        resume = ["--resume"] if job.started else []
        print(f"{'resumed' if resume else 'started'}: {job.name}", flush=True)
        job.path.parent.mkdir(parents=True, exist_ok=True)
        ludus = [
            sys.executable,
            "-P",
            "-m",
            "ludus.cli",
        ]  # -P: the same package as here, whatever lies around
        command = [*ludus, "train", *job.arguments, "--out", str(job.path), *resume]
        environment = {**os.environ, "OMP_NUM_THREADS": str(len(slot))}
        with job.log.open("ab") as log, _Pinned(slot):
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
            )

    def tell(self) -> bool:
        """Print how it ended; whether it ended well."""
        seconds = time.monotonic() - self.began
        status = self.process.returncode
        if status == 0:
            print(f"done: {self.job.name}, {seconds:.0f} s", flush=True)
            return True
        print(f"FAILED: {self.job.name}, status {status}; the end of {self.job.log}:", flush=True)
        for line in self.job.log.read_text(errors="replace").splitlines()[-TAIL:]:
            print(f"    {line}")
        return False


class _Pinned:
    """While it lasts, this process and what it starts keep to these cores, where the system can do that."""

    def __init__(self, slot: tuple[int, ...]) -> None:
        self.slot = slot

    def __enter__(self) -> None:
        if hasattr(os, "sched_setaffinity"):
            self.before = os.sched_getaffinity(0)
            os.sched_setaffinity(0, self.slot)

    def __exit__(self, *error: object) -> None:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, self.before)


def report(sweep: Sweep, out: Path) -> dict[str, Any]:
    """Write summary.json, summary.md and figure.svg out of what the runs have recorded so far.

    Raises UserError where no run has recorded anything.
    """
    runs: dict[str, dict[int, Run]] = {}
    for (variant, seed), job in plan(sweep, out).items():
        if records := read_metrics(job.path / METRICS):
            if any(figure.path.startswith(f"{THOUGHTS}.") for figure in sweep.figures):
                lengths = thought_tokens(job.path, job.config.model)
                records = [
                    record if is_evaluation(record) else {**record, THOUGHTS: lengths.get(record["step"], {})}
                    for record in records
                ]
            runs.setdefault(variant, {})[seed] = Run(records, job.finished)
    if not runs:
        raise UserError(f"no run in {out} has recorded anything yet")
    runs = {variant.name: runs[variant.name] for variant in sweep.variants if variant.name in runs}
    found = {"sweep": sweep.model_dump(mode="json", exclude_none=True), **summarise(runs, sweep.figures)}
    (out / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "summary.md").write_text(markdown(found, sweep.seeds))
    draw(runs, sweep.figures, sweep.axis, out / "figure.svg")
    for figure in sweep.figures:
        seen = (
            one["figures"][figure.path] for row in found["variants"].values() for one in row["runs"].values()
        )
        if not any(seen):
            print(f"no run has recorded {figure.path!r} so far; is that the figure's path?", file=sys.stderr)
    print(f"summary: {out / 'summary.md'}, summary.json, figure.svg", flush=True)
    return found


def _reached(run: Path) -> int:
    """The step of the newest checkpoint; -1 without any."""
    found = checkpoint.steps(run)
    return found[-1][0] if found else -1


def _chosen(
    sweep: Sweep, jobs: dict[tuple[str, int], Job], only: Sequence[str] | None, seeds: Sequence[int] | None
) -> list[Job]:
    names = [variant.name for variant in sweep.variants]
    for given, known, what in ((only or (), names, "variant"), (seeds or (), sweep.seeds, "seed")):
        for one in given:
            if one not in known:
                raise UserError(f"the sweep has no {what} {one}; it has {', '.join(map(str, known))}")
    return [
        job
        for (name, seed), job in jobs.items()
        if name in (only or names) and seed in (seeds or sweep.seeds)
    ]


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("sweep", type=Path, help="a sweep file, such as experiments/settling.toml")
    parser.add_argument("--out", type=Path, required=True, help="directory of all its runs")
    parser.add_argument("--jobs", type=int, help="runs at the same time (default: as many as fit)")
    parser.add_argument("--cores", type=int, default=2, help="of each run (default: 2)")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="run these variants alone")
    parser.add_argument("--seeds", nargs="+", type=int, help="run these seeds alone")
    parser.add_argument("--report", action="store_true", help="run nothing, only write the summary")
    args = parser.parse_args(argv)
    for name in ("jobs", "cores"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return args


if __name__ == "__main__":
    sys.exit(main())
