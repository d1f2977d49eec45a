"""`ludus tournament`: from words on the command line to entrants, and from their matches to tables and files.

An entrant is one of

    NAME            a program (random, minimax, cfr, mcts:100, fair_trader), or an opponent of the recipe
    PATH            a run directory (its newest whole checkpoint), or a model directory
    NAME=PATH       the same under another name
    NAME=URL#MODEL  a model behind an OpenAI-compatible endpoint, such as big=http://127.0.0.1:8000/v1#qwen3;
                    its key is read from NAME_API_KEY where that variable is set

Settings of games, prompts and sampling come from the recipe; without one the games' options are those of the
runs among the entrants, a model plays by the settings of its own run, and everything else by the defaults.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ludus import config as configuration
from ludus import experts, measuring
from ludus.config import EndpointConfig, RunConfig
from ludus.engines.openai_engine import OpenAIEngine
from ludus.errors import UserError
from ludus.games import registry
from ludus.games.base import Game
from ludus.model_files import digests
from ludus.players import LanguagePlayer, Player
from ludus.rollout.play import HouseRules
from ludus.text.tokenizer import byte_tokenizer
from ludus.train.rundir import stored_config
from ludus.truth.tournament import Tournament, tournament
from ludus.types import Sampling
from ludus.viewer.console import table_console
from ludus.viewer.standings import print_tournament, write_heatmap

RESULT = "tournament.json"


@dataclass(frozen=True, slots=True)
class Entrant:
    """`identity` is plain data that differs where the same name stands for another player."""

    player: Player
    identity: dict[str, Any]


def hold(
    words: Sequence[str],
    games: Sequence[str],
    *,
    recipe: Path | None,
    matches: int,
    seed: int,
    out: Path,
    as_json: bool,
) -> None:
    """Play a tournament, or what an earlier call in `out` left to play; print it and write its files.

    Raises UserError for bad input, and in the end where some matches could not be played: the others are
    then printed and kept.
    """
    config, labels = settings(recipe, games, words)
    names = [_named(word)[0] for word in words]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"entrant {twice[0]!r} is named twice; give one of them another name: NAME=...")
    result = asyncio.run(_play(words, config, recipe, labels, matches, seed, out))
    found = {"seed": seed, "matches": 2 * -(-matches // 2), **result.to_json()}
    _write(found, out)
    if as_json:
        json.dump(found, sys.stdout, indent=1)
        print()
    else:
        console = table_console()
        print_tournament(found, console)
        console.print(f"results: {out}", markup=False, soft_wrap=True)
    if result.problems:
        raise UserError(
            f"{'; '.join(result.problems)}. What was played is kept in {out}: mend the cause, then run the "
            "same command again for the rest"
        )


async def _play(
    words: Sequence[str],
    config: RunConfig,
    recipe: Path | None,
    games: Mapping[str, Game],
    matches: int,
    seed: int,
    out: Path,
) -> Tournament:
    entrants: dict[str, Entrant] = {}
    try:
        for word in words:
            entrants[_named(word)[0]] = open_entrant(word, config, recipe)
        settings = {
            "games": {game.label: game.model_dump(exclude={"weight"}) for game in config.games},
            "entrants": {name: entrant.identity for name, entrant in entrants.items()},
        }
        columns = (TextColumn("deals"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("deals")
            return await tournament(
                games,
                {name: entrant.player for name, entrant in entrants.items()},
                matches=matches,
                seed=seed,
                keep=out,
                settings=settings,
                rule=HouseRules(config.rollout.retries, config.rollout.forfeit),
                in_flight=config.rollout.in_flight,
                tell=lambda done, total: bar.update(task, completed=done, total=total),
            )
    finally:
        for entrant in entrants.values():
            if isinstance(entrant.player, LanguagePlayer):
                await entrant.player.engine.close()


def settings(
    recipe: Path | None, games: Sequence[str], words: Sequence[str]
) -> tuple[RunConfig, dict[str, Game]]:
    """The recipe's settings, else the defaults, and the games that are asked for by label.

    `words` are the entrants: their runs say with which options a game is played, where no recipe does.
    """
    if recipe is not None:
        base = configuration.load(recipe).model_dump(mode="json")
    elif games:
        base = {"name": "tournament", "model": {"path": "none"}, "games": _games_of_runs(words, games)}
    else:
        raise UserError("name what is played: --game kuhn_poker (may be repeated), or --recipe")
    measuring.pick_games(base, games)
    config = configuration.validate(base, where=str(recipe or "--game"))
    return config, {game.label: registry.make(game.name, **game.args) for game in config.games}


def _games_of_runs(words: Sequence[str], games: Sequence[str]) -> list[dict[str, Any]]:
    """Those of `games` that runs among the entrants play, with their options, which must be the same."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for word in words:
        path = Path(_named(word)[1])
        run = measuring.enclosing_run(path) if path.is_dir() else None
        for game in stored_config(run).games if run is not None else ():
            plain = game.model_dump(mode="json", exclude={"weight"})
            if game.label not in games:
                continue
            first, other = found.setdefault(game.label, (word, plain))
            if other != plain:
                raise UserError(
                    f"{first} and {word} play {game.label!r} with different options; say by a recipe "
                    "(--recipe) which ones count"
                )
    return [plain for _, plain in found.values()]


