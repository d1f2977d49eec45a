"""A run that several processes share: real ranks on the CPU, joined by gloo."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import rank_process
from once import once
from safetensors.torch import load_file
from tiny_run import ROOT, config, episodes, newest, trained

from ludus import config as configuration
from ludus.config import RunConfig
from ludus.errors import UserError
from ludus.records import read_metrics
from ludus.train.loop import train
from ludus.train.past import snapshots
from ludus.train.ranks import ALONE, Ranks, join
from ludus.types import Episode

# Weights are of the order of 1 and move by 1e-2 in a run; the ranks' sums are in another order.
TOLERANCE = 1e-5


def shared(model: Path, **sections: Any) -> RunConfig:
    """Four steps with all that ranks must agree on: past selves, minibatches, magnet, average, reference."""
    return config(
        model,
        **{
            "optim": {"schedule": "constant", "lr": 3e-3, "minibatches": 2, "average": 0.9},
            "loss": {"magnet_kl": 0.1, "magnet_every": 3, "reference_kl": 0.1},
            "league": {
                "snapshot_every": 2,
                "payoff_matches": 4,
                "opponents": [{"policy": "past/uniform"}, {"policy": "random"}],
            },
            "eval": {"opponents": ["random", "past/0"], "every": 2, "matches": 4, "final_matches": 4},
            **sections,
        },
    )


def ranks(
    size: int,
    recipe: RunConfig,
    out: Path,
    *options: str,
    port: int | None = None,
    dies: int | None = None,
    **environment: str,
) -> rank_process.Started:
    """`ludus train` by `size` ranks."""
    folder = out.with_name(f"{out.name}-ranks")
    folder.mkdir(exist_ok=True)
    file = folder / "recipe.toml"
    file.write_text(configuration.dump(recipe))
    argv = ["train", str(file), "--out", str(out), *options]
    return rank_process.start(size, lambda rank: argv, folder, port, dies, **environment)


@pytest.fixture(autouse=True)
def nobody_is_left() -> Iterator[None]:
    """A test that fails may leave ranks, a stopped one even, and the interpreter would wait for them."""
    yield
    for process in multiprocessing.active_children():
        process.kill()


def done(started: rank_process.Started) -> list[str]:
    assert set(started.finish()) == {0}, "\n".join(started.said())
    return started.said()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The same run by one process, by two ranks, and half of it by two, for others to resume."""

    def make(folder: Path) -> None:
        folder.mkdir()
        wanted = shared(tiny_model)
        half = shared(tiny_model, train={"steps": 2})
        started = [ranks(1, wanted, folder / "one"), ranks(2, wanted, folder / "two")]
        (folder / "said.txt").write_text("---".join([*done(started[0]), *done(started[1])]))
        done(ranks(2, half, folder / "half"))

    return once(tmp_path_factory, "ranks", make)


def assert_same_run(run: Path, other: Path) -> None:
    """The same matches move by move, weights within the tolerance, figures alike; clocks apart."""
    assert [plain(e) for e in episodes(run)] == [plain(e) for e in episodes(other)]
    assert [step for step, _ in snapshots(run)] == [step for step, _ in snapshots(other)]
    for name in ("trainer/learner.safetensors", "model/model.safetensors"):
        mine, theirs = load_file(newest(run) / name), load_file(newest(other) / name)
        assert mine.keys() == theirs.keys()
        assert max(float((mine[n] - theirs[n]).abs().max()) for n in mine) <= TOLERANCE
    states = [json.loads((newest(x) / "trainer" / "state.json").read_text()) for x in (run, other)]
    for name in ("league", "learner", "credit", "version"):
        assert states[0][name] == states[1][name]
    for before, after in zip(trained(run), trained(other), strict=True):
        assert after["learn"] == pytest.approx(before["learn"], rel=1e-3, abs=1e-6)
        assert after["games"] == before["games"]
        assert after["league"] == before["league"]
    found = [read_metrics(x / "metrics.jsonl") for x in (run, other)]
    assert [r.get("eval") for r in found[0]] == [r.get("eval") for r in found[1]]


def plain(episode: Episode) -> Episode:
    """Without what rounding touches."""
    return dataclasses.replace(episode, turns=[dataclasses.replace(t, logprobs=[]) for t in episode.turns])


def test_two_ranks_make_the_run_of_one_process(runs: Path) -> None:
    assert_same_run(runs / "one", runs / "two")
    learner = load_file(newest(runs / "two") / "trainer" / "learner.safetensors")
    names = [name.removeprefix("model.") for name in learner if name.startswith("model.")]
    moved = [learner[f"model.{name}"] - learner[f"reference.{name}"] for name in names]
    assert max(float(m.abs().max()) for m in moved) > 1e-3  # else equality would say nothing


def test_one_rank_speaks(runs: Path) -> None:
    alone, first, second = (runs / "said.txt").read_text().split("---")
    assert "step 4/4" in alone
    assert "step 4/4" in first
    assert "report: " in first
    assert second == ""


