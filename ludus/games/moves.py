"""Small things that every match needs: whose action it is, how to quote it back, the sign of a return."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

from ludus.games.base import IllegalAction

Payout = Literal["chips", "sign"]  # returns as the game pays them, or their sign


def sole_action(to_act: tuple[int, ...], actions: Mapping[int, str]) -> tuple[int, str]:
    """(seat, text) of the one action that a turn-by-turn match waits for.

    Raises IllegalAction for a seat that is not to act, and ValueError where the acting seat is missing.
    """
    for seat in actions:
        if seat not in to_act:
            raise IllegalAction(seat, "not your turn" if to_act else "the match is over")
    if not to_act:
        raise ValueError("the match is over: nobody can act")
    (seat,) = to_act
    if seat not in actions:
        raise ValueError(f"no action given for seat {seat}, whose move it is")
    return seat, actions[seat]


def quoted(text: str) -> str:
    """A refused action for an error message: ASCII, at most 40 characters of it."""
    return ascii(text[:40]) + ("..." if len(text) > 40 else "")


def signs(returns: Iterable[float]) -> tuple[float, ...]:
    """-1.0, 0.0 or 1.0 for each return."""
    return tuple(float((r > 0) - (r < 0)) for r in returns)


def plain_lines(text: str) -> str:
    """The same text with line feeds for line breaks of all other kinds."""
    return re.sub("\r\n|[\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]", "\n", text)
