"""Estimators on hand-worked numbers, and against naive loops over random batches."""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ludus.algos.estimators import (
    EPSILON,
    Estimator,
    grpo,
    make_estimator,
    marshal,
    rae,
    reinforce,
    reinforce_pp,
    rloo,
    seat_return,
)
from ludus.errors import UserError
from ludus.types import Episode, Group, Stop, Turn

NAMES = ("rae", "reinforce", "grpo", "rloo", "reinforce_pp", "marshal")
ROLES = ("first", "second")


def turn(seat: int, *, trainable: bool = True, **rewards: float) -> Turn:
    return Turn(
        seat=seat,
        role=ROLES[seat],
        index=0,
        policy="self" if trainable else "random",
        version=0,
        prompt_ids=[1],
        completion_ids=[2],
        logprobs=[-0.5],
        stop=Stop.EOS,
        action="a",
        trainable=trainable,
        rewards=rewards,
    )


def episode(
    returns: tuple[float, ...],
    turns: Sequence[Turn] | None = None,
    *,
    game: str = "g",
    masked: str | None = None,
    roles: tuple[str, ...] = ROLES,
) -> Episode:
    if turns is None:
        turns = [turn(0), turn(1)]
    return Episode(0, game, 0, ("self", "self"), roles, list(turns), returns, masked=masked)


def alone(*episodes: Episode) -> list[Group]:
    return [Group([e]) for e in episodes]


# RAE


def test_rae_subtracts_the_baseline_from_before_the_batch() -> None:
    first, state = rae(alone(episode((1.0, -1.0)), episode((3.0, -3.0))), {}, decay=0.5)
    assert first == [[[1.0, -1.0]], [[3.0, -3.0]]]  # nothing known yet: b = 0
    # counted average of 1 then 3 at decay 0.5: (0.5 * 1 + 3) / (0.5 + 1) = 7/3
    b = state["baselines"]["g"]
    assert b["first"] == {"mean": pytest.approx(7 / 3), "weight": 1.5, "count": 2}
    assert b["second"]["mean"] == pytest.approx(-7 / 3)
    second, state = rae(alone(episode((0.0, 0.0))), state, decay=0.5)
    assert second[0][0] == [pytest.approx(-7 / 3), pytest.approx(7 / 3)]
    # (0.25 * 1 + 0.5 * 3 + 0) / 1.75 = 1
    assert state["baselines"]["g"]["first"]["mean"] == pytest.approx(1.0)


def test_rae_equals_adams_bias_corrected_average() -> None:
    returns = [2.0, -1.0, 0.5, 4.0, -3.0]
    state: dict[str, Any] = {}
    zero_started = 0.0
    for n, r in enumerate(returns, start=1):
        _, state = rae(alone(episode((r, -r))), state, decay=0.95)
        zero_started = 0.95 * zero_started + 0.05 * r
        assert state["baselines"]["g"]["first"]["mean"] == pytest.approx(zero_started / (1 - 0.95**n))


def test_rae_keeps_games_and_roles_apart() -> None:
    """Pitfall 8: the seat that always wins must not lend its baseline to the other one."""
    state: dict[str, Any] = {}
    for _ in range(3):
        _, state = rae(alone(episode((1.0, -1.0)), episode((5.0, 7.0), game="h")), state)
    advantages, _ = rae(alone(episode((1.0, -1.0)), episode((5.0, 7.0), game="h")), state)
    assert advantages == [
        [[0.0, 0.0]],
        [[0.0, 0.0]],
    ]  # constant returns: exactly zero from the second batch on


def test_rae_with_decay_one_is_the_running_mean() -> None:
    _, state = rae(alone(*(episode((r, 0.0)) for r in (1.0, 2.0, 6.0))), {}, decay=1.0)
    assert state["baselines"]["g"]["first"]["mean"] == pytest.approx(3.0)


def test_rae_goes_on_from_a_saved_state() -> None:
    """Four batches equal two, a trip through JSON, and two more."""
    batches = [alone(episode((r, -r)), episode((r / 3, -r / 3))) for r in (1.0, 0.1, -2.0, 0.7)]
    whole: dict[str, Any] = {}
    parted: dict[str, Any] = {}
    for i, batch in enumerate(batches):
        a, whole = rae(batch, whole)
        if i == 2:
            parted = json.loads(json.dumps(parted))
        b, parted = rae(batch, parted)
        assert a == b
    assert whole == parted


# The others on hand-worked numbers


def test_reinforce_pays_the_return_to_every_turn() -> None:
    match = episode((1.0, -1.0), [turn(0), turn(1), turn(0)])
    assert reinforce(alone(match), {})[0] == [[[1.0, -1.0, 1.0]]]


