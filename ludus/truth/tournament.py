"""Every entrant against every other one: the matches, the payoff matrix, the ranking.

Models meet all opponents in all games at once, so that an engine's batches stay full to the end. Every pair
plays the same deals, each in both seatings. What is played depends on the seed, the game and the names of
the two entrants alone: neither on who else takes part nor on the order in which matches end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from ludus.engines.base import EngineUnavailable
from ludus.errors import UserError
from ludus.experts import Choosy
from ludus.games.base import Game
from ludus.league.ratings import Outcome, Ranking, Tally, rank
from ludus.players import Ask, LanguagePlayer, Player, Reply
from ludus.rollout.play import FORFEIT_AT_ONCE, HouseRules
from ludus.rollout.scheduler import play_all
from ludus.seeding import derive
from ludus.truth.kept import Deal, Kept, Key
from ludus.truth.score import Result, Score
from ludus.types import MatchPlan

PROGRAMS = 4  # deals alive at once between entrants without an engine
GIVE_UP = 8  # failed requests in a row after which an entrant's engine is asked no more


@dataclass(frozen=True, slots=True)
class Standings:
    """What one game showed. `payoffs[a][b]` is a's result against b, None where nothing was played."""

    ranking: Ranking
    payoffs: Mapping[str, Mapping[str, Score | None]]

    def to_json(self) -> dict[str, Any]:
        """Plain data, as it stands in tournament.json."""
        return {
            **_plain(asdict(self.ranking)),
            "payoffs": {
                a: {b: None if score is None else score.to_json() for b, score in row.items()}
                for a, row in self.payoffs.items()
            },
        }


@dataclass(frozen=True, slots=True)
class Tournament:
    """What all games showed, and what could not be played, one sentence per reason."""

    games: Mapping[str, Standings]
    problems: tuple[str, ...]  # empty where every match was played to its end

    def to_json(self) -> dict[str, Any]:
        """Plain data, as it stands in tournament.json."""
        return {
            "games": {label: standings.to_json() for label, standings in self.games.items()},
            "problems": list(self.problems),
        }


