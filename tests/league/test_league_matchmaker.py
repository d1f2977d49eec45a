"""The matchmaker: exact mixes, fair seatings, and nothing but (seed, step) behind them."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ludus.errors import UserError
from ludus.league.matchmaker import SELF, Matchmaker, shares

SEATS = {"kuhn": 2, "tic": 2, "odd": 3}


def matchmaker(**changes: Any) -> Matchmaker:
    settled: dict[str, Any] = {
        "seed": 5,
        "seats": SEATS,
        "weights": {"kuhn": 2.0, "tic": 1.0, "odd": 1.0},
        "matches": 16,
        "group_size": 1,
        "self_weight": 1.0,
        "opponents": {},
    }
    settled |= changes
    return Matchmaker(settled.pop("seed"), settled.pop("seats"), settled.pop("weights"), **settled)


# --- shares ---


@pytest.mark.parametrize(
    ("weights", "total", "parts"),
    [
        ([1.0], 7, [7]),
        ([1.0, 1.0], 8, [4, 4]),
        ([2.0, 1.0, 1.0], 16, [8, 4, 4]),
        ([1.0, 1.0, 1.0], 8, [3, 3, 2]),  # 2.67 each: the first ones win the tie
        ([5.0, 3.0, 1.0], 10, [6, 3, 1]),  # 5.56, 3.33, 1.11
        ([0.5, 0.3, 0.2], 4, [2, 1, 1]),  # 2, 1.2, 0.8
        ([1.0, 1000.0], 10, [0, 10]),  # too rare for a batch this small
    ],
)
def test_shares_by_hand(weights: list[float], total: int, parts: list[int]) -> None:
    assert shares(weights, total) == parts


@given(
    st.lists(st.integers(1, 60).map(lambda n: n / 4), min_size=1, max_size=6),
    st.integers(1, 300),
)
def test_shares_are_those_of_the_largest_remainder(weights: list[float], total: int) -> None:
    parts = shares(weights, total)
    assert sum(parts) == total
    quotas = [Fraction(w) * total / sum(map(Fraction, weights)) for w in weights]
    over = [i for i, (part, quota) in enumerate(zip(parts, quotas, strict=True)) if part > quota // 1]
    for i, (part, quota) in enumerate(zip(parts, quotas, strict=True)):
        assert part in (quota // 1, quota // 1 + 1)
        if i not in over:  # whoever was rounded up had at least as much left over
            assert all(quotas[k] % 1 >= quota % 1 - Fraction(1, 10**9) for k in over)
            assert all(k < i for k in over if weights[k] == weights[i])


# --- plans ---


def test_every_step_has_exactly_the_recipes_mix() -> None:
    maker = matchmaker()
    for step in range(5):
        assert Counter(plan.game for plan in maker.plan(step)) == {"kuhn": 8, "tic": 4, "odd": 4}


def test_a_game_that_would_never_be_played_is_told() -> None:
    with pytest.raises(UserError, match=r"'tic' gets none of the 16 matches"):
        matchmaker(weights={"kuhn": 100.0, "tic": 1.0, "odd": 100.0}, matches=16)


def test_an_opponent_sits_only_in_the_games_that_it_plays() -> None:
    maker = matchmaker(self_weight=0.5, opponents={"cfr": 1.0}, plays={"cfr": ("kuhn",)})
    plans = [plan for step in range(20) for plan in maker.plan(step)]
    met = {game: {p for plan in plans for p in plan.seats if plan.game == game} for game in SEATS}
    assert met == {"kuhn": {SELF, "cfr"}, "tic": {SELF}, "odd": {SELF}}


@settings(max_examples=40, deadline=None)
@given(
    weights=st.fixed_dictionaries({g: st.integers(1, 9).map(float) for g in SEATS}),
    groups=st.integers(3, 24),
    group_size=st.integers(1, 4),
    opponents=st.dictionaries(st.sampled_from(["random", "minimax"]), st.floats(0.1, 2.0)),
    step=st.integers(0, 1000),
)
def test_a_plan_holds_together(
    weights: dict[str, float], groups: int, group_size: int, opponents: dict[str, float], step: int
) -> None:
    assume(all(shares(list(weights.values()), groups)))
    maker = matchmaker(
        weights=weights, matches=groups * group_size, group_size=group_size, opponents=opponents
    )
    plans = maker.plan(step)
    assert [p.episode for p in plans] == list(range(step * len(plans), (step + 1) * len(plans)))
    assert [p.group for p in plans] == [step * groups + i // group_size for i in range(len(plans))]
    mix = dict(zip(weights, shares(list(weights.values()), groups), strict=True))
    assert Counter(p.game for p in plans[::group_size]) == {g: n for g, n in mix.items() if n}
    for plan in plans:
        assert len(plan.seats) == SEATS[plan.game]
        assert SELF in plan.seats
        others = [policy for policy in plan.seats if policy != SELF]
        assert len(set(others)) <= 1
        assert len(others) in (0, SEATS[plan.game] - 1)
        assert set(others) <= set(opponents)
        first = plans[(plan.group - step * groups) * group_size]
        assert (plan.game, plan.seats, plan.match_seed) == (first.game, first.seats, first.match_seed)
    assert len({p.match_seed for p in plans}) == groups
    assert len({p.reply_seed for p in plans}) == len(plans)


def test_a_plan_is_a_pure_function_of_seed_and_step() -> None:
    used = matchmaker(opponents={"random": 1.0})
    for step in (9, 0, 3):
        used.plan(step)
    assert used.plan(4) == matchmaker(opponents={"random": 1.0}).plan(4)
    other = matchmaker(seed=6, opponents={"random": 1.0}).plan(4)
    assert {p.match_seed for p in other}.isdisjoint(p.match_seed for p in used.plan(4))
    assert {p.reply_seed for p in other}.isdisjoint(p.reply_seed for p in used.plan(4))


def test_no_seed_comes_twice_in_a_run() -> None:
    maker = matchmaker(group_size=2)
    plans = [plan for step in range(50) for plan in maker.plan(step)]
    assert len({p.match_seed for p in plans}) == len({p.group for p in plans}) == 400
    assert len({p.reply_seed for p in plans} | {p.match_seed for p in plans}) == 800 + 400


def test_plain_self_play_holds_every_seat() -> None:
    assert {p.seats for p in matchmaker().plan(0)} == {(SELF,) * 2, (SELF,) * 3}


@pytest.mark.parametrize("matches", [3, 4, 6, 8, 12, 15])
@pytest.mark.parametrize("group_size", [1, 3])
def test_against_an_opponent_the_seat_goes_round_in_each_game(matches: int, group_size: int) -> None:
    """Also where a step's number of matches would pin a game to one seat, were they counted together."""
    maker = matchmaker(
        weights=dict.fromkeys(SEATS, 1.0),
        matches=matches * group_size,
        group_size=group_size,
        self_weight=0.0,
        opponents={"random": 1.0},
    )
    plans = [plan for step in range(6) for plan in maker.plan(step)]
    for game, seats in SEATS.items():
        mine = [p.seats.index(SELF) for p in plans[::group_size] if p.game == game]
        assert len(mine) >= 6
        assert mine == [i % seats for i in range(len(mine))]
        assert all(p.seats.count(SELF) == 1 for p in plans if p.game == game)


