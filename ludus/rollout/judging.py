"""Rulings in the middle of a match: whom a game names, what is asked of them, and what a failure means.

Judges are asked as the matches come to it, those of all matches in flight at once. A failed verdict is
nobody's reward: it masks the match, which is counted by the reason. Where too many fail, the judge itself
ends the run.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ludus.games.base import Game, Ruling, judges_of
from ludus.judges.base import FIELDS, Failure, Judge, Question, Verdict
from ludus.judges.make import check_names

JUDGED_FIELDS = ("request", "answer", "refusal")  # what the comparison of two judges calls the fields


class NoVerdict(Exception):
    """The judge that pays has said nothing, or left open what is paid for."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Bench:
    """The judges of one game. `second` is asked for the sake of comparison alone."""

    first: Judge
    second: Judge | None = None

    @staticmethod
    def of(game: Game, judges: Mapping[str, Judge]) -> Bench | None:
        """None for a game that asks nobody. Raises UserError for a judge that is not there."""
        names = judges_of(game)
        check_names(game.name, names, judges)
        return Bench(*(judges[name] for name in names)) if names else None

    async def rule(self, id: str, request: str, answer: str | None) -> tuple[Ruling, Counter[str]]:
        """The ruling of the first judge, and how the second one's verdict compares with it, field by field.

        Counted are, of what both say, "agree_request" or "differ_request", and so on; and "second_failed".
        Raises NoVerdict where the first fails or leaves open what the answer, if there is one, needs, and
        UserError where a judge gives up.
        """
        question = Question(id, request, answer)
        asked = [self.first] if self.second is None else [self.first, self.second]
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(judge.judge([question])) for judge in asked]
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from several
        said, *others = [task.result()[id] for task in running]
        ruling = _ruling(said, answered=answer is not None)
        return ruling, Counter(key for other in others for key in _compared(said, other))


def _ruling(said: Verdict | Failure, *, answered: bool) -> Ruling:
    if isinstance(said, Failure):
        raise NoVerdict(said.reason)
    found = {name: getattr(said, name) for name in (FIELDS if answered else FIELDS[:1])}
    if None in found.values():
        raise NoVerdict("unsaid")
    return Ruling(**found)


def _compared(first: Verdict | Failure, second: Verdict | Failure) -> list[str]:
    if isinstance(second, Failure):
        return ["second_failed"]
    pairs = [(getattr(first, field), getattr(second, field)) for field in FIELDS]
    return [
        f"{'agree' if one == other else 'differ'}_{name}"
        for name, (one, other) in zip(JUDGED_FIELDS, pairs, strict=True)
        if one is not None and other is not None
    ]
