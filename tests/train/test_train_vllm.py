"""The loop with vLLM (for CPUs) as its engine: killed itself, bereft of vLLM, and in the end done.

Skipped where vLLM is not: see `make test-vllm`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tiny_run import config, episodes, trained

from ludus import config as configuration
from ludus.config import RunConfig
from ludus.records import read_metrics
from ludus.small.make import Course, SmallSpec, make
from ludus.train import checkpoint

pytest.importorskip("vllm")

LONG = 300  # steps, more than anybody waits for


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Kuhn poker against itself and its past selves, for a model whose heads are wide enough for vLLM."""
    model = tmp_path_factory.mktemp("vllm") / "model"
    courses = (Course("kuhn_poker", 800),)
    spec = SmallSpec(
        courses, hidden=64, layers=2, heads=2, kv_heads=1, ffn=64, context=1024, batch=4, lr=6e-3
    )
    make(model, spec, tell=lambda _: None)
    return config(
        model,
        games=[{"name": "kuhn_poker"}],
        engine={"kind": "vllm", "threads": 1, "vllm": {"eager": True}},
        optim={"lr": 1e-3, "schedule": "constant", "average": 0.9},
        train={"steps": LONG, "checkpoint_every": 1},
        eval={"opponents": ["random", "past/0"], "exploitability": True, "thoughts": 2},
        league={"snapshot_every": 2, "payoff_matches": 2, "opponents": [{"policy": "past/uniform"}]},
    )


class Life:
    """One `ludus train`, and the processes of vLLM that it starts."""

    def __init__(self, recipe: Path, out: Path, *options: str) -> None:
        self.log = out.with_suffix(".log")
        command = [sys.executable, "-m", "ludus.cli", "train", str(recipe), "--out", str(out), *options]
        with self.log.open("a") as log:
            self.process = psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def until(self, there: Callable[[], bool]) -> None:
        while not there():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)

    def vllm(self) -> list[psutil.Process]:
        return [p for p in self.process.children(recursive=True) if p.name().startswith("VLLM")]

    def end(self) -> int:
        return int(self.process.wait())


def steps_kept(out: Path) -> int:
    found = checkpoint.steps(out) if out.exists() else []
    return found[-1][0] if found else 0


@pytest.mark.timeout(1800)  # vLLM starts three times, and on a busy machine each takes minutes
def test_a_run_outlives_kills_of_itself_and_of_vllm(recipe: RunConfig, tmp_path: Path):
    toml, out = tmp_path / "recipe.toml", tmp_path / "run"
    toml.write_text(configuration.dump(recipe))

    life = Life(toml, out)
    life.until(lambda: steps_kept(out) >= 2)
    processes = life.vllm()
    life.process.kill()
    life.end()
    assert len(processes) == 2  # the engine core and its worker: they do not outlive the run
    assert not psutil.wait_procs(processes, timeout=60)[1]

    before = steps_kept(out)
    life = Life(toml, out, "--resume")
    life.until(lambda: steps_kept(out) > before)
    core = next(p for p in life.vllm() if p.name() == "VLLM::EngineCore")
    core.kill()
    assert life.end() == 2
    assert "vLLM's processes have died" in life.log.read_text()

    last = steps_kept(out) + 2
    assert before < last < LONG
    assert Life(toml, out, "--resume", f"train.steps={last}").end() == 0

    records = read_metrics(out / "metrics.jsonl")
    assert [r["step"] for r in records if "learn" in r] == [*range(1, last + 1)]
    assert [r["step"] for r in records if "eval" in r] == [0, last]
    assert all(record["masked"] == {} for record in trained(out))
    assert records[-1]["eval"]["games"]["kuhn_poker"]["exploitability"]["value"] >= 0
    versions: dict[str, set[int]] = {}
    played = episodes(out)
    assert len(played) == last * recipe.rollout.matches
    for number, episode in enumerate(played):
        for turn in episode.turns:
            if turn.policy == "self":
                assert turn.version == number // recipe.rollout.matches  # the weights of the step before
            versions.setdefault(turn.policy, set()).add(turn.version)
            assert len(turn.logprobs) == len(turn.completion_ids) > 0
    assert {"self", "past/0"} <= versions.keys()
    assert all(v == {int(name.removeprefix("past/"))} for name, v in versions.items() if name != "self")
    assert any(turn.stop == "action" for episode in played for turn in episode.turns)
