"""Alarms: what a run's own figures say when self-play goes wrong, each with a stated threshold.

All are pure functions of metrics records (`ludus.records`). Rates and lengths are means over the last
`window` training steps, so that one unlucky step sets nothing off; changes compare them with the first
`window` steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from ludus.records import Record, is_evaluation


@dataclass(frozen=True, slots=True)
class Limits:
    """Where the alarms go off."""

    window: int = 10  # training steps that are averaged
    shrink: float = 0.5  # reply length against the first steps', below which thinking has collapsed
    illegal: float = 0.2  # share of replies that are refused
    truncated: float = 0.2  # share of replies cut off at the token limit
    draws: float = 0.95  # share of matches without a winner
    seat_gap: float = 0.8  # difference between two roles' mean returns
    entropy: float = 0.02  # nats per token, below which nothing is explored any more
    still: float = 1e-4  # gradient norm, below which nothing is learnt any more
    burst: float = 20.0  # gradient norm against the median of all earlier steps
    blind: float = 0.02  # see `ignores_observation`
    should_differ: float = 0.2


@dataclass(frozen=True, slots=True)
class Alarm:
    """One alarm. `where` is a game's label, or "learner"; `value` passed `limit`."""

    name: str
    where: str
    value: float
    limit: float
    message: str


def check(records: Sequence[Record], limits: Limits = Limits()) -> list[Alarm]:
    """The alarms that sound after the last of `records`, in a fixed order. None before `window` steps."""
    steps = [r for r in records if not is_evaluation(r)]
    evaluations = [r for r in records if is_evaluation(r)]
    found: list[Alarm] = []
    if len(steps) >= limits.window:
        last, first = steps[-limits.window :], steps[: limits.window]
        for game in sorted({game for r in last for game in r.get("games", {})}):
            found += _game(game, _of(first, game), _of(last, game), len(steps) >= 2 * limits.window, limits)
        found += _learner(steps, limits)
    if evaluations:
        for game, result in evaluations[-1]["eval"].get("games", {}).items():
            rows = (result.get("exploitability") or {}).get("policy") or []
            found += _blind(game, rows, limits)
    return found


def ignores_observation(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """(how much the policy differs, how much an equilibrium does) between what one seat may have seen.

    `rows` are those of an exploitability report. Information sets of one seat with the same legal actions
    are compared; the figure is the largest total variation distance between two of them. A policy near 0
    where the equilibrium is far from 0 plays one mixed action whatever it sees (its cards, above all).
    """
    groups: dict[tuple[int, tuple[str, ...]], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["seat"], tuple(row["legal"])].append(row)

    def spread(key: str) -> float:
        laws = [[row[key] for row in group] for group in groups.values()]
        return max(
            (
                sum(abs(p - q) for p, q in zip(a, b, strict=True)) / 2
                for group in laws
                for i, a in enumerate(group)
                for b in group[:i]
            ),
            default=0.0,
        )

    return spread("probs"), spread("equilibrium")


def _game(game: str, first: list[Record], last: list[Record], compare: bool, limits: Limits) -> list[Alarm]:
    found = []
    for key, name, limit, words in (
        ("illegal_rate", "illegal", limits.illegal, "of the replies are illegal"),
        ("truncated_rate", "truncated", limits.truncated, "of the replies hit the token limit"),
        ("draw_rate", "draws", limits.draws, "of the matches are drawn"),
    ):
        rate = fmean(r[key] for r in last)
        if rate > limit:
            found.append(Alarm(name, game, rate, limit, f"{rate:.0%} {words}"))
    means = _returns(last)
    gap = max(means.values()) - min(means.values()) if means else 0.0
    if gap > limits.seat_gap:
        best = max(means, key=lambda role: means[role])
        found.append(
            Alarm("seat_gap", game, gap, limits.seat_gap, f"{best} gets {gap:.2f} more than the other")
        )
    before, now = (fmean(r["reply_tokens"] for r in part) for part in (first, last)) if first else (0.0, 0.0)
    if compare and now < limits.shrink * before:
        found.append(
            Alarm(
                "thinking_collapse",
                game,
                now / before,
                limits.shrink,
                f"replies shrank from {before:.1f} to {now:.1f} tokens",
            )
        )
    return found


def _learner(steps: Sequence[Record], limits: Limits) -> list[Alarm]:
    found = []
    entropies = _learned(steps[-limits.window :], "entropy")
    if entropies and fmean(entropies) < limits.entropy:
        low = fmean(entropies)
        found.append(Alarm("entropy", "learner", low, limits.entropy, f"{low:.3g} nats per token are left"))
    norms = _learned(steps, "grad_norm")
    recent = norms[-limits.window :]
    if recent and fmean(recent) < limits.still:
        low = fmean(recent)
        found.append(Alarm("gradient_vanished", "learner", low, limits.still, f"gradient norm {low:.2g}"))
    if len(norms) > limits.window and norms[-1] > (most := limits.burst * median(norms[:-1])):
        found.append(
            Alarm("gradient_burst", "learner", norms[-1], most, f"gradient norm {norms[-1]:.3g} at once")
        )
    return found


def _blind(game: str, rows: Sequence[Mapping[str, Any]], limits: Limits) -> list[Alarm]:
    differs, should = ignores_observation(rows)
    if differs >= limits.blind or should < limits.should_differ:
        return []
    message = f"the policy hardly depends on what it sees (by {differs:.3f}, an equilibrium by {should:.2f})"
    return [Alarm("ignores_observation", game, differs, limits.blind, message)]


def _of(steps: Sequence[Record], game: str) -> list[Record]:
    return [r["games"][game] for r in steps if game in r.get("games", {})]


def _returns(records: Sequence[Record]) -> dict[str, float]:
    by_role: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for role, value in record["returns"].items():
            by_role[role].append(value)
    return {role: fmean(values) for role, values in by_role.items()}


def _learned(steps: Sequence[Record], key: str) -> list[float]:
    return [value for r in steps if (value := r.get("learn", {}).get(key)) is not None]
