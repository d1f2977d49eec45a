"""Runs of several policies: who plays what, who learns from which row, and that a kill loses nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import config, dealt_kills, episodes, newest, trained
from torch import Tensor

from ludus.algos.estimators import make_estimator
from ludus.config import RunConfig
from ludus.errors import UserError
from ludus.learner.learner import Learner
from ludus.learner.model import load_model
from ludus.learner.rows import rows
from ludus.players import LanguagePlayer
from ludus.records import is_evaluation, read_metrics
from ludus.seeding import derive
from ludus.train.loop import train
from ludus.train.past import folder
from ludus.types import Episode, Group
from ludus.viewer.report import write_report

BOTH = [{"name": "first", "roles": ["player_0"]}, {"name": "second", "roles": ["player_1"]}]


def two(directory: Path, **sections: Any) -> RunConfig:
    """Two policies, one for each seat, with a league of their past selves; two steps of twelve matches."""
    settled: dict[str, Any] = {
        "policies": BOTH,
        "rollout": {"matches": 12},
        "train": {"steps": 2, "checkpoint_every": 1},
        "optim": {"schedule": "constant", "lr": 3e-3, "warmup_steps": 0},
        "league": {"snapshot_every": 1, "payoff_matches": 2, "opponents": [{"policy": "past/uniform"}]},
        "eval": {"opponents": ["random", "past/0"]},
    }
    return config(directory, **{**settled, **sections})


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of it. Read-only."""
    out = tmp_path_factory.mktemp("policies") / "finished"
    train(two(tiny_model), out)
    return out


def weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- who plays what, and who learns from it ---


def test_each_policy_plays_its_roles_and_no_other(finished: Path) -> None:
    said = {(t.policy, t.role) for e in episodes(finished) for t in e.turns if t.trainable}
    assert said == {("first", "player_0"), ("second", "player_1")}
    past = {(t.policy, t.role) for e in episodes(finished) for t in e.turns if not t.trainable}
    assert past <= {(f"past/{n}/{name}", role) for n in (0, 1) for name, role in said}
    assert len(past) == 4
    seats = {name for e in episodes(finished) for name in e.seats}
    assert seats == {"self", "past/0", "past/1"}  # the league knows one player of several policies


def test_rows_go_to_the_learner_of_the_policy_that_sampled_them(finished: Path, tiny_model: Path) -> None:
    """Held against learners of our own, which get only the episodes in which the other one said nothing."""
    torch.set_num_threads(1)  # as the run, for the split into micro-batches depends on it
    settled = two(tiny_model)
    batch = episodes(finished)[:12]
    groups = [Group([episode]) for episode in batch]
    advantages, _ = make_estimator("rae")(groups, {})
    found = finished / "checkpoints" / "step_00000001"
    for name in ("first", "second"):
        mine = [
            Group([Episode(**{**fields(e), "turns": [t for t in e.turns if t.policy == name]})])
            for e in batch
        ]
        paid = [
            [[a for a, t in zip(turns, e.turns, strict=True) if t.policy == name]]
            for [turns], e in zip(advantages, batch, strict=True)
        ]
        learner = Learner(
            load_model(tiny_model),
            settled.loss,
            settled.optim,
            max_tokens=24,
            total_steps=2,
            seed=derive(3, "learner", name),
        )
        figures = learner.update(rows(mine, paid))
        assert same(weights(found / "model" / name), dict(learner.model.named_parameters()))
        said = trained(finished)[0]["learn"][name]
        assert {key: said[key] for key in figures} == figures
        assert said["turns"] == sum(t.policy == name for e in batch for t in e.turns)
    assert not same(weights(found / "model" / "first"), weights(found / "model" / "second"))


def fields(episode: Episode) -> dict[str, Any]:
    return {name: getattr(episode, name) for name in Episode.__dataclass_fields__}


def test_a_snapshot_holds_every_policy_as_it_played(finished: Path) -> None:
    for name in ("first", "second"):
        learner = load_file(newest(finished) / "trainer" / f"{name}.safetensors")
        kept = weights(folder(finished, 2) / name)
        assert same(
            kept,
            {n.removeprefix("model."): t for n, t in learner.items() if n in {f"model.{k}" for k in kept}},
        )


