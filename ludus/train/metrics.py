"""What a step's episodes say, as plain numbers for metrics.jsonl."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from ludus.types import Episode, Stop


def summarise(episodes: Sequence[Episode]) -> dict[str, dict[str, Any]]:
    """Per game: rates and means over the step's episodes; masked ones count in nothing but `matches`.

    `illegal_rate`, `truncated_rate` and `reply_tokens` are per reply of the trained policy;
    `forfeit_rate` and `draw_rate` (all seats got the same return) per match; `returns` is the mean return
    per role over the matches in which the trained policy held it and had a move.
    """
    by_game: dict[str, list[Episode]] = {}
    for episode in episodes:
        by_game.setdefault(episode.game, []).append(episode)
    return {game: _one_game(members) for game, members in by_game.items()}


def masked(episodes: Sequence[Episode]) -> dict[str, int]:
    """How many episodes were masked, by reason."""
    return dict(Counter(e.masked for e in episodes if e.masked is not None))


def _one_game(episodes: Sequence[Episode]) -> dict[str, Any]:
    counted = [e for e in episodes if e.masked is None]
    replies = [t for e in counted for t in e.turns if t.trainable]
    returns: dict[str, list[float]] = {}
    for episode in counted:
        for seat in sorted({t.seat for t in episode.turns if t.trainable}):
            returns.setdefault(episode.roles[seat], []).append(episode.returns[seat])
    return {
        "matches": len(episodes),
        "turns": sum(len(e.turns) for e in counted),
        "tokens": sum(len(t.completion_ids) for t in replies),
        "returns": {role: fmean(values) for role, values in sorted(returns.items())},
        "illegal_rate": _mean(not t.legal for t in replies),
        "forfeit_rate": _mean(e.forfeit is not None for e in counted),
        "draw_rate": _mean(e.forfeit is None and len(set(e.returns)) == 1 for e in counted),
        "truncated_rate": _mean(t.stop is Stop.LENGTH for t in replies),
        "reply_tokens": _mean(len(t.completion_ids) for t in replies),
    }


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return fmean(numbers) if numbers else 0.0
