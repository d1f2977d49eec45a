"""Forfeits: zero-sum by default, SPIRAL's release by name."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from ludus.errors import UserError
from ludus.games.base import Match, Payoff
from ludus.games.forfeit import forfeit_returns
from ludus.games.registry import describe, make


@dataclass(frozen=True)
class Table:
    """A game of any size; nobody plays it here."""

    roles: tuple[str, ...]
    payoff: Payoff = Payoff.ZERO_SUM
    min_return: float = -6.0
    name: str = "table"
    max_turns: int = 1

    def start(self, seed: int) -> Match:
        raise NotImplementedError


def test_zero_sum_by_hand() -> None:
    assert forfeit_returns(make("kuhn_poker"), 0) == (-2.0, 2.0)
    assert forfeit_returns(make("kuhn_poker"), 1) == (2.0, -2.0)
    assert forfeit_returns(make("kuhn_poker", payoff="sign"), 1) == (1.0, -1.0)
    assert forfeit_returns(make("kuhn_poker", rounds=3), 0) == (-6.0, 6.0)
    assert forfeit_returns(Table(("a", "b", "c")), 1) == (3.0, -6.0, 3.0)
    assert forfeit_returns(Table(("a",)), 0) == (-6.0,)


def test_seats_paid_alike_all_lose() -> None:
    assert forfeit_returns(Table(("a", "b"), Payoff.COMMON), 0) == (-6.0, -6.0)


def test_spiral_by_hand() -> None:
    assert forfeit_returns(make("tic_tac_toe"), 1, "spiral") == (0.5, -1.5)
    assert forfeit_returns(Table(("a", "b", "c")), 0, "spiral") == (-1.5, 0.5, 0.5)


@pytest.mark.parametrize("name", [row.name for row in describe() if "required" not in row.options.values()])
def test_every_game_sums_to_zero(name: str) -> None:
    game = make(name)
    for seat in range(len(game.roles)):
        assert sum(forfeit_returns(game, seat, "zero_sum")) == 0


def test_bad_input() -> None:
    with pytest.raises(UserError, match="known rules: zero_sum, spiral"):
        forfeit_returns(make("tic_tac_toe"), 0, "none")  # type: ignore[arg-type]
    for seat in (-1, 2):
        with pytest.raises(IndexError, match="seats 0 to 1"):
            forfeit_returns(make("tic_tac_toe"), seat)
