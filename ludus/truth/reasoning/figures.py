"""avg@k with intervals, and the difference between two models on the same problems.

A problem is solved by a reply to which the library gives full marks; avg@k is the share of a problem's k
replies that solve it, averaged over problems. The problems are the units: k replies to one problem are not
independent, so intervals are taken over the problems' own averages. Over several tasks the average is that of
the tasks, each weighing the same.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ludus.errors import UserError
from ludus.truth.intervals import strata_interval
from ludus.truth.reasoning.asking import Marked

_FULL = 1 - 1e-9


def figures(marked: Sequence[Marked]) -> dict[str, Any]:
    """The figures, as plain data.

    {"overall": FIGURE, "groups": {group: FIGURE}, "tasks": {task: FIGURE}, "masked", "unread", "values"}
    FIGURE: {"solved", "ci95", "score", "problems", "replies", "no_answer", "cut"}

    A task's figure names its group too. `solved` is avg@k, `score` the library's own score averaged in the
    same way, `no_answer` and `cut` are shares of the replies. `masked` counts by reason replies that were
    never given, which count nowhere; `unread` by task and reason answers that the library could not read,
    which count as wrong. `values` holds task, group and [solved, score] of every problem, as `compare` wants
    them.
    """
    told = [m for m in marked if m.masked is None]
    groups = dict.fromkeys(m.problem.group for m in marked if m.problem.group)
    tasks = {m.problem.task: m.problem.group for m in marked}
    return {
        "overall": _figure(told),
        "groups": {group: _figure([m for m in told if m.problem.group == group]) for group in groups},
        "tasks": {
            task: {"group": group, **_figure([m for m in told if m.problem.task == task])}
            for task, group in tasks.items()
        },
        "masked": dict(Counter(m.masked for m in marked if m.masked is not None).most_common()),
        "unread": {
            task: dict(found)
            for task in tasks
            if (found := Counter(m.unread for m in told if m.problem.task == task and m.unread))
        },
        "values": {
            problem: {"task": of[0].problem.task, "group": of[0].problem.group, "value": list(_value(of))}
            for problem, of in _by_problem(told).items()
        },
    }


def _figure(told: Sequence[Marked]) -> dict[str, Any]:
    if not told:
        return {"solved": None, "ci95": [0.0, 1.0], "score": None, "problems": 0, "replies": 0}
    solved: dict[str, list[float]] = defaultdict(list)
    score: dict[str, list[float]] = defaultdict(list)
    for of in _by_problem(told).values():
        value = _value(of)
        solved[of[0].problem.task].append(value[0])
        score[of[0].problem.task].append(value[1])
    strata = list(solved.values())
    return {
        "solved": fmean(fmean(s) for s in strata),
        "ci95": list(strata_interval(strata)),
        "score": fmean(fmean(s) for s in score.values()),
        "problems": sum(map(len, strata)),
        "replies": len(told),
        "no_answer": fmean(not m.answered for m in told),
        "cut": fmean(m.cut for m in told),
    }


def _by_problem(told: Sequence[Marked]) -> dict[str, list[Marked]]:
    found: dict[str, list[Marked]] = defaultdict(list)
    for m in told:
        found[m.problem.id].append(m)
    return found


def _value(of: Sequence[Marked]) -> tuple[float, float]:
    return fmean(m.score >= _FULL for m in of), fmean(m.score for m in of)


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """How `solved` differs between two models' `figures(...)["values"]`, problem by problem.

    {"overall": CHANGE, "groups": {...}, "tasks": {...}, "unpaired"}
    CHANGE: {"before", "after", "difference", "ci95", "problems"}

    Intervals are those of the mean of paired differences. `unpaired` problems, which only one of the two was
    asked, count nowhere. Raises UserError where no problem is common.
    """
    common = [problem for problem in after if problem in before]
    if not common:
        raise UserError("the two results have no problem in common")

    def change(chosen: Sequence[str]) -> dict[str, Any]:
        pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for problem in chosen:
            task = after[problem]["task"]
            pairs[task].append((before[problem]["value"][0], after[problem]["value"][0]))
        was, now = (fmean(fmean(pair[i] for pair in of) for of in pairs.values()) for i in (0, 1))
        # A difference lies between -1 and 1, half of one more than it between 0 and 1.
        low, high = strata_interval([[(1 + b - a) / 2 for a, b in of] for of in pairs.values()])
        return {
            "before": was,
            "after": now,
            "difference": now - was,
            "ci95": [2 * low - 1, 2 * high - 1],
            "problems": len(chosen),
        }

    def by(key: str) -> dict[str, Any]:
        names = dict.fromkeys(after[problem][key] for problem in common if after[problem][key])
        return {name: change([p for p in common if after[p][key] == name]) for name in names}

    return {
        "overall": change(common),
        "groups": by("group"),
        "tasks": by("task"),
        "unpaired": len(before) + len(after) - 2 * len(common),
    }
