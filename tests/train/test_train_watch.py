"""What begins, what ends, when to stop: by hand-made records, and by real runs of a very small model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ludus import config as configuration
from ludus.cli import main
from ludus.config import AlarmsConfig, RunConfig
from ludus.records import read_metrics
from ludus.train import checkpoint
from ludus.train.loop import train
from ludus.train.watch import StoppedByAlarm, Watch


def step(number: int, illegal: float = 0.0, norm: float = 0.4) -> dict[str, Any]:
    role = {
        "matches": 8,
        "replies": 10,
        "return_rms": 1.0,
        "illegal_rate": illegal,
        "truncated_rate": 0.0,
        "draw_rate": 0.0,
        "reply_tokens": 20.0,
    }
    game = {"returns": {"a": 0.0}, "roles": {"a": role}}
    return {"step": number, "games": {"kuhn": game}, "learn": {"entropy": 0.5, "grad_norm": norm}}


def evaluation(number: int, differs: float) -> dict[str, Any]:
    exact = {"differs": differs, "equilibrium_differs": 0.66}
    return {"step": number, "eval": {"games": {"kuhn": {"opponents": {}, "exploitability": exact}}}}


def names(record: dict[str, Any]) -> list[str]:
    return [alarm["name"] for alarm in record["alarms"]]


# --- by hand ---


def test_an_alarm_is_told_once_when_it_begins_and_once_when_it_ends() -> None:
    watch = Watch(AlarmsConfig(window=2))
    told = {
        n: watch.see(step(n, illegal)) for n, illegal in enumerate([1.0, 0.0, 0.5, 0.5, 0.0, 0.0], start=1)
    }
    assert told == {
        1: [],  # the window is not full
        2: ["alarm: illegal (kuhn, a): 50.0% of its replies are illegal; it sounds at more than 0.2"],
        3: [],
        4: [],
        5: [],
        6: ["no more: illegal (kuhn, a)"],
    }
    assert watch.sounding == []


def test_records_hold_what_sounds_because_of_them() -> None:
    watch = Watch(AlarmsConfig(window=1))
    first, measured, second = step(1, 0.5), evaluation(1, 0.0), step(2, 0.4)
    assert watch.see(first) == ["alarm: " + str(watch.sounding[0])]
    assert first["alarms"] == [
        {
            "name": "illegal",
            "where": "kuhn, a",
            "value": 0.5,
            "limit": 0.2,
            "message": "50.0% of its replies are illegal",
        }
    ]
    watch.see(measured)
    assert names(measured) == ["ignores_observation"]
    assert watch.see(second) == []
    assert names(second) == ["illegal"]  # the measurement's stays with the measurement, and sounds on
    assert [alarm.name for alarm in watch.sounding] == ["illegal", "ignores_observation"]
    assert watch.see(evaluation(2, 0.3)) == ["no more: ignores_observation (kuhn)"]
    assert [alarm.name for alarm in watch.sounding] == ["illegal"]


@pytest.mark.parametrize("cut", range(13))
def test_a_watch_taken_up_from_written_records_goes_on_as_the_first_one(cut: int) -> None:
    """Whatever a resume finds on the disk, what it writes next is the same."""
    limits = AlarmsConfig(window=2, gradient_burst=3.0)
    records = [evaluation(0, 0.0)]
    for n in range(1, 11):
        records.append(step(n, illegal=(n % 5) / 5, norm=4.0 if n == 8 else 1.0))
        if n % 5 == 0:
            records.append(evaluation(n, n / 100))
    assert len(records) == 13
    whole = Watch(limits)
    lines = [whole.see(record) for record in records]
    on_disk = json.loads(json.dumps(records))
    again = Watch(limits, on_disk[:cut])
    bare = [{k: v for k, v in record.items() if k != "alarms"} for record in on_disk[cut:]]
    assert [again.see(record) for record in bare] == lines[cut:]
    assert bare == on_disk[cut:]
    assert again.sounding == whole.sounding
    assert {name for record in records for name in names(record)} == {
        "illegal",
        "gradient_burst",
        "ignores_observation",
    }


def test_a_watch_keeps_few_records_however_long_the_run() -> None:
    watch = Watch(AlarmsConfig(window=3))
    for n in range(1, 200):
        watch.see(step(n))
    assert [r["step"] for r in watch._first] == [1, 2, 3]
    assert [r["step"] for r in watch._last] == [196, 197, 198, 199]


@pytest.mark.parametrize("stop", [("illegal",), ("entropy", "illegal"), ("any",)])
def test_the_alarms_of_stop_end_a_run(stop: tuple[str, ...]) -> None:
    watch = Watch(AlarmsConfig(window=1, stop=stop))  # type: ignore[arg-type]
    watch.see(step(1))
    assert watch.stopping() is None
    watch.see(step(2, 0.5))
    assert str(watch.stopping()) == (
        "stopped after step 2, with a checkpoint, by the alarm illegal (kuhn, a): 50.0% of its replies are "
        "illegal; it sounds at more than 0.2; to go on, set alarms.illegal higher, or leave it out "
        f"of alarms.stop (now {', '.join(stop)}), and use --resume"
    )
    watch.see(step(3))
    assert watch.stopping() is None


def test_other_alarms_do_not() -> None:
    watch = Watch(AlarmsConfig(window=1, stop=("entropy",)))
    watch.see(step(1, 0.5))
    assert watch.stopping() is None


def test_a_measurement_before_the_first_step_ends_nothing() -> None:
    watch = Watch(AlarmsConfig(window=1, stop=("ignores_observation",)))
    assert watch.see(evaluation(0, 0.0))
    assert watch.stopping() is None
    watch.see(step(1))
    assert watch.stopping() is None
    watch.see(evaluation(1, 0.0))
    assert "set alarms.ignores_observation lower" in str(watch.stopping())


# --- real runs ---


@pytest.fixture(scope="module")
def babbling(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with fresh random weights: it talks nonsense. Read-only."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path = tmp_path_factory.mktemp("babbling") / "model"
    shutil.copytree(tiny_model, path)
    torch.manual_seed(0)
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model))  # type: ignore[no-untyped-call]
    fresh.save_pretrained(path)
    return path


def config(model: Path, **sections: dict[str, Any]) -> RunConfig:
    data: dict[str, Any] = {
        "name": "tiny",
        "seed": 3,
        "threads": 1,
        "games": [{"name": "kuhn_poker"}],
        "model": {"path": str(model)},
        "text": {"rules": False},
        "engine": {"slots": 16, "context": 256},
        "rollout": {"matches": 8, "in_flight": 8, "max_tokens": 24},
        "optim": {"lr": 1e-3},
        "train": {"steps": 4, "checkpoint_every": 10},
        "eval": {"matches": 2, "final_matches": 2, "exploitability": False, "thoughts": 4},
        "alarms": {"window": 2},
    }
    for name, section in sections.items():
        data[name] = {**data[name], **section}
    return configuration.validate(data, where="test")


def records(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run / "metrics.jsonl")


def training(run: Path) -> list[dict[str, Any]]:
    return [record for record in records(run) if "learn" in record]


@pytest.fixture(scope="module")
def nonsense(babbling: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of the babbling model. Read-only."""
    out = tmp_path_factory.mktemp("watch") / "nonsense"
    train(config(babbling), out)
    return out


