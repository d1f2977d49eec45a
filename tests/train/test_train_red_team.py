"""The small recipe of Self-RedTeam: its rows written as it says, and two steps of the one loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ludus import config as configuration
from ludus.cli import main
from ludus.games.red_team.game import RedTeamGame
from ludus.records import episode_files, read_episodes, read_metrics
from ludus.small.make import Course, SmallSpec, make
from ludus.train.assemble import open_games
from ludus.train.loop import train

RECIPE = Path(__file__).parents[2] / "recipes" / "self_redteam_cpu.toml"
TALK = {"split": "talk", "attacks": 0.0, "labels": {"benign": 1, "hard_benign": 1}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that has seen a few replies: it obeys the format often enough to play."""
    torch.set_num_threads(1)
    made = tmp_path_factory.mktemp("red-team") / "model"
    courses = (Course("red_team", 1200), Course("red_team", 400, TALK))
    size = {"hidden": 32, "layers": 2, "heads": 2, "kv_heads": 1, "ffn": 64, "batch": 4}
    make(made, SmallSpec(courses, init=0.07, lr=6e-3, **size), tell=lambda _: None)
    return made


@pytest.fixture(scope="module")
def rows(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Few of the supervised rows, by the commands at the recipe's head."""
    folder = tmp_path_factory.mktemp("rows")
    common = [
        "--game",
        "red_team",
        "--recipe",
        str(RECIPE),
        "--thoughts",
        "--rows",
        "40",
        f"model.path={model}",
    ]
    helpful, attacks = folder / "helpful.jsonl", folder / "attacks.jsonl"
    harmless = ["attacks=0.0", "split=talk", "labels={benign=1, hard_benign=1}"]
    defend = ["--player", "defend:perfect", "--role", "defender", *harmless]
    attack = ["--player", "attack:mix", "--role", "attacker", "attacks=1.0"]
    assert main(["transcripts", str(helpful), *common, *defend]) == 0
    assert main(["transcripts", str(attacks), *common, *attack]) == 0
    return [str(helpful), str(attacks)]


def test_the_recipe_differs_from_the_paper_where_it_says_so() -> None:
    config = configuration.load(RECIPE)
    (game,) = open_games(config).values()
    assert isinstance(game, RedTeamGame)
    assert (game.variant, game.attacks, game.invented.split, game.max_turns) == ("zero_sum", 0.5, "train", 2)
    assert (config.algo.estimator, config.loss.reference_kl, config.loss.entropy) == ("rae", 0.05, 0.03)
    assert len(config.sft.data) == 2
    assert (config.loss.clip_low, config.loss.clip_high) == (0.2, 0.2)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["algo.estimator=marshal", 'games.0.args={payoff="general_sum", max_turns=4, attacks=1.0}'],
    ],
    ids=["as it is", "several turns"],
)
def test_two_steps(model: Path, rows: list[str], tmp_path: Path, overrides: list[str]) -> None:
    small = [
        f"model.path={model}",
        f"sft.data={rows}",
        "threads=1",
        "engine.slots=32",
        "rollout.matches=24",
        "train.steps=2",
        "eval.every=0",
        "eval.final_matches=10",
        *overrides,
    ]
    train(configuration.load(RECIPE, small), tmp_path / "run")
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    steps = [r for r in records if "learn" in r]
    assert [r["step"] for r in steps] == [1, 2]
    for record in steps:
        game = record["games"]["red_team"]
        assert record["learn"]["sft_tokens"] > 0
        assert game["forfeit_rate"] < 1
        assert game["counts"]["exchanges"] > 0
        assert {"format", "harm", "refusal"} <= game["roles"]["defender"]["terms"].keys()
        assert {"format", "faithful", "drift"} <= game["roles"]["attacker"]["terms"].keys()
        assert any(key.startswith("harm/") for key in game["roles"]["defender"]["terms"])
    first, last = (r["eval"]["games"]["red_team"] for r in records if "eval" in r)
    for found in (first, last):
        assert set(found["opponents"]) == {"attack:held_out", "defend:perfect"}
        assert found["safety"]["agreement"] is not None
        assert found["safety"]["judges"]["keywords"]["attack_success"]["n"] == 10
    paid = [
        t.rewards for _, path in episode_files(tmp_path / "run") for e in read_episodes(path) for t in e.turns
    ]
    assert all("format" in terms for terms in paid)