def test_grpo_whitens_each_role_over_its_group() -> None:
    group = Group([episode((1.0, 0.0)), episode((3.0, 0.0))])
    other = Group([episode((100.0, 1.0)), episode((100.0, 2.0))])
    advantages, _ = grpo([group, other], {})
    unit = 1.0 / (2.0**0.5 + EPSILON)  # mean 2, deviation of the sample sqrt(2)
    assert advantages[0] == [[pytest.approx(-unit), 0.0], [pytest.approx(unit), 0.0]]
    half = 0.5 / (0.5**0.5 + EPSILON)
    assert advantages[1] == [[0.0, pytest.approx(-half)], [0.0, pytest.approx(half)]]


def test_rloo_leaves_the_match_out() -> None:
    group = Group([episode((1.0, 0.0)), episode((2.0, 0.0)), episode((6.0, 3.0))])
    advantages, _ = rloo([group], {})
    assert advantages == [[[1.0 - 4.0, -1.5], [2.0 - 3.5, -1.5], [6.0 - 1.5, 3.0]]]


def test_rloo_with_a_shared_role_leaves_both_seats_out() -> None:
    group = Group([episode((1.0, -1.0), roles=("p", "p")), episode((2.0, 4.0), roles=("p", "p"))])
    advantages, _ = rloo([group], {})
    assert advantages == [[[1.0 - 3.0, -1.0 - 3.0], [2.0, 4.0]]]


@pytest.mark.parametrize("estimator", [grpo, rloo])
def test_a_group_of_one_has_no_baseline(estimator: Estimator) -> None:
    assert estimator(alone(episode((5.0, -5.0))), {})[0] == [[[0.0, 0.0]]]


def test_reinforce_pp_whitens_each_role_over_the_batch() -> None:
    advantages, _ = reinforce_pp(alone(*(episode((r, 2.0)) for r in (1.0, 2.0, 3.0))), {})
    unit = 1.0 / (1.0 + EPSILON)
    assert advantages == [[[pytest.approx(-unit), 0.0]], [[0.0, 0.0]], [[pytest.approx(unit), 0.0]]]


def test_marshal_on_matches_of_unequal_length() -> None:
    """Pitfall 9. Seat 0: to-go (0.5 + 2) and 2 in the long match, -1 in the short one; mean 3.5 / 3."""
    long = episode((2.0, 0.0), [turn(0, format=0.5), turn(1), turn(0)])
    short = episode((-1.0, 0.0), [turn(0), turn(1)])
    advantages, _ = marshal(alone(long, short), {})
    mean = 3.5 / 3
    assert advantages[0][0] == [pytest.approx(2.5 - mean), 0.0, pytest.approx(2.0 - mean)]
    assert advantages[1][0] == [pytest.approx(-1.0 - mean), 0.0]


def test_marshal_discounts_what_comes_later() -> None:
    match = episode((8.0, 0.0), [turn(0, a=1.0), turn(0, a=2.0), turn(0)])
    advantages, _ = marshal(alone(match), {}, discount=0.5)
    to_go = [1.0 + 0.5 * 6.0, 2.0 + 0.5 * 8.0, 8.0]
    assert advantages[0][0] == pytest.approx([r - 6.0 for r in to_go])


def test_seat_return_adds_named_rewards() -> None:
    match = episode((1.0, -1.0), [turn(0, judge=0.5, format=0.25), turn(1, judge=9.0), turn(0, judge=2.0)])
    assert seat_return(match, 0) == 1.0 + 0.75 + 2.0
    assert seat_return(match, 0, discount=0.5) == 1.0 + 0.75 + 1.0


def test_rloo_baseline_ignores_the_length_of_matches() -> None:
    """Pitfall 9: a match of many turns is still one match in the baseline."""
    long = episode((4.0, 0.0), [turn(0)] * 5)
    advantages, _ = rloo([Group([long, episode((1.0, 0.0)), episode((2.0, 0.0))])], {})
    assert advantages[0][1][0] == 1.0 - (4.0 + 2.0) / 2


# What all have in common


