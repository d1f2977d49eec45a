"""A lower bound of exploitability, for games too large to write a policy out.

In a two-player zero-sum game exploitability is (b0 + b1) / 2, where b_i is what a best response earns in
seat i against the policy in the other seat. Whatever *any* responder earns in seat i is at most b_i in
expectation. So a responder plays both seats of every deal, and its mean return over both is an unbiased
estimate of a number that exploitability is at least as large as:

    mean return  ->  (u0 + u1) / 2  <=  (b0 + b1) / 2  =  exploitability

The bound is only as good as the responder. Two are tried: `respond:N` searches for a best response to this
very player (`ludus.truth.responder`), `mcts:N` plays well against anybody; in games without OpenSpiel's rules
the fair trader and random play. The second is taken where it is told apart as the better one, on deals that
are played for this choice alone, so that choosing does not flatter the result. For the same reason the search
asks the player with other seeds than those of the matches.

Bounded is the policy as it plays, at its own temperature and context, its illegal replies included: they cost
it the match, after the retries that it is given, by the rule that keeps returns zero-sum. The exact figure to
compare with is therefore `exploitability_with_forfeits`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from ludus.errors import UserError
from ludus.experts import FairTrader, SearchPlayer
from ludus.games.base import Game, Payoff
from ludus.games.openspiel import SpielGame
from ludus.players import Player, RandomPlayer
from ludus.rollout.play import HouseRules
from ludus.rollout.scheduler import play_all
from ludus.seeding import derive
from ludus.truth.illegal import hopeless
from ludus.truth.intervals import mean_interval, pair_interval
from ludus.truth.responder import Questions, Responder
from ludus.types import Episode, MatchPlan, Turn

SIMULATIONS = 100  # per move of the responder, unless told otherwise
_SHARE = 4  # a choice between responders takes one match for so many of the report's, each
_LEAST = 20  # pairs of matches for a choice, at least
_IT, _RESPONDER = "player under test", "responder"


@dataclass(frozen=True, slots=True)
class LowerBound:
    """What a responder earns against a player, in the returns of the game, as mean of both seats.

    `lower_bound` is that mean and `ci95` its two-sided 95% interval; exploitability is at least `ci95[0]`
    unless chance played a trick of 1 in 40. `per_seat` is the responder's mean return in seat 0 and in seat
    1. `tried` holds, per responder, what it earned on the deals that the choice was made on (empty: there
    was no choice). `matches` counts those of the report that were played to an end in both seatings,
    `masked` the others. `illegal_rate` is the share of the player's replies that were refused, `forfeits`
    the share of matches that it lost by them.
    """

    lower_bound: float
    ci95: tuple[float, float]
    per_seat: tuple[float, float]
    responder: str
    tried: dict[str, float]
    matches: int
    masked: int
    illegal_rate: float
    forfeits: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"ci95": list(self.ci95), "per_seat": list(self.per_seat)}


async def lower_bound(
    game: Game,
    player: Player,
    *,
    matches: int,
    simulations: int = SIMULATIONS,
    replies: int,
    seed: int,
    retries: int = 0,
    in_flight: int = 512,
) -> LowerBound:
    """Measure `player` over `matches` matches (rounded up to pairs) against the best responder found.

    A search runs `simulations` matches per move and asks `player` at most `replies` times per position.
    Raises UserError for a game that is not zero-sum between two seats, for a player that says hardly
    anything legal, and where no match could be played to an end.
    """
    if len(game.roles) != 2 or game.payoff is not Payoff.ZERO_SUM:
        raise UserError(
            f"{game.name} is no zero-sum game of two seats, and for others exploitability has no lower bound "
            "of this kind; play fixed opponents instead (ludus eval)"
        )
    if matches < 2:
        raise UserError(f"{matches} matches tell nothing; ask for at least 2 (eval.matches)")
    found = _responders(game, player, simulations, replies, derive(seed, "questions"), retries)
    rule = HouseRules(retries)
    pairs = -(-matches // 2)
    tries: dict[str, list[_Deal]] = {}
    if len(found) > 1:
        few = min(pairs, max(_LEAST, pairs // _SHARE))
        for name, responder in found.items():
            tries[name] = await _play(game, player, responder, few, derive(seed, "choice"), rule, in_flight)
    chosen = _choose(list(found), tries)
    deals = await _play(game, player, found[chosen], pairs, derive(seed, "report"), rule, in_flight)
    turns = [turn for deal in deals for turn in deal.replies]
    stake = -game.min_return  # no seat of a zero-sum match gets more, so means lie in [-stake, stake]
    low, high = pair_interval([(deal.mean + stake) / (2 * stake) for deal in deals])
    return LowerBound(
        lower_bound=fmean(deal.mean for deal in deals),
        ci95=((2 * low - 1) * stake, (2 * high - 1) * stake),
        per_seat=(fmean(deal.earned[0] for deal in deals), fmean(deal.earned[1] for deal in deals)),
        responder=chosen,
        tried={name: fmean(deal.mean for deal in played) for name, played in tries.items()},
        matches=2 * len(deals),
        masked=2 * (pairs - len(deals)),
        illegal_rate=sum(not turn.legal for turn in turns) / max(1, len(turns)),
        forfeits=sum(deal.forfeits for deal in deals) / (2 * len(deals)),
    )


@dataclass(frozen=True, slots=True)
class _Deal:
    """One deal, played in both seatings to an end: the responder in seat 0, then in seat 1."""

    matches: tuple[Episode, Episode]

    @property
    def number(self) -> int:
        return self.matches[0].id

    @property
    def earned(self) -> tuple[float, float]:
        """The responder's return in seat 0 and in seat 1."""
        return self.matches[0].returns[0], self.matches[1].returns[1]

    @property
    def mean(self) -> float:
        return fmean(self.earned)

    @property
    def replies(self) -> list[Turn]:
        """The measured player's."""
        return [
            t for seat, match in zip((1, 0), self.matches, strict=True) for t in match.turns if t.seat == seat
        ]

    @property
    def forfeits(self) -> int:
        """Matches that the measured player gave away."""
        return (self.matches[0].forfeit == 1) + (self.matches[1].forfeit == 0)


