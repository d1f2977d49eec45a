"""The games that come with Ludus: one factory per registry name.

A factory's keyword arguments are the game's options; `ludus.games.registry` checks them against the
annotations. The first line of its docstring is the summary that `ludus games ls` prints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import pyspiel
from pydantic import Field

from ludus.errors import UserError
from ludus.games.base import Game
from ludus.games.faces import (
    BreakthroughFace,
    ConnectFourFace,
    Face,
    KuhnFace,
    LeducFace,
    LiarsDiceFace,
    TicTacToeFace,
)
from ludus.games.moves import Payout
from ludus.games.negotiation import NegotiationGame
from ludus.games.openspiel import SpielGame
from ludus.games.red_team.game import RedTeamGame
from ludus.games.red_team.rewards import DEFAULT_WEIGHTS, Term
from ludus.games.red_team.world import Label, Split, seeds
from ludus.games.red_team.worlds import DEFAULT_LABELS, Invented, from_files
from ludus.games.repeated import RepeatedGame

Rounds = Annotated[int, Field(ge=1, le=1000)]
Name = Annotated[str, Field(min_length=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _cards(name: str, spiel: str, face: Face, rounds: int, payoff: Payout) -> Game:
    rules = pyspiel.load_game(spiel)
    if rounds == 1:
        return SpielGame(name, rules, face, payoff)
    return RepeatedGame(SpielGame(name, rules, face), rounds, payoff)


def kuhn_poker(*, rounds: Rounds = 1, payoff: Payout = "chips") -> Game:
    """Kuhn poker: three cards, one bet; 12 information sets."""
    return _cards("kuhn_poker", "kuhn_poker", KuhnFace(), rounds, payoff)


def leduc_poker(*, suits: bool = False, rounds: Rounds = 1, payoff: Payout = "chips") -> Game:
    """Leduc poker: six cards, two betting rounds, one public card; suits named, or left out."""
    spiel = f"leduc_poker(suit_isomorphism={str(not suits).lower()})"
    return _cards("leduc_poker", spiel, LeducFace(suits), rounds, payoff)


def liars_dice(
    *, dice: Annotated[int, Field(ge=1, le=5)] = 1, rounds: Rounds = 1, payoff: Payout = "chips"
) -> Game:
    """Liar's dice: hidden dice, rising bids."""
    return _cards("liars_dice", f"liars_dice(numdice={dice})", LiarsDiceFace(dice), rounds, payoff)


def tic_tac_toe(*, view: Literal["board", "cells"] = "board") -> Game:
    """Tic-tac-toe, drawn as a board or listed by cells."""
    return SpielGame("tic_tac_toe", pyspiel.load_game("tic_tac_toe"), TicTacToeFace(view))


def connect_four() -> Game:
    """Connect four on 7 columns and 6 rows."""
    return SpielGame("connect_four", pyspiel.load_game("connect_four"), ConnectFourFace())


def breakthrough(
    *, rows: Annotated[int, Field(ge=4, le=8)] = 6, columns: Annotated[int, Field(ge=2, le=8)] = 6
) -> Game:
    """Breakthrough: race pawns to the far row."""
    spiel = pyspiel.load_game(f"breakthrough(rows={rows},columns={columns})")
    return SpielGame("breakthrough", spiel, BreakthroughFace())


def negotiation(
    *,
    resources: Literal[2, 5] = 2,
    turns: Annotated[int, Field(ge=2, le=100)] | None = None,
    payoff: Literal["sign", "difference"] = "sign",
) -> Game:
    """Simple Negotiation: trade resources whose worth the other cannot see."""
    return NegotiationGame(resources=resources, turns=turns or (8 if resources == 2 else 10), payout=payoff)


def red_team(
    *,
    payoff: Literal["zero_sum", "general_sum"] = "zero_sum",
    attacks: Annotated[float, Field(ge=0, le=1)] = 0.5,
    max_turns: Annotated[int, Field(ge=2, le=20, multiple_of=2)] = 2,
    split: Split = "train",
    labels: dict[Literal["harmful", "benign", "hard_benign"], NonNegative] | None = None,
    weights: dict[Term, NonNegative] | None = None,
) -> Game:
    """Red teaming: rewrite a request, answer it, in a world of invented words with an exact judge."""
    if split == "talk" and attacks > 0:
        raise UserError('red_team: nothing is rewritten with split = "talk"; set attacks = 0.0')
    mix = {Label(name): share for name, share in (labels or DEFAULT_LABELS).items() if share > 0}
    known = seeds(split)
    if unknown := [label.value for label in mix if label not in known]:
        raise UserError(f"red_team: split = {split!r} has no {unknown[0]} seeds; leave them out of labels")
    if not mix:
        raise UserError("red_team: every label has weight 0; give one of them a weight above 0")
    return RedTeamGame(
        payoff, attacks, max_turns, {**DEFAULT_WEIGHTS, **(weights or {})}, Invented(split, mix)
    )


def red_team_files(
    *,
    seeds: Annotated[list[str], Field(min_length=1)],
    judge: Name,
    second_judge: Name | None = None,
    payoff: Literal["zero_sum", "general_sum"] = "zero_sum",
    attacks: Annotated[float, Field(ge=0, le=1)] = 0.5,
    max_turns: Annotated[int, Field(ge=2, le=20, multiple_of=2)] = 2,
    max_chars: Annotated[int, Field(ge=1)] = 10_000,
    labels: dict[Literal["harmful", "benign"], NonNegative] | None = None,
    weights: dict[Term, NonNegative] | None = None,
) -> Game:
    """Red teaming in free text: seeds from files, and a judge of the run ([judges.NAME]) that pays."""
    mix = {Label(name): share for name, share in (labels or {"harmful": 0.5, "benign": 0.5}).items() if share}
    if not mix:
        raise UserError("red_team_files: every label has weight 0; give one of them a weight above 0")
    weighed = {**DEFAULT_WEIGHTS, **(weights or {})}
    if weighed["help"]:
        raise UserError(
            "red_team_files: no judge says whether an answer gives all that was asked for; leave help out of "
            "weights"
        )
    if judge == second_judge:
        raise UserError(f"red_team_files: {judge!r} is both judge and second_judge; name another beside it")
    names = (judge,) if second_judge is None else (judge, second_judge)
    return RedTeamGame(payoff, attacks, max_turns, weighed, from_files(seeds, mix, names, max_chars))


GAMES: dict[str, Callable[..., Game]] = {
    factory.__name__: factory
    for factory in (
        breakthrough,
        connect_four,
        kuhn_poker,
        leduc_poker,
        liars_dice,
        negotiation,
        red_team,
        red_team_files,
        tic_tac_toe,
    )
}
