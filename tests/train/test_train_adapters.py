"""Runs that train adapters over one base: what is written, shared, resumed and measured."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_run import config, dealt_kills, episodes, newest, trained
from torch import Tensor
from transformers import AutoModelForCausalLM

from ludus import config as configuration
from ludus import measuring
from ludus.cli import main
from ludus.config import RunConfig
from ludus.errors import UserError
from ludus.learner.model import load_model, save_model
from ludus.records import read_metrics
from ludus.train.assemble import BASE, open_model, open_player
from ludus.train.loop import Trainer, train
from ludus.train.past import folder, open_past
from ludus.train.rundir import RunDir
from ludus.types import Turn

ADAPTER = {"rank": 4, "alpha": 8}
BOTH = [{"name": "first", "roles": ["player_0"]}, {"name": "second", "roles": ["player_1"]}]


def adapted(directory: Path, **sections: Any) -> RunConfig:
    """Two steps of twelve matches, an adapter for each seat, past selves, and all that a learner keeps."""
    settled: dict[str, Any] = {
        "policies": BOTH,
        "adapter": ADAPTER,
        "games": [{"name": "kuhn_poker"}],
        "rollout": {"matches": 12},
        "train": {"steps": 2, "checkpoint_every": 1},
        "optim": {"schedule": "constant", "lr": 2e-2, "warmup_steps": 0, "average": 0.5},
        "loss": {"magnet_kl": 0.1, "reference_kl": 0.1},
        "league": {"snapshot_every": 1, "payoff_matches": 2, "opponents": [{"policy": "past/uniform"}]},
        "eval": {"opponents": ["random", "past/0"], "final_matches": 8},
    }
    return config(directory, **{**settled, **sections})


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of it. Read-only."""
    out = tmp_path_factory.mktemp("adapters") / "finished"
    train(adapted(tiny_model), out)
    return out