def _named(word: str) -> tuple[str, str]:
    """Name and what it stands for."""
    name, eq, rest = word.partition("=")
    if not eq:
        return word, word
    if not name or not rest:
        raise UserError(f"entrant {word!r} is not of the form NAME=PATH or NAME=URL#MODEL")
    return name, rest


def open_entrant(word: str, config: RunConfig, recipe: Path | None) -> Entrant:
    """The player that a word of the command line stands for. Raises UserError where there is none."""
    name, what = _named(word)
    if what.startswith(("http://", "https://")):
        url, _, model = what.partition("#")
        if not model:
            raise UserError(f"entrant {word!r} names no model; write {name}={url}#MODEL")
        variable = re.sub(r"\W", "_", name).upper() + "_API_KEY"
        endpoint = EndpointConfig(
            base_url=url, model=model, key_env=variable if variable in os.environ else None
        )
        return _remote(endpoint, config)
    league = {opponent.policy: opponent for opponent in config.league.opponents}
    if what in league:
        opponent = league[what]
        if opponent.endpoint is not None:
            return _remote(opponent.endpoint, config)
        if opponent.model is not None:
            return _model(Path(opponent.model), config, recipe)
    if Path(what).is_dir():
        return _model(Path(what), config, recipe)
    if what.startswith(configuration.PAST):
        raise UserError(
            f"entrant {word!r} is a past self of no run; name its directory: RUN/league/past_00000000"
        )
    try:
        return Entrant(experts.make_player(what), {"program": what})
    except UserError as e:
        raise UserError(f"entrant {word!r} is no directory, and as a program: {e}") from e


def _model(path: Path, config: RunConfig, recipe: Path | None) -> Entrant:
    """A local model on an engine of its own."""
    from ludus.train.assemble import open_model, open_player

    target = measuring.find(path, recipe, [game.label for game in config.games])
    own = target.config
    player = open_player(own, open_model(own))
    engine = own.engine.model_dump(include={"dtype", "context", "matmul"})
    identity = {"files": digests(target.model), "template": own.model.template, "engine": engine}
    return Entrant(player, identity | _speech(own))


def _remote(endpoint: EndpointConfig, config: RunConfig) -> Entrant:
    """A model behind an endpoint: it reads words, so any tokenizer serves to render its prompts."""
    from ludus.train.assemble import open_prompter

    rollout = config.rollout
    prompter = open_prompter(config, byte_tokenizer(), "plain")
    sampling = Sampling(rollout.max_tokens, rollout.temperature, rollout.top_p, rollout.top_k)
    player = LanguagePlayer(endpoint.model, OpenAIEngine(endpoint), prompter, sampling)
    return Entrant(player, {"url": endpoint.base_url, "model": endpoint.model} | _speech(config))


def _speech(config: RunConfig) -> dict[str, Any]:
    """The settings that decide what a language model reads and how its replies are sampled."""
    sampled = {"max_tokens", "temperature", "top_p", "top_k"}
    return {"text": config.text.model_dump(), "sampling": config.rollout.model_dump(include=sampled)}


def _write(found: Mapping[str, Any], out: Path) -> None:
    try:
        temporary = out / f".tmp-{RESULT}"
        temporary.write_text(json.dumps(found, indent=1) + "\n")
        temporary.replace(out / RESULT)
        for label, game in found["games"].items():
            if game["standings"]:
                write_heatmap(label, game, out)
    except OSError as e:
        raise UserError(f"cannot write to {out}: {e.strerror}; the matches themselves are kept") from e
