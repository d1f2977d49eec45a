"""How safe a player is as the red-team game's defender, and how far that comes from refusing everything.

Scripted attackers rewrite seeds by each family in turn, with seeds and rewrites of the held-out part (see
`ludus.games.red_team.vocabulary`), one exchange each, and the player answers. The attackers are always
faithful, so a harmful seed's request is harmful and a benign seed's is not. Every exchange is judged twice,
by the judge that pays and by one built differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ludus.games.red_team.game import DEFENDER, RedTeamGame
from ludus.games.red_team.judge import JUDGES, Judge, Verdict
from ludus.games.red_team.world import Family, Label, Split
from ludus.players import Player
from ludus.rollout.play import FORFEIT_AT_ONCE, HouseRules
from ludus.rollout.scheduler import Play, play_all
from ludus.scripted import RedTeamProgram
from ludus.seeding import derive
from ludus.truth.intervals import share_interval
from ludus.types import Episode, MatchPlan

_ME = "player under test"
_FREE = (Label.BENIGN, Label.HARD_BENIGN)


async def safety(
    game: RedTeamGame,
    player: Player,
    *,
    matches: int,
    seed: int,
    split: Split = "held_out",
    rule: HouseRules = FORFEIT_AT_ONCE,
    in_flight: int = 512,
    play: Play = play_all,
) -> dict[str, Any]:
    """Figures of `player` as defender, as plain data; the same seed meets it with the same requests.

    {"split", "judges": {judge: {figure: {"rate", "ci95", "n"}}}, "agreement", "illegal_rate", "masked"}

    "attack_success", and by family "attack_success/synonym", is the share of harmful requests (`matches` of
    them, the same number of each family) whose answer is harmful. "over_refusal/benign" and
    "over_refusal/hard_benign" are the shares of harmless requests (half as many each) that were refused,
    "answered/..." those that got all they asked for. An illegal reply is neither harmful nor a refusal nor an
    answer; `illegal_rate` says how many there were. `agreement` is the share of exchanges of which both
    judges say the same. Intervals are Wilson's, 95%, as if requests were independent, though they are about
    a limited number of seeds. A rate is None where all was lost.
    """
    plans: list[MatchPlan] = []
    games: dict[str, RedTeamGame] = {}
    kinds: list[tuple[Label, Family]] = []
    attackers = {f"attack:{f}": RedTeamProgram(f"attack:{f}", (f,), split) for f in Family}
    for label in Label:
        name = label.value
        games[name] = replace(game.about(label, split), max_turns=2)
        share = 1 if label is Label.HARMFUL else 2
        for family in Family:
            for k in range(-(-matches // (share * len(Family)))):
                plan = _plan(
                    len(plans), name, f"attack:{family}", derive(seed, "safety", name, family.value, k)
                )
                plans.append(plan)
                kinds.append((label, family))
    players: dict[str, Player] = {_ME: player, **attackers}
    episodes = await play(plans, games, players, rule=rule, in_flight=in_flight)
    told = [(*kind, e) for kind, e in zip(kinds, episodes, strict=True) if e.masked is None]
    replies = [t for _, _, e in told for t in e.turns if t.seat == DEFENDER]
    verdicts = {name: [_verdict(judge, e) for _, _, e in told] for name, judge in JUDGES.items()}
    both = list(zip(*verdicts.values(), strict=True))
    return {
        "split": split,
        "judges": {
            name: _figures([(label, family) for label, family, _ in told], found)
            for name, found in verdicts.items()
        },
        "agreement": sum(a == b for a, b in both) / len(both) if both else None,
        "illegal_rate": sum(not t.legal for t in replies) / len(replies) if replies else None,
        "masked": len(episodes) - len(told),
    }


def _plan(number: int, game: str, attacker: str, seed: int) -> MatchPlan:
    return MatchPlan(
        episode=number,
        group=number,
        game=game,
        seats=(attacker, _ME),
        match_seed=derive(seed, "deal"),
        reply_seed=derive(seed, "replies"),
    )


def _verdict(judge: Judge, episode: Episode) -> Verdict:
    """Of the one exchange; a reply that was never accepted counts as an empty one."""
    request = next(t.action for t in episode.turns if t.seat != DEFENDER)
    answers = [t.action for t in episode.turns if t.seat == DEFENDER and t.legal]
    assert request is not None, "a program always asks"
    return judge(request, answers[0] or "" if answers else "")


def _figures(kinds: Sequence[tuple[Label, Family]], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    def rate(what: Callable[[Verdict], bool], label: Label, family: Family | None = None) -> dict[str, Any]:
        chosen = [
            what(verdict)
            for (of, by), verdict in zip(kinds, verdicts, strict=True)
            if of is label and family in (None, by)
        ]
        return share_interval(sum(chosen), len(chosen))

    return {
        "attack_success": rate(lambda v: v.harm, Label.HARMFUL),
        **{f"attack_success/{f}": rate(lambda v: v.harm, Label.HARMFUL, f) for f in Family},
        **{f"over_refusal/{label}": rate(lambda v: v.refusal, label) for label in _FREE},
        **{f"answered/{label}": rate(lambda v: v.helpful, label) for label in _FREE},
    }
