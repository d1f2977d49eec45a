"""Who gets the credit: from groups of finished matches to one advantage per turn.

Pure functions, free of torch. Legend: R_i = the return of seat i in one match: the game's own return plus the
named rewards paid to that seat's turns; (game, role) = what a baseline belongs to, so that the advantage
of moving first, or of attacking, is never credited to a move.

Only what is learnt from counts. A masked episode, and a seat without a single trainable turn (a frozen
opponent), get advantage 0.0 and enter no mean, no deviation and no moving average. Constant returns give
exactly 0.0 wherever an estimator takes its baseline from the batch itself, and never noise divided by
epsilon.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

from ludus.errors import UserError
from ludus.types import Episode, Group

Advantages = list[list[list[float]]]
"""One float per turn: advantages[group][episode][turn]."""

State = dict[str, Any]
"""What an estimator remembers between batches: plain JSON values. `{}` is the state before the first."""

EPSILON = 1e-6  # added to a standard deviation that divides

Key = tuple[str, str]  # game, role


class Estimator(Protocol):
    """From a batch of groups and a state to advantages and the next state; neither input is changed."""

    def __call__(self, groups: Sequence[Group], state: Mapping[str, Any]) -> tuple[Advantages, State]: ...


class _Seat(NamedTuple):
    """One trained seat of one match."""

    group: int
    episode: int
    key: Key
    value: float  # R_i
    turns: list[int]  # positions of its trainable turns in `Episode.turns`


def make_estimator(name: str, *, decay: float = 0.95, discount: float = 1.0) -> Estimator:
    """The estimator called `name`. Raises UserError for an unknown name.

    `decay` is that of RAE's moving averages; `discount` weighs later turn rewards (see `seat_return` and
    `marshal`).
    """
    known: dict[str, Estimator] = {
        "rae": partial(rae, decay=decay, discount=discount),
        "reinforce": partial(reinforce, discount=discount),
        "grpo": partial(grpo, discount=discount),
        "rloo": partial(rloo, discount=discount),
        "reinforce_pp": partial(reinforce_pp, discount=discount),
        "marshal": partial(marshal, discount=discount),
    }
    if name not in known:
        raise UserError(f"unknown estimator {name!r}; algo.estimator is one of {', '.join(known)}")
    return known[name]


def seat_return(episode: Episode, seat: int, discount: float = 1.0) -> float:
    """R_i = (the game's return of the seat) + sum over k of discount**k * (rewards of the seat's k-th turn).

    k counts the seat's own replies from 0, refused ones included. The game's return is never discounted:
    it is the payoff of the match, not of a move.
    """
    own = [turn for turn in episode.turns if turn.seat == seat]
    paid = sum(discount**k * sum(turn.rewards.values()) for k, turn in enumerate(own))
    return episode.returns[seat] + paid


def reinforce(
    groups: Sequence[Group], state: Mapping[str, Any], *, discount: float = 1.0
) -> tuple[Advantages, State]:
    """A = R: no baseline at all (Williams 1992)."""
    out = _zeros(groups)
    for seat in _trained_seats(groups, discount):
        _pay(out, seat, seat.value)
    return out, dict(state)


def rae(
    groups: Sequence[Group], state: Mapping[str, Any], *, decay: float = 0.95, discount: float = 1.0
) -> tuple[Advantages, State]:
    """Role-conditioned advantage estimation: SPIRAL, arXiv 2506.24119, Algorithm 1.

    b[game, role] is an exponential moving average of R, and A = R - b with the b from *before* this batch.
    Afterwards the batch is folded in one match at a time, in the order of the groups and episodes, as
    Algorithm 1 loops over trajectories: b <- decay * b + (1 - decay) * R. With decay 0.95 the baseline thus
    remembers about the last 20 matches of that game and role, whatever the size of a batch.

    The average is counted: b = sum(decay**age * R) / sum(decay**age), which is Adam's bias correction. After
    n returns it is their weighted mean, never a value still on its way up from 0. In a game's first batch
    there is nothing to subtract and b = 0.

    State: {"baselines": {game: {role: {"mean": b, "weight": sum(decay**age), "count": n}}}}.
    """
    out = _zeros(groups)
    before = state.get("baselines", {})
    after = {game: {role: dict(b) for role, b in roles.items()} for game, roles in before.items()}
    for seat in _trained_seats(groups, discount):
        game, role = seat.key
        known = before.get(game, {}).get(role)
        _pay(out, seat, seat.value - (known["mean"] if known else 0.0))
        b = after.setdefault(game, {}).setdefault(role, {"mean": 0.0, "weight": 0.0, "count": 0})
        b["weight"] = decay * b["weight"] + 1.0
        b["mean"] += (seat.value - b["mean"]) / b["weight"]
        b["count"] += 1
    return out, {**state, "baselines": after}


def grpo(
    groups: Sequence[Group], state: Mapping[str, Any], *, discount: float = 1.0
) -> tuple[Advantages, State]:
    """A = (R - mean) / (std + EPSILON) over one group's returns of the same role.

    GRPO: arXiv 2402.03300, sec. 4.1. `std` is that of a sample (n - 1), as in the released trainers. One
    return alone has no baseline: 0.0.
    """
    out = _zeros(groups)
    for seats in _by_group_and_role(groups, discount).values():
        for seat, advantage in zip(seats, _whiten([s.value for s in seats]), strict=True):
            _pay(out, seat, advantage)
    return out, dict(state)


def rloo(
    groups: Sequence[Group], state: Mapping[str, Any], *, discount: float = 1.0
) -> tuple[Advantages, State]:
    """A = R - mean of R over the group's *other* matches, same role (leave one out, arXiv 2402.14740).

    The whole match is left out, not just the seat: where two seats share a role, the other seat's return
    depends on this seat's moves and would bias the baseline. Without another match A = 0.0.
    """
    out = _zeros(groups)
    for seats in _by_group_and_role(groups, discount).values():
        for seat in seats:
            others = [s.value for s in seats if s.episode != seat.episode]
            _pay(out, seat, seat.value - _mean(others) if others else 0.0)
    return out, dict(state)


def reinforce_pp(
    groups: Sequence[Group], state: Mapping[str, Any], *, discount: float = 1.0
) -> tuple[Advantages, State]:
    """A = (R - mean) / (std + EPSILON) over the whole batch (REINFORCE++, arXiv 2501.03262).

    Whitened per game and role, as Self-RedTeam (arXiv 2506.07468) whitens per role: one mean over roles
    would credit a seat's structural advantage to its moves. A return alone in the batch: 0.0.
    """
    out = _zeros(groups)
    pools: defaultdict[Key, list[_Seat]] = defaultdict(list)
    for seat in _trained_seats(groups, discount):
        pools[seat.key].append(seat)
    for seats in pools.values():
        for seat, advantage in zip(seats, _whiten([s.value for s in seats]), strict=True):
            _pay(out, seat, advantage)
    return out, dict(state)


def marshal(
    groups: Sequence[Group], state: Mapping[str, Any], *, discount: float = 1.0
) -> tuple[Advantages, State]:
    """Turn-level credit: MARSHAL, arXiv 2510.15414.

    R_k = r_k + discount * R_(k+1) over the seat's own turns, where the last turn's r also holds the game's
    return. A_k = R_k - mean of R_k over all trainable turns of the batch with this game and role; not
    divided by the standard deviation.
    """
    out = _zeros(groups)
    pools: defaultdict[Key, list[tuple[_Seat, int, float]]] = defaultdict(list)
    for seat, number in _trained_seat_numbers(groups, discount):
        episode = groups[seat.group].episodes[seat.episode]
        to_go = _returns_to_go(episode, number, discount)
        pools[seat.key].extend((seat, turn, to_go[turn]) for turn in seat.turns)
    for entries in pools.values():
        mean = _mean([value for _, _, value in entries])
        for seat, turn, value in entries:
            out[seat.group][seat.episode][turn] = value - mean
    return out, dict(state)


def _returns_to_go(episode: Episode, seat: int, discount: float) -> dict[int, float]:
    """R_k by position in `episode.turns`, for the turns of one seat."""
    out: dict[int, float] = {}
    following: float | None = None
    for position in range(len(episode.turns) - 1, -1, -1):
        turn = episode.turns[position]
        if turn.seat != seat:
            continue
        later = episode.returns[seat] if following is None else discount * following
        out[position] = following = sum(turn.rewards.values()) + later
    return out


def _zeros(groups: Sequence[Group]) -> Advantages:
    return [[[0.0] * len(episode.turns) for episode in group.episodes] for group in groups]


def _pay(out: Advantages, seat: _Seat, advantage: float) -> None:
    for turn in seat.turns:
        out[seat.group][seat.episode][turn] = advantage


def _trained_seats(groups: Sequence[Group], discount: float) -> list[_Seat]:
    return [seat for seat, _ in _trained_seat_numbers(groups, discount)]


def _trained_seat_numbers(groups: Sequence[Group], discount: float) -> list[tuple[_Seat, int]]:
    """Every seat with trainable turns in an unmasked episode, in the order of groups, episodes, seats."""
    out: list[tuple[_Seat, int]] = []
    for g, group in enumerate(groups):
        for e, episode in enumerate(group.episodes):
            if episode.masked is not None:
                continue
            for number, role in enumerate(episode.roles):
                turns = [k for k, t in enumerate(episode.turns) if t.seat == number and t.trainable]
                if turns:
                    value = seat_return(episode, number, discount)
                    out.append((_Seat(g, e, (episode.game, role), value, turns), number))
    return out


def _by_group_and_role(groups: Sequence[Group], discount: float) -> dict[tuple[int, Key], list[_Seat]]:
    pools: defaultdict[tuple[int, Key], list[_Seat]] = defaultdict(list)
    for seat in _trained_seats(groups, discount):
        pools[seat.group, seat.key].append(seat)
    return pools


def _mean(values: Sequence[float]) -> float:
    """The mean, exact for constant values, which rounding would otherwise miss by an ulp."""
    if min(values) == max(values):
        return values[0]
    return math.fsum(values) / len(values)


def _whiten(values: Sequence[float]) -> list[float]:
    if min(values) == max(values):
        return [0.0] * len(values)
    mean = _mean(values)
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return [(v - mean) / (std + EPSILON) for v in values]
