"""Every alarm: silent on a healthy run, set off by its own symptom and by nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest

from ludus.config import AlarmName, AlarmsConfig
from ludus.games.base import HasSpiel
from ludus.games.registry import make
from ludus.truth.alarms import Alarm, after_evaluation, after_step
from ludus.truth.exploitability import exploitability
from ludus.truth.sequence_form import sequence_form

Figures = dict[str, Any]
Change = Callable[[int, Figures, Figures], None]  # of step, the first role's figures and the learner's

LIMITS = AlarmsConfig()


def role(**figures: float) -> Figures:
    return {
        "matches": 8,
        "replies": 20,
        "return_rms": 2.0,
        "illegal_rate": 0.01,
        "truncated_rate": 0.0,
        "draw_rate": 0.3,
        "reply_tokens": 20.0,
        **figures,
    }


def run(steps: int, change: Change = lambda step, first, learn: None) -> list[Figures]:
    records = []
    for step in range(1, steps + 1):
        first, learn = role(), {"entropy": 0.5, "grad_norm": 0.4}
        first["return"] = 0.1
        change(step, first, learn)
        worth = first.pop("return")
        game = {"returns": {"a": worth, "b": -worth}, "roles": {"a": first, "b": role()}}
        records.append({"step": step, "games": {"kuhn": game}, "learn": learn})
    return records


def check(records: list[Figures], **limits: Any) -> list[Alarm]:
    wanted = AlarmsConfig(**limits)
    return after_step(records[: wanted.window], records[-wanted.window - 1 :], wanted)


def sounding(records: list[Figures], **limits: Any) -> list[tuple[str, str]]:
    return [(alarm.name, alarm.where) for alarm in check(records, **limits)]


def late(step: int) -> bool:
    return step > 30


# The figure of the last ten of forty steps, or of the last one, just beyond the threshold and just within it.
SYMPTOMS: dict[AlarmName, tuple[str, Change, Change]] = {
    "illegal": (
        "kuhn, a",
        lambda step, first, learn: first.update(illegal_rate=0.21 if late(step) else 0.0),
        lambda step, first, learn: first.update(illegal_rate=0.19 if late(step) else 1.0),
    ),
    "truncated": (
        "kuhn, a",
        lambda step, first, learn: first.update(truncated_rate=0.21 if late(step) else 0.0),
        lambda step, first, learn: first.update(truncated_rate=0.19 if late(step) else 1.0),
    ),
    "draws": (
        "kuhn, a",
        lambda step, first, learn: first.update(draw_rate=0.96 if late(step) else 0.2),
        lambda step, first, learn: first.update(draw_rate=0.94 if late(step) else 1.0),
    ),
    "seat_gap": (  # returns of 2 and -2, so half the matches are worth +0.8 - -0.8 over 2
        "kuhn",
        lambda step, first, learn: first.update({"return": -0.81} if late(step) else {}),
        lambda step, first, learn: first.update({"return": 0.79 if late(step) else 2.0}),
    ),
    "thinking_collapse": (
        "kuhn, a",
        lambda step, first, learn: first.update(reply_tokens=9.9 if late(step) else 20.0),
        lambda step, first, learn: first.update(reply_tokens=10.1 if late(step) else 20.0),
    ),
    "entropy": (
        "learner",
        lambda step, first, learn: learn.update(entropy=0.0049 if late(step) else 0.5),
        lambda step, first, learn: learn.update(entropy=0.0051 if late(step) else 0.0),
    ),
    "gradient_vanished": (
        "learner",
        lambda step, first, learn: learn.update(grad_norm=0.9e-4 if late(step) else 0.4),
        lambda step, first, learn: learn.update(grad_norm=1.1e-4),
    ),
    "gradient_burst": (
        "learner",
        lambda step, first, learn: learn.update(grad_norm=8.1 if step == 40 else 0.4),
        lambda step, first, learn: learn.update(grad_norm=7.9 if step == 40 else 0.4),
    ),
}


@pytest.mark.parametrize("name", SYMPTOMS)
def test_each_alarm_has_its_symptom(name: AlarmName) -> None:
    where, beyond, within = SYMPTOMS[name]
    (alarm,) = check(run(40, beyond))
    assert (alarm.name, alarm.where, alarm.limit) == (name, where, getattr(LIMITS, name))
    assert check(run(40, within)) == []


def test_no_alarm_is_without_a_test() -> None:
    assert {*SYMPTOMS, "ignores_observation"} == set(get_args(AlarmName))


@pytest.mark.parametrize("name", SYMPTOMS)
def test_a_threshold_silences_its_own_alarm(name: AlarmName) -> None:
    _, beyond, _ = SYMPTOMS[name]
    (alarm,) = check(run(40, beyond))
    beside = 1.01 if alarm.value > alarm.limit else 0.99
    assert check(run(40, beyond), **{name: alarm.value * beside}) == []


def test_values_are_worked_out_by_hand() -> None:
    def found(name: AlarmName) -> Alarm:
        (alarm,) = check(run(40, SYMPTOMS[name][1]))
        return alarm

    assert found("illegal").value == pytest.approx(0.21)
    assert found("seat_gap").value == pytest.approx(2 * 0.81 / 2)
    assert found("thinking_collapse").value == pytest.approx(9.9 / 20)
    assert found("gradient_burst").value == pytest.approx(8.1 / 0.4)
    assert found("gradient_vanished").value == pytest.approx(0.9e-4)
    assert str(found("thinking_collapse")) == (
        "thinking_collapse (kuhn, a): its replies shrank from 20.0 to 9.9 tokens; it sounds at less than 0.5"
    )
    assert str(found("seat_gap")) == (
        "seat_gap (kuhn): b gets +0.81, a -0.81 where 2.00 is at stake; it sounds at more than 0.8"
    )


def test_steps_weigh_as_much_as_they_hold() -> None:
    """Nine steps of 20 replies, a tenth of them illegal, and one of 80 illegal ones: 98 of 260."""

    def once(step: int, first: Figures, learn: Figures) -> None:
        first.update(illegal_rate=0.1)
        if step == 40:
            first.update(replies=80, illegal_rate=1.0)

    (alarm,) = check(run(40, once))
    assert alarm.value == pytest.approx(98 / 260)


def test_a_role_that_was_not_held_for_some_steps_is_judged_by_the_others() -> None:
    records = run(40, SYMPTOMS["illegal"][1])
    for record in records[31:]:
        del record["games"]["kuhn"]["roles"]["a"], record["games"]["kuhn"]["returns"]["a"]
    assert sounding(records) == [("illegal", "kuhn, a")]
    for record in records:
        record["games"] = {}
    assert sounding(records) == []


def test_a_healthy_run_is_silent() -> None:
    assert check(run(40)) == []
    assert after_step([], [], LIMITS) == []


def test_one_bad_step_is_no_alarm() -> None:
    def once(step: int, first: Figures, learn: Figures) -> None:
        if step == 40:
            first.update(illegal_rate=1.0, truncated_rate=1.0, reply_tokens=1.0, draw_rate=1.0)

    assert sounding(run(40, once)) == []


def test_nothing_sounds_before_the_window_is_full() -> None:
    def bad(step: int, first: Figures, learn: Figures) -> None:
        first.update(illegal_rate=0.5)

    assert sounding(run(9, bad)) == []
    assert sounding(run(10, bad)) == [("illegal", "kuhn, a")]
    assert sounding(run(1, bad), window=1) == [("illegal", "kuhn, a")]


def test_lengths_are_compared_once_the_windows_do_not_overlap() -> None:
    def shorter(step: int, first: Figures, learn: Figures) -> None:
        first.update(reply_tokens=20.0 if step <= 10 else 5.0)

    assert sounding(run(19, shorter)) == []
    assert sounding(run(20, shorter)) == [("thinking_collapse", "kuhn, a")]


def test_learning_without_gradients_says_nothing_of_a_burst() -> None:
    """A step of masked matches alone learns nothing; numbers that are not finite are null once written."""

    def gone(step: int, first: Figures, learn: Figures) -> None:
        learn.update(grad_norm=(None, float("nan"), float("inf"))[step % 3], entropy=None)

    assert sounding(run(40, gone)) == []


@pytest.mark.parametrize(("steps", "heard"), [(10, []), (11, [("gradient_burst", "learner")])])
def test_a_burst_is_held_against_a_whole_window_of_steps_before_it(
    steps: int, heard: list[tuple[str, str]]
) -> None:
    def last(step: int, first: Figures, learn: Figures) -> None:
        learn.update(grad_norm=9.0 if step == steps else 0.4)

    assert sounding(run(steps, last), window=10) == heard


def report(bet: Callable[[str], float]) -> Figures:
    game = make("kuhn_poker")
    assert isinstance(game, HasSpiel)
    policy = {s.key: {0: 1 - bet(s.key), 1: bet(s.key)} for s in sequence_form(game).sets}
    return exploitability(game, policy).to_json()


def measured(figures: Figures | None) -> Figures:
    exact = {} if figures is None else {"exploitability": figures}
    return {"step": 40, "eval": {"games": {"kuhn": {"opponents": {}, **exact}}}}


def test_a_policy_that_ignores_its_card_sets_an_alarm_off() -> None:
    blind = measured(report(lambda key: 0.4 + 0.2 * len(key[1:])))  # looks at the bets alone
    sees = measured(report(lambda key: 0.1 + 0.4 * int(key[0])))
    (alarm,) = after_evaluation(blind, LIMITS)
    assert (alarm.name, alarm.where, alarm.limit) == ("ignores_observation", "kuhn", 0.1)
    assert alarm.value == pytest.approx(0.0, abs=1e-9)
    assert str(alarm).endswith(
        "the policy differs by 0.000 between hands, an equilibrium by 0.66; it sounds at less than 0.1"
    )
    assert after_evaluation(sees, LIMITS) == []
    assert [a.value for a in after_evaluation(sees, AlarmsConfig(ignores_observation=0.6))] == [
        pytest.approx(0.32**0.5)
    ]


def test_where_hands_need_not_differ_nothing_sounds() -> None:
    blind = measured(report(lambda key: 0.4))
    assert after_evaluation(blind, AlarmsConfig(must_differ=0.7)) == []
    assert after_evaluation(measured({"differs": None, "equilibrium_differs": None}), LIMITS) == []
    assert after_evaluation(measured({"exploitability": 0.1}), LIMITS) == []
    assert after_evaluation(measured(None), LIMITS) == []
