"""A model answers every problem several times, and the answers are marked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ludus.seeding import derive
from ludus.truth.reasoning.extract import REQUEST, extract
from ludus.truth.reasoning.problems import Problem, ProblemSuite
from ludus.truth.subject import Subject
from ludus.truth.transcripts import Answer, Answers

_OF_THE_MODEL = (None, "no_answer")  # the other reasons for a missing answer are not the model's own


@dataclass(frozen=True, slots=True)
class Marked:
    """One reply to one problem. `masked`: nobody was asked, or nobody answered, for this reason."""

    problem: Problem
    score: float  # the library's, from 0 to 1
    answered: bool  # whether an answer could be extracted
    cut: bool  # at the limit of tokens
    unread: str | None = None  # why the library could not read the answer
    masked: str | None = None


async def ask(
    suite: ProblemSuite,
    subject: Subject,
    kept: Answers,
    *,
    samples: int,
    seed: int,
    in_flight: int,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Have each problem answered `samples` times into `kept`. What is there, masked answers apart, is not
    asked again.

    Each reply has randomness of its own, the same for every model, so two models meet the same problems with
    the same luck.
    """
    gate = asyncio.Semaphore(in_flight)
    done = 0

    async def one(problem: Problem, sample: int) -> None:
        nonlocal done
        key = (suite.name, f"{problem.id}#{sample}")
        async with gate:
            if key not in kept.answers or kept.answers[key].masked not in (*_OF_THE_MODEL, "prompt_too_long"):
                prompt = f"{problem.question.strip()}\n\n{REQUEST}"
                kept.answered(key, prompt, await subject.answer(prompt, derive(seed, "reasoning", *key)))
        done += 1
        tell(done, len(tasks))

    tasks = [asyncio.ensure_future(one(p, k)) for p in suite.problems for k in range(samples)]
    try:
        await asyncio.gather(*tasks)
    finally:  # the disk takes no more, or the user has enough
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def mark(suite: ProblemSuite, answers: Mapping[tuple[str, str], Answer], samples: int) -> list[Marked]:
    """Every reply with its score, problem by problem."""
    return [
        _mark(suite, problem, answers[suite.name, f"{problem.id}#{sample}"])
        for problem in suite.problems
        for sample in range(samples)
    ]


def _mark(suite: ProblemSuite, problem: Problem, answer: Answer) -> Marked:
    if answer.masked not in _OF_THE_MODEL:
        return Marked(problem, 0.0, answered=False, cut=answer.cut, masked=answer.masked)
    said = None if answer.text is None else extract(answer.text)
    if said is None:
        return Marked(problem, 0.0, answered=False, cut=answer.cut)
    found = suite.mark(problem, said)
    return Marked(problem, found.score, answered=True, cut=answer.cut, unread=found.problem)
