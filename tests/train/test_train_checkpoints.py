"""Checkpoints of every family train and play: what was sampled is what the learner reckons with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import CHECKPOINTS, write_checkpoint
from safetensors.torch import load_file
from tiny_run import config, newest, trained
from transformers import AutoModelForCausalLM

from ludus.errors import UserError
from ludus.train.loop import train


@pytest.mark.parametrize("name", list(CHECKPOINTS))
def test_a_run_from_each_family(name: str, tmp_path: Path) -> None:
    """Two steps: the second one's replies come from weights that were learnt and handed over."""
    directory = write_checkpoint(name, tmp_path / "model", torch.bfloat16, shard="100KB")
    recipe = config(
        directory,
        text={"rules": True},
        engine={"slots": 16, "context": 1024},
        model={"path": str(directory), "gradient_checkpointing": name == "gemma3"},
        train={"steps": 2, "checkpoint_every": 1},
        algo={"estimator": "reinforce"},
    )
    train(recipe, tmp_path / "run")
    records = trained(tmp_path / "run")
    assert len(records) == 2
    for record in records:
        learn = record["learn"]
        assert learn["grad_norm"] > 0
        # The engine and the learner agree on the log-probability of every sampled token.
        assert learn["importance"] == pytest.approx(1.0, abs=1e-3)
        assert learn["importance_max"] == pytest.approx(1.0, abs=2e-3)
        assert learn["sampler_kl"] < 1e-6
    start = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    end = AutoModelForCausalLM.from_pretrained(newest(tmp_path / "run") / "model")
    assert any(not torch.equal(p, q) for p, q in zip(start.parameters(), end.parameters(), strict=True))


def test_a_checkpoint_without_a_chat_template_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    directory = write_checkpoint("gemma3", tmp_path / "model")
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"no chat template .* model\.template = 'gemma3'"):
        train(config(directory), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_trust_in_code_is_loud_in_the_log(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trusting = config(tiny_model, model={"path": str(tiny_model), "trust_remote_code": True})
    train(trusting, tmp_path / "run")
    assert "model.trust_remote_code is on" in capsys.readouterr().err
    assert "warning: model.trust_remote_code is on" in (tmp_path / "run" / "log.txt").read_text()


def test_a_run_goes_on_with_less_memory(tiny_model: Path, tmp_path: Path) -> None:
    """What limits memory may change at a resume, and changes rounding alone."""
    steps = {"steps": 2, "checkpoint_every": 1}
    train(config(tiny_model, train=steps), tmp_path / "whole")
    train(config(tiny_model, train={**steps, "steps": 1}), tmp_path / "parts")
    less = config(
        tiny_model,
        train=steps,
        model={"path": str(tiny_model), "gradient_checkpointing": True},
        engine={"slots": 5},
        rollout={"in_flight": 4},
        optim={"microbatch_tokens": 100},
    )
    train(less, tmp_path / "parts", resume=True)
    whole, parts = (
        load_file(newest(tmp_path / x) / "model" / "model.safetensors") for x in ("whole", "parts")
    )
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-3, atol=1e-4)
