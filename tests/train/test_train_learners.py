"""Learners that a real Ray on this machine starts, and an actor that plays for them."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_train_ranks import assert_same_run, shared
from tiny_run import ROOT, config, trained

from ludus import config as configuration
from ludus.config import RunConfig
from ludus.errors import UserError
from ludus.train import checkpoint
from ludus.train.loop import train

pytest.importorskip("ray")
pytestmark = pytest.mark.timeout(1200)  # on a machine with other work, actors take long to start

TWO: dict[str, Any] = {"kind": "ray", "learners": 2, "learner_cpus": 0.25, "cpus": 0.25, "patience": 240.0}


def start(recipe: RunConfig, folder: Path, *options: str) -> psutil.Popen:
    """`ludus train`, with a cluster of its own; what it says goes to FOLDER/said.txt and errors.txt."""
    (folder / "recipe.toml").write_text(configuration.dump(recipe))
    argv = ["-m", "ludus", "train", str(folder / "recipe.toml"), "--out", str(folder / "run"), *options]
    with open(folder / "said.txt", "w") as said, open(folder / "errors.txt", "w") as errors:
        return psutil.Popen([sys.executable, *argv], cwd=ROOT, stdout=said, stderr=errors)


def ranks(of: psutil.Popen) -> list[psutil.Process]:
    """The learners that it has had started, in order."""
    found = {}
    for process in of.children(recursive=True):
        try:
            if process.cmdline()[1:5] == ["-u", "-m", "ludus", "train"]:
                found[int(process.environ()["RANK"])] = process
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return [found[rank] for rank in sorted(found)]


def reach(step: int, started: psutil.Popen, run: Path) -> Sequence[psutil.Process]:
    """Wait for a checkpoint; the learners."""
    while not (checkpoint.steps(run) and checkpoint.steps(run)[-1][0] >= step):
        assert started.poll() is None, "it has ended"
        time.sleep(0.05)
    return ranks(started)


def test_two_learners_and_an_actor_make_the_run_of_one_process(tiny_model: Path, tmp_path: Path) -> None:
    """Though one of them is killed in the middle, which ends the run with a line, and it is resumed."""
    train(shared(tiny_model), tmp_path / "alone")
    run = tmp_path / "run"
    started = start(shared(tiny_model, cluster=TWO), tmp_path)
    learners = reach(2, started, run)
    assert len(learners) == 2
    learners[1].kill()
    assert started.wait(600) == 2
    errors = (tmp_path / "errors.txt").read_text()
    assert "ludus: learner 1 of 2 was ended by SIGKILL" in errors
    assert "go on with --resume" in errors
    psutil.wait_procs(learners, timeout=60)
    assert not any(learner.is_running() for learner in learners)

    assert start(shared(tiny_model, cluster=TWO), tmp_path, "--resume").wait(600) == 0, errors
    said = (tmp_path / "said.txt").read_text()
    assert "step 4/4" in said
    assert said.count("report: ") == 1
    assert_same_run(run, tmp_path / "alone")
    assert [record["crew"]["actors"] for record in trained(run)] == [1] * 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_learners_too(tiny_model: Path, tmp_path: Path, number: signal.Signals) -> None:
    """SIGINT too, though Ray blocks it in what it starts."""
    wanted = config(tiny_model, train={"steps": 100_000, "checkpoint_every": 1}, cluster=TWO)
    started = start(wanted, tmp_path)
    learners = reach(1, started, tmp_path / "run")
    os.kill(started.pid, number)
    assert started.wait(600) == 128 + number
    psutil.wait_procs(learners, timeout=60)
    assert not any(learner.is_running() for learner in learners)
    assert "Traceback" not in (tmp_path / "errors.txt").read_text()


def test_from_python_learners_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it is the command `ludus train` that has Ray start learners"):
        train(config(tiny_model, cluster=TWO), tmp_path / "run")
    assert not (tmp_path / "run").exists()