async def tournament(
    games: Mapping[str, Game],
    entrants: Mapping[str, Player],
    *,
    matches: int,
    seed: int,
    keep: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    rule: HouseRules = FORFEIT_AT_ONCE,
    in_flight: int = 512,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Tournament:
    """Play `matches` matches (rounded up to whole deals) of every two entrants in every game.

    Each deal is written to the directory `keep` as it ends (`ludus.truth.kept`) and is not played again by
    a later call. `settings` tells results apart that must not be mixed, beside the seed and the rule: which
    options the games have, and what the entrants' names stand for. `tell(done, total)` is called as deals
    end.

    An engine that stays silent costs only the matches of its entrant: these are masked, listed among
    `problems`, and played by the next call. The same holds for an entrant that raises UserError.
    Raises UserError, before anything is played, for fewer than two entrants, a game that does not have two
    seats, and an entrant that cannot play a game.
    """
    _check(games, entrants, matches)
    agreed = {
        "seed": seed,
        "rule": asdict(rule),
        "games": {label: {} for label in games},
        "entrants": {name: {} for name in entrants},
        **(settings or {}),
    }
    wanted: list[Key] = [
        (label, a, b, deal)
        for label in games
        for a, b in combinations(sorted(entrants), 2)
        for deal in range(-(-matches // 2))
    ]
    with Kept(keep, agreed) as kept:
        hall = _Hall(games, {n: Watched(n, p) for n, p in entrants.items()}, kept, seed, rule)
        await hall.play(wanted, in_flight, tell)
        deals = {key: kept.deals[key] for key in wanted if key in kept.deals}
    return Tournament(
        games={label: _standings(label, list(entrants), deals, seed) for label in games},
        problems=hall.problems(wanted),
    )


@dataclass(slots=True)
class Watched:
    """An entrant whose failures are noted; after `GIVE_UP` of them in a row its engine is asked no more."""

    name: str
    player: Player
    failure: EngineUnavailable | None = None  # the last one
    failures: int = 0  # in a row
    error: UserError | None = None

    @property
    def gone(self) -> bool:
        return self.failures >= GIVE_UP

    @property
    def policy(self) -> str:
        return self.player.policy

    @property
    def trainable(self) -> bool:
        return False

    async def answer(self, ask: Ask) -> Reply:
        if self.gone and self.failure is not None:  # matches that were in flight when it went
            raise EngineUnavailable(self.failure.endpoint, self.failure.reason)
        try:
            reply = await self.player.answer(ask)
        except EngineUnavailable as e:
            self.failure = e
            self.failures += 1
            raise
        except UserError as e:
            self.error = e
            raise
        self.failures = 0
        return reply

    def trouble(self) -> str | None:
        """What went wrong, in a sentence's middle."""
        if self.error is not None:
            return str(self.error)
        if self.failure is None:
            return None
        return " ".join(
            [str(self.failure), *(f"({note})" for note in getattr(self.failure, "__notes__", ()))]
        )


@dataclass(slots=True)
class _Hall:
    """The tournament in play."""

    games: Mapping[str, Game]
    players: Mapping[str, Watched]
    kept: Kept
    seed: int
    rule: HouseRules
    _broken: set[tuple[str, str, str]] = field(default_factory=set)  # game and pair that a UserError ended

    async def play(self, wanted: Sequence[Key], in_flight: int, tell: Callable[[int, int], None]) -> None:
        """Play what is wanted and not there yet, at most `in_flight` matches at once."""
        missing = [key for key in wanted if not _whole(self.kept.deals.get(key))]
        done = len(wanted) - len(missing)
        tell(done, len(wanted))
        together = asyncio.Semaphore(max(1, in_flight // 2))
        # Programs gain nothing from company, and few at once end, and are kept, long before many do.
        apart = asyncio.Semaphore(min(PROGRAMS, max(1, in_flight // 2)))

        async def one(key: Key) -> None:
            nonlocal done
            waits = any(isinstance(self.players[name].player, LanguagePlayer) for name in key[1:3])
            async with together if waits else apart:
                if key[:3] not in self._broken and not any(self.players[n].gone for n in key[1:3]):
                    await self._deal(key)
            done += 1
            tell(done, len(wanted))

        try:
            async with asyncio.TaskGroup() as tasks:
                for key in missing:
                    tasks.create_task(one(key))
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from several

    async def _deal(self, key: Key) -> None:
        label, a, b, deal = key
        plans = [
            MatchPlan(
                episode=seat,
                group=0,
                game=label,
                seats=(a, b) if seat == 0 else (b, a),
                match_seed=derive(self.seed, label, "deal", deal),
                reply_seed=derive(self.seed, label, a, b, "replies", deal, seat),
            )
            for seat in (0, 1)
        ]
        try:
            episodes = await play_all(plans, self.games, self.players, rule=self.rule, in_flight=2)
        except UserError:
            if self.players[a].error is None and self.players[b].error is None:
                raise  # no entrant's fault
            self._broken.add(key[:3])
            return
        first, second = (Result.of(episode) for episode in episodes)
        self.kept.add(key, (first, second))

    def problems(self, wanted: Sequence[Key]) -> tuple[str, ...]:
        """One sentence per reason for which matches are missing."""
        missing: dict[str, dict[str, int]] = {}
        for label, a, b, number in wanted:
            deal = self.kept.deals.get((label, a, b, number))
            lost = 2 if deal is None else sum(result.masked is not None for result in deal)
            if lost:
                pairs = missing.setdefault(self._why(a, b, deal), {})
                pair = f"{label}, {a} against {b}"
                pairs[pair] = pairs.get(pair, 0) + lost
        return tuple(
            f"{sum(pairs.values())} matches could not be played ({'; '.join(pairs)}): {why}"
            for why, pairs in missing.items()
        )

    def _why(self, a: str, b: str, deal: Deal | None) -> str:
        told = [f"{name}: {why}" for name in (a, b) if (why := self.players[name].trouble()) is not None]
        return "; ".join(told) or ", ".join(sorted({r.masked for r in deal or () if r.masked is not None}))


def _whole(deal: Deal | None) -> bool:
    return deal is not None and all(result.masked is None for result in deal)


def _check(games: Mapping[str, Game], entrants: Mapping[str, Player], matches: int) -> None:
    if len(entrants) < 2:
        raise UserError(
            f"a tournament needs at least two entrants, and {' '.join(entrants) or 'nobody'} is alone; "
            "add an anchor, such as random"
        )
    if not games:
        raise UserError("a tournament needs at least one game; name it by --game, such as --game kuhn_poker")
    if matches < 1:
        raise UserError(f"{matches} matches tell nothing; ask for at least 2")
    for label, game in games.items():
        if len(game.roles) != 2:
            raise UserError(f"{label} has {len(game.roles)} seats; tournaments are for games of two seats")
        for name, player in entrants.items():
            if isinstance(player, Choosy) and not player.plays(game):
                raise UserError(
                    f"entrant {name!r} cannot play {label!r}; leave one of the two out of this tournament"
                )


def _standings(label: str, names: Sequence[str], deals: Mapping[Key, Deal], seed: int) -> Standings:
    names = sorted(names)  # the order in which they were named changes nothing
    outcomes: list[Outcome] = []
    pairs: dict[tuple[str, str], list[tuple[Result, Result]]] = {}
    for (game, a, b, deal), (first, second) in deals.items():
        if game != label:
            continue
        pairs.setdefault((a, b), []).append((first, second))
        pairs.setdefault((b, a), []).append((second, first))
        outcomes += [
            Outcome(*seats, deal, result.returns)
            for seats, result in (((a, b), first), ((b, a), second))
            if result.masked is None
        ]
    return Standings(
        ranking=rank(Tally.of(names, outcomes), seed=derive(seed, label, "bootstrap")),
        payoffs={a: {b: Score.of(pairs.get((a, b), [])) for b in names if b != a} for a in names},
    )


def _plain(value: Any) -> Any:
    """With lists for tuples, as JSON gives them back."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
