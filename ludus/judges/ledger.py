"""What a judge counts, and when it refuses to go on."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from ludus.errors import UserError
from ludus.judges.base import Failure, Stats, Verdict

_FEWEST = 20  # calls before an alarm may sound: fewer say little about a share
K = TypeVar("K")


@dataclass(slots=True)
class Ledger:
    """Counts per reason, and two alarms over the last `window` calls, those out of the cache left out.

    `max_unparsed` bounds the share of replies that did not parse, `max_failed` that of calls that brought
    no verdict for whatever reason. A share above its bound raises UserError: what survives such a judge is
    no fair sample, and a template that does not fit its model never mends itself.
    """

    id: str
    window: int
    max_unparsed: float
    max_failed: float
    attempts: Counter[str] = field(default_factory=Counter)
    quoted: int = 0
    cached: int = 0
    _calls: int = 0
    _questions: int = 0
    _failures: Counter[str] = field(default_factory=Counter)
    _replies: deque[bool] = field(init=False)  # of each reply, whether it did not parse
    _outcomes: deque[str | None] = field(init=False)  # of each call, why it failed

    def __post_init__(self) -> None:
        self._replies = deque(maxlen=self.window)
        self._outcomes = deque(maxlen=self.window)

    def called(self, result: Verdict | Failure) -> None:
        """Note how one call ended. Raises UserError where an alarm sounds, and then starts it anew."""
        self._calls += 1
        failed = result.reason if isinstance(result, Failure) else None
        if failed in (None, "parse"):
            self._replies.append(failed is not None)
        self._outcomes.append(failed)
        unparsed = sum(self._replies)
        if _above(unparsed, len(self._replies), self.window, self.max_unparsed):
            of = len(self._replies)
            self._replies.clear()
            raise UserError(
                f"judge {self.id}: {unparsed} of the last {of} replies are not in its format; check that the "
                "model behind the endpoint is the one the format is for, and that the server uses the chat "
                "template that docs/judges.md asks for"
            )
        lost = len(self._outcomes) - self._outcomes.count(None)
        if _above(lost, len(self._outcomes), self.window, self.max_failed):
            of = len(self._outcomes)
            reasons = Counter(reason for reason in self._outcomes if reason is not None)
            self._outcomes.clear()
            counts = ", ".join(f"{reason} {n}" for reason, n in reasons.most_common())
            raise UserError(
                f"judge {self.id}: {lost} of the last {of} calls brought no verdict ({counts}); "
                "mend the judge and resume, or raise max_failed"
            )

    def judged(self, results: Mapping[K, Verdict | Failure]) -> None:
        """Note how the questions of one call of `judge` ended."""
        self._questions += len(results)
        self._failures.update(r.reason for r in results.values() if isinstance(r, Failure))

    def stats(self) -> Stats:
        return Stats(
            questions=self._questions,
            verdicts=self._questions - self._failures.total(),
            failures=dict(self._failures),
            calls=self._calls,
            cached=self.cached,
            attempts=dict(self.attempts),
            quoted=self.quoted,
        )


def _above(count: int, of: int, window: int, bound: float) -> bool:
    return of >= min(window, _FEWEST) and count > bound * of
