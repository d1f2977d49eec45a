"""Supervised rows in a whole run: exact resumes, kills, bad data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import config, dealt_kills, newest, trained

from ludus.errors import UserError
from ludus.train.loop import train


def data(path: Path, count: int = 40) -> Path:
    rows = [
        {"prompt": f"Your card: {'JQK'[k % 3]}.", "completion": f"<think>{k}</think>\\boxed{{bet}}"}
        for k in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sft(path: Path, **more: Any) -> dict[str, Any]:
    return {"data": [str(path)], "weight": 0.5, "batch": 4, **more}


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run with supervised rows; its data lies beside it. Read-only."""
    folder = tmp_path_factory.mktemp("supervised")
    path = data(folder / "rows.jsonl")
    train(
        config(tiny_model, sft=sft(path), optim={"lr": 1e-2, "epochs": 2, "minibatches": 2}), folder / "run"
    )
    return folder


def wanted(tiny_model: Path, folder: Path, **more: Any) -> Any:
    optim = {"lr": 1e-2, "epochs": 2, "minibatches": 2}
    return config(tiny_model, sft=sft(folder / "rows.jsonl", **more), optim=optim)


def test_every_step_says_what_the_supervised_rows_cost(finished: Path) -> None:
    learn = [record["learn"] for record in trained(finished / "run")]
    assert len(learn) == 4
    assert all(said["sft_tokens"] > 0 for said in learn)
    assert learn[-1]["sft_loss"] < learn[0]["sft_loss"]
    assert "rows.jsonl: 40 supervised rows" in (finished / "run" / "log.txt").read_text()


def test_a_resume_equals_the_undisturbed_run_bit_for_bit(
    finished: Path, tiny_model: Path, tmp_path: Path, kills: ModuleType
) -> None:
    resumed = tmp_path / "resumed"
    shutil.copytree(finished / "run", resumed)
    shutil.rmtree(newest(resumed))
    train(wanted(tiny_model, finished), resumed, resume=True)
    assert kills.differences(resumed, finished / "run") == []


def test_real_kills_lose_nothing(tiny_model: Path, tmp_path: Path) -> None:
    recipe = config(tiny_model, sft=sft(data(tmp_path / "rows.jsonl")))
    assert " 0 different" in dealt_kills(recipe, tiny_model, tmp_path, kills=1, seed=1)


def test_other_data_than_the_run_began_with_is_refused(
    finished: Path, tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    folder = tmp_path / "copy"
    stored = (folder / "run" / "config.toml").read_text()
    (folder / "run" / "config.toml").write_text(stored.replace(str(finished), str(folder)))
    data(folder / "rows.jsonl", count=39)
    with pytest.raises(UserError, match=r"no longer what .* began with"):
        train(wanted(tiny_model, folder), folder / "run", resume=True)


def test_the_rows_move_the_weights(finished: Path, tiny_model: Path, tmp_path: Path) -> None:
    optim = {"lr": 1e-2, "epochs": 2, "minibatches": 2}
    train(config(tiny_model, optim=optim, train={"steps": 1, "checkpoint_every": 1}), tmp_path / "without")
    train(
        config(
            tiny_model,
            optim=optim,
            train={"steps": 1, "checkpoint_every": 1},
            sft=sft(finished / "rows.jsonl"),
        ),
        tmp_path / "with",
    )
    one, other = (
        load_file(newest(tmp_path / name) / "model" / "model.safetensors") for name in ("without", "with")
    )
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert "sft_loss" not in trained(tmp_path / "without")[0]["learn"]


def test_each_policy_learns_from_its_own_data(tiny_model: Path, tmp_path: Path) -> None:
    two = [{"name": "first", "roles": ["player_0"]}, {"name": "second", "roles": ["player_1"]}]
    mine = {"path": str(data(tmp_path / "rows.jsonl")), "policies": ["second"]}
    train(
        config(
            tiny_model,
            policies=two,
            sft={"data": [mine], "batch": 2},
            train={"steps": 1, "checkpoint_every": 1},
        ),
        tmp_path / "run",
    )
    learn = trained(tmp_path / "run")[0]["learn"]
    assert ["sft_loss" in learn[name] for name in ("first", "second")] == [False, True]
    with pytest.raises(UserError, match="is for policy 'third', which is not in policies"):
        config(tiny_model, policies=two, sft={"data": [{**mine, "policies": ["third"]}]})


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"data": ["absent.jsonl"]}, "cannot read supervised data absent.jsonl"),
        ({"context": 20}, 'are longer than 20 tokens.*sft.too_long="drop"'),
        ({"context": 99999}, "lower sft.context"),
    ],
)
def test_data_that_cannot_serve_leaves_nothing_behind(
    section: dict[str, Any], says: str, tiny_model: Path, tmp_path: Path
) -> None:
    path = data(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match=says):
        train(config(tiny_model, sft=sft(path) | section), tmp_path / "run")
    assert not (tmp_path / "run").exists()
