"""From a word on the command line to something that can be measured: a run, a checkpoint, a model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ludus import config as configuration
from ludus.config import RunConfig
from ludus.errors import UserError
from ludus.train import checkpoint
from ludus.train.rundir import CONFIG, stored_config

if TYPE_CHECKING:
    from ludus.games.base import HasSpiel
    from ludus.truth.policy_table import PolicyTable


@dataclass(frozen=True, slots=True)
class Target:
    """A model directory and the settings to measure it under."""

    model: Path
    config: RunConfig


def find(
    word: Path, recipe: Path | None = None, games: Sequence[str] = (), overrides: Sequence[str] = ()
) -> Target:
    """What `word` names: a run (its newest whole checkpoint), or a model directory.

    Settings come from `recipe`, else from the run that the model lies in, else from the defaults; then
    `overrides` apply, and `games` picks games by label or adds them by name. Raises UserError.
    """
    run = _enclosing_run(word)
    model = _newest_model(word) if (word / CONFIG).is_file() else word
    if not (model / "config.json").is_file():
        raise UserError(
            f"{word} is neither a run directory ({CONFIG} in it) nor a model directory (config.json in it)"
        )
    if recipe is not None:
        base = configuration.load(recipe).model_dump(mode="json")
    elif run is not None:
        base = stored_config(run).model_dump(mode="json")
    elif games:
        base = {"name": "eval", "games": []}
    else:
        raise UserError(f"{word} lies in no run: name a recipe (--recipe) or games (--game) to measure it on")
    base["model"] = {**base.get("model", {}), "path": str(model)}
    if games:
        known = {game["label"]: game for game in base["games"]}
        base["games"] = [known.get(name, {"name": name}) for name in games]
    where = f"settings for {word}"
    return Target(model, configuration.validate(configuration.override(base, overrides), where))


def exploitability(word: str, game: str, recipe: Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """The exploitability of a model or run, of uniformly random play ("random") or of CFR+ ("cfr").

    Raises UserError for games that are too large or of another kind.
    """
    from ludus.experts import equilibrium
    from ludus.games import registry
    from ludus.games.base import HasSpiel
    from ludus.truth.exploitability import exploitability as distance
    from ludus.truth.sequence_form import information_sets, sequence_form

    if word in ("random", "cfr"):
        plain = {"name": word, "model": {"path": word}, "games": [{"name": game}]}
        config = configuration.validate(configuration.override(plain, overrides), "settings")
    else:
        config = find(Path(word), recipe, [game], overrides).config
    rules = registry.make(config.games[0].name, **config.games[0].args)
    if not isinstance(rules, HasSpiel) or information_sets(rules) is None:
        raise UserError(
            f"exploitability cannot be measured in {game!r}: it needs a small two-player zero-sum game of "
            "OpenSpiel, such as kuhn_poker or leduc_poker"
        )
    if word == "random":
        sets = sequence_form(rules).sets
        return distance(rules, {s.key: dict.fromkeys(s.actions, 1 / len(s.actions)) for s in sets}).to_json()
    if word == "cfr":
        return distance(rules, equilibrium(rules)).to_json()
    return distance(rules, asyncio.run(_tabulate(config, rules)), seed=config.seed).to_json()


async def _tabulate(config: RunConfig, game: HasSpiel) -> PolicyTable:
    from ludus.seeding import derive
    from ludus.train.assemble import open_model, open_player
    from ludus.truth.policy_table import tabulate

    player = open_player(config, open_model(config))
    try:
        return await tabulate(
            game,
            player.engine,
            player.policy,
            player.prompter,
            player.sampling,
            thoughts=config.eval.thoughts,
            seed=derive(config.seed, "eval"),
            in_flight=config.rollout.in_flight,
        )
    finally:
        await player.engine.close()


def measure(target: Target) -> dict[str, Any]:
    """Scores against the anchors and exploitability, as `eval` of the target's settings says."""
    return asyncio.run(_measure(target.config))


async def _measure(config: RunConfig) -> dict[str, Any]:
    from ludus.train.assemble import measure_player, open_games, open_model, open_opponents, open_player

    player = open_player(config, open_model(config))
    try:
        opponents = open_opponents(config, player, league=False)
        return await measure_player(config, open_games(config), player, opponents, config.eval.matches)
    finally:
        await player.engine.close()


def _newest_model(run: Path) -> Path:
    found = checkpoint.latest(run)
    if found is None:
        raise UserError(f"{run} has no checkpoint yet; measure its model, or train it first")
    return found / "model"


def _enclosing_run(path: Path) -> Path | None:
    """The run directory that `path` is, or that it lies in as checkpoints/step_N/model."""
    resolved = path.resolve()
    for candidate in (resolved, *resolved.parents[:3]):
        if (candidate / CONFIG).is_file():
            return candidate
    return None
