"""Exact judges: any pure function of a question."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ludus.judges.base import Failure, Question, Stats, Verdict, check_ids
from ludus.judges.ledger import Ledger


class RuleJudge:
    """A function's word, for worlds whose rules are known. What it raises is its own bug."""

    def __init__(self, name: str, rule: Callable[[Question], Verdict | Failure]) -> None:
        self.id = f"rule/{name}"
        self._rule = rule
        self._ledger = Ledger(self.id, window=1, max_unparsed=1.0, max_failed=1.0)  # its failures are exact

    async def judge(self, questions: Sequence[Question]) -> dict[str, Verdict | Failure]:
        """See `Judge.judge`; raises nothing of its own."""
        check_ids(questions)
        results = {}
        for question in questions:
            results[question.id] = self._rule(question)
            self._ledger.called(results[question.id])
        self._ledger.judged(results)
        return results

    def stats(self) -> Stats:
        return self._ledger.stats()

    async def close(self) -> None:
        """Nothing to give back."""
