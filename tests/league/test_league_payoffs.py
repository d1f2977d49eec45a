"""The payoff matrix: margins by hand, fading, what does not count, and exact saving."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ludus.league.matchmaker import SELF
from ludus.league.payoffs import Payoffs
from ludus.types import Episode


def match(*seats: str, returns: tuple[float, ...], game: str = "kuhn", **changes: Any) -> Episode:
    return Episode(0, game, 0, seats, tuple("abcdef"[: len(seats)]), [], returns, **changes)


def payoffs(*episodes: Episode, decay: float = 0.5, **stakes: float) -> Payoffs:
    table = Payoffs(stakes or {"kuhn": 2.0}, decay)
    table.count(episodes)
    return table


# --- margins ---


@pytest.mark.parametrize(
    ("seats", "returns", "margin"),
    [
        ((SELF, "x"), (2.0, -2.0), 2.0),  # zero-sum: the return itself
        (("x", SELF), (2.0, -2.0), -2.0),
        ((SELF, "x"), (3.0, 1.0), 1.0),  # (3 - 1) / 2
        ((SELF, "x"), (1.0, 1.0), 0.0),  # what both gain is no margin
        ((SELF, "x"), (-1.5, 0.5), -1.0),  # SPIRAL's forfeit
        ((SELF, "x", "x"), (2.0, -1.0, -1.0), 2.0),  # (2 - -1) 2 / 3
        (("x", SELF, "x"), (2.0, -1.0, -1.0), -1.0),  # (-1 - 0.5) 2 / 3
        ((SELF, "x", "x"), (5.0, 1.0, 3.0), 2.0),  # (5 - 2) 2 / 3
        ((SELF, SELF, "x"), (1.0, 0.0, -1.0), 0.5),  # the mean of 1 and 0
        ((SELF, SELF, "x"), (4.0, 1.0, 1.0), 0.5),  # ((4 - 1) + (1 - 2.5)) / 2 2 / 3
    ],
)
def test_a_margin_by_hand(seats: tuple[str, ...], returns: tuple[float, ...], margin: float) -> None:
    table = payoffs(match(*seats, returns=returns))
    assert table.margin("kuhn", SELF, "x") == pytest.approx(margin, abs=1e-15)
    assert table.margin("kuhn", "x", SELF) == pytest.approx(-margin, abs=1e-15)


@given(st.lists(st.floats(-5, 5, allow_subnormal=False), min_size=2, max_size=5), st.integers(0, 4))
def test_in_a_zero_sum_game_a_margin_is_the_return(returns: list[float], seat: int) -> None:
    seat %= len(returns)
    mean = sum(returns) / len(returns)
    paid = tuple(x - mean for x in returns)
    table = payoffs(match(*(SELF if i == seat else "x" for i in range(len(paid))), returns=paid))
    assert table.margin("kuhn", SELF, "x") == pytest.approx(paid[seat], abs=1e-9)


def test_means_are_per_game_and_opponent() -> None:
    table = payoffs(
        match(SELF, "x", returns=(2.0, -2.0)),
        match("x", SELF, returns=(1.0, -1.0)),
        match(SELF, "y", returns=(-2.0, 2.0)),
        match(SELF, "x", returns=(1.0, -1.0), game="tic"),
        kuhn=2.0,
        tic=1.0,
    )
    assert table.matrix(["x", SELF, "y"]) == {
        "kuhn": [[None, -0.5, None], [0.5, None, -2.0], [None, 2.0, None]],
        "tic": [[None, -1.0, None], [1.0, None, None], [None, None, None]],
    }


def test_what_is_no_match_of_two_policies_is_not_counted() -> None:
    table = payoffs(
        match(SELF, SELF, returns=(1.0, -1.0)),
        match("x", "y", returns=(1.0, -1.0)),
        match(SELF, "x", "y", returns=(2.0, -1.0, -1.0)),
        match(SELF, "x", returns=(0.0, 0.0), masked="the server was lost"),
    )
    assert table.state() == {}
    assert table.matrix([SELF, "x"]) == {"kuhn": [[None, None], [None, None]]}


def test_a_snapshots_matches_go_into_its_own_row_too() -> None:
    table = payoffs()
    table.count([match(SELF, "past/0", returns=(2.0, -2.0))], as_row=(SELF, "past/4"))
    assert table.margin("kuhn", "past/4", "past/0") == 2.0
    assert table.margin("kuhn", "past/0", "past/4") == -2.0
    assert table.margin("kuhn", SELF, "past/0") == 2.0
    assert table.margin("kuhn", SELF, "past/4") is None


# --- fading and scores ---


def test_only_the_row_of_the_trained_policy_fades() -> None:
    table = payoffs()
    table.count([match(SELF, "past/0", returns=(2.0, -2.0))] * 4, as_row=(SELF, "past/4"))
    table.fade()
    assert table.state()["kuhn"] == {SELF: {"past/0": [4, 2.0, 4.0]}, "past/4": {"past/0": [4, 4.0, 8.0]}}
    table.count([match(SELF, "past/0", returns=(-2.0, 2.0))] * 2)
    # Four matches of half the weight at +2, two at -2.
    assert table.margin("kuhn", SELF, "past/0") == 0.0
    assert table.margin("kuhn", "past/4", "past/0") == 2.0


def test_without_memory_nothing_is_left_of_a_step() -> None:
    table = payoffs(match(SELF, "x", returns=(2.0, -2.0)), decay=0.0)
    table.fade()
    assert table.margin("kuhn", SELF, "x") is None
    assert table.score("x", ["kuhn"]) == 0.5


def test_a_score_by_hand() -> None:
    """(1 + margin / stake) / 2 after one more match of margin 0."""
    table = payoffs(*[match(SELF, "x", returns=(2.0, -2.0))] * 3, kuhn=2.0, tic=1.0)
    assert table.score("x", ["kuhn"]) == pytest.approx((1 + (6 / 4) / 2) / 2)  # 0.875
    assert table.score("x", ["tic"]) == table.score("y", ["kuhn"]) == 0.5  # never met
    assert table.score("x", ["kuhn", "tic"]) == pytest.approx((0.875 + 0.5) / 2)


def test_a_score_stays_between_0_and_1() -> None:
    """Three seats can gain more than the stake, which is what one can lose."""
    table = payoffs(*[match(SELF, "x", "x", returns=(2.0, -1.0, -1.0))] * 9, kuhn=1.0)
    assert table.score("x", ["kuhn"]) == 1.0
    table = payoffs(*[match(SELF, "x", returns=(-9.0, 9.0))] * 9, kuhn=1.0)
    assert table.score("x", ["kuhn"]) == 0.0


# --- what is kept ---

policies = st.sampled_from([SELF, "past/0", "past/10", "random"])
results = st.tuples(policies, policies, st.floats(-2, 2), st.sampled_from(["kuhn", "tic"]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(results, max_size=6), max_size=5))
def test_the_matrix_is_antisymmetric_and_saved_exactly(
    steps: list[list[tuple[str, str, float, str]]],
) -> None:
    table = Payoffs({"kuhn": 2.0, "tic": 1.0}, 0.9)
    for i, step in enumerate(steps):
        table.fade()
        table.count(
            [match(a, b, returns=(x, -x), game=game) for a, b, x, game in step],
            as_row=(SELF, "past/10") if i == 2 else (SELF,),
        )
    names = [SELF, "past/0", "past/10", "random"]
    for rows in table.matrix(names[1:]).values():
        for i, row in enumerate(rows):
            assert row[i] is None
            for j, margin in enumerate(row):
                assert rows[j][i] == (None if margin is None else -margin)
    again = Payoffs({"kuhn": 2.0, "tic": 1.0}, 0.9)
    again.load_state(json.loads(json.dumps(table.state(), sort_keys=True)))
    assert again.state() == table.state()
    for kept in (table, again):
        kept.fade()
        kept.count([match(SELF, "random", returns=(0.1, -0.1))])
    assert again.state() == table.state()
    assert again.matrix(names) == table.matrix(names)
    assert again.score("random", ["kuhn", "tic"]) == table.score("random", ["kuhn", "tic"])


def test_who_is_forgotten_leaves_no_trace() -> None:
    table = payoffs()
    for new, old in (("past/1", "past/0"), ("past/2", "past/0"), ("past/2", "past/1")):
        table.count([match(SELF, old, returns=(1.0, -1.0))], as_row=(SELF, new))
    table.forget(["past/1"])
    assert "past/1" not in json.dumps(table.state())
    assert table.margin("kuhn", "past/2", "past/0") == 1.0
    assert table.margin("kuhn", "past/2", "past/1") is None
