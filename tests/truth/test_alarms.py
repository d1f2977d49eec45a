"""Every alarm: silent on a healthy run, set off by its own symptom and by nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ludus.games.base import HasSpiel
from ludus.games.registry import make
from ludus.truth.alarms import Limits, check, ignores_observation
from ludus.truth.exploitability import exploitability
from ludus.truth.sequence_form import sequence_form

Change = Callable[[int, dict[str, Any], dict[str, Any]], None]


def run(steps: int, change: Change = lambda step, game, learn: None) -> list[dict[str, Any]]:
    records = []
    for step in range(1, steps + 1):
        game: dict[str, Any] = {
            "illegal_rate": 0.01,
            "truncated_rate": 0.0,
            "draw_rate": 0.3,
            "reply_tokens": 20.0,
            "returns": {"player_0": 0.1, "player_1": -0.1},
        }
        learn: dict[str, Any] = {"entropy": 0.5, "grad_norm": 0.4}
        change(step, game, learn)
        records.append({"step": step, "games": {"kuhn": game}, "learn": learn})
    return records


def sounding(records: list[dict[str, Any]]) -> set[str]:
    return {alarm.name for alarm in check(records)}


def late(step: int) -> bool:
    return step > 30


SYMPTOMS: dict[str, Change] = {
    "illegal": lambda step, game, learn: game.update(illegal_rate=0.3 if late(step) else 0.0),
    "truncated": lambda step, game, learn: game.update(truncated_rate=0.25 if late(step) else 0.0),
    "draws": lambda step, game, learn: game.update(draw_rate=1.0 if late(step) else 0.2),
    "seat_gap": lambda step, game, learn: game.update(returns={"player_0": -0.5, "player_1": 0.5}),
    "thinking_collapse": lambda step, game, learn: game.update(reply_tokens=9.0 if late(step) else 20.0),
    "entropy": lambda step, game, learn: learn.update(entropy=0.01 if late(step) else 0.5),
    "gradient_vanished": lambda step, game, learn: learn.update(grad_norm=1e-5 if late(step) else 0.4),
    "gradient_burst": lambda step, game, learn: learn.update(grad_norm=9.0 if step == 40 else 0.4),
}


@pytest.mark.parametrize("name", SYMPTOMS)
def test_each_alarm_has_its_symptom(name: str) -> None:
    assert sounding(run(40, SYMPTOMS[name])) == {name}


def test_a_healthy_run_is_silent() -> None:
    assert check(run(40)) == []
    assert check([]) == []


def test_one_bad_step_is_no_alarm() -> None:
    def once(step: int, game: dict[str, Any], learn: dict[str, Any]) -> None:
        if step == 40:
            game.update(illegal_rate=1.0, truncated_rate=1.0, reply_tokens=1.0)

    assert sounding(run(40, once)) == set()


def test_nothing_sounds_before_the_window_is_full() -> None:
    assert check(run(9, SYMPTOMS["seat_gap"])) == []
    assert sounding(run(10, SYMPTOMS["seat_gap"])) == {"seat_gap"}


def test_alarms_say_what_passed_which_limit() -> None:
    (alarm,) = check(run(40, SYMPTOMS["thinking_collapse"]), Limits(shrink=0.6))
    assert (alarm.where, alarm.value, alarm.limit) == ("kuhn", pytest.approx(0.45), 0.6)
    assert "20.0 to 9.0" in alarm.message
    assert check(run(40, SYMPTOMS["thinking_collapse"]), Limits(shrink=0.4)) == []


def report(bet: Callable[[str], float]) -> dict[str, Any]:
    game = make("kuhn_poker")
    assert isinstance(game, HasSpiel)
    policy = {s.key: {0: 1 - bet(s.key), 1: bet(s.key)} for s in sequence_form(game).sets}
    return exploitability(game, policy).to_json()


def test_a_policy_that_ignores_its_card_sets_an_alarm_off() -> None:
    blind = report(lambda key: 0.4)
    sees = report(lambda key: 0.1 + 0.4 * int(key[0]))
    assert ignores_observation(blind["policy"])[0] == pytest.approx(0)
    assert ignores_observation(sees["policy"])[0] == pytest.approx(0.8)
    assert ignores_observation(sees["policy"])[1] > 0.9  # an equilibrium calls with the king, never the jack
    for figure, names in ((blind, {"ignores_observation"}), (sees, set())):
        evaluation = {"step": 40, "eval": {"games": {"kuhn": {"opponents": {}, "exploitability": figure}}}}
        assert sounding([*run(40), evaluation]) == names


def test_evaluations_without_a_policy_say_nothing() -> None:
    assert check([{"step": 0, "eval": {"games": {"board": {"opponents": {}}}}}]) == []
