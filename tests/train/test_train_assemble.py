"""Who sits at the table: frozen models, servers and programs, and what is refused before a run begins."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ludus import config as configuration
from ludus.config import RunConfig
from ludus.errors import UserError
from ludus.players import LanguagePlayer
from ludus.rollout.scheduler import play_all
from ludus.text.train_tokenizer import train_tokenizer
from ludus.train.assemble import open_games, open_model, open_opponents, open_player
from ludus.types import MatchPlan


def config(model: Path, *opponents: dict[str, Any], **sections: Any) -> RunConfig:
    data = {
        "name": "tiny",
        "threads": 1,
        "model": {"path": str(model)},
        "games": [{"name": "kuhn_poker"}],
        "text": {"rules": False},
        "engine": {"slots": 8, "context": 256, "threads": 1},
        "rollout": {"matches": 8, "max_tokens": 24},
        "league": {"opponents": list(opponents)},
        **sections,
    }
    return configuration.validate(data, where="test")


def opponents_of(settings: RunConfig) -> dict[str, Any]:
    return open_opponents(settings, open_player(settings, open_model(settings), trainable=True))


def test_a_frozen_model_plays_beside_the_trained_one(tiny_model: Path) -> None:
    settings = config(tiny_model, {"policy": "first", "model": str(tiny_model)})
    me = open_player(settings, open_model(settings), trainable=True)
    players = {"self": me, **open_opponents(settings, me)}
    plans = [MatchPlan(i, i, "kuhn_poker", ("self", "first"), i, i) for i in range(8)]
    episodes = asyncio.run(play_all(plans, open_games(settings), players))
    turns = [turn for episode in episodes for turn in episode.turns]
    assert {(turn.seat, turn.policy, turn.trainable) for turn in turns} == {
        (0, "self", True),
        (1, "first", False),
    }
    # The same weights under two names: whoever sits there, the same prompt and seed give the same reply.
    swapped = [
        MatchPlan(p.episode, p.group, p.game, ("first", "self"), p.match_seed, p.reply_seed) for p in plans
    ]
    again = asyncio.run(play_all(swapped, open_games(settings), players))
    assert [t.completion_ids for e in again for t in e.turns] == [t.completion_ids for t in turns]


def test_measuring_opens_no_opponent_that_it_does_not_ask_for(tiny_model: Path) -> None:
    settings = config(tiny_model, {"policy": "first"}, {"policy": "gone", "model": "nowhere"})
    me = open_player(settings, open_model(settings))
    assert set(open_opponents(settings, me, league=False)) == {"random"}


def test_a_frozen_model_with_another_tokenizer_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    train_tokenizer(["entirely different words here"] * 50, other, 400)
    with pytest.raises(UserError, match=r"'first': the tokenizer in .*other is not that of"):
        opponents_of(config(tiny_model, {"policy": "first", "model": str(other)}))


def test_a_frozen_model_built_otherwise_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    file = other / "config.json"
    data = json.loads(file.read_text())
    data["rms_norm_eps"] = 0.5  # the tensors fit all the same
    file.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"'first': the model in .* is built otherwise .*rms_norm_eps"):
        opponents_of(config(tiny_model, {"policy": "first", "model": str(other)}))


def test_a_program_keeps_its_name(tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"'random' has a program's name"):
        opponents_of(config(tiny_model, {"policy": "random", "model": str(tiny_model)}))


def test_a_server_sits_behind_its_own_engine(tiny_model: Path) -> None:
    endpoint = {"base_url": "http://127.0.0.1:9/v1", "model": "m"}
    server = opponents_of(config(tiny_model, {"policy": "server", "endpoint": endpoint}))["server"]
    assert isinstance(server, LanguagePlayer)
    assert server.engine.endpoint == "http://127.0.0.1:9/v1/chat/completions"  # type: ignore[attr-defined]
    assert not server.trainable


@pytest.mark.parametrize(
    ("opponents", "said"),
    [
        ([{"policy": "self"}], "'self' names the trained policy itself"),
        ([{"policy": "random"}, {"policy": "random"}], "has 'random' twice"),
        (
            [{"policy": "a", "model": "m", "endpoint": {"base_url": "http://x", "model": "m"}}],
            "both a model and",
        ),
        ([{"policy": "a", "endpoint": {"base_url": "x", "model": "m"}}], "must start with http"),
        (
            [{"policy": "random", "games": ["chess"]}],
            "'random' is to play 'chess', which is not in this recipe",
        ),
    ],
)
def test_what_a_recipe_may_not_say_of_opponents(opponents: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(UserError, match=said):
        config(Path("m"), *opponents)


def test_nobody_to_play_a_game_against() -> None:
    league = {"self_weight": 0.0, "opponents": [{"policy": "random", "games": ["kuhn_poker"]}]}
    games = [{"name": "kuhn_poker"}, {"name": "tic_tac_toe"}]
    with pytest.raises(UserError, match="nobody is there to play 'tic_tac_toe' against"):
        config(Path("m"), league=league, games=games)


@pytest.mark.parametrize("engine", [{"dtype": "bfloat16"}, {"matmul": "medium"}])
def test_an_inexact_sampler_cannot_stand_in_for_the_learner(engine: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"loss\.proximal = 'sampler'"):
        config(Path("m"), engine=engine, loss={"proximal": "sampler"})