def test_a_model_that_talks_nonsense_sets_alarms_off(nonsense: Path) -> None:
    found = training(nonsense)
    assert names(found[0]) == []
    for record in found[1:]:
        first = record["alarms"][0]
        assert (first["name"], first["where"]) == ("illegal", "kuhn_poker, player_0")
        assert first["value"] > 0.9
        assert "truncated" in names(record)
    log = (nonsense / "log.txt").read_text()
    assert log.count("alarm: illegal (kuhn_poker, player_0): ") == 1


def test_a_model_that_obeys_the_format_does_not(tiny_model: Path, tmp_path: Path) -> None:
    train(config(tiny_model, train={"steps": 2}), tmp_path / "run")
    assert not {"illegal", "truncated", "entropy", "gradient_vanished"} & {
        name for record in records(tmp_path / "run") for name in names(record)
    }


def test_a_measurement_sets_its_alarm_off_too(tiny_model: Path, tmp_path: Path) -> None:
    """No policy differs by more than 1 between hands, so with this threshold each one is told of."""
    alarms = {"ignores_observation": 1.0, "stop": ["ignores_observation"]}
    exact = {"every": 1, "exploitability": True}
    with pytest.raises(
        StoppedByAlarm, match=r"stopped after step 1, .* alarm ignores_observation \(kuhn_poker\)"
    ):
        train(config(tiny_model, train={"steps": 2}, eval=exact, alarms=alarms), tmp_path / "run")
    first, step, second = records(tmp_path / "run")
    for measured in (first, second):
        (alarm,) = measured["alarms"]
        assert alarm["value"] == measured["eval"]["games"]["kuhn_poker"]["exploitability"]["differs"]
    assert step["alarms"] == []


