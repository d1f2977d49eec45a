"""What `ludus export` takes out of a run: weights that others read, and a card that tells the truth."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from tiny_run import config, newest
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ludus import measuring
from ludus.cli import main
from ludus.records import measured_rows, read_metrics
from ludus.train.loop import train
from ludus.train.past import folder

SMALL: dict[str, Any] = {
    "games": [{"name": "kuhn_poker", "args": {"rounds": 1}, "weight": 3}, {"name": "tic_tac_toe"}],
    "rollout": {"matches": 8},
    "train": {"steps": 2, "checkpoint_every": 1},
    "optim": {"lr": 2e-2, "schedule": "constant", "warmup_steps": 0},
}


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one whole model. Read-only."""
    out = tmp_path_factory.mktemp("export") / "whole"
    train(config(tiny_model, **SMALL), out)
    return out


@pytest.fixture(scope="module")
def adapted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two adapters, with snapshots. Read-only."""
    out = tmp_path_factory.mktemp("export") / "adapted"
    policies = [{"name": "first", "roles": ["player_0"]}, {"name": "second", "roles": ["player_1"]}]
    league = {"snapshot_every": 1, "payoff_matches": 0}
    train(config(tiny_model, **SMALL, policies=policies, adapter={"rank": 4, "alpha": 8}, league=league), out)
    return out


def exported(*words: str | Path) -> int:
    return main(["export", *map(str, words)])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.arange(30)[None]).logits
    return found


# --- the weights ---


def test_a_whole_model_is_copied(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exported(whole, "--out", tmp_path / "new" / "out") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "new" / "out")
    mine, theirs = tmp_path / "new" / "out", newest(whole) / "model"
    for file in theirs.iterdir():
        assert (mine / file.name).read_bytes() == file.read_bytes()
    assert {p.name for p in mine.iterdir()} == {p.name for p in theirs.iterdir()} | {"README.md"}
    AutoModelForCausalLM.from_pretrained(mine)
    assert list((tmp_path / "new").iterdir()) == [mine]


def test_an_adapter_is_read_by_peft(adapted: Path, tiny_model: Path, tmp_path: Path) -> None:
    assert exported(adapted, "--policy", "second", "--out", tmp_path / "out") == 0
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "out")
    kept = load_file(newest(adapted) / "model" / "second" / "adapter_model.safetensors")
    held = theirs.state_dict()
    for name, tensor in kept.items():
        assert torch.equal(held[name.replace(".weight", ".default.weight")], tensor)
    AutoTokenizer.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_merged_adapter_is_a_model_of_its_own(
    stored: str, adapted: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run = adapted
    if stored == "bfloat16":  # a base that is stored so, and an adapter that belongs to it
        base = tmp_path / "base"
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(base)
        run = tmp_path / "adapter"
        shutil.copytree(newest(adapted) / "model" / "first", run)
        (run / "base.json").unlink()
        told = json.loads((run / "adapter_config.json").read_text())
        (run / "adapter_config.json").write_text(json.dumps({**told, "base_model_name_or_path": str(base)}))
        assert exported(run, "--merge", "--out", tmp_path / "out") == 0
    else:
        assert exported(run, "--policy", "first", "--merge", "--out", tmp_path / "out") == 0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {getattr(torch, stored)}
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    wanted = logits(PeftModel.from_pretrained(plain, newest(adapted) / "model" / "first"))
    assert (wanted - logits(AutoModelForCausalLM.from_pretrained(tiny_model))).abs().max() > 0.01
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 if stored == "float32" else 0.2)


def test_what_is_exported_plays_as_its_run_does(adapted: Path, tmp_path: Path) -> None:
    where = newest(adapted) / "model" / "first"
    assert exported(where, "--merge", "--out", tmp_path / "out") == 0
    settings = ["eval.matches=4", 'eval.opponents=["random"]', "seed=5"]
    recipe = adapted / "config.toml"
    text = recipe.read_text().split("[[policies]]")[0]
    (tmp_path / "recipe.toml").write_text(text)
    found = [
        measuring.measure(measuring.find(w, tmp_path / "recipe.toml", (), settings))
        for w in (where, tmp_path / "out")
    ]
    assert found[0]["games"]["kuhn_poker"]["opponents"] == found[1]["games"]["kuhn_poker"]["opponents"]


# --- the card ---


def test_the_card_says_what_it_is(adapted: Path, tiny_model: Path, tmp_path: Path) -> None:
    exported(adapted, "--policy", "first", "--out", tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model == str(tiny_model)
    assert {"ludus", "kuhn_poker", "tic_tac_toe"} <= set(card.data.tags)
    text = card.text
    assert "# tiny, first" in text
    assert "A LoRA adapter, trained by self-play with Ludus after step 2 of 2." in text
    assert "| kuhn_poker | kuhn_poker | rounds = 1 | 75% |" in text
    assert "It plays the roles player_0." in text
    assert "together with the other policies of its run" in text
    assert hashlib.sha256((adapted / "config.toml").read_bytes()).hexdigest() in text
    assert hashlib.sha256((tiny_model / "model.safetensors").read_bytes()).hexdigest() in text
    weights = newest(adapted) / "model" / "first" / "adapter_model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in text
    assert "rank 4, alpha 8" in text


def test_its_results_are_those_that_the_run_measured_last(whole: Path, tmp_path: Path) -> None:
    exported(whole, "--out", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    first, last = [r["eval"] for r in read_metrics(whole / "metrics.jsonl") if "eval" in r]
    for before, after in zip(measured_rows(first), measured_rows(last), strict=True):
        assert f"| {after.game} | {after.figure} | {before.after} | {after.after} |" in text


def test_an_older_checkpoint_is_shown_with_what_was_known_then(whole: Path, tmp_path: Path) -> None:
    exported(whole / "checkpoints" / "step_00000001", "--out", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "after step 1 of 2" in text
    assert "| game | figure | after step 0 | after step 0 |" in text


def test_a_snapshot_is_exported_like_a_checkpoint(adapted: Path, tmp_path: Path) -> None:
    assert exported(folder(adapted, 1), "--policy", "first", "--out", tmp_path / "out") == 0
    assert "after step 1 of 2" in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "MANIFEST.json").exists()


# --- what goes wrong ---


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert exported(*words) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    return told


def test_bad_input_is_told_and_leaves_nothing(
    whole: Path, adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert "holds several policies: first, second; name one: --policy first" in refused(
        capsys, adapted, "--out", out
    )
    assert "no policy 'third'; it holds first, second" in refused(
        capsys, adapted, "--policy", "third", "--out", out
    )
    assert "leave --policy out" in refused(capsys, whole, "--policy", "first", "--out", out)
    assert "is neither a run directory" in refused(capsys, tmp_path, "--out", out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    assert "exists already" in refused(capsys, whole, "--out", tmp_path / "full")
    assert "cannot write to" in refused(capsys, whole, "--out", tmp_path / "full" / "mine.txt" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_damage_is_named(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    weights = newest(run) / "model" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[len(raw) // 2] ^= 4
    weights.write_bytes(raw)
    for word in (newest(run), newest(run) / "model"):
        assert "model.safetensors has another SHA-256" in refused(capsys, word, "--out", tmp_path / "out")
    assert exported(run, "--out", tmp_path / "out") == 0  # the whole one before it
    assert "using the one before it" in capsys.readouterr().err
    assert "after step 1 of 2" in (tmp_path / "out" / "README.md").read_text()


def test_an_adapter_whose_base_is_gone_or_another_is_not_merged(
    adapted: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "adapter"
    shutil.copytree(newest(adapted) / "model" / "first", run)
    told = json.loads((run / "adapter_config.json").read_text())
    base = tmp_path / "base"

    def merged() -> str:
        (run / "adapter_config.json").write_text(json.dumps({**told, "base_model_name_or_path": str(base)}))
        return refused(capsys, run, "--merge", "--out", tmp_path / "out")

    assert f"is not at {base}; put it there" in merged()
    shutil.copytree(tiny_model, base)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.get_input_embeddings().weight[0] += 1
    model.save_pretrained(base)
    capsys.readouterr()
    assert "belongs to other weights than those in" in merged()
    assert not (tmp_path / "out").exists()
