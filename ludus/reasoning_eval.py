"""`ludus eval --suite`: from words on the command line to problems, answers and figures.

A suite is one of

    reasoning-gym   generated problems, by SPIRAL's three patterns (needs the extra `reasoning`)
    math:FILE       problems and answers out of a file (the same extra)
    lm-eval:TASKS   tasks of lm-evaluation-harness, which runs them itself (needs the extra `lm-eval`)

With `out` every suite has a directory there: answers as they come, and the result, which a later call may
compare with (`against`).
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ludus import measuring, subjects
from ludus.config import RunConfig
from ludus.errors import UserError
from ludus.truth.reasoning.asking import ask, mark
from ludus.truth.reasoning.figures import compare, figures
from ludus.truth.reasoning.harness import Job, evaluate, split_tasks
from ludus.truth.reasoning.library import Library
from ludus.truth.reasoning.problems import ProblemSuite, mathematics, reasoning_gym
from ludus.truth.transcripts import Answer, Answers, write_private
from ludus.viewer.console import table_console

RESULT = "result.json"
SAMPLES, PROBLEMS, TEMPERATURE = 4, 25, 1.0  # replies per problem, problems per task of reasoning-gym
_GYM, _MATH, _HARNESS = "reasoning-gym", "math:", "lm-eval:"


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line asks for, apart from suites. `problems` None: the suite's own number."""

    target: str
    recipe: Path | None
    overrides: Sequence[str]
    samples: int
    problems: int | None
    include: Path | None
    out: Path | None
    against: Path | None


