"""What is told of a checkpoint before it is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families import CHECKPOINTS, write_checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

from ludus.cli import main
from ludus.examine import Finding, examine


def by_check(directory: Path) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine(directory)}


@pytest.mark.parametrize("name", list(CHECKPOINTS))
def test_a_sound_checkpoint(name: str, tmp_path: Path) -> None:
    found = by_check(write_checkpoint(name, tmp_path))
    assert list(found) == [
        *("tokenizer", "chat template", "prompt", "model", "learner", "torch engine", "packed rows")
    ]
    assert all(finding.passed for finding in found.values()), found
    thinks = name == "qwen3"
    assert found["chat template"].evidence.endswith("opens thoughts" if thinks else "no marks for thoughts")
    assert found["prompt"].evidence == "as by the directory's own" + (
        ", and then '<think>\\n'" if thinks else ""
    )


def test_a_prompt_that_differs_is_shown(tmp_path: Path) -> None:
    """As Qwen2.5's, which puts a system message of its own where there is none."""
    directory = write_checkpoint("qwen2.5", tmp_path)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["chat_template"] = "<|im_start|>system\nYou are somebody.<|im_end|>\n" + config["chat_template"]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    prompt = by_check(directory)["prompt"]
    assert prompt.passed is None
    assert "the directory's own has '<|im_start|>system\\nYou are" in prompt.evidence
    assert "ludus has '<|im_start|>user\\nGood" in prompt.evidence


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that the learner can train and the engine cannot run, and a tokenizer without a template."""
    directory = write_checkpoint("gemma3", tmp_path)
    for file in directory.glob("*.safetensors"):
        file.unlink()
    config = GPT2Config(vocab_size=600, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(directory)
    (directory / "chat_template.jinja").unlink()
    capsys.readouterr()
    assert main(["doctor", str(directory)]) == 1
    lines = capsys.readouterr().out.splitlines()
    told = {line.split("  ")[0]: line for line in lines}
    assert "FAILED" in told["chat template"]
    assert "model.template = 'gemma3'" in told["chat template"]
    assert "passed" in told["learner"]
    assert "cannot run model type 'gpt2'" in told["torch engine"]
    assert main(["doctor", str(tmp_path / "nothing-but-a-name")]) == 2
    (tmp_path / "empty").mkdir()
    assert main(["doctor", str(tmp_path / "empty"), "--json"]) == 1
    capsys.readouterr()


def test_json(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["doctor", str(tiny_model), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {k: v for k, v in facts[5].items() if k != "evidence"} == {"check": "torch engine", "passed": True}
