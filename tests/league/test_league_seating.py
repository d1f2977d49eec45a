"""Roles that the recipe gives to somebody for good, read against the games."""

from __future__ import annotations

from typing import Any

import pytest

from ludus.config import OpponentConfig
from ludus.errors import UserError
from ludus.games import registry
from ludus.league.seating import seats_of, taken_seats

GAMES = {
    "guard": registry.make("red_team"),
    "long": registry.make("red_team", max_turns=4),
    "kuhn": registry.make("kuhn_poker"),
}


def opponent(policy: str = "past/0", **options: Any) -> OpponentConfig:
    return OpponentConfig(policy=policy, **options)


def test_a_role_is_meant_in_every_game_or_in_the_one_that_it_names() -> None:
    guard, kuhn = GAMES["guard"], GAMES["kuhn"]
    assert seats_of(["defender"], "guard", guard) == seats_of(["guard/defender"], "guard", guard) == (1,)
    assert seats_of(["long/defender"], "guard", guard) == ()
    assert seats_of(["defender", "attacker"], "guard", guard) == (0, 1)
    assert seats_of(["player_0"], "kuhn", kuhn) == (0,)


def test_only_opponents_with_roles_have_seats_of_their_own() -> None:
    found = taken_seats(
        [
            opponent("random"),
            opponent("past/0", roles=["defender", "player_1"]),
            opponent("attack:mix", roles=["guard/attacker", "long/defender"], games=["guard", "long"]),
        ],
        GAMES,
    )
    assert found == {
        "past/0": {"guard": (1,), "long": (1,), "kuhn": (1,)},
        "attack:mix": {"guard": (0,), "long": (1,)},
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"roles": ["guardian"]},
            "'past/0' is to take the role 'guardian', which no game of its has; there are",
        ),
        ({"roles": ["defender"], "games": ["kuhn"]}, r"'defender'.*there are kuhn: player_0, player_1"),
        ({"roles": ["defender"]}, r"no role in kuhn \(its roles: player_0, player_1\); name the games"),
        ({"roles": ["kuhn/defender"]}, "'kuhn/defender', which no game"),
        (
            {"roles": ["attacker", "defender"], "games": ["guard"]},
            "takes every role of guard: leave one to the trained policy",
        ),
    ],
)
def test_roles_that_cannot_be_are_told(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        taken_seats([opponent(**options)], GAMES)