def run(suites: Sequence[str], asked: Asked, *, as_json: bool) -> None:
    """Measure the target on every suite; print, and write what `out` is to keep. Raises UserError."""
    for word in suites:
        if word != _GYM and not word.startswith((_MATH, _HARNESS)):
            raise UserError(f"unknown suite {word!r}; known: {_GYM}, {_MATH}FILE, {_HARNESS}TASKS")
    for name, value in (("--samples", asked.samples), ("--problems", asked.problems)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; ask for at least 1")
    found = {}
    for word in dict.fromkeys(suites):
        one = _harness(word, asked) if word.startswith(_HARNESS) else _ours(word, asked)
        found[one["suite"]] = one
        if not as_json:
            _print(one)
    if as_json:
        json.dump(found, sys.stdout, indent=1)
        print()
    elif asked.out is not None:
        print(f"results: {asked.out}")


def _ours(word: str, asked: Asked) -> dict[str, Any]:
    config, identity = subjects.settings(asked.target, asked.recipe, asked.overrides, TEMPERATURE)
    with ExitStack() as stack:
        package = "reasoning_gym" if word == _GYM else "math_verify"
        library = stack.enter_context(Library(package))
        if word == _GYM:
            suite = reasoning_gym(library, asked.problems or PROBLEMS)
        else:
            suite = mathematics(library, Path(word.removeprefix(_MATH)), asked.problems)
        settings = {"suite": dict(suite.identity), "model": identity, "seed": config.seed}
        before = _before(asked.against / suite.name / RESULT, settings) if asked.against else None
        folder = asked.out / suite.name if asked.out else None
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / suite.name
        answers = asyncio.run(_ask(suite, folder, settings, config, asked))
        found = {
            "suite": suite.name,
            "model": asked.target,
            "samples": asked.samples,
            "settings": settings,
            "missing": dict(suite.missing),
            **figures(mark(suite, answers, asked.samples)),
        }
        if before is not None:
            found["against"] = {"result": str(asked.against), **compare(before["values"], found["values"])}
        if asked.out is not None:
            _write(folder / RESULT, found)
    return found


async def _ask(
    suite: ProblemSuite, folder: Path, settings: Mapping[str, Any], config: RunConfig, asked: Asked
) -> Mapping[tuple[str, str], Answer]:
    subject = subjects.open_subject(asked.target, config)
    columns = (TextColumn("replies"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    try:
        with (
            Answers(folder, settings) as kept,
            Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
        ):
            task = bar.add_task("replies")
            await ask(
                suite,
                subject,
                kept,
                samples=asked.samples,
                seed=config.seed,
                in_flight=config.rollout.in_flight,
                tell=lambda done, total: bar.update(task, completed=done, total=total),
            )
            return kept.answers
    finally:
        await subject.engine.close()


def _before(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """An earlier result, of the same problems asked in the same way. Raises UserError."""
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
        pairs = [
            ("problems", found["settings"]["suite"], settings["suite"]),
            ("sampling", found["settings"]["model"]["sampling"], settings["model"]["sampling"]),
            ("seed", found["settings"]["seed"], settings["seed"]),
        ]
        found["values"].items()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}; --against wants an earlier --out") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path} is no result of this command ({e}); --against wants an earlier --out") from e
    for what, old, new in pairs:
        if old != new:
            raise UserError(
                f"{path} cannot be compared with: its {what} were {json.dumps(old)}, these are "
                f"{json.dumps(new)}; ask both models in the same way"
            )
    return found


def _harness(word: str, asked: Asked) -> dict[str, Any]:
    tasks = split_tasks(word.removeprefix(_HARNESS))
    if "://" in asked.target:
        raise UserError(
            "lm-eval reads a model's directory; for a server call the harness itself (lm-eval run)"
        )
    if asked.against is not None:
        raise UserError(
            "--against compares problem by problem, which lm-eval's results do not allow; leave it out"
        )
    target = measuring.find_asked(Path(asked.target), asked.recipe, asked.overrides, TEMPERATURE)
    config = target.config
    if config.policies:
        raise UserError(
            f"{target.model} holds no whole model, and the harness reads nothing else; take one out first: "
            "ludus export --merge"
        )
    with ExitStack() as stack:
        folder = (
            asked.out / "lm-eval" if asked.out else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"cannot write to {folder}: {e.strerror}; choose another --out") from e
        job = Job(
            tasks,
            engine="vllm" if str(config.engine.kind) == "vllm" else "hf",
            model=str(target.model.resolve()),
            dtype=config.model.dtype,
            device=_device(config),
            max_length=config.engine.context,
            batch=config.engine.slots,
            limit=asked.problems,
            include=str(asked.include) if asked.include else None,
            seed=config.seed,
        )
        found = {
            "suite": "lm-eval",
            "model": asked.target,
            "job": asdict(job),
            **evaluate(job, folder / "lm-eval.log"),
        }
        if asked.out is not None:
            _write(folder / RESULT, found)
    return found


def _device(config: RunConfig) -> str:
    from ludus.learner.device import resolve_device

    return str(resolve_device(config.model.device))


def _write(path: Path, found: Mapping[str, Any]) -> None:
    try:
        write_private(path, found)
    except OSError as e:
        raise UserError(f"cannot write to {path.parent}: {e.strerror}; the answers are kept") from e


def _print(found: Mapping[str, Any]) -> None:
    console = table_console()
    console.print(f"{found['suite']}, {found['model']}", markup=False, soft_wrap=True)
    if found["suite"] == "lm-eval":
        console.print(_harness_table(found))
        return
    console.print(_table(found))
    for task, why in found["missing"].items():
        console.print(f"missing: {task}: {why}", markup=False)
    for reason, n in found["masked"].items():
        console.print(f"masked: {reason} {n}", markup=False)
    for task, reasons in found["unread"].items():
        told = ", ".join(f"{reason} {n}" for reason, n in reasons.items())
        console.print(f"answers that {task} could not read, counted as wrong: {told}", markup=False)
    if "against" in found:
        told = f"against {found['against']['result']}, on the same problems"
        console.print(told, markup=False, soft_wrap=True)
        console.print(_against_table(found["against"]))


def _rows(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The whole, then each group with its tasks."""
    rows = [("all", found["overall"])]
    for group in found["groups"] or [""]:
        if group:
            rows.append((group, found["groups"][group]))
        if group or len(found["tasks"]) > 1:
            rows += [(f"  {task}", of) for task, of in found["tasks"].items() if of["group"] == group]
    return rows


def _table(found: Mapping[str, Any]) -> Table:
    table = Table()
    table.add_column("")
    for name in ("problems", f"avg@{found['samples']}", "95%", "score", "no answer", "cut"):
        table.add_column(name, justify="right")
    for name, of in _rows(found):
        if of["solved"] is None:
            table.add_row(name, "0")
            continue
        shares = (f"{of[key]:.3f}" for key in ("score", "no_answer", "cut"))
        table.add_row(name, str(of["problems"]), f"{of['solved']:.3f}", _interval(of["ci95"]), *shares)
    return table


def _against_table(found: Mapping[str, Any]) -> Table:
    table = Table()
    table.add_column("")
    for name in ("problems", "before", "after", "difference", "95%"):
        table.add_column(name, justify="right")
    rows = [
        ("all", found["overall"]),
        *found["groups"].items(),
        *((f"  {t}", of) for t, of in found["tasks"].items()),
    ]
    for name, of in rows:
        values = (f"{of['before']:.3f}", f"{of['after']:.3f}", f"{of['difference']:+.3f}")
        table.add_row(name, str(of["problems"]), *values, _interval(of["ci95"], "+"))
    return table


def _harness_table(found: Mapping[str, Any]) -> Table:
    table = Table()
    for name in ("task", "problems", "metric", "value", "95%"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for task, metrics in found["tasks"].items():
        for metric, of in metrics.items():
            interval = "" if of["ci95"] is None else _interval(of["ci95"])
            table.add_row(task, str(found["problems"].get(task, "")), metric, f"{of['value']:.4f}", interval)
    return table


def _interval(ends: Sequence[float], sign: str = "") -> str:
    low, high = (format(end, f"{sign}.3f") for end in ends)
    return rf"\[{low}, {high}]"