@pytest.fixture(scope="module")
def single(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one adapter that plays every role. Read-only."""
    out = tmp_path_factory.mktemp("adapters") / "single"
    train(adapted(tiny_model, policies=[], league={}, eval={"opponents": ["random"]}), out)
    return out


def tensors(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- what plays, and what is written ---


def replies_of(base: Path, adapter: Path, turns: list[Turn]) -> list[list[float]]:
    """The log-probabilities of recorded replies, by transformers and peft alone."""
    network = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    found = []
    for turn in turns:
        ids = torch.tensor([[*turn.prompt_ids, *turn.completion_ids]])
        with torch.inference_mode():
            law = network(input_ids=ids).logits[0].float().log_softmax(-1)
        first = len(turn.prompt_ids)
        found.append([float(law[first + k - 1, token]) for k, token in enumerate(turn.completion_ids)])
    return found


def test_every_reply_is_that_of_the_adapter_that_it_names(finished: Path, tiny_model: Path) -> None:
    """Of the learner's now, and of past selves, as peft reads them from the disk."""
    turns = [turn for episode in episodes(finished) for turn in episode.turns]
    checked = 0
    for step in (0, 1):
        for name in ("first", "second"):
            where = folder(finished, step) / name
            for policy, version in ((name, step), (f"past/{step}/{name}", step)):
                said = [t for t in turns if (t.policy, t.version) == (policy, version)][:4]
                for turn, logprobs in zip(said, replies_of(tiny_model, where, said), strict=True):
                    assert turn.logprobs == pytest.approx(logprobs, abs=3e-4)
                    checked += 1
    assert checked >= 20


def test_learner_and_engine_agree(finished: Path) -> None:
    for record in trained(finished):
        for figures in record["learn"].values():
            assert figures["importance"] == pytest.approx(1.0, abs=1e-3)
            assert figures["grad_norm"] > 0


def test_checkpoints_and_snapshots_are_adapters_and_small(finished: Path, tiny_model: Path) -> None:
    whole = (tiny_model / "model.safetensors").stat().st_size
    for name in ("first", "second"):
        learner = load_file(newest(finished) / "trainer" / f"{name}.safetensors")
        assert all("lora_" in key for key in learner)
        shipped, kept = tensors(newest(finished) / "model" / name), tensors(folder(finished, 2) / name)
        for key, tensor in shipped.items():
            inner = key.removeprefix("base_model.model.").replace(".weight", ".default.weight")
            assert torch.equal(tensor, learner[f"average.{inner}"])
            assert torch.equal(kept[key], learner[f"model.{inner}"])
        files = [p for p in (folder(finished, 2) / name).iterdir() if p.suffix == ".safetensors"]
        assert sum(p.stat().st_size for p in files) < whole / 2
    assert not any(p.name == "model.safetensors" for p in finished.rglob("*"))
    assert not same(tensors(folder(finished, 2) / "first"), tensors(folder(finished, 2) / "second"))
    assert not same(tensors(folder(finished, 2) / "first"), tensors(folder(finished, 0) / "first"))


def test_there_is_one_base_in_the_engine_and_one_in_the_learners(tiny_model: Path, tmp_path: Path) -> None:
    settled = adapted(tiny_model)
    trainer = Trainer(settled)

    async def go() -> None:
        with RunDir.create(tmp_path / "run", settled) as run:
            await trainer.begin(run)
            await trainer.step(run, 0)
            await trainer.close()

    asyncio.run(go())
    start = load_file(tiny_model / "model.safetensors")
    held = trainer.me.engine._weights  # type: ignore[attr-defined]
    assert {BASE, "first", "second"} < set(held)
    assert any(name.startswith("past/0/") for name in held)
    assert len({weights.embed.data_ptr() for weights in held.values()}) == 1
    assert len({weights.layers[1].down.data_ptr() for weights in held.values()}) == 1
    models = [m for one in trainer.policies.learners.values() for m in (one.model, one.magnet, one.reference)]
    # And the two are one, but for the norms of the heads, which the engine holds in another form.
    base = dict(trainer.policies.learners["second"].model.named_parameters())
    for name, tensor in held[BASE].lend().items():
        known = base.get(name, base.get(name.replace(".weight", ".base_layer.weight")))
        assert known is not None, name
        assert known.data_ptr() == tensor.data_ptr(), name
        assert torch.equal(known, start[name])
    assert {n for n in start if n not in held[BASE].lend()} == {
        n for n in start if "_norm" in n and "self_attn" in n
    }
    heads = {m.get_input_embeddings().weight.data_ptr() for m in models if m is not None}
    assert (len(models), len(heads)) == (6, 1)


def test_an_adapter_says_which_base_it_belongs_to(finished: Path, tiny_model: Path) -> None:
    told = json.loads((newest(finished) / "model" / "first" / "base.json").read_text())
    assert told["path"] == str(tiny_model)
    assert told["sizes"]["vocab_size"] == load_model(tiny_model).config.vocab_size
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert told["digests"][name] == hashlib.sha256((tiny_model / name).read_bytes()).hexdigest()


# --- resumes ---


def test_kill_9_at_random_moments_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    last = dealt_kills(adapted(tiny_model), tiny_model, tmp_path, kills=3, seed=4)
    assert last.startswith("3 kills in ")
    assert ", 0 different" in last


def test_a_resume_over_another_base_is_refused_and_loses_nothing(
    single: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run, base = tmp_path / "run", tmp_path / "base"
    shutil.copytree(single, run)
    shutil.copytree(tiny_model, base)
    model = load_model(base)
    with torch.no_grad():
        model.get_input_embeddings().weight[0] += 1.0
    save_model(model, base)
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace(str(tiny_model), str(base)))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name not in ("log.txt", "lock")}
    settled = adapted(base, policies=[], league={}, eval={"opponents": ["random"]})
    with pytest.raises(UserError, match=r"is no longer the one that the adapters of this run change"):
        train(settled, run, resume=True)
    assert all(p.read_bytes() == data for p, data in before.items())


# --- measured from the outside ---


def test_a_run_is_measured_as_it_measured_itself(finished: Path, single: Path) -> None:
    for run, matches in ((finished, 8), (single, 2)):
        target = measuring.find(run, overrides=[f"eval.matches={matches}"])
        (last,) = [r["eval"] for r in read_metrics(run / "metrics.jsonl") if "eval" in r and r["step"] == 2]
        assert measuring.measure(target) == last


