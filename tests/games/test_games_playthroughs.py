"""Stored playthroughs pin every word that a seat reads.

After a wanted change of texts, write them anew and read the diff:

    python tests/games/test_games_playthroughs.py
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest

from ludus.games.base import Observation
from ludus.games.registry import make

FOLDER = Path(__file__).parent / "playthroughs"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "breakthrough": ("breakthrough", {"rows": 4, "columns": 3}),
    "connect_four": ("connect_four", {}),
    "kuhn_poker": ("kuhn_poker", {}),
    "kuhn_poker_3_rounds": ("kuhn_poker", {"rounds": 3, "payoff": "sign"}),
    "leduc_poker": ("leduc_poker", {}),
    "leduc_poker_suits": ("leduc_poker", {"suits": True}),
    "liars_dice": ("liars_dice", {}),
    "liars_dice_2": ("liars_dice", {"dice": 2}),
    "negotiation": ("negotiation", {}),
    "negotiation_5": ("negotiation", {"resources": 5, "payoff": "difference"}),
    "tic_tac_toe": ("tic_tac_toe", {}),
}


def playthrough(case: str) -> str:
    """One random match in words: all that the seat to move reads, its move, and the end as both see it."""
    name, args = CASES[case]
    game = make(name, **args)
    match, rng = game.start(2), Random(2)
    lines = [f"# {name} {args}", f"roles {game.roles} payoff {game.payoff} max_turns {game.max_turns}"]
    lines += [f"min_return {game.min_return}", "", match.observe(0).rules, ""]
    while match.to_act():
        (seat,) = match.to_act()
        seen = match.observe(seat)
        move = match.sample(seat, rng)
        lines += [
            f"## seat {seat}",
            seen.state,
            f"legal: {_legal(seen)}",
            f"key: {seen.key!r}",
            f"> {move}",
            "",
        ]
        match.play({seat: move})
    for seat in range(len(game.roles)):
        seen = match.observe(seat)
        lines += [f"## seat {seat} at the end", seen.state, "events:", *seen.events, ""]
    return "\n".join([*lines, f"returns {match.returns()}", ""])


def _legal(seen: Observation) -> str:
    return "any text of the rules" if seen.legal is None else " | ".join(seen.legal)


@pytest.mark.parametrize("case", sorted(CASES))
def test_texts_are_as_stored(case: str) -> None:
    assert playthrough(case) == (FOLDER / f"{case}.txt").read_text(encoding="ascii")


def test_no_playthrough_is_left_over() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == CASES.keys()


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for written in CASES:
        (FOLDER / f"{written}.txt").write_text(playthrough(written), encoding="ascii")
