"""`ludus attack`: hold an attacker against a defender in the red-team game, whoever the two are.

Both are words that `ludus tournament` understands: programs, runs, model directories, endpoints.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from ludus import contest
from ludus.config import RunConfig
from ludus.errors import UserError
from ludus.games.red_team.game import RedTeamGame
from ludus.games.red_team.world import Split
from ludus.games.red_team.worlds import Invented
from ludus.players import LanguagePlayer, Player
from ludus.rollout.play import HouseRules
from ludus.seeding import derive
from ludus.truth.attacks import attack
from ludus.viewer.console import table_console


def run(attacker: str, defender: str, *, as_json: bool, **how: Any) -> None:
    """Measure as `measure` does, and print."""
    found = measure(attacker, defender, **how)
    if as_json:
        json.dump(found, sys.stdout, indent=1)
        print()
    else:
        _show(found)


def measure(
    attacker: str,
    defender: str,
    *,
    recipe: Path | None = None,
    game: str = "red_team",
    matches: int = 500,
    split: Split = "held_out",
    seed: int = 0,
    embedder: Path | None = None,
) -> dict[str, Any]:
    """What `ludus.truth.attacks.attack` finds, and who was asked. `recipe` says how models are prompted.

    Raises UserError for bad input, and for any game but red_team.
    """
    config, games = contest.settings(recipe, [game], [attacker, defender])
    rules = games[game]
    if not isinstance(rules, RedTeamGame) or not isinstance(rules.world, Invented):
        raise UserError(
            f"{game!r} is no red-team game of the invented world; name one that is (--game red_team)"
        )
    if matches < 1:
        raise UserError(f"--matches is {matches}; ask for at least 1, such as 500")
    found = asyncio.run(_attack(attacker, defender, config, recipe, rules, matches, split, seed, embedder))
    return {"attacker": attacker, "defender": defender, "matches": matches, "seed": seed, **found}


async def _attack(
    attacker: str,
    defender: str,
    config: RunConfig,
    recipe: Path | None,
    rules: RedTeamGame,
    matches: int,
    split: Split,
    seed: int,
    embedder: Path | None,
) -> dict[str, Any]:
    entrants: list[contest.Entrant] = []
    try:
        for word in (attacker, defender):
            entrants.append(contest.open_entrant(word, config, recipe))
        players = [_here(entrant.player, config) for entrant in entrants]
        return await attack(
            rules,
            players[0],
            players[1],
            matches=matches,
            seed=derive(seed, "attack"),
            split=split,
            rule=HouseRules(config.rollout.retries, config.rollout.forfeit),
            in_flight=config.rollout.in_flight,
            embedder=embedder,
        )
    finally:
        for entrant in entrants:
            if isinstance(entrant.player, LanguagePlayer):
                await entrant.player.engine.close()


def _here(player: Player, config: RunConfig) -> Player:
    """A player as it plays the one game of `config`."""
    return player.playing(config.games[0].label) if isinstance(player, LanguagePlayer) else player


def _show(found: dict[str, Any]) -> None:
    table = Table(title=f"{found['attacker']} attacks {found['defender']} on {found['split']} seeds")
    table.add_column("figure")
    for judge in found["judges"]:
        table.add_column(f"by the judge {judge!r}")
    for figure in next(iter(found["judges"].values())):
        table.add_row(figure, *(_share(told[figure]) for told in found["judges"].values()))
    console = table_console()
    console.print(table)
    for name, value in found["diversity"].items():
        console.print(f"{name.replace('_', ' '):20} {_number(value)}", markup=False)
    for role, rate in found["illegal_rate"].items():
        console.print(f"{f'illegal, {role}':20} {_number(rate)}", markup=False)
    if found["masked"]:
        console.print(f"{'lost matches':20} {found['masked']}", markup=False)


def _share(told: dict[str, Any]) -> str:
    if told["rate"] is None:
        return "none"
    low, high = told["ci95"]
    return f"{told['rate']:.1%} [{low:.1%}, {high:.1%}]"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
