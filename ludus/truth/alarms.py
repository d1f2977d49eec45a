"""Alarms: what a run's own figures say when self-play goes wrong, each with a stated threshold.

Pure functions of metrics records (`ludus.records`). The thresholds are the recipe's (`AlarmsConfig`), one per
alarm and of its name. Figures are taken over the last `window` training steps, each step weighing as much as
it holds, so that one unlucky step sets nothing off; the length of replies is held against the first `window`
steps. No more than these have to be looked at, however long a run gets.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from ludus.config import AlarmName, AlarmsConfig
from ludus.records import Record, learnt

LEARNER = "learner"


@dataclass(frozen=True, slots=True)
class Alarm:
    """One alarm that sounds: `value` is on the wrong side of `limit`.

    `where` is "GAME, ROLE", a game's label, "learner", or "learner, POLICY" where several policies learn.
    """

    name: AlarmName
    where: str
    value: float
    limit: float
    message: str  # the figures in words

    def to_json(self) -> dict[str, Any]:
        """Plain data, as it stands in metrics.jsonl."""
        return asdict(self)

    def __str__(self) -> str:
        side = "more" if self.value > self.limit else "less"
        return f"{self.name} ({self.where}): {self.message}; it sounds at {side} than {self.limit:g}"


def after_step(first: Sequence[Record], last: Sequence[Record], limits: AlarmsConfig) -> list[Alarm]:
    """The alarms that sound after a training step, in a fixed order; none before there are `window` steps.

    `first` holds the first `window` training records of the run and `last` the newest `window` + 1, the step
    itself at the end (fewer of both where there are not so many yet).
    """
    recent = last[-limits.window :]
    if len(recent) < limits.window:
        return []
    early = first if first[-1]["step"] < recent[0]["step"] else []  # two windows that do not overlap, or none
    found: list[Alarm] = []
    for game in sorted({game for record in recent for game in record.get("games", {})}):
        now, before = _roles(recent, game), _roles(early, game)
        for role, steps in now.items():
            found += _role(f"{game}, {role}", before.get(role, []), steps, limits)
        found += _seat_gap(game, recent, limits)
    for policy in learnt(last[-1]):
        found += _learner(policy, last, recent, limits)
    return found


def after_evaluation(record: Record, limits: AlarmsConfig) -> list[Alarm]:
    """The alarms that sound after an evaluation: of policies that hardly differ between hands.

    See `ludus.truth.hands` for the figure. Only games count in which an equilibrium differs by `must_differ`.
    """
    found = []
    for game, result in record["eval"].get("games", {}).items():
        exact = result.get("exploitability") or {}
        differs, should = exact.get("differs"), exact.get("equilibrium_differs")
        if differs is None or should is None or should < limits.must_differ:
            continue
        if differs < limits.ignores_observation:
            message = f"the policy differs by {differs:.3f} between hands, an equilibrium by {should:.2f}"
            found.append(Alarm("ignores_observation", game, differs, limits.ignores_observation, message))
    return found


def _role(
    where: str, before: Sequence[Record], now: Sequence[Record], limits: AlarmsConfig
) -> Iterable[Alarm]:
    rates: tuple[tuple[AlarmName, str, str, float, str], ...] = (
        ("illegal", "illegal_rate", "replies", limits.illegal, "of its replies are illegal"),
        ("truncated", "truncated_rate", "replies", limits.truncated, "of its replies hit the token limit"),
        ("draws", "draw_rate", "matches", limits.draws, "of its matches are drawn"),
    )
    for name, key, weight, limit, words in rates:
        rate = _mean(now, key, weight)
        if rate is not None and rate > limit:
            yield Alarm(name, where, rate, limit, f"{rate:.1%} {words}")
    was, length = _mean(before, "reply_tokens", "replies"), _mean(now, "reply_tokens", "replies")
    if was and length is not None and length < limits.thinking_collapse * was:
        message = f"its replies shrank from {was:.1f} to {length:.1f} tokens"
        yield Alarm("thinking_collapse", where, length / was, limits.thinking_collapse, message)


def _seat_gap(game: str, steps: Sequence[Record], limits: AlarmsConfig) -> Iterable[Alarm]:
    """What a seat is worth more than another, over the root mean square of a return: at most 2 for two seats
    with opposite returns, whatever the stakes are."""
    sums: dict[str, float] = defaultdict(float)
    matches: dict[str, float] = defaultdict(float)
    squares = 0.0
    for record in steps:
        figures = record.get("games", {}).get(game, {})
        for role, of in figures.get("roles", {}).items():
            matches[role] += of["matches"]
            sums[role] += of["matches"] * figures["returns"][role]
            squares += of["matches"] * of["return_rms"] ** 2
    if not squares:
        return
    scale = math.sqrt(squares / sum(matches.values()))
    means = {role: sums[role] / matches[role] for role in sums}
    best, worst = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    gap = (means[best] - means[worst]) / scale
    if gap > limits.seat_gap:
        message = f"{best} gets {means[best]:+.2f}, {worst} {means[worst]:+.2f} where {scale:.2f} is at stake"
        yield Alarm("seat_gap", game, gap, limits.seat_gap, message)


def _learner(
    policy: str, last: Sequence[Record], recent: Sequence[Record], limits: AlarmsConfig
) -> Iterable[Alarm]:
    where = f"{LEARNER}, {policy}" if policy else LEARNER
    if entropies := _learnt(recent, policy, "entropy"):
        low = fmean(entropies)
        if low < limits.entropy:
            yield Alarm("entropy", where, low, limits.entropy, f"entropy {low:.3g} nats per token")
    if norms := _learnt(recent, policy, "grad_norm"):
        low = fmean(norms)
        if low < limits.gradient_vanished:
            message = f"mean gradient norm {low:.2g}"
            yield Alarm("gradient_vanished", where, low, limits.gradient_vanished, message)
    now, before = _learnt(last[-1:], policy, "grad_norm"), _learnt(last[:-1], policy, "grad_norm")
    if now and len(before) >= limits.window and (usual := median(before)) > 0:
        times = now[0] / usual
        if times > limits.gradient_burst:
            message = f"gradient norm {now[0]:.3g}, {times:.3g} times that of the steps before"
            yield Alarm("gradient_burst", where, times, limits.gradient_burst, message)


def _roles(steps: Sequence[Record], game: str) -> dict[str, list[Record]]:
    """Per role, what each of the steps says of it in one game."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in steps:
        for role, figures in record.get("games", {}).get(game, {}).get("roles", {}).items():
            found[role].append(figures)
    return dict(sorted(found.items()))


def _mean(figures: Sequence[Record], key: str, weight: str) -> float | None:
    total = sum(f[weight] for f in figures)
    return sum(f[weight] * f[key] for f in figures) / total if total else None


def _learnt(steps: Sequence[Record], policy: str, key: str) -> list[float]:
    """The finite values: any other is null in metrics.jsonl, and both must sound alike."""
    values = (learnt(record).get(policy, {}).get(key) for record in steps)
    return [value for value in values if value is not None and math.isfinite(value)]
