"""The loop with vLLM (for CPUs) as its engine: bereft of vLLM, and in the end done.

Skipped where vLLM is not: see `make test-vllm`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import config, episodes, trained
from vllm_life import LONG, Life, make_small, steps_kept

from ludus import config as configuration
from ludus.records import read_metrics

pytest.importorskip("vllm")


@pytest.mark.timeout(1800)  # vLLM starts twice, and on a busy machine each takes minutes
def test_a_run_outlives_a_kill_of_vllm(tmp_path: Path):
    """Kuhn poker against itself and its past selves, sampled in bfloat16."""
    recipe = config(
        make_small(tmp_path / "model"),
        games=[{"name": "kuhn_poker"}],
        engine={"kind": "vllm", "dtype": "bfloat16", "threads": 1, "vllm": {"eager": True}},
        optim={"lr": 1e-3, "schedule": "constant", "average": 0.9},
        train={"steps": LONG, "checkpoint_every": 1},
        eval={"opponents": ["random", "past/0"], "exploitability": True, "thoughts": 2},
        league={"snapshot_every": 2, "payoff_matches": 2, "opponents": [{"policy": "past/uniform"}]},
    )
    toml, out = tmp_path / "recipe.toml", tmp_path / "run"
    toml.write_text(configuration.dump(recipe))

    life = Life(toml, out)
    life.until(lambda: steps_kept(out) >= 2)
    core = next(p for p in life.vllm() if p.name() == "VLLM::EngineCore")
    core.kill()
    assert life.end() == 2
    assert "vLLM's processes have died" in life.log.read_text()

    last = steps_kept(out) + 2
    assert last < LONG
    assert Life(toml, out, "--resume", f"train.steps={last}").end() == 0

    records = read_metrics(out / "metrics.jsonl")
    assert [r["step"] for r in records if "learn" in r] == [*range(1, last + 1)]
    assert [r["step"] for r in records if "eval" in r] == [0, last]
    for record in trained(out):
        assert record["masked"] == {}
        assert 0 < record["learn"]["sampler_kl"] < 0.05  # the learner's weights, less some bits
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
