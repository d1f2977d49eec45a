"""What a step's episodes say, as plain numbers for metrics.jsonl."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from ludus.judges.base import Stats
from ludus.rollout.judging import JUDGED_FIELDS
from ludus.types import Episode, Stop, Turn


def summarise(episodes: Sequence[Episode]) -> dict[str, dict[str, Any]]:
    """Per game: rates and means over the step's episodes; masked ones count in nothing but `matches`.

    `illegal_rate`, `truncated_rate` and `reply_tokens` are per reply of the trained policy;
    `forfeit_rate` and `draw_rate` (all seats got the same return) per match; `returns` is the mean return
    per role over the matches in which the trained policy held it and had a move. `roles` says the same of
    each role, over those matches (`matches`) and its own replies in them (`replies`), with `return_rms`, the
    root mean square of its returns.

    Where a game names its pay, a role has `terms`: the mean of each named term (a match's sum over the role's
    replies, and what its return is made of) over the matches that paid it. `counts` are summed over matches.
    Both are also broken down by the matches' tags: "harm/benign" is "harm" where a tag is "benign".
    `agreement` is the share of verdicts, per field, in which a second judge said the same as the first.
    """
    by_game: dict[str, list[Episode]] = {}
    for episode in episodes:
        by_game.setdefault(episode.game, []).append(episode)
    return {game: _one_game(members) for game, members in by_game.items()}


def masked(episodes: Sequence[Episode]) -> dict[str, int]:
    """How many episodes were masked, by reason."""
    return dict(Counter(e.masked for e in episodes if e.masked is not None))


def lost_lengths(episodes: Sequence[Episode]) -> dict[str, dict[str, float]]:
    """{"lost_lengths": {reason: mean, "kept": mean}}, or nothing where no episode was masked.

    The means are of the trained policy's reply tokens per match, so far as it got. Where they differ much,
    what is kept is no fair sample: a judge that is too slow for long answers shows here.
    """
    lengths: dict[str, list[int]] = {}
    for episode in episodes:
        tokens = sum(len(turn.completion_ids) for turn in episode.turns if turn.trainable)
        lengths.setdefault(episode.masked or "kept", []).append(tokens)
    if lengths.keys() <= {"kept"}:
        return {}
    return {"lost_lengths": {name: fmean(tokens) for name, tokens in sorted(lengths.items())}}


def judges(before: Mapping[str, Stats], now: Mapping[str, Stats]) -> dict[str, dict[str, Any]]:
    """{"judges": {name: counts}}, what each judge has done since `before`; nothing where there is none.

    Counted are questions, those without a verdict by reason (`failures`), calls, calls that the cache
    `spared`, attempts that failed by reason, and texts that held a marker of the judge's template (`quoted`).
    """
    found = {}
    for name, stats in now.items():
        new = stats - before[name]
        found[name] = {
            "questions": new.questions,
            "failures": new.failures,
            "calls": new.calls,
            "spared": new.cached,
            "attempts": new.attempts,
            "quoted": new.quoted,
        }
    return {"judges": found} if found else {}


def _one_game(episodes: Sequence[Episode]) -> dict[str, Any]:
    counted = [e for e in episodes if e.masked is None]
    replies = [t for e in counted for t in e.turns if t.trainable]
    roles: dict[str, list[tuple[Episode, int]]] = {}  # the seats in which the trained policy held it
    for episode in counted:
        for seat in sorted({t.seat for t in episode.turns if t.trainable}):
            roles.setdefault(episode.roles[seat], []).append((episode, seat))
    return {
        "matches": len(episodes),
        "turns": sum(len(e.turns) for e in counted),
        "tokens": sum(len(t.completion_ids) for t in replies),
        "returns": {role: _mean(e.returns[s] for e, s in held) for role, held in sorted(roles.items())},
        "forfeit_rate": _mean(e.forfeit is not None for e in counted),
        **_rates(counted, replies),
        "roles": {role: _one_role(held) for role, held in sorted(roles.items())},
        **_counts(counted),
        **_agreement(counted),
    }


def _one_role(held: Sequence[tuple[Episode, int]]) -> dict[str, Any]:
    replies = [t for e, seat in held for t in e.turns if t.seat == seat and t.trainable]
    return {
        "matches": len(held),
        "replies": len(replies),
        "return_rms": math.sqrt(_mean(e.returns[seat] ** 2 for e, seat in held)),
        **_rates([e for e, _ in held], replies),
        **_terms(held),
    }


def _terms(held: Sequence[tuple[Episode, int]]) -> dict[str, dict[str, float]]:
    """{"terms": {name: mean}}, or nothing where no term was paid."""
    values: dict[str, list[float]] = {}
    for episode, seat in held:
        paid = [turn.rewards for turn in episode.turns if turn.seat == seat]
        paid += episode.parts[seat : seat + 1]
        sums: dict[str, float] = {}
        for name, value in (item for terms in paid for item in terms.items()):
            sums[name] = sums.get(name, 0.0) + value
        for name, value in sums.items():
            for key in _keys(name, episode):
                values.setdefault(key, []).append(value)
    return {"terms": {name: fmean(values[name]) for name in sorted(values)}} if values else {}


def _counts(episodes: Sequence[Episode]) -> dict[str, dict[str, int]]:
    """{"counts": {name: sum}}, or nothing where nothing is counted."""
    sums: Counter[str] = Counter()
    for episode in episodes:
        for name, count in episode.counts.items():
            sums.update(dict.fromkeys(_keys(name, episode), count))
    return {"counts": dict(sorted(sums.items()))} if sums else {}


def _agreement(episodes: Sequence[Episode]) -> dict[str, dict[str, float]]:
    """{"agreement": {field: share}}, or nothing where no second judge was asked."""
    sums = Counter[str]()
    for episode in episodes:
        sums.update(episode.counts)
    both = {field: (sums[f"agree_{field}"], sums[f"differ_{field}"]) for field in JUDGED_FIELDS}
    shares = {field: agree / (agree + differ) for field, (agree, differ) in both.items() if agree + differ}
    return {"agreement": shares} if shares else {}


def _keys(name: str, episode: Episode) -> list[str]:
    return [name, *(f"{name}/{tag}" for tag in episode.tags.values())]


def _rates(matches: Sequence[Episode], replies: Sequence[Turn]) -> dict[str, float]:
    return {
        "illegal_rate": _mean(not t.legal for t in replies),
        "draw_rate": _mean(e.forfeit is None and len(set(e.returns)) == 1 for e in matches),
        "truncated_rate": _mean(t.stop is Stop.LENGTH for t in replies),
        "reply_tokens": _mean(len(t.completion_ids) for t in replies),
    }


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return fmean(numbers) if numbers else 0.0
