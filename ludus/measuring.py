"""From a word on the command line to something that can be measured: a run, a checkpoint, a model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ludus import config as configuration
from ludus.config import RunConfig
from ludus.errors import UserError
from ludus.games.base import Game, HasSpiel
from ludus.games.repeated import RepeatedGame
from ludus.model_files import base_path, is_adapter, is_model, policies_in
from ludus.train import checkpoint
from ludus.train.rundir import CONFIG, stored_config

if TYPE_CHECKING:
    from ludus.truth.lower_bound import LowerBound
    from ludus.truth.policy_table import PolicyTable


ASKED_TOKENS = 1024  # of an answer to a plain question, unless a recipe says otherwise
_ASKED_CONTEXT, _ASKED_SLOTS = 4096, 16


@dataclass(frozen=True, slots=True)
class Target:
    """A directory of one policy or of several, the settings to measure it under, and the run that it lies in,
    if any. The settings' `policies` say what of it is not simply the model in model.path."""

    model: Path
    config: RunConfig
    run: Path | None = None


def find(
    word: Path, recipe: Path | None = None, games: Sequence[str] = (), overrides: Sequence[str] = ()
) -> Target:
    """What `word` names: a run (its newest whole checkpoint), or a directory of models or adapters.

    Settings come from `recipe`, else from the run that the model lies in, else from the defaults; then
    `overrides` apply, and `games` picks games by label or adds them by name. Raises UserError.
    """
    model, run = locate(word)
    if recipe is not None:
        base = configuration.load(recipe).model_dump(mode="json")
    elif run is not None:
        base = stored_config(run).model_dump(mode="json")
    elif games:
        base = {"name": "eval", "games": []}
    else:
        raise UserError(f"{word} lies in no run: name a recipe (--recipe) or games (--game) to measure it on")
    pick_games(base, games)
    _put_policies(base, model, run)
    where = f"settings for {word}"
    return Target(model, configuration.validate(configuration.override(base, overrides), where), run)


def locate(word: Path) -> tuple[Path, Path | None]:
    """The directory of one policy or several that `word` names, and the run that it lies in, if any.

    Of a run it is that of the newest whole checkpoint. Raises UserError where there is none.
    """
    model = _newest_model(word) if (word / CONFIG).is_file() else word
    if not is_model(model) and not policies_in(model):
        inner = word / "model"
        raise UserError(
            f"{word} is neither a run directory ({CONFIG} in it) nor a model directory (config.json, or "
            "adapter_config.json, in it)"
            + (f"; the model is {inner}" if is_model(inner) or policies_in(inner) else "")
        )
    return model, enclosing_run(word)


def _put_policies(base: dict[str, Any], model: Path, run: Path | None) -> None:
    """Make the policies in `model` those of a recipe's plain data, and the model or their base its model."""
    several = policies_in(model)
    known = stored_config(run).policies if run is not None and several else ()
    policies = [
        {**p.model_dump(mode="json"), "model": str(several[p.name])} for p in known if p.name in several
    ]
    if several and len(policies) < len(several):
        names = ", ".join(several)
        raise UserError(
            f"{model} holds several policies ({names}) of no run; name one: {model / min(several)}"
        )
    one = next(iter(several.values()), model)
    if not several and is_adapter(model):
        policies = [{"name": "self", "model": str(model)}]
    home = base_path(one) if is_adapter(one) else one
    base["model"] = {**base.get("model", {}), "path": str(home)}
    base["policies"] = _playing(policies, base["games"]) if several else policies
    base.pop("adapter", None)  # nothing is to be learnt


