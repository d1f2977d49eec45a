"""What a person sees: plain lines in a log, a live table on a terminal, and the summary at the end."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from ludus.config import validate
from ludus.records import changes
from ludus.train.display import Display
from ludus.train.rundir import RunDir
from ludus.truth.alarms import Alarm

CONFIG = validate(
    {"name": "t", "model": {"path": "m"}, "games": [{"name": "kuhn_poker"}], "train": {"steps": 4}}, "test"
)


def training(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "wall": 3600.0 + step,
        "games": {
            "kuhn_poker": {
                "matches": 64,
                "returns": {"player_0": -0.25, "player_1": 0.25},
                "illegal_rate": 0.015,
                "forfeit_rate": 0.5,
                "draw_rate": 0.0,
                "reply_tokens": 12.34,
            }
        },
        "learn": {"loss": 0.0000123, "grad_norm": 1.5, "entropy": None},
        "speed": {"games_per_s": 50.0, "tokens_per_s": 4321.0},
        "masked": {"timeout": 2, "aborted": 0},
    }


def evaluation(step: int, score: float, illegal: float) -> dict[str, Any]:
    figures = {"score": score, "ci95": [score - 0.1, score + 0.1], "illegal_rate": illegal}
    exact = {"exploitability": 0.5 - 0.1 * step, "ci95": [0.1, 0.5]}
    return {
        "step": step,
        "eval": {"games": {"kuhn_poker": {"opponents": {"random": figures}, "exploitability": exact}}},
    }


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "run", CONFIG)


def played(run: RunDir, stream: io.StringIO) -> str:
    display = Display(CONFIG, run, stream)
    for record in (evaluation(0, 0.5, 0.1), training(1), training(2), evaluation(2, 0.7, 0.1)):
        run.append(record)
        (display.evaluation if "eval" in record else display.step)(record)
    display.close()
    display.close()
    display.summary()
    return stream.getvalue()


def test_a_log_has_one_plain_line_per_step(run: RunDir) -> None:
    lines = played(run, io.StringIO()).splitlines()
    assert "\x1b" not in "".join(lines)
    steps = [line for line in lines if line.startswith("step 1/4") or line.startswith("step 2/4")]
    assert len(steps) == 2
    for expected in (
        "kuhn_poker: 64 matches",
        "player_0 -0.25 player_1 +0.25",
        "illegal 1.5%",
        "draws 0.0%",
        "forfeits 50.0%",
        "reply 12.3 tokens",
        "loss 1.2e-05, gradient 1.500, entropy -",
        "masked timeout 2 ",
        "50.0 games/s, 4,321 tokens/s",
        "1:00:01 elapsed",
    ):
        assert expected in steps[0], expected
    assert "aborted" not in steps[0]


def test_the_summary_compares_the_first_with_the_last_measurement(run: RunDir) -> None:
    lines = played(run, io.StringIO()).splitlines()
    assert lines[-4:-1] == [
        "kuhn_poker: exploitability: 0.500 [0.100, 0.500] -> 0.300 [0.100, 0.500]",
        "kuhn_poker: score vs random: 50.0% [40.0%, 60.0%] -> 70.0% [60.0%, 80.0%]",
        "kuhn_poker: illegal replies vs random: 10.0% -> 10.0%",
    ]
    assert lines[-1].endswith("run")


def test_the_summary_of_a_resumed_run_starts_at_its_very_first_measurement(run: RunDir) -> None:
    played(run, io.StringIO())
    stream = io.StringIO()
    display = Display(CONFIG, run, stream)
    run.append(evaluation(4, 0.9, 0.0))
    display.summary()
    assert "50.0% [40.0%, 60.0%] -> 90.0%" in stream.getvalue()


def test_a_terminal_gets_a_live_table(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    text = played(run, Terminal())
    assert "\x1b[" in text
    assert "step 2/4" in text
    assert "Before and after" in text


BLIND = Alarm("ignores_observation", "kuhn_poker", 0.01, 0.05, "the policy differs by 0.010 between hands")
ILLEGAL = Alarm("illegal", "kuhn_poker, [bold]player_0[/bold]", 0.75, 0.2, "75.0% of its replies are illegal")


def test_a_log_names_the_alarms_that_sound_in_each_line(run: RunDir) -> None:
    stream = io.StringIO()
    display = Display(CONFIG, run, stream)
    display.step(training(1), [ILLEGAL, BLIND])
    display.step(training(2))
    first, second = stream.getvalue().splitlines()[1:]
    assert first.endswith(
        " | alarms: illegal (kuhn_poker, [bold]player_0[/bold]), ignores_observation (kuhn_poker)"
    )
    assert "alarm" not in second


def test_a_terminal_shows_an_alarm_while_it_sounds(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    display = Display(CONFIG, run, stream)
    display.step(training(1), [ILLEGAL])
    sounding = stream.getvalue()
    display.step(training(2))
    display.close()
    assert (
        "alarm: illegal (kuhn_poker, [bold]player_0[/bold]): 75.0% of its replies are illegal; "
        "it sounds at more than 0.2" in sounding
    )
    assert "alarm:" not in stream.getvalue()[len(sounding) :]


def test_a_run_without_measurements_says_so(run: RunDir) -> None:
    stream = io.StringIO()
    Display(CONFIG, run, stream).summary()
    assert "nothing was measured" in stream.getvalue()


def test_changes_know_which_way_is_better() -> None:
    rows = changes(evaluation(0, 0.5, 0.1)["eval"], evaluation(2, 0.4, 0.1)["eval"])
    assert [(row.figure, row.better) for row in rows] == [
        ("exploitability", True),
        ("score vs random", False),
        ("illegal replies vs random", None),
    ]


def test_what_was_not_measured_before_is_shown_alone() -> None:
    rows = changes({"games": {}}, evaluation(2, 0.4, 0.1)["eval"])
    assert [(row.before, row.better) for row in rows] == [("-", None)] * 3
    assert rows[1].after == "40.0% [30.0%, 50.0%]"
