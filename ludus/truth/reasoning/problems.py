"""Suites of problems: tasks of reasoning-gym in SPIRAL's three patterns, and mathematics out of a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ludus.errors import UserError
from ludus.seeding import derive
from ludus.suites import Row, rows_of
from ludus.truth.reasoning.library import Library, Mark, TooLate

# Why these: docs/reasoning.md. The first three are the patterns that SPIRAL (arXiv 2506.24119) finds in its
# games and in mathematics; `control` needs none of them.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "decomposition": (
        "basic_arithmetic",
        "calendar_arithmetic",
        "gsm_symbolic",
        "leg_counting",
        "simple_equations",
        "time_intervals",
        "tower_of_hanoi",
    ),
    "case analysis": (
        "cryptarithm",
        "knights_knaves",
        "mini_sudoku",
        "self_reference",
        "survo",
        "syllogism",
        "zebra_puzzles",
    ),
    "expected value": (
        "coin_flip",
        "dice",
        "count_primes",
        "decimal_arithmetic",
        "fraction_simplification",
        "number_filtering",
    ),
    "control": ("caesar_cipher", "spell_backward", "word_sorting"),
}
_TEXT = ("problem", "question")  # how files call what is asked


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem. `group` is "" in suites without groups."""

    id: str
    task: str
    group: str
    question: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class ProblemSuite:
    """Problems, and how an answer to one of them is marked.

    `identity` is plain data that differs where the problems or their marking do; `missing` says why a task
    has none.
    """

    name: str
    problems: tuple[Problem, ...]
    identity: Mapping[str, Any]
    mark: Callable[[Problem, str], Mark]
    missing: Mapping[str, str] = field(default_factory=dict)


def reasoning_gym(
    library: Library, problems: int, groups: Mapping[str, tuple[str, ...]] = GROUPS
) -> ProblemSuite:
    """`problems` of each task, the same ones for every model: their seeds depend on the task's name alone.

    A task whose problems cannot be made in time is missing, by name. Raises UserError where all are.
    """
    made: list[Problem] = []
    missing: dict[str, str] = {}
    where: dict[str, tuple[str, int, int]] = {}
    for group, tasks in groups.items():
        for task in tasks:
            seed = derive("reasoning-gym", task) % 2**31
            try:
                questions = library.generate(task, seed, problems)
            except TooLate:
                missing[task] = f"its problems were not made within {library.generation:g} seconds"
                continue
            for index, question in enumerate(questions):
                made.append(Problem(f"{task}/{index}", task, group, question))
                where[made[-1].id] = (task, seed, index)
    if not made:
        raise UserError(
            f"reasoning-gym made no problem in time ({', '.join(missing)}); is this machine busy?"
        )

    def mark(problem: Problem, answer: str) -> Mark:
        task, seed, index = where[problem.id]
        return library.mark(task, seed, problems, index, answer)

    identity = {
        "reasoning_gym": library.version,
        "problems": problems,
        "groups": {g: list(t) for g, t in groups.items()},
    }
    return ProblemSuite("reasoning-gym", tuple(made), identity, mark, missing)


def mathematics(library: Library, path: Path, problems: int | None) -> ProblemSuite:
    """The first `problems` (None: all) of a file with a problem and its answer in every row, as MATH-500 has
    them.

    JSONL, CSV, TSV or Parquet; columns `problem` (or `question`) and `answer`, and if they are there
    `subject`, by which the figures are broken down, and `unique_id` or `id`. Raises UserError, with file and
    line, for a row without them and for an answer that is no mathematics.
    """
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as e:
        raise UserError(f"cannot read problems {path}: {e.strerror}") from e
    made: list[Problem] = []
    truths: dict[str, str] = {}
    for line, row in rows_of(path):
        if len(made) == problems:
            break
        problem, truth = _problem(path, line, row)
        if problem.id in truths:
            raise UserError(
                f"{path}, line {line}: the id {problem.id!r} is there twice; every problem needs its own"
            )
        try:
            library.equal(truth, truth)
        except UserError as e:
            raise UserError(f"{path}, line {line}: {e}") from e
        made.append(problem)
        truths[problem.id] = truth
    if not made:
        raise UserError(f"{path} is empty: it has no problem")
    identity = {"math_verify": library.version, "sha256": digest, "problems": len(made)}
    return ProblemSuite(
        f"math-{path.stem}", tuple(made), identity, lambda p, answer: library.equal(truths[p.id], answer)
    )


def _problem(path: Path, line: int, row: Row) -> tuple[Problem, str]:
    question = next((row[name] for name in _TEXT if row.get(name, "").strip()), None)
    if question is None:
        raise UserError(f"{path}, line {line}: no problem; a column {' or '.join(_TEXT)} is wanted")
    truth = row.get("answer", "").strip()
    if not truth:
        raise UserError(
            f"{path}, line {line}: no answer; a column answer is wanted, with the final answer alone"
        )
    name = row.get("unique_id") or row.get("id") or str(line)
    return Problem(name, row.get("subject") or path.stem, "", question), truth