def _playing(policies: Sequence[dict[str, Any]], games: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The policies that play any of the games, with their roles there."""
    from ludus.games import registry
    from ludus.league.seating import seats_of

    made = {
        game.get("label", game["name"]): registry.make(game["name"], **game.get("args", {})) for game in games
    }
    found = []
    for policy in policies:
        roles = [
            r for r in policy["roles"] if any(seats_of([r], label, game) for label, game in made.items())
        ]
        if roles:
            found.append({**policy, "roles": roles})
    return found


def find_asked(word: Path, recipe: Path | None, overrides: Sequence[str], temperature: float) -> Target:
    """The same for a model that is asked plain questions.

    Unless a recipe says otherwise it has more room than a move of a game needs, and is sampled at
    `temperature` from the whole distribution.
    """
    nothing = recipe is None and enclosing_run(word) is None
    games = ["kuhn_poker"] if nothing else []  # a configuration has a game; none is played
    if recipe is not None:
        return find(word, recipe, games, overrides)
    context = min(_ASKED_CONTEXT, _longest(Path(find(word, recipe, games).config.model.path)))
    ours = {
        "engine.context": context,
        "engine.slots": _ASKED_SLOTS,
        "rollout.max_tokens": min(ASKED_TOKENS, context // 2),
        "rollout.temperature": temperature,
        "rollout.top_p": 1.0,
        "rollout.top_k": 0,
    }
    return find(word, recipe, games, [*(f"{key}={value}" for key, value in ours.items()), *overrides])


def _longest(model: Path) -> int:
    try:
        return int(json.loads((model / "config.json").read_bytes())["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{model / 'config.json'} does not say max_position_embeddings ({e})") from e


def pick_games(base: dict[str, Any], games: Sequence[str]) -> None:
    """Make `games` those of a recipe's plain data: its own by label, others by name. None named: as it is."""
    if not games:
        return
    known = {game["label"]: game for game in base.get("games", [])}
    base["games"] = [known.get(name, {"name": name}) for name in dict.fromkeys(games)]
    for opponent in base.get("league", {}).get("opponents", []):
        # Where it sits in training says nothing of whom it is measured against.
        opponent["games"] = opponent["roles"] = []


def exploitability(
    word: str, game: str, recipe: Path | None, overrides: Sequence[str], search: int | None = None
) -> dict[str, Any]:
    """How far a model, a run or a program ("random", "cfr", "mcts:100") is from an equilibrium of `game`.

    `Exploitability.to_json()` where the policy can be written out; else, or where a `search` of so many
    simulations a move is asked for, `LowerBound.to_json()` and "why_not_exact" in words. Raises UserError
    for games in which neither makes sense, and for a model that says hardly anything legal.
    """
    from ludus import experts
    from ludus.games import registry
    from ludus.truth.exploitability import exploitability as distance
    from ludus.truth.lower_bound import SIMULATIONS
    from ludus.truth.sequence_form import sequence_form

    if "://" in word:
        raise UserError(
            f"{word}: a model behind an endpoint cannot be measured here; let it play: ludus tournament"
        )
    program = word in experts.names() or word.startswith("mcts:")
    if not program and not Path(word).exists():
        try:
            experts.make_player(word)
        except UserError as e:
            raise UserError(
                f"{word} is neither a run directory nor a model directory, and as a program: {e}"
            ) from e
    if program:
        plain = {"name": word, "model": {"path": word}, "games": [{"name": game}]}
        config = configuration.validate(configuration.override(plain, overrides), "settings")
    else:
        config = find(Path(word), recipe, [game], overrides).config
    rules = registry.make(config.games[0].name, **config.games[0].args)
    why = _why_not_exact(rules, word if program else None, search)
    if why is not None:
        bound = asyncio.run(_lower_bound(config, rules, word if program else None, search or SIMULATIONS))
        return {**bound.to_json(), "why_not_exact": why}
    assert isinstance(rules, HasSpiel)
    if word == "random":
        sets = sequence_form(rules).sets
        return distance(rules, {s.key: dict.fromkeys(s.actions, 1 / len(s.actions)) for s in sets}).to_json()
    if word == "cfr":
        return distance(rules, experts.equilibrium(rules)).to_json()
    table = asyncio.run(_tabulate(config, rules, rules.roles))
    if table.problem is not None:
        raise UserError(table.problem)
    return distance(rules, table, seed=config.seed).to_json()


def _why_not_exact(game: Game, program: str | None, search: int | None) -> str | None:
    """Why the policy is not written out, or None."""
    from ludus.truth.sequence_form import sequence_form

    if search is not None:
        return "a search was asked for"
    if program not in (None, "random", "cfr"):
        return f"the policy of {program} is not known as a table"
    if not isinstance(game, HasSpiel):
        rounds = " over several rounds" if isinstance(game, RepeatedGame) else ""
        return f"{game.name}{rounds} has no list of information sets"
    try:
        sequence_form(game)
    except UserError as e:
        return str(e)
    return None


async def _lower_bound(config: RunConfig, game: Game, program: str | None, search: int) -> LowerBound:
    from ludus import experts
    from ludus.players import Player
    from ludus.seeding import derive
    from ludus.train.assemble import open_model, open_player
    from ludus.truth.lower_bound import lower_bound

    async def measured(player: Player) -> LowerBound:
        return await lower_bound(
            game,
            player,
            matches=config.eval.matches,
            simulations=search,
            replies=config.eval.thoughts,
            seed=derive(config.seed, "lower bound"),
            retries=config.rollout.retries,
            in_flight=config.rollout.in_flight,
        )

    if program is not None:
        player = experts.make_player(program)
        if isinstance(player, experts.Choosy) and not player.plays(game):
            raise UserError(f"{program!r} cannot play {game.name}; name another program, or a model")
        return await measured(player)
    model = open_player(config, open_model(config))
    try:
        return await measured(model.playing(config.games[0].label))
    finally:
        await model.engine.close()


async def _tabulate(config: RunConfig, game: HasSpiel, roles: Sequence[str]) -> PolicyTable:
    from ludus.seeding import derive
    from ludus.train.assemble import open_model, open_player
    from ludus.truth.policy_table import tabulate

    player = open_player(config, open_model(config))
    try:
        return await tabulate(
            game,
            player.engine,
            [player.policy_of(config.games[0].label, role) for role in roles],
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
    return asyncio.run(_measure(target.config, target.run))


async def _measure(config: RunConfig, run: Path | None) -> dict[str, Any]:
    from ludus.train.assemble import (
        house_rules,
        measure_player,
        open_games,
        open_model,
        open_opponents,
        open_player,
    )
    from ludus.train.past import open_past

    games = open_games(config)
    rule = house_rules(config, games)
    player = open_player(config, open_model(config))
    try:
        opponents = open_opponents(config, player, league=False)
        for name in config.eval.opponents:
            if name.startswith(configuration.PAST):
                if run is None:
                    raise UserError(
                        f"{config.model.path} lies in no run, so {name!r} is nobody: leave it out"
                    )
                opponents[name] = open_past(player, run, name)
        return await measure_player(config, games, player, opponents, rule, config.eval.matches)
    finally:
        await player.engine.close()
        for judge in rule.judges.values():
            await judge.close()


def _newest_model(run: Path) -> Path:
    found = checkpoint.latest(run)
    if found is None:
        raise UserError(f"{run} has no checkpoint yet; measure its model, or train it first")
    return found / "model"


def enclosing_run(path: Path) -> Path | None:
    """The run directory that `path` is, or that it lies in as checkpoints/step_N/model/NAME."""
    resolved = path.resolve()
    for candidate in (resolved, *resolved.parents[:4]):
        if (candidate / CONFIG).is_file():
            return candidate
    return None
