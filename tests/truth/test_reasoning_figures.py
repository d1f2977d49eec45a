"""avg@k, its intervals and differences by hand-worked numbers, and the intervals' cover by simulation."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ludus.errors import UserError
from ludus.truth.intervals import pair_interval, strata_interval, wilson
from ludus.truth.reasoning.asking import Marked
from ludus.truth.reasoning.figures import compare, figures
from ludus.truth.reasoning.problems import Problem


def reply(task: str, index: int, score: float, group: str = "g", **more: object) -> Marked:
    problem = Problem(f"{task}/{index}", task, group, "?")
    return Marked(problem, score, **{"answered": True, "cut": False, **more})  # type: ignore[arg-type]


def test_figures_by_hand() -> None:
    marked = [
        *(reply("a", 0, s) for s in (1.0, 0.0)),  # 1/2
        *(reply("a", 1, s) for s in (1.0, 1.0)),  # 1
        *(reply("b", 0, s) for s in (0.5, 0.0)),  # 0: half marks solve nothing
        reply("b", 1, 1.0),  # 1: of the one reply that came
        reply("b", 1, 0.0, masked="timeout", answered=False),
        reply("b", 2, 0.0, answered=False, cut=True),
        reply("b", 2, 0.0, unread="ValueError"),
        reply("c", 0, 0.0, "h", masked="prompt_too_long", answered=False),
    ]
    found = figures(marked)
    a, b = found["tasks"]["a"], found["tasks"]["b"]
    assert (a["solved"], a["problems"], a["replies"], a["group"]) == (0.75, 2, 4, "g")
    assert a["ci95"] == list(pair_interval([0.5, 1.0]))
    assert b["solved"] == pytest.approx(1 / 3)
    assert b["score"] == pytest.approx((0.25 + 1 + 0) / 3)
    assert (b["no_answer"], b["cut"]) == (1 / 5, 1 / 5)
    assert found["tasks"]["c"]["solved"] is None
    assert found["groups"]["h"]["solved"] is None
    assert found["overall"]["solved"] == pytest.approx((3 / 4 + 1 / 3) / 2)  # tasks weigh the same
    assert found["overall"]["ci95"] == list(strata_interval([[0.5, 1.0], [0.0, 1.0, 0.0]]))
    assert found["masked"] == {"timeout": 1, "prompt_too_long": 1}
    assert found["unread"] == {"b": {"ValueError": 1}}
    assert found["values"]["b/0"] == {"task": "b", "group": "g", "value": [0.0, 0.25]}


def test_differences_by_hand() -> None:
    before = figures([*(reply("a", i, s) for i, s in enumerate((0.0, 0.0, 1.0))), reply("b", 0, 1.0)])
    after = figures([*(reply("a", i, s) for i, s in enumerate((1.0, 0.0, 1.0))), reply("b", 9, 1.0)])
    found = compare(before["values"], after["values"])
    assert found["overall"]["difference"] == pytest.approx(1 / 3)  # of a alone: b has no common problem
    assert found["unpaired"] == 2
    assert list(found["tasks"]) == ["a"]
    low, high = pair_interval([1.0, 0.5, 0.5])
    assert found["tasks"]["a"]["ci95"] == [2 * low - 1, 2 * high - 1]
    with pytest.raises(UserError, match="no problem in common"):
        compare(before["values"], {})


def test_a_model_against_itself_does_not_differ() -> None:
    values = figures([reply("a", i, float(i % 2)) for i in range(40)])["values"]
    found = compare(values, values)["overall"]
    low, high = found["ci95"]
    assert found["difference"] == 0.0
    assert low == pytest.approx(-high)
    assert 0 < high < 0.06


def test_strata_by_hand() -> None:
    strata = [[0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0]]
    mean = (3 / 4 + 1 / 3) / 2
    variance = (0.25 / 4 + (1 / 3) / 3) / 4  # of the strata's values, over their numbers, over two squared
    assert strata_interval(strata) == pytest.approx(wilson(mean, mean * (1 - mean) / variance))
    assert strata_interval([]) == strata_interval([[]]) == (0.0, 1.0)
    assert strata_interval([[0.0] * 5, [0.0] * 5]) == wilson(0.0, 10)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=20))
def test_one_stratum_is_a_plain_interval(values: list[float]) -> None:
    assert strata_interval([values]) == pytest.approx(pair_interval(values))


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """4 replies each to 20 problems of two tasks, whose difficulties vary: replies are not independent."""
    rng = Random(5)
    held = 0
    for _ in range(400):
        strata = []
        for hard in (0.3, 0.7):  # the chance of each problem is Beta distributed around it
            chances = [rng.betavariate(2 * hard, 2 * (1 - hard)) for _ in range(20)]
            strata.append([sum(rng.random() < p for _ in range(4)) / 4 for p in chances])
        low, high = strata_interval(strata)
        held += low <= 0.5 <= high
    assert abs(held / 400 - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 400)
