"""The loop with two adapters of one base on vLLM (for CPUs): killed itself, and taken up again.

Skipped where vLLM is not: see `make test-vllm`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import psutil
import pytest
from tiny_run import config, episodes, trained
from vllm_life import LONG, Life, make_small, steps_kept

from ludus import config as configuration

pytest.importorskip("vllm")


@pytest.mark.timeout(1800)  # vLLM starts twice, and on a busy machine each takes minutes
def test_a_run_of_two_adapters_outlives_its_own_kill(tmp_path: Path):
    recipe = config(
        make_small(tmp_path / "model"),
        games=[{"name": "kuhn_poker"}],
        policies=[{"name": "first", "roles": ["player_0"]}, {"name": "second", "roles": ["player_1"]}],
        adapter={"rank": 4, "alpha": 8},
        engine={"kind": "vllm", "threads": 1, "vllm": {"eager": True, "adapters": 4}},
        optim={"lr": 1e-2, "schedule": "constant"},
        train={"steps": LONG, "checkpoint_every": 1},
        eval={"opponents": ["random"]},
        league={"snapshot_every": 1, "payoff_matches": 2, "opponents": [{"policy": "past/uniform"}]},
    )
    toml, out = tmp_path / "recipe.toml", tmp_path / "run"
    toml.write_text(configuration.dump(recipe))

    life = Life(toml, out)
    life.until(lambda: steps_kept(out) >= 2)
    processes = life.vllm()
    folders = f"ludus-adapters-{life.process.pid}-*"
    assert list(Path(tempfile.gettempdir()).glob(folders))
    life.process.kill()
    life.end()
    assert len(processes) == 2  # the engine core and its worker: they do not outlive the run
    assert not psutil.wait_procs(processes, timeout=600)[1]
    assert not list(Path(tempfile.gettempdir()).glob(folders))

    last = steps_kept(out) + 2
    assert last < LONG
    assert Life(toml, out, "--resume", f"train.steps={last}").end() == 0

    assert [record["step"] for record in trained(out)] == [*range(1, last + 1)]
    for record in trained(out):
        assert record["masked"] == {}
        for learnt in record["learn"].values():  # vLLM sampled from the very adapter that then learnt
            assert learnt["importance_max"] == pytest.approx(1, abs=2e-3)
            assert learnt["grad_norm"] > 0
    matches = recipe.rollout.matches
    for number, episode in enumerate(episodes(out)):
        for turn in episode.turns:
            if turn.policy in ("first", "second"):
                assert turn.version == number // matches  # the weights of the step before
                assert turn.policy == ("first", "second")[turn.seat]
    assert any("past" in turn.policy for episode in episodes(out) for turn in episode.turns)
