"""Values and best responses against OpenSpiel's own, and against brute force where forfeits come in."""

from __future__ import annotations

import itertools
from random import Random
from typing import Any

import numpy as np
import pyspiel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ludus.errors import UserError
from ludus.truth.sequence_form import SequenceForm

GAMES = (
    "kuhn_poker",
    "leduc_poker",
    "leduc_poker(suit_isomorphism=true)",
    "liars_dice(numdice=1,dice_sides=3)",
)
FORMS = {name: SequenceForm(pyspiel.load_game(name)) for name in GAMES}
Policy = dict[str, dict[int, float]]


def uniform(form: SequenceForm) -> Policy:
    return {s.key: {a: 1 / len(s.actions) for a in s.actions} for s in form.sets}


def cfr_plus(name: str) -> Policy:
    solver = pyspiel.CFRPlusSolver(pyspiel.load_game(name))
    for _ in range(30):
        solver.evaluate_and_update_policy()
    return {key: dict(row) for key, row in solver.tabular_average_policy().policy_table().items()}


def spiel_policy(policy: Policy) -> Any:
    return pyspiel.TabularPolicy({key: list(row.items()) for key, row in policy.items()})


def random_policy(form: SequenceForm, seed: int) -> Policy:
    rng = Random(seed)
    policy = {}
    for s in form.sets:
        weights = [rng.choice((0.0, rng.random(), 1.0)) for _ in s.actions]
        total = sum(weights)
        policy[s.key] = {
            a: w / total if total else 1 / len(weights) for a, w in zip(s.actions, weights, strict=True)
        }
    return policy


@pytest.mark.parametrize("name", GAMES)
@pytest.mark.parametrize("kind", ["uniform", "cfr+"])
def test_openspiel_agrees(name: str, kind: str) -> None:
    game, form = pyspiel.load_game(name), FORMS[name]
    policy = uniform(form) if kind == "uniform" else cfr_plus(name)
    values = form.evaluate(form.behaviour(policy))
    theirs = spiel_policy(policy)
    assert values.nash_conv[0] == pytest.approx(pyspiel.nash_conv(game, theirs), abs=1e-9)
    root = game.new_initial_state()
    for seat in (0, 1):
        best = pyspiel.TabularBestResponse(game, seat, theirs).value_from_state(root)
        assert values.best_response[seat, 0] == pytest.approx(best, abs=1e-9)
    on_policy = pyspiel.expected_returns(root, theirs, -1, True)
    assert values.value[0] == pytest.approx(on_policy[0], abs=1e-9)


def test_uniform_kuhn_is_eleven_twelfths() -> None:
    form = FORMS["kuhn_poker"]
    values = form.evaluate(form.behaviour(uniform(form)))
    assert len(form.sets) == 12
    assert values.nash_conv[0] == pytest.approx(11 / 12, abs=1e-12)
    assert values.value[0] == pytest.approx(1 / 8, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_any_policy_agrees_with_openspiel(seed: int) -> None:
    form = FORMS["kuhn_poker"]
    policy = random_policy(form, seed)
    ours = form.evaluate(form.behaviour(policy)).nash_conv[0]
    theirs = pyspiel.nash_conv(pyspiel.load_game("kuhn_poker"), spiel_policy(policy))
    assert ours == pytest.approx(theirs, abs=1e-9)


def test_many_policies_at_once_are_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    form = FORMS["leduc_poker(suit_isomorphism=true)"]
    columns = np.concatenate([form.behaviour(random_policy(form, seed)) for seed in range(7)], axis=1)
    forfeit = np.random.default_rng(0).uniform(0, 0.2, (len(form.sets), 7))
    alone = [form.evaluate(columns[:, k : k + 1], forfeit[:, k : k + 1]) for k in range(7)]
    monkeypatch.setattr("ludus.truth.sequence_form._CHUNK", 3 * form.cells)  # several chunks
    together = form.evaluate(columns, forfeit)
    np.testing.assert_allclose(together.value, [v.value[0] for v in alone], atol=1e-12)
    np.testing.assert_allclose(together.best_response.T, [v.best_response[:, 0] for v in alone], atol=1e-12)


def naive_value(state: Any, policy: Policy, forfeit: dict[str, float], responder: int | None) -> float:
    """Seat 0's value in Kuhn poker; a forfeit costs the offender 2 chips; `responder` never forfeits."""
    if state.is_terminal():
        return float(state.returns()[0])
    if state.is_chance_node():
        return sum(
            p * naive_value(state.child(a), policy, forfeit, responder) for a, p in state.chance_outcomes()
        )
    seat, key = state.current_player(), state.information_state_string()
    lost = 0.0 if seat == responder else forfeit[key]
    rest = sum(
        p * naive_value(state.child(a), policy, forfeit, responder) for a, p in policy[key].items() if p
    )
    return (1 - lost) * rest + lost * (-2.0 if seat == 0 else 2.0)


@pytest.mark.parametrize("seed", [1, 2])
def test_forfeits_agree_with_brute_force(seed: int) -> None:
    form, root = FORMS["kuhn_poker"], pyspiel.load_game("kuhn_poker").new_initial_state()
    policy = random_policy(form, seed)
    rng = Random(seed)
    forfeit = {s.key: rng.random() / 2 for s in form.sets}
    column = np.array([[forfeit[s.key]] for s in form.sets])
    values = form.evaluate(form.behaviour(policy), column)
    assert values.value[0] == pytest.approx(naive_value(root, policy, forfeit, None), abs=1e-12)
    for seat, sign in ((0, 1.0), (1, -1.0)):
        mine = [s for s in form.sets if s.seat == seat]
        best = max(
            sign
            * naive_value(
                root,
                policy | {s.key: {a: 1.0} for s, a in zip(mine, choice, strict=True)},
                forfeit,
                seat,
            )
            for choice in itertools.product((0, 1), repeat=len(mine))
        )
        assert values.best_response[seat, 0] == pytest.approx(best, abs=1e-12)


def test_forfeiting_everything_loses_everything() -> None:
    form = FORMS["kuhn_poker"]
    values = form.evaluate(form.behaviour(uniform(form)), np.ones((len(form.sets), 1)))
    assert values.value[0] == -2.0  # seat 0 moves first
    # Seat 0 best-responding wins 2 at once; seat 1 need not even move.
    assert values.best_response[:, 0].tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tiny_hanabi", "not zero-sum"),
        ("matrix_rps", "simultaneous"),
        ("kuhn_poker(players=3)", "3 players"),
        ("connect_four", "too large"),
    ],
)
def test_unfit_games_are_named(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        SequenceForm(pyspiel.load_game(name))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (None, "says nothing about"),
        ({0: 0.5, 1: 0.4}, "no law"),
        ({0: 1.5, 1: -0.5}, "no law"),
        ({0: 0.5, 7: 0.5}, "legal actions"),
    ],
)
def test_incomplete_tables_are_refused(row: dict[int, float] | None, said: str) -> None:
    form = FORMS["kuhn_poker"]
    policy = uniform(form)
    del policy["1pb"]
    if row is not None:
        policy["1pb"] = row
    with pytest.raises(UserError, match=said):
        form.behaviour(policy)
