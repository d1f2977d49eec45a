"""`ludus sft` on a very small model: what it leaves, exact resumes, a real kill, bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import ROOT
from transformers import AutoModelForCausalLM

from ludus.cli import main
from ludus.config import LossConfig, SftDataConfig, TuneConfig, validate_tune
from ludus.errors import UserError
from ludus.learner.batching import passes
from ludus.learner.learner import Learner, NonFinite
from ludus.learner.model import load_model
from ludus.records import read_metrics
from ludus.seeding import derive
from ludus.sft.encode import Encoder, load
from ludus.text.templates import detect
from ludus.text.tokenizer import Tokenizer
from ludus.train.rundir import RunDir
from ludus.train.tune import tune


def quiet(_: str) -> None: ...


def data(path: Path, count: int = 42) -> Path:
    rows = [
        {"prompt": f"Your card: {'JQK'[k % 3]}.", "completion": f"<think>{k}</think>\\boxed{{bet}}"}
        for k in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(model: Path, rows: Path, **more: Any) -> TuneConfig:
    plain = {
        "model": {"path": str(model)},
        "data": [str(rows)],
        "threads": 1,
        "batch": 4,
        "epochs": 2,
        **more,
    }
    plain["optim"] = {"lr": 1e-2, "average": 0.9, **more.get("optim", {})}
    return validate_tune(plain, "test")


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of 20 updates, OUT, beside its data. Read-only."""
    folder = tmp_path_factory.mktemp("tune")
    tune(settings(tiny_model, data(folder / "rows.jsonl")), folder / "out", tell=quiet)
    return folder


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def learnt(out: Path) -> list[dict[str, float]]:
    return [record["learn"] for record in read_metrics(out / "metrics.jsonl")]


def same(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return learnt(a) == learnt(b) and all(torch.equal(one[name], other[name]) for name in one)


def test_it_leaves_a_model_and_its_metrics(finished: Path, tiny_model: Path) -> None:
    out = finished / "out"
    assert {path.name for path in out.iterdir()} == {"sft.toml", "metrics.jsonl", "log.txt", "lock", "model"}
    records = read_metrics(out / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 21))  # 2 rows of 42 fill no batch
    assert records[-1]["epoch"] == 2.0
    assert learnt(out)[-1]["loss"] < 0.5 * learnt(out)[0]["loss"]
    assert all(said["rows"] == 4 for said in learnt(out))
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert model.config.model_type == "qwen3"
    assert Tokenizer.load(out / "model").same_as(Tokenizer.load(tiny_model))
    assert "42 supervised rows" in (out / "log.txt").read_text()


def test_it_is_learner_sft_over_the_passes(finished: Path, tiny_model: Path) -> None:
    """By hand: the same rows in the same order give the same weights."""
    config = settings(tiny_model, finished / "rows.jsonl")
    tokenizer = Tokenizer.load(tiny_model)
    source = load(
        SftDataConfig(path=str(finished / "rows.jsonl")),
        Encoder(tokenizer, detect(tokenizer)),
        1000,
        "refuse",
        quiet,
    )
    torch.set_num_threads(1)
    learner = Learner(load_model(tiny_model), LossConfig(), config.optim, max_tokens=1, total_steps=20)
    for picked in passes(42, 4, 2, derive(0, "shuffle")):
        learner.sft([source.rows[i].sample() for i in picked])
    kept = weights(finished / "out")
    assert all(torch.equal(kept[name], w) for name, w in learner.average_weights().items() if name in kept)