def _responders(
    game: Game, player: Player, simulations: int, replies: int, seed: int, retries: int
) -> dict[str, Player]:
    """Those that can play `game`, by name, the one that promises most first."""
    found: list[Player] = []
    search = SearchPlayer(simulations)
    if not search.plays(game):
        found += [FairTrader(), RandomPlayer()] if FairTrader().plays(game) else [RandomPlayer()]
    else:
        if isinstance(game, SpielGame):  # in a match of several rounds a reply depends on the rounds before
            questions = Questions(game, player, replies=replies, seed=seed, retries=retries)
            found.append(Responder(questions, simulations))
        found.append(search)
    return {responder.policy: responder for responder in found}


def _choose(names: Sequence[str], tries: Mapping[str, Sequence[_Deal]]) -> str:
    """The first, unless a later one earned more on the same deals, told apart from it at 95%."""
    chosen = names[0]
    for name in names[1:]:
        before = {deal.number: deal.mean for deal in tries[chosen]}
        gains = [deal.mean - before[deal.number] for deal in tries[name] if deal.number in before]
        if len(gains) > 1 and mean_interval(gains)[0] > 0:
            chosen = name
    return chosen


async def _play(
    game: Game, player: Player, responder: Player, pairs: int, seed: int, rule: HouseRules, in_flight: int
) -> list[_Deal]:
    """Play `pairs` deals; those of which an engine's failure ended a match are left out."""
    plans = [
        MatchPlan(
            episode=2 * pair + seat,
            group=pair,
            game=game.name,
            seats=(_RESPONDER, _IT) if seat == 0 else (_IT, _RESPONDER),
            match_seed=derive(seed, "deal", pair),
            reply_seed=derive(seed, responder.policy, "replies", pair, seat),
        )
        for pair in range(pairs)
        for seat in (0, 1)
    ]
    players = {_RESPONDER: responder, _IT: player}
    episodes = await play_all(plans, {game.name: game}, players, rule=rule, in_flight=in_flight)
    deals = [
        _Deal(both)
        for both in zip(episodes[::2], episodes[1::2], strict=True)
        if both[0].masked is None and both[1].masked is None
    ]
    if not deals:
        reasons = sorted({e.masked for e in episodes if e.masked is not None})
        raise UserError(f"none of {pairs} deals could be played to an end ({', '.join(reasons)})")
    said = [turn for deal in deals for turn in deal.replies]
    refused = [turn for turn in said if not turn.legal]
    if refused and (reason := hopeless(len(refused) / len(said), refused[0].text)) is not None:
        raise UserError(reason)
    return deals
