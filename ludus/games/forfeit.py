"""What a match pays when a seat's illegal replies end it: one rule for all games, outside the games."""

from __future__ import annotations

from typing import Literal, get_args

from ludus.errors import UserError
from ludus.games.base import Game, Payoff

ForfeitRule = Literal["zero_sum", "spiral"]


def forfeit_returns(game: Game, offender: int, rule: ForfeitRule = "zero_sum") -> tuple[float, ...]:
    """Returns per seat of a match that `offender` forfeits.

    "zero_sum": the offender gets the worst return of the game (`min_return`) and the others share its
    opposite equally, so the returns sum to 0; in a game where all are paid alike, all get the worst.
    "spiral": -1.5 to the offender and +0.5 to every other seat, as in the code that SPIRAL released
    (arXiv 2506.24119). These do not sum to 0, whatever the game pays: for reproduction only.

    Raises UserError for an unknown rule, IndexError for a seat that the game does not have.
    """
    seats = len(game.roles)
    if not 0 <= offender < seats:
        raise IndexError(f"game {game.name!r} has seats 0 to {seats - 1}, not {offender}")
    if rule == "spiral":
        worst, others = -1.5, 0.5
    elif rule == "zero_sum":
        worst = game.min_return
        if game.payoff is Payoff.COMMON:
            others = worst
        else:
            others = -worst / (seats - 1) if seats > 1 else 0.0
    else:
        raise UserError(f"unknown forfeit rule {rule!r}; known rules: {', '.join(get_args(ForfeitRule))}")
    return tuple(worst if seat == offender else others for seat in range(seats))