def test_one_policy_of_several_and_a_past_self_are_measured_by_their_directories(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for word in (newest(finished) / "model" / "second", folder(finished, 1), newest(finished) / "model"):
        assert main(["eval", str(word), "eval.matches=2", 'eval.opponents=["random"]']) == 0
        assert "kuhn_poker: score vs random" in capsys.readouterr().out


def test_adapters_enter_tournaments_and_their_exploitability_is_measured(
    finished: Path, single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"two={finished}", f"one={single}", f"old={folder(finished, 0)}", "--game", "kuhn_poker"]
    assert main(["tournament", *words, "--matches", "2", "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert main(["exploitability", str(finished), "--game", "kuhn_poker", "eval.thoughts=2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert 0 < told["exploitability"] < 2


def test_several_policies_answer_no_plain_questions(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = tmp_path / "suite.jsonl"
    suite.write_text('{"prompt": "How?", "category": "a", "label": "benign", "metric": "over_refusal"}\n')
    words = [
        "eval-safety",
        str(finished),
        "--suite",
        str(suite),
        "--judge",
        "rule",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(words) == 2
    assert "first, second are several policies" in capsys.readouterr().err


def test_directories_of_several_policies_out_of_a_run_want_a_name(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(newest(finished) / "model", tmp_path / "model")
    with pytest.raises(UserError, match=r"several policies \(first, second\) of no run; name one: .*/first"):
        measuring.find(tmp_path / "model", games=["kuhn_poker"])
    found = measuring.find(tmp_path / "model" / "first", games=["kuhn_poker"])
    assert [p.model for p in found.config.policies] == [str(tmp_path / "model" / "first")]


# --- adapters as starts and as opponents ---


def test_training_goes_on_from_an_adapter(single: Path, tiny_model: Path, tmp_path: Path) -> None:
    start = newest(single) / "model"
    policies = [{"name": "on", "roles": ["player_0", "player_1"], "model": str(start)}]
    settled = adapted(tiny_model, policies=policies, train={"steps": 1})
    train(settled, tmp_path / "run")
    assert same(tensors(folder(tmp_path / "run", 0)), tensors(start))
    assert not same(tensors(folder(tmp_path / "run", 1)), tensors(start))


@pytest.mark.parametrize("adapter", [ADAPTER, None], ids=["adapters", "whole models"])
def test_a_frozen_opponent_may_be_an_adapter(
    adapter: dict[str, int] | None, single: Path, tiny_model: Path, tmp_path: Path
) -> None:
    frozen = newest(single) / "model"
    opponents = [{"policy": "frozen", "model": str(frozen), "roles": ["player_1"]}]
    sections: dict[str, Any] = {
        "policies": [],
        "league": {"self_weight": 0, "opponents": opponents},
        "train": {"steps": 1},
        "eval": {"opponents": ["random"]},
    }
    settled = adapted(tiny_model, **sections)
    train(settled if adapter else settled.model_copy(update={"adapter": None}), tmp_path / "run")
    said = [t for e in episodes(tmp_path / "run") for t in e.turns if t.policy == "frozen"][:6]
    assert said
    for turn, logprobs in zip(said, replies_of(tiny_model, frozen, said), strict=True):
        assert turn.logprobs == pytest.approx(logprobs, abs=3e-4)


def test_what_does_not_fit_is_told_before_anything_is_written(
    single: Path, tiny_model: Path, tmp_path: Path
) -> None:
    start = newest(single) / "model"
    own = [{"name": "on", "model": str(start)}]
    other = tmp_path / "other"
    shutil.copytree(start, other)
    told = json.loads((other / "base.json").read_text())
    told["sizes"]["vocab_size"] = 500
    (other / "base.json").write_text(json.dumps(told))
    for sections, said in (
        (
            {"policies": own, "adapter": {"rank": 8}},
            r"rank 4, alpha 8\) is built otherwise .*adapter.rank = 8",
        ),
        ({"policies": own, "adapter": None}, "holds an adapter, but the recipe trains whole models"),
        (
            {"policies": [{"name": "on", "model": str(tiny_model)}]},
            "holds a whole model, but the recipe trains adapters",
        ),
        (
            {"policies": [], "league": {"opponents": [{"policy": "x", "model": str(other)}]}},
            "opponent 'x': the adapter in .* belongs to a base with vocab_size = 500, but",
        ),
    ):
        plain = adapted(tiny_model).model_dump(mode="json") | sections
        plain["eval"] = {"opponents": ["random"]}
        plain.setdefault("league", {})
        with pytest.raises(UserError, match=said):
            train(configuration.validate(plain, "test"), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_past_selves_of_a_run_are_opened_on_its_base(finished: Path) -> None:
    target = measuring.find(finished)
    me = open_player(target.config, open_model(target.config))
    past = open_past(me, finished, "past/1")
    assert past.policies == ("past/1/first", "past/1/second")
    assert me.engine.versions["past/1/first"] == 1  # type: ignore[attr-defined]
    assert trained(finished)[0]["league"]["population"] == ["past/0", "past/1"]