def test_a_run_that_was_interrupted_goes_on_exactly(
    finished: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tiny_model, finished / "rows.jsonl", checkpoint_every=3)
    append = RunDir.append

    def interrupted(self: RunDir, record: dict[str, Any]) -> None:
        if record["step"] == 11:
            raise KeyboardInterrupt
        append(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune(config, tmp_path / "out", tell=quiet)
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step_00000009"]
    assert not (tmp_path / "out" / "model").exists()
    tune(config, tmp_path / "out", resume=True, tell=quiet)
    assert same(tmp_path / "out", finished / "out")
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_real_kill_loses_nothing(finished: Path, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = ["sft", str(tiny_model), "--data", str(finished / "rows.jsonl"), "--out", str(out)]
    argv += ["batch=4", "epochs=2", "threads=1", "optim.lr=1e-2", "optim.average=0.9", "checkpoint_every=1"]
    command = [sys.executable, "-m", "ludus.cli", *argv]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as running:
        while running.poll() is None and not list(out.glob("checkpoints/step_*")):
            time.sleep(0.005)
        running.kill()  # -9
    assert main([*argv, "--resume"]) == 0
    assert same(out, finished / "out")


def test_a_finished_run_stays_as_it_is(finished: Path, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "out", tmp_path / "out")
    told: list[str] = []
    tune(settings(tiny_model, finished / "rows.jsonl"), tmp_path / "out", resume=True, tell=told.append)
    assert told[-1] == f"model: {tmp_path / 'out' / 'model'}"
    assert same(tmp_path / "out", finished / "out")
    with pytest.raises(UserError, match="is not empty, and nothing is overwritten"):
        tune(settings(tiny_model, finished / "rows.jsonl"), tmp_path / "out", tell=quiet)


def test_other_data_and_settings_are_refused_at_a_resume(tiny_model: Path, tmp_path: Path) -> None:
    rows, out = data(tmp_path / "rows.jsonl"), tmp_path / "out"
    tune(settings(tiny_model, rows, checkpoint_every=3), out, tell=quiet)
    half = tmp_path / "half"
    shutil.copytree(out, half)
    shutil.rmtree(half / "model")
    with pytest.raises(UserError, match=r"epochs \(was 2, now 3\).*half/sft\.toml"):
        tune(settings(tiny_model, rows, epochs=3), half, resume=True, tell=quiet)
    with pytest.raises(UserError, match=r"was not made by ludus sft"):
        tune(settings(tiny_model, rows), tmp_path, resume=True, tell=quiet)


def test_a_checkpoint_of_other_data_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, out = data(tmp_path / "rows.jsonl"), tmp_path / "out"
    config = settings(tiny_model, rows, checkpoint_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "sft", _once(Learner.sft))
        with pytest.raises(NonFinite):
            tune(config, out, tell=quiet)
    data(rows, count=43)
    with pytest.raises(UserError, match=r"no longer what .* began with"):
        tune(config, out, resume=True, tell=quiet)


def _once(sft: Any) -> Any:
    """The second update fails, as one with an infinite loss does."""
    seen: list[None] = []

    def once(self: Learner, rows: Any) -> Any:
        seen.append(None)
        if len(seen) > 1:
            raise NonFinite("update 1: the loss is inf")
        return sft(self, rows)

    return once


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--data", "absent.jsonl"], "cannot read supervised data absent.jsonl"),
        (["batsh=4"], "did you mean 'batch'?"),
        (["batch=43"], "42 rows, not even one batch of 43"),
        (["context=10"], 'raise context, or drop them by too_long="drop"'),
        (["context=100000"], "lower context or take a model"),
        (["optim.minibatches=2"], "set epochs and batch"),
        (["data.0={path='x', weight=2.0}"], "every pass goes over all rows"),
        (["model.path=nowhere"], "no model directory at nowhere"),
    ],
)
def test_bad_input_is_told_in_one_line_and_leaves_nothing(
    words: list[str], says: str, finished: Path, tiny_model: Path, tmp_path: Path, capsys: Any
) -> None:
    argv = ["sft", str(tiny_model), "--data", str(finished / "rows.jsonl"), "--out", str(tmp_path / "out")]
    assert main([*argv, *words]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_two_files_are_one_row_after_another(finished: Path, tiny_model: Path, tmp_path: Path) -> None:
    one, two = data(tmp_path / "one.jsonl", 20), tmp_path / "two.jsonl"
    lines = (finished / "rows.jsonl").read_text().splitlines(keepends=True)
    two.write_text("".join(lines[20:]))
    assert one.read_text() + two.read_text() == "".join(lines)
    config = settings(tiny_model, one)
    both = config.model_copy(update={"data": (*config.data, SftDataConfig(path=str(two)))})
    tune(both, tmp_path / "out", tell=quiet)
    assert same(tmp_path / "out", finished / "out")
