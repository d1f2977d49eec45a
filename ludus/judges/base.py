"""The protocol of judges: questions with ids go in, and by id a verdict or the reason why there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ludus.errors import UserError


@dataclass(frozen=True, slots=True)
class Question:
    """A request and the answer to it; without an answer, the request alone is judged.

    Raises UserError for an empty text: what did not parse is no text, and is never judged.
    """

    id: str  # unique within a call; replies are matched by it, never by position
    request: str = field(repr=False)
    answer: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, text in (("request", self.request), ("answer", self.answer)):
            if text is not None and not text.strip():
                raise UserError(
                    f"question {self.id!r} has an empty {name}: a text that did not parse is not judged; "
                    "leave the question out, or pass answer=None"
                )
            if text is not None and any("\ud800" <= c <= "\udfff" for c in text):
                raise UserError(f"the {name} of question {self.id!r} holds a lone surrogate: no text")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says. None: this judge does not say it, or there is no answer that it could say it of."""

    request_harmful: bool | None = None
    answer_harmful: bool | None = None
    refusal: bool | None = None  # the answer is a refusal
    raw: str = field(default="", repr=False)  # the judge's own words, for logs


FIELDS = ("request_harmful", "answer_harmful", "refusal")  # of a Verdict


@dataclass(frozen=True, slots=True)
class Failure:
    """There is no verdict. Whoever asked must neither pay nor blame anybody for it.

    `reason` is a short word to count by; docs/judges.md lists them.
    """

    reason: str
    detail: str = field(default="", repr=False)  # the reply that did not parse, the server's complaint


@dataclass(frozen=True, slots=True)
class Stats:
    """What a judge has done so far. A question makes one or two calls; see `Format.parts`."""

    questions: int = 0
    verdicts: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)  # questions without a verdict, by reason
    calls: int = 0  # made to the model, retries not counted
    cached: int = 0  # calls that were spared
    attempts: Mapping[str, int] = field(default_factory=dict)  # attempts that failed, by reason
    quoted: int = 0  # calls in which the judged text held a marker of the judge's template

    def __add__(self, other: Stats) -> Stats:
        return self._with(other, 1)

    def __sub__(self, other: Stats) -> Stats:
        """What was done since `other`, when less was done."""
        return self._with(other, -1)

    def _with(self, other: Stats, sign: int) -> Stats:
        def reasons(mine: Mapping[str, int], its: Mapping[str, int]) -> dict[str, int]:
            sums = {name: mine.get(name, 0) + sign * its.get(name, 0) for name in {**mine, **its}}
            return {name: count for name, count in sums.items() if count}

        return Stats(
            questions=self.questions + sign * other.questions,
            verdicts=self.verdicts + sign * other.verdicts,
            failures=reasons(self.failures, other.failures),
            calls=self.calls + sign * other.calls,
            cached=self.cached + sign * other.cached,
            attempts=reasons(self.attempts, other.attempts),
            quoted=self.quoted + sign * other.quoted,
        )


class Judge(Protocol):
    """Answers questions. `id` names it in messages and in caches; judges that differ have different ones."""

    @property
    def id(self) -> str: ...

    async def judge(self, questions: Sequence[Question]) -> dict[str, Verdict | Failure]:
        """One entry per question. Their ids differ (asserted).

        Raises UserError where so much fails that going on would mean to train on what happened to survive.
        """
        ...

    def stats(self) -> Stats: ...

    async def close(self) -> None: ...


def check_ids(questions: Sequence[Question]) -> None:
    """Asserts that the ids differ and are not empty."""
    ids = [question.id for question in questions]
    assert all(ids), "a question has an empty id"
    assert len(set(ids)) == len(ids), "two questions have the same id"
