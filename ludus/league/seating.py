"""Which role is whose: the seats that the recipe gives to an opponent for good, and the policies' roles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ludus.config import OpponentConfig, PolicyConfig, RunConfig
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


def parts(policies: Sequence[PolicyConfig], games: Mapping[str, Game]) -> dict[tuple[str, str], str]:
    """(game, role) -> the name of the trained policy that plays it; {} where one plays them all.

    Raises UserError for a role of no game, and for one that no policy plays, or several do.
    """
    found: dict[tuple[str, str], str] = {}
    for policy in policies:
        for name in policy.roles:
            mine = [
                (label, game.roles[i]) for label, game in games.items() for i in seats_of([name], label, game)
            ]
            if not mine:
                raise UserError(f"policies: {policy.name!r} is to play {name!r}, which {known_roles(games)}")
            for part in mine:
                if found.setdefault(part, policy.name) != policy.name:
                    raise UserError(
                        f"policies: {part[1]} of {part[0]} is played by {found[part]!r} and by "
                        f"{policy.name!r}; take it from one of them"
                    )
    if found:
        for label, game in games.items():
            if open_roles := [role for role in game.roles if (label, role) not in found]:
                raise UserError(
                    f"policies: nobody plays {', '.join(open_roles)} of {label}; give it to a policy, as "
                    f'roles = ["{open_roles[0]}"]'
                )
    return found if len(policies) > 1 else {}


def check_roles(config: RunConfig, games: Mapping[str, Game]) -> None:
    """Raise UserError where the recipe's roles do not add up (`parts`, `taken_seats`), or where the league's
    opponents always take all roles of a trained policy from it."""
    league = config.league
    played = parts(config.policies, games)
    taken = taken_seats(league.opponents, games)
    if league.self_weight > 0:
        return
    free = {
        (label, role)
        for label, game in games.items()
        for opponent in league.opponents
        if label in (opponent.games or games)
        for seat, role in enumerate(game.roles)
        if seat not in taken.get(opponent.policy, {}).get(label, ())
    }
    for policy in config.policies:
        if played and not any(name == policy.name and part in free for part, name in played.items()):
            raise UserError(
                f"policies: {policy.name!r} would never play, as league.self_weight is 0 and the opponents "
                "always take its roles; leave it out of the recipe, or give league.self_weight a value"
            )


def known_roles(games: Mapping[str, Game]) -> str:
    """The end of a message about a role that no game has."""
    said = "; ".join(f"{label}: {', '.join(game.roles)}" for label, game in games.items())
    return f"no game of its has; there are {said}"
