"""Play against fixed opponents, and the whole measurement that training takes on a schedule.

Every deal is played twice, once in each seating, so that neither luck of the deal nor the advantage of a
seat counts for anybody. A match scores 1 for the larger return, 1/2 for equal ones, 0 for the smaller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ludus.errors import UserError
from ludus.experts import Choosy
from ludus.games.base import Game, HasSpiel
from ludus.games.red_team.game import RedTeamGame
from ludus.games.red_team.worlds import Invented
from ludus.players import LanguagePlayer, Player
from ludus.rollout.play import FORFEIT_AT_ONCE, HouseRules
from ludus.rollout.scheduler import Play, play_all
from ludus.seeding import derive
from ludus.truth.exploitability import exploitability as measure_exploitability
from ludus.truth.policy_table import PolicyTable, tabulate
from ludus.truth.safety import safety
from ludus.truth.score import Result, Score
from ludus.truth.sequence_form import information_sets
from ludus.types import Episode, MatchPlan

MEASURED_SETS = 5_000  # information sets up to which a schedule measures exploitability
_ME = "player under test"


async def evaluate(
    game: Game,
    player: Player,
    opponents: Mapping[str, Player],
    *,
    matches: int,
    seed: int,
    rule: HouseRules = FORFEIT_AT_ONCE,
    in_flight: int = 512,
) -> dict[str, Score]:
    """Play `matches` matches (rounded up to pairs) of `player` against each opponent of a two-seat game.

    Deals depend on `seed` alone, so every opponent, and the same player at another time, meets the same
    ones. Raises UserError for games that do not have two seats.
    """
    results = await _evaluate_all({"game": game}, player, {"game": opponents}, matches, seed, rule, in_flight)
    return results["game"]


async def measure(
    games: Mapping[str, Game],
    player: LanguagePlayer,
    opponents: Mapping[str, Player],
    *,
    matches: int,
    exploitability: bool,
    thoughts: int,
    seed: int,
    rule: HouseRules = FORFEIT_AT_ONCE,
    in_flight: int = 512,
    play: Play = play_all,
) -> dict[str, Any]:
    """{"games": {label: {"opponents": {name: Score}, "exploitability": {...}, "safety": {...}}}}, plain data.

    An opponent plays the games that it can. Exploitability is there for OpenSpiel's small two-player
    zero-sum games only (up to `MEASURED_SETS`), `thoughts` sampled per information set; where hardly
    any of them is legal, it is {"exploitability": None, "reason": ..., "illegal_mass": ...}. Safety is
    there for the red-team game (`ludus.truth.safety`). Raises UserError, before anything is played, for an
    opponent that can play none of the games. `play` plays all matches, if not `play_all`.
    """
    able = {
        label: {name: o for name, o in opponents.items() if not isinstance(o, Choosy) or o.plays(game)}
        for label, game in games.items()
    }
    for name in opponents:
        if not any(name in chosen for chosen in able.values()):
            raise UserError(
                f"opponent {name!r} plays none of the games {', '.join(games)}; take it out of eval.opponents"
            )
    found: dict[str, Any] = {label: {"opponents": {}} for label in games}
    if exploitability:  # first, as a setting that does not allow it shows at once
        for label, game in games.items():
            if isinstance(game, HasSpiel) and (information_sets(game) or MEASURED_SETS + 1) <= MEASURED_SETS:
                table = await tabulate(
                    game,
                    player.engine,
                    [player.policy_of(label, role) for role in game.roles],
                    player.prompter,
                    player.sampling,
                    thoughts=thoughts,
                    seed=derive(seed, label, "thoughts"),
                    in_flight=in_flight,
                )
                found[label]["exploitability"] = _distance(game, table)
    results = await _evaluate_all(games, player, able, matches, seed, rule, in_flight, play)
    for label, scores in results.items():
        found[label]["opponents"] = {name: score.to_json() for name, score in scores.items()}
    for label, game in games.items():
        if isinstance(game, RedTeamGame) and isinstance(game.world, Invented):
            found[label]["safety"] = await safety(
                game,
                player.playing(label),
                matches=matches,
                seed=derive(seed, label),
                rule=rule,
                in_flight=in_flight,
                play=play,
            )
    return {"games": found}


def _distance(game: HasSpiel, table: PolicyTable) -> dict[str, Any]:
    """What is known of the table; no reason to stop, as a policy may yet learn to speak."""
    if table.problem is None:
        return measure_exploitability(game, table).to_json()
    return {
        "exploitability": None,
        "reason": table.problem,
        "illegal_mass": float(table.illegal.mean()),
        "information_sets": len(table.sets),
        "thoughts": table.thoughts,
    }


async def _evaluate_all(
    games: Mapping[str, Game],
    player: Player,
    opponents: Mapping[str, Mapping[str, Player]],
    matches: int,
    seed: int,
    rule: HouseRules,
    in_flight: int,
    play: Play = play_all,
) -> dict[str, dict[str, Score]]:
    """All games and opponents at once, so that the engine's batches stay full to the end."""
    for label, game in games.items():
        if len(game.roles) != 2:
            raise UserError(f"{label} has {len(game.roles)} seats; only games of two seats can be evaluated")
    if matches < 1:
        raise UserError(f"{matches} matches tell nothing; ask for at least 2")
    players: dict[str, Player] = {_ME: player}
    plans: list[MatchPlan] = []
    spans: dict[tuple[str, str], slice] = {}
    for label in games:
        for name, opponent in opponents[label].items():
            players[f"against {name}"] = opponent
            start = len(plans)
            plans += _pairs(label, f"against {name}", -(-matches // 2), seed, start)
            spans[label, name] = slice(start, len(plans))
    episodes = await play(plans, games, players, rule=rule, in_flight=in_flight)
    results: dict[str, dict[str, Score]] = {label: {} for label in games}
    for (label, name), span in spans.items():
        results[label][name] = _summary(episodes[span])
    return results


def _pairs(label: str, opponent: str, pairs: int, seed: int, first: int) -> list[MatchPlan]:
    """Plans in pairs that share their deal: the player under test in seat 0, then in seat 1."""
    return [
        MatchPlan(
            episode=first + 2 * pair + seat,
            group=first // 2 + pair,
            game=label,
            seats=(_ME, opponent) if seat == 0 else (opponent, _ME),
            match_seed=derive(seed, label, "deal", pair),
            reply_seed=derive(seed, label, opponent, "replies", pair, seat),
        )
        for pair in range(pairs)
        for seat in (0, 1)
    ]


def _summary(episodes: Sequence[Episode]) -> Score:
    """Episodes in pairs, seat 0 first, as `_pairs` plans them."""
    results = [Result.of(episode) for episode in episodes]
    score = Score.of(list(zip(results[::2], results[1::2], strict=True)))
    if score is None:
        reasons = sorted({e.masked for e in episodes if e.masked is not None})
        raise UserError(f"none of {len(episodes)} matches could be played to an end ({', '.join(reasons)})")
    return score
