"""Past selves: which snapshots stay, and how likely each one is to be met, by hand and as laws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ludus.league.population import Population, past_id


def grown(every: int, keep: int, last: int, newest: int = 1) -> Population:
    """A population as a run of `last` steps leaves it."""
    population = Population(every, keep, newest)
    for step in range(last + 1):
        if population.due(step):
            population.add(step)
    return population


def scores(**known: float) -> Callable[[str], float]:
    """Scores by the step of a past self: s0 = 0.25 is that of past/0."""
    return lambda policy: known[policy.replace("past/", "s")]


# --- when one is taken, and which stay ---


def test_snapshots_are_due_at_the_start_and_then_on_schedule() -> None:
    assert [step for step in range(13) if Population(4, 8).due(step)] == [0, 4, 8, 12]
    assert [step for step in range(13) if Population(0, 8).due(step)] == [0]


@pytest.mark.parametrize(
    ("last", "left"),
    [
        (3, [0, 1, 2, 3]),
        (4, [0, 2, 3, 4]),  # 1, 2 and 3 each stand between neighbours two steps apart: the oldest goes
        (5, [0, 2, 4, 5]),  # around 2 there are three steps, around 3 and 4 two
        (6, [0, 2, 4, 6]),
        (7, [0, 2, 4, 7]),
        (8, [0, 4, 7, 8]),  # 4, 5 and 4 steps around 2, 4 and 7
        (9, [0, 4, 7, 9]),
    ],
)
def test_thinning_to_four_by_hand(last: int, left: list[int]) -> None:
    assert grown(1, 4, last).steps == left
    assert grown(10, 4, 10 * last).steps == [10 * step for step in left]


def test_two_are_the_first_and_the_newest() -> None:
    assert grown(5, 2, 23).steps == [0, 20]


def test_the_newest_stay_as_many_as_asked_for() -> None:
    assert grown(1, 5, 9, newest=3).steps == [0, 2, 7, 8, 9]
    assert grown(1, 4, 9, newest=3).steps == [0, 7, 8, 9]


@settings(max_examples=60, deadline=None)
@given(every=st.integers(1, 9), newest=st.integers(1, 5), more=st.integers(1, 9), taken=st.integers(0, 120))
def test_the_history_is_covered_evenly_within_the_bound(
    every: int, newest: int, more: int, taken: int
) -> None:
    keep, last = newest + more, every * taken
    steps = grown(every, keep, last, newest).steps
    everything = list(range(0, last + 1, every))
    assert len(steps) == min(keep, len(everything))
    assert steps == sorted(set(steps) & set(everything))
    assert steps[0] == 0
    assert steps[-newest:] == everything[-newest:][-len(steps) :]
    gaps = [b - a for a, b in pairwise(steps)]
    assert max(gaps, default=0) <= max(every, 2 * last / (keep - newest))


def test_what_stays_does_not_depend_on_when_a_run_was_interrupted() -> None:
    whole, part = grown(3, 5, 120), grown(3, 5, 60)
    again = Population(3, 5)
    again.steps = list(part.steps)  # as a checkpoint gives it back
    for step in range(63, 121, 3):
        again.add(step)
    assert again.steps == whole.steps


# --- who is met how often ---


def test_laws_that_know_no_scores() -> None:
    def nobody_asks(_: str) -> float:
        raise AssertionError

    population = grown(10, 8, 30)
    assert population.ids == ["past/0", "past/10", "past/20", "past/30"]
    assert population.law("past/0", nobody_asks) == {"past/0": 1.0}
    assert population.law("past/latest", nobody_asks) == {"past/30": 1.0}
    assert population.law("past/latest:1", nobody_asks) == {"past/30": 1.0}
    assert population.law("past/latest:3", nobody_asks) == {
        f"past/{n}": pytest.approx(1 / 3) for n in (10, 20, 30)
    }
    assert population.law("past/uniform", nobody_asks) == dict.fromkeys(population.ids, 0.25)


def test_the_latest_of_a_young_run_are_all_that_there_are() -> None:
    assert grown(10, 8, 15).law("past/latest:5", lambda _: 0.5) == {"past/0": 0.5, "past/10": 0.5}


def test_prioritised_fictitious_self_play_by_hand() -> None:
    """f_hard(x) = (1 - x)^2 and f_var(x) = x (1 - x), normalised."""
    population = grown(1, 8, 2)
    known = scores(s0=0.9, s1=0.5, s2=0.2)
    # (0.01, 0.25, 0.64) and (0.09, 0.25, 0.16)
    hard = population.law("past/hard", known)
    assert hard == pytest.approx({"past/0": 1 / 90, "past/1": 25 / 90, "past/2": 64 / 90})
    even = population.law("past/even", known)
    assert even == pytest.approx({"past/0": 9 / 50, "past/1": 25 / 50, "past/2": 16 / 50})


def test_where_all_weights_are_0_all_are_alike() -> None:
    population = grown(1, 8, 3)
    assert population.law("past/hard", lambda _: 1.0) == dict.fromkeys(population.ids, 0.25)
    for certain in (0.0, 1.0):
        assert population.law("past/even", lambda _, x=certain: x) == dict.fromkeys(population.ids, 0.25)


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8))
def test_laws_are_laws_and_prefer_whom_they_should(known: list[float]) -> None:
    population = Population(1, 9)
    for step in range(len(known)):
        population.add(step)
    hard = population.law("past/hard", lambda p: known[population.ids.index(p)])
    even = population.law("past/even", lambda p: known[population.ids.index(p)])
    for law in (hard, even):
        assert list(law) == population.ids
        assert sum(law.values()) == pytest.approx(1.0)
        assert min(law.values()) >= 0.0
    for i, a in enumerate(known):
        for j, b in enumerate(known):
            if a <= b:  # whom it fares worse against comes at least as often
                assert hard[past_id(i)] >= hard[past_id(j)]
            if abs(a - 0.5) < abs(b - 0.5) - 1e-9:
                assert even[past_id(i)] >= even[past_id(j)]


def test_draws_follow_the_law_and_the_generator_alone() -> None:
    population = grown(1, 8, 2)
    known = scores(s0=0.9, s1=0.5, s2=0.2)
    drawn = population.draw("past/hard", known, 9000, Random(7))
    assert drawn == population.draw("past/hard", known, 9000, Random(7))
    seen = Counter(drawn)
    # Expected 100, 2500 and 6400; five standard deviations are at most 215.
    assert abs(seen["past/0"] - 100) < 50
    assert abs(seen["past/1"] - 2500) < 215
    assert abs(seen["past/2"] - 6400) < 215