def test_opponents_come_as_often_as_their_weights_say() -> None:
    maker = matchmaker(self_weight=2.0, opponents={"random": 1.0, "minimax": 1.0}, matches=400)
    seen: Counter[str] = Counter()
    for plan in (plan for step in range(5) for plan in maker.plan(step)):
        seen[next((policy for policy in plan.seats if policy != SELF), SELF)] += 1
    # 2,000 draws: five standard deviations are 112 and 97.
    assert abs(seen[SELF] - 1000) < 112
    assert abs(seen["random"] - 500) < 97
    assert abs(seen["minimax"] - 500) < 97


def test_an_opponent_with_seats_of_its_own_is_always_in_them() -> None:
    """And nothing else of the plan changes, such as who else is met, and in which seat."""
    opponents = {"past/uniform": 1.0, "random": 1.0}
    free = matchmaker(opponents=opponents)
    bound = matchmaker(
        opponents=opponents, taken={"past/uniform": {"kuhn": (1,), "tic": (0,), "odd": (0, 2)}}
    )
    drawn = {"past/uniform": ["past/0", "past/5"]}
    theirs = {"kuhn": {1}, "tic": {0}, "odd": {0, 2}}
    met = 0
    for step in range(10):
        for a, b in zip(free.plan(step, drawn), bound.plan(step, drawn), strict=True):
            past = [i for i, name in enumerate(b.seats) if name.startswith("past/")]
            if not past:
                assert a == b
                continue
            met += 1
            assert (a.episode, a.game, a.match_seed, a.reply_seed) == (
                b.episode,
                b.game,
                b.match_seed,
                b.reply_seed,
            )
            assert set(past) == theirs[b.game]
            assert set(a.seats) == set(b.seats) == {SELF, b.seats[past[0]]}
    assert met >= 20


# --- opponents that are a choice of several ---


def test_stand_ins_take_the_seat_each_alike_and_change_nothing_else() -> None:
    maker = matchmaker(self_weight=1.0, opponents={"past/uniform": 1.0, "random": 1.0}, matches=400)
    known = {"past/uniform": ["past/0", "past/5"]}
    seen: Counter[str] = Counter()
    for step in range(5):
        for named, filled in zip(maker.plan(step), maker.plan(step, known), strict=True):
            assert (named.episode, named.game, named.match_seed, named.reply_seed) == (
                filled.episode,
                filled.game,
                filled.match_seed,
                filled.reply_seed,
            )
            for before, after in zip(named.seats, filled.seats, strict=True):
                assert after in (known["past/uniform"] if before == "past/uniform" else [before])
            seen[next((policy for policy in filled.seats if policy != SELF), SELF)] += 1
    # 2,000 draws, a sixth of them each: five standard deviations are 83.
    assert set(seen) == {SELF, "random", "past/0", "past/5"}
    assert abs(seen["past/0"] - 333) < 83
    assert abs(seen["past/5"] - 333) < 83


def test_a_stand_in_that_was_drawn_twice_comes_twice_as_often() -> None:
    maker = matchmaker(self_weight=0.0, opponents={"past/hard": 1.0}, matches=400)
    drawn = {"past/hard": ["past/3", "past/3", "past/9"]}
    plans = [plan for step in range(5) for plan in maker.plan(step, drawn)]
    seen = Counter(policy for plan in plans for policy in set(plan.seats) - {SELF})
    assert abs(seen["past/3"] - 2000 * 2 / 3) < 106  # five standard deviations
    assert seen["past/3"] + seen["past/9"] == 2000


def test_all_of_a_group_and_all_other_seats_meet_one_stand_in() -> None:
    maker = matchmaker(self_weight=0.0, opponents={"past/uniform": 1.0}, group_size=4)
    plans = maker.plan(3, {"past/uniform": ["past/0", "past/5", "past/7"]})
    for group in range(4):
        assert len({plan.seats for plan in plans[4 * group : 4 * group + 4]}) == 1
    assert all(len(set(plan.seats) - {SELF}) == 1 for plan in plans)
