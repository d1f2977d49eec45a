"""Which role is whose: the seats that the recipe gives to somebody for good."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ludus.config import OpponentConfig
from ludus.errors import UserError
from ludus.games.base import Game


def seats_of(roles: Sequence[str], label: str, game: Game) -> tuple[int, ...]:
    """The seats of `game`, called `label` in the recipe, that `roles` name: "ROLE", or "LABEL/ROLE"."""
    return tuple(i for i, role in enumerate(game.roles) if {role, f"{label}/{role}"} & set(roles))


def taken_seats(
    opponents: Iterable[OpponentConfig], games: Mapping[str, Game]
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Policy id -> game -> the seats that this opponent always takes; only opponents with `roles` are there.

    Raises UserError for a role that none of its games has, for a game of its in which it has none of its
    roles, and where it would take every seat.
    """
    taken: dict[str, dict[str, tuple[int, ...]]] = {}
    for opponent in opponents:
        if not opponent.roles:
            continue
        where = f"league.opponents: {opponent.policy!r}"
        mine = {label: games[label] for label in opponent.games or games}
        for name in opponent.roles:
            if not any(seats_of([name], label, game) for label, game in mine.items()):
                raise UserError(f"{where} is to take the role {name!r}, which {known_roles(mine)}")
        taken[opponent.policy] = {}
        for label, game in mine.items():
            seats = seats_of(opponent.roles, label, game)
            if not seats:
                raise UserError(
                    f"{where} has no role in {label} (its roles: {', '.join(game.roles)}); name the games "
                    "that it plays (games = [...]), or a role there"
                )
            if len(seats) == len(game.roles):
                raise UserError(f"{where} takes every role of {label}: leave one to the trained policy")
            taken[opponent.policy][label] = seats
    return taken


def known_roles(games: Mapping[str, Game]) -> str:
    """The end of a message about a role that no game has."""
    said = "; ".join(f"{label}: {', '.join(game.roles)}" for label, game in games.items())
    return f"no game of its has; there are {said}"