def test_one_policy_by_name_is_the_same_run_as_none(
    tiny_model: Path, tmp_path: Path, kills: ModuleType
) -> None:
    plain = two(tiny_model, policies=[])
    named = two(tiny_model, policies=[{"name": "solver", "roles": ["player_0", "player_1"], "lr": 3e-3}])
    train(plain, tmp_path / "plain")
    train(named, tmp_path / "named")
    assert kills.differences(tmp_path / "named", tmp_path / "plain") == []


def test_kill_9_at_random_moments_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    last = dealt_kills(two(tiny_model), tiny_model, tmp_path, kills=3, seed=5)
    assert last.startswith("3 kills in ")
    assert ", 0 different" in last


def test_a_policy_may_have_a_start_and_a_rate_of_its_own(
    finished: Path, tiny_model: Path, tmp_path: Path
) -> None:
    other = newest(finished) / "model" / "second"
    settled = two(
        tiny_model,
        policies=[BOTH[0], {**BOTH[1], "model": str(other), "lr": 1e-5}],
        train={"steps": 1},
        league={},
        eval={"opponents": ["random"]},
    )
    train(settled, tmp_path / "run")
    (record,) = trained(tmp_path / "run")
    assert (record["learn"]["first"]["lr"], record["learn"]["second"]["lr"]) == (3e-3, 1e-5)
    begun, ended = weights(other), weights(newest(tmp_path / "run") / "model" / "second")
    moved = max(float((begun[name] - ended[name]).abs().max()) for name in begun)
    assert 0 < moved < 1.1e-5  # AdamW's first step


def test_metrics_display_and_report_tell_the_policies_apart(finished: Path, capsys: Any) -> None:
    for record in read_metrics(finished / "metrics.jsonl"):
        assert is_evaluation(record) or set(record["learn"]) == {"first", "second"}
    page = write_report(finished).read_text()
    assert ">first<" in page
    assert ">second<" in page


# --- what cannot be ---


@pytest.mark.parametrize(
    ("policies", "league", "said"),
    [
        ([{"name": "a", "roles": ["player_0"]}, {"name": "b"}], {}, "'b' has no roles"),
        ([BOTH[0], BOTH[0]], {}, "policies has 'first' twice"),
        ([BOTH[0], {"name": "self", "roles": ["player_1"]}], {}, "'self' is somebody else's name"),
        (
            [BOTH[0], {"name": "random", "roles": ["player_1"]}],
            {"opponents": [{"policy": "random"}]},
            "'random' is somebody else's name",
        ),
        ([BOTH[0], {"name": "a/b", "roles": ["player_1"]}], {}, "policies.1.name"),
        (
            [BOTH[0], {"name": "b", "roles": ["judge"]}],
            {},
            "'b' is to play 'judge', which no game of its has",
        ),
        ([BOTH[0]], {}, "nobody plays player_1 of kuhn_poker"),
        (
            [BOTH[0], {"name": "b", "roles": ["kuhn_poker/player_1"]}],
            {},
            "nobody plays player_1 of tic_tac_toe",
        ),
        (
            [*BOTH, {"name": "c", "roles": ["kuhn_poker/player_1"]}],
            {},
            "player_1 of kuhn_poker is played by 'second' and by 'c'",
        ),
        (
            BOTH,
            {"self_weight": 0, "opponents": [{"policy": "past/0", "roles": ["player_1"]}]},
            "'second' would never play",
        ),
    ],
)
def test_policies_that_do_not_add_up_are_told_before_anything_is_written(
    policies: list[Any], league: dict[str, Any], said: str, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        train(config(tiny_model, policies=policies, league=league), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_start_of_another_architecture_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    told = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**told, "rms_norm_eps": 1e-5}))
    with pytest.raises(UserError, match=r"built otherwise than .*\(rms_norm_eps\)"):
        train(config(tiny_model, policies=[BOTH[0], {**BOTH[1], "model": str(other)}]), tmp_path / "run")


# --- a player of several policies ---


def test_a_player_knows_whose_role_it_is() -> None:
    player = LanguagePlayer(
        "self", None, None, None, parts={("g", "a"): "x", ("g", "b"): "y", ("h", "a"): "y"}
    )  # type: ignore[arg-type]
    assert player.policies == ("x", "y")
    assert [player.policy_of("g", r) for r in "ab"] == ["x", "y"]
    assert player.playing("g").policy_of("whatever", "b") == "y"
    past = player.named("past/3")
    assert (past.policy, past.policies, past.trainable) == ("past/3", ("past/3/x", "past/3/y"), False)
    assert past.policy_of("h", "a") == "past/3/y"
    assert player.alone("z").policies == ("z",)
