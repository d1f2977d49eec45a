"""The result of one player against one opponent: what a match leaves, and what many add up to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ludus.truth.intervals import mean_interval, pair_interval
from ludus.types import Episode


@dataclass(frozen=True, slots=True)
class Result:
    """What counts of one match of two seats.

    `replies` and `refused` count each seat's replies and those of them that were refused; `masked` says why
    an engine's failure ended the match (it then counts nowhere), else None.
    """

    returns: tuple[float, float]
    replies: tuple[int, int]
    refused: tuple[int, int]
    masked: str | None = None

    @staticmethod
    def of(episode: Episode) -> Result:
        turns = [[t for t in episode.turns if t.seat == seat] for seat in (0, 1)]
        return Result(
            returns=(episode.returns[0], episode.returns[1]),
            replies=(len(turns[0]), len(turns[1])),
            refused=(sum(not t.legal for t in turns[0]), sum(not t.legal for t in turns[1])),
            masked=episode.masked,
        )

    def score(self, seat: int) -> float:
        """1 for the larger return, 1/2 for equal ones, 0 for the smaller."""
        mine, theirs = self.returns[seat], self.returns[1 - seat]
        return 0.5 if mine == theirs else float(mine > theirs)


@dataclass(frozen=True, slots=True)
class Score:
    """The result of one player against one opponent. `matches` counts those that were played to an end.

    `score` is the mean of win 1, draw 1/2, loss 0 and `ci95` its 95% interval (`pair_interval`);
    `per_seat` the same mean in either seat (None: nothing was played there); `illegal_rate` the share of
    this player's replies that were refused; `masked` counts matches that an engine's failure ended, which
    count nowhere else. Where stakes differ, as in poker, `mean_return` says more than `score`: `return_ci95`
    is its 95% interval (`mean_interval` over the pairs).
    """

    score: float
    ci95: tuple[float, float]
    win: float
    draw: float
    loss: float
    mean_return: float
    return_ci95: tuple[float, float]
    per_seat: tuple[float | None, float | None]
    illegal_rate: float
    matches: int
    masked: int

    @staticmethod
    def of(deals: Sequence[tuple[Result, Result]]) -> Score | None:
        """Sum up deals, each played with this player in seat 0 and then in seat 1.

        None where no match was played to an end.
        """
        scores: list[list[float]] = [[], []]  # per seat
        pairs: list[list[tuple[float, float]]] = []  # (score, return) of a deal's matches
        replies = refused = 0
        for deal in deals:
            played = [(seat, r) for seat, r in enumerate(deal) if r.masked is None]
            if played:
                pairs.append([(r.score(seat), r.returns[seat]) for seat, r in played])
            for seat, r in played:
                scores[seat].append(r.score(seat))
                replies += r.replies[seat]
                refused += r.refused[seat]
        every = scores[0] + scores[1]
        n = len(every)
        if not n:
            return None
        return Score(
            score=fmean(every),
            ci95=pair_interval([fmean(s for s, _ in pair) for pair in pairs]),
            win=every.count(1.0) / n,
            draw=every.count(0.5) / n,
            loss=every.count(0.0) / n,
            mean_return=fmean(r for pair in pairs for _, r in pair),
            return_ci95=mean_interval([fmean(r for _, r in pair) for pair in pairs]),
            per_seat=(fmean(scores[0]) if scores[0] else None, fmean(scores[1]) if scores[1] else None),
            illegal_rate=refused / replies if replies else 0.0,
            matches=n,
            masked=2 * len(deals) - n,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data, as it stands in metrics.jsonl."""
        return {
            "score": self.score,
            "ci95": list(self.ci95),
            "win": self.win,
            "draw": self.draw,
            "loss": self.loss,
            "mean_return": self.mean_return,
            "return_ci95": list(self.return_ci95),
            "per_seat": list(self.per_seat),
            "illegal_rate": self.illegal_rate,
            "matches": self.matches,
            "masked": self.masked,
        }