@pytest.mark.parametrize("name", NAMES)
def test_masked_and_frozen_contribute_nothing(name: str) -> None:
    estimator = make_estimator(name)
    plain = [Group([episode((1.0, 2.0)), episode((4.0, 2.5))])]
    frozen = [turn(0), turn(1, trainable=False)]
    crowd = [
        Group(
            [
                episode((1.0, 2.0)),
                episode((1e6, -1e6), masked="judge failed"),
                episode((4.0, 2.5)),
                episode((0.0, 1e6), [turn(1, trainable=False)]),
            ]
        )
    ]
    small, small_state = estimator(plain, {})
    big, big_state = estimator(crowd, {})
    assert big[0] == [small[0][0], [0.0, 0.0], small[0][1], [0.0]]
    assert big_state == small_state
    against_frozen, state = estimator([Group([episode((1.0, 1e6), frozen), episode((4.0, 1e6), frozen)])], {})
    assert [e[0] for e in against_frozen[0]] == [e[0] for e in small[0]]
    assert [e[1] for e in against_frozen[0]] == [0.0, 0.0]
    if name == "rae":
        assert list(state["baselines"]["g"]) == ["first"]


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce_pp", "marshal"])
@given(value=st.floats(-1e3, 1e3), count=st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_constant_returns_give_exactly_zero(name: str, value: float, count: int) -> None:
    """Pitfall 10: zero, not rounding noise over epsilon."""
    advantages, _ = make_estimator(name)([Group([episode((value, -value)) for _ in range(count)])], {})
    assert advantages == [[[0.0, 0.0]] * count]


@st.composite
def batches(draw: st.DrawFn) -> list[Group]:
    def one() -> Episode:
        turns = [
            turn(
                draw(st.integers(0, 1)),
                trainable=draw(st.booleans()),
                bonus=draw(st.sampled_from([0.0, 0.5, -1.0])),
            )
            for _ in range(draw(st.integers(0, 5)))
        ]
        returns = (draw(st.sampled_from([-1.0, 0.0, 2.0])), draw(st.sampled_from([-1.0, 0.0, 1.5])))
        return episode(
            returns, turns, game=draw(st.sampled_from("gh")), masked=draw(st.sampled_from([None, None, "x"]))
        )

    return [Group([one() for _ in range(draw(st.integers(1, 4)))]) for _ in range(draw(st.integers(1, 4)))]


def naive(name: str, groups: list[Group], discount: float) -> list[list[list[float]]]:
    """Every advantage from its definition, one turn at a time."""

    def trains(e: Episode, seat: int) -> bool:
        return e.masked is None and any(t.seat == seat and t.trainable for t in e.turns)

    def total(e: Episode, seat: int) -> float:
        own = [t for t in e.turns if t.seat == seat]
        return e.returns[seat] + sum(discount**k * sum(t.rewards.values()) for k, t in enumerate(own))

    def to_go(e: Episode, k: int) -> float:
        later = [t for t in e.turns[k:] if t.seat == e.turns[k].seat]
        paid = [sum(t.rewards.values()) for t in later]
        paid[-1] += e.returns[e.turns[k].seat]
        return sum(discount**j * r for j, r in enumerate(paid))

    def white(value: float, pool: list[float]) -> float:
        if len(set(pool)) < 2:
            return 0.0
        return (value - statistics.fmean(pool)) / (statistics.stdev(pool) + EPSILON)

    out = []
    for group in groups:
        out.append([])
        for e in group.episodes:
            row = []
            for k, t in enumerate(e.turns):
                if e.masked is not None or not t.trainable:
                    row.append(0.0)
                    continue
                same_game = [x for g in groups for x in g.episodes if x.game == e.game]
                mates = [x for x in group.episodes if x.game == e.game]
                mine = total(e, t.seat)
                if name == "reinforce":
                    row.append(mine)
                elif name == "reinforce_pp":
                    row.append(white(mine, [total(x, t.seat) for x in same_game if trains(x, t.seat)]))
                elif name == "grpo":
                    row.append(white(mine, [total(x, t.seat) for x in mates if trains(x, t.seat)]))
                elif name == "rloo":
                    rest = [total(x, t.seat) for x in mates if x is not e and trains(x, t.seat)]
                    row.append(mine - statistics.fmean(rest) if rest else 0.0)
                else:
                    pool = [
                        to_go(x, j)
                        for x in same_game
                        if x.masked is None
                        for j, u in enumerate(x.turns)
                        if u.seat == t.seat and u.trainable
                    ]
                    row.append(to_go(e, k) - statistics.fmean(pool))
            out[-1].append(row)
    return out


@pytest.mark.parametrize("name", ["reinforce", "grpo", "rloo", "reinforce_pp", "marshal"])
@given(groups=batches(), discount=st.sampled_from([1.0, 0.5]))
@settings(max_examples=40, deadline=None)
def test_equals_the_naive_loop(name: str, groups: list[Group], discount: float) -> None:
    fast, _ = make_estimator(name, discount=discount)(groups, {})
    slow = naive(name, groups, discount)
    for fast_group, slow_group in zip(fast, slow, strict=True):
        for fast_row, slow_row in zip(fast_group, slow_group, strict=True):
            assert fast_row == pytest.approx(slow_row, abs=1e-9)


@given(groups=batches())
@settings(max_examples=25, deadline=None)
def test_neither_batch_nor_state_is_changed(groups: list[Group]) -> None:
    before: Mapping[str, Any] = {
        "baselines": {"g": {"first": {"mean": 0.5, "weight": 2.0, "count": 3}}},
    }
    saved, saved_groups = copy.deepcopy(before), copy.deepcopy(groups)
    for name in NAMES:
        _, after = make_estimator(name)(groups, before)
        assert before == saved
        assert groups == saved_groups
        assert json.loads(json.dumps(after)) == after


def test_unknown_name_says_what_is_known() -> None:
    with pytest.raises(UserError, match=r"'gae'.*rae, reinforce, grpo"):
        make_estimator("gae")


def test_imports_without_torch() -> None:
    code = "import sys, ludus.algos.estimators; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