@pytest.mark.parametrize("size", [1, 4])
def test_a_checkpoint_of_two_ranks_resumes_on_any_number(
    runs: Path, tiny_model: Path, tmp_path: Path, size: int
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "half", run)
    done(ranks(size, shared(tiny_model), run, "--resume"))
    assert len(trained(run)) == 4
    assert_same_run(runs / "one", run)


def test_a_killed_rank_ends_the_others_and_the_run_goes_on_from_its_checkpoint(
    runs: Path, tiny_model: Path, tmp_path: Path, kills: ModuleType
) -> None:
    run = tmp_path / "run"
    started = ranks(2, shared(tiny_model), run, dies=1)
    assert started.finish() == [2, -signal.SIGKILL]
    assert newest(run).name == "step_00000002"
    assert "rank 0 of 2 has lost the others" in started.said()[0]
    assert "go on with --resume" in started.said()[0]
    assert "Traceback" not in started.said()[0]
    done(ranks(2, shared(tiny_model), run, "--resume"))
    assert kills.differences(run, runs / "two") == []  # to the last bit, on as many ranks


def test_a_rank_that_hangs_ends_the_others_after_their_patience(tiny_model: Path, tmp_path: Path) -> None:
    started = ranks(2, shared(tiny_model, train={"patience": 20.0, "steps": 1000}), tmp_path / "run")
    while not (tmp_path / "run" / "checkpoints").exists():
        assert all(p.is_alive() for p in started.processes), started.said()
        time.sleep(0.01)
    hung = started.processes[1].pid
    assert hung is not None
    os.kill(hung, signal.SIGSTOP)
    started.processes[0].join(240)
    assert started.processes[0].exitcode == 2
    assert "has lost the others (Timed out waiting 20000ms" in started.said()[0]
    started.processes[1].kill()


def test_an_error_of_the_first_rank_is_told_and_ends_the_others(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "something").touch()
    started = ranks(2, shared(tiny_model), tmp_path / "run")
    assert started.finish() == [2, 2]
    assert "is not empty, and nothing is overwritten" in started.said()[0]
    assert started.said()[1].startswith("ludus (rank 1): rank 1 of 2 has lost the others")
    assert [len(said.splitlines()) for said in started.said()] == [1, 1]


def test_ranks_with_different_recipes_do_not_start(tiny_model: Path, tmp_path: Path) -> None:
    files = []
    for seed in (1, 2):
        files.append(tmp_path / f"{seed}.toml")
        files[-1].write_text(configuration.dump(shared(tiny_model, seed=seed)))
    out = ["--out", str(tmp_path / "run")]
    started = rank_process.start(2, lambda rank: ["train", str(files[rank]), *out], tmp_path / "ranks")
    assert started.finish() == [2, 2]
    for said in started.said():
        assert "the ranks do not do the same: rank 0 has recipe" in said
        assert len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_is_named(tiny_model: Path, tmp_path: Path) -> None:
    """By the rank that is to listen there; torchrun ends the others."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        started = ranks(2, shared(tiny_model), tmp_path / "run", port=port)
        started.processes[0].join(240)
        started.processes[1].kill()
    assert started.processes[0].exitcode == 2
    assert f"rank 0 of 2 cannot meet the others at 127.0.0.1:{port}" in started.said()[0]
    assert "choose another --master-port if that one is in use" in started.said()[0]


@pytest.mark.parametrize(
    ("environment", "sections", "message"),
    [
        ({"RANK": "0"}, {}, "WORLD_SIZE is 9, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
        (
            {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            {},
            "9 ranks are to share the 8 matches of a step; raise rollout.matches or start fewer",
        ),
    ],
)
def test_ranks_that_cannot_be_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Path,
    tmp_path: Path,
    environment: Mapping[str, str],
    sections: Mapping[str, Any],
    message: str,
) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "9", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        train(config(tiny_model, **sections), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    for size in (None, "1"):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if size:
            monkeypatch.setenv("WORLD_SIZE", size)
        with join(config(tiny_model), "") as ranks:
            assert ranks is ALONE
            assert ranks.first
            assert ranks.gather(b"x") == [b"x"]
            assert ranks.agree({"a": 1}) == {"a": 1}


def test_ranks_keep_verdicts_in_files_of_their_own(tiny_model: Path) -> None:
    judge = {"kind": "classifier", "model": "guard", "labels": {"refusal": ["yes"]}}
    judges = {"kept": {**judge, "cache_file": "all/verdicts.jsonl"}, "not": judge}
    wanted = config(tiny_model, judges=judges)
    assert ALONE.own_files(wanted) is wanted
    third = Ranks(3, 4).own_files(wanted)
    assert third.judges["kept"].cache_file == "all/verdicts.rank3.jsonl"
    assert third.judges["not"].cache_file is None


def test_torchrun_starts_the_ranks(tiny_model: Path, tmp_path: Path) -> None:
    """The command of the documentation."""
    (tmp_path / "tiny.toml").write_text(configuration.dump(config(tiny_model, train={"steps": 1})))
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ludus", "train"]
    ran = subprocess.run(
        [sys.executable, "-m", *command, str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "step 1/1" in ran.stdout
    assert len(trained(tmp_path / "run")) == 1