def test_an_alarm_stops_a_run_with_a_checkpoint_and_the_resume_goes_on(
    babbling: Path, nonsense: Path, tmp_path: Path, kills: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    stopping = config(babbling, alarms={"stop": ["illegal"]})
    with pytest.raises(
        StoppedByAlarm, match=r"stopped after step 2, .* alarm illegal \(kuhn_poker, player_0\)"
    ):
        train(stopping, run)
    assert [step for step, _ in checkpoint.steps(run)] == [2]
    assert [record["step"] for record in training(run)] == [1, 2]
    before = (run / "metrics.jsonl").read_bytes()

    with pytest.raises(
        StoppedByAlarm, match=r"stopped after step 2,"
    ):  # nothing was changed, so nothing goes on
        train(stopping, run, resume=True)
    assert (run / "metrics.jsonl").read_bytes() == before
    capsys.readouterr()

    train(config(babbling), run, resume=True)
    assert "alarm, as before: illegal (kuhn_poker, player_0)" in capsys.readouterr().out
    assert kills.differences(run, nonsense) == []


def test_a_raised_threshold_lets_a_run_go_on(babbling: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    alarms: dict[str, Any] = {"stop": ["truncated", "illegal"], "truncated": 1.0}
    with pytest.raises(StoppedByAlarm, match=r"set alarms\.illegal higher"):
        train(config(babbling, alarms=alarms), run)
    train(config(babbling, alarms={**alarms, "illegal": 1.0}), run, resume=True)
    found = training(run)
    assert [record["step"] for record in found] == [1, 2, 3, 4]
    assert ["illegal" in names(record) for record in found] == [False, True, False, False]


def test_records_of_a_resumed_run_hold_the_same_alarms(
    babbling: Path, nonsense: Path, tmp_path: Path, kills: ModuleType
) -> None:
    run = tmp_path / "run"
    wanted = config(babbling, train={"checkpoint_every": 1})
    train(wanted, run)
    shutil.rmtree(checkpoint.steps(run)[-1][1])
    train(wanted, run, resume=True)  # from step 3: the first window is read from the disk
    assert [record["alarms"] for record in records(run)] == [record["alarms"] for record in records(nonsense)]
    assert kills.differences(run, nonsense) == []


def test_the_command_ends_with_one_line_and_a_report(
    babbling: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = tmp_path / "tiny.toml", tmp_path / "run"
    recipe.write_text(configuration.dump(config(babbling)))
    assert main(["train", str(recipe), "--out", str(run), 'alarms.stop=["any"]']) == 2
    said = capsys.readouterr()
    assert (
        "stopped after step 2, with a checkpoint, by the alarm illegal (kuhn_poker, player_0): " in said.err
    )
    assert len(said.err.splitlines()) == 1
    page = (run / "report.html").read_text()
    assert f"report: {run / 'report.html'}" in said.out
    assert (
        '<td class="worse">illegal</td><td>kuhn_poker, player_0</td><td>2</td><td>2, still sounding</td>'
        in page
    )
