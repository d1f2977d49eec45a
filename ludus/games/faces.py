"""Text faces: the words that a seat reads and may answer, one small class per OpenSpiel game.

A face is a pure reading of a pyspiel state. It decides no rule: payoffs, legal actions and turns are
OpenSpiel's. Texts are short on purpose, so that a tiny model can learn them and a long match stays cheap.
In events the reader is "You" and the other seat is "They".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, Protocol

State = Any  # pyspiel.State: the bindings carry no usable annotations
CHANCE = -1  # pyspiel's player id of a chance node
CARDS = "JQK"


class Face(Protocol):
    """Reads one OpenSpiel game aloud."""

    @property
    def rules(self) -> str: ...

    def action(self, state: State, action: int) -> str:
        """The one spelling of `action`: ASCII, without surrounding space."""
        ...

    def position(self, state: State, seat: int) -> str:
        """All that `seat` knows in `state`, complete by itself."""
        ...

    def dealt(self, state: State, seat: int) -> tuple[str, ...]:
        """Events that open the match for `seat`, such as its own cards."""
        ...

    def chance(self, state: State, number: int, outcome: int) -> str | None:
        """The event of chance outcome number `number` (from 0) as everyone sees it, or None if hidden."""
        ...

    def shown(self, state: State, seat: int) -> tuple[str, ...]:
        """Events that the end of the match reveals to `seat`, such as the other's cards at a showdown."""
        ...


def chances(state: State) -> list[int]:
    """Chance outcomes so far, in order."""
    return [step.action for step in state.full_history() if step.player == CHANCE]


def moves(state: State) -> list[tuple[int, int]]:
    """(seat, action) of the players' moves so far, in order."""
    return [(step.player, step.action) for step in state.full_history() if step.player != CHANCE]


def spoken(words: list[str], separator: str = " ") -> str:
    return separator.join(words) or "none"


@dataclass(frozen=True, slots=True)
class KuhnFace:
    """Two-player Kuhn poker: three cards, one each, one bet."""

    rules: str = (
        "Kuhn poker. Each player antes 1 and gets one card: J, Q or K. Moves: pass, or bet 1. "
        "To pass after a bet is to fold, to bet after a bet is to call. The higher card wins the pot."
    )

    def action(self, state: State, action: int) -> str:
        return ("pass", "bet")[action]

    def position(self, state: State, seat: int) -> str:
        said = spoken([self.action(state, action) for _, action in moves(state)])
        return f"You are player {seat}. Your card: {self._card(state, seat)}. Moves: {said}."

    def dealt(self, state: State, seat: int) -> tuple[str, ...]:
        return (f"You are player {seat}. Your card: {self._card(state, seat)}.",)

    def chance(self, state: State, number: int, outcome: int) -> str | None:
        return None

    def shown(self, state: State, seat: int) -> tuple[str, ...]:
        folded = [action for _, action in moves(state)][-2:] == [1, 0]
        return () if folded else (f"Their card: {self._card(state, 1 - seat)}.",)

    def _card(self, state: State, seat: int) -> str:
        dealt = chances(state)
        return CARDS[dealt[seat]] if seat < len(dealt) else "none"


@dataclass(frozen=True, slots=True)
class LeducFace:
    """Two-player Leduc poker. Cards are ranks, as suits decide nothing (OpenSpiel's `suit_isomorphism`).

    `suits` names them all the same, "Js" or "Jh": OpenSpiel's plain game, where every card is one of its own.
    """

    suits: bool = False

    @property
    def rules(self) -> str:
        return (
            f"Leduc poker. The deck is {' '.join(map(self._name, range(6)))}. Each player antes 1 and gets "
            "one card; after round 1 a public card is shown. Moves: fold, call (or check), raise (2 in round "
            "1, 4 in round 2, at most two per round). A pair with the public card wins, else the higher "
            "card; equal cards split the pot." + (" Suits decide nothing." if self.suits else "")
        )

    def action(self, state: State, action: int) -> str:
        return ("fold", "call", "raise")[action]

    def position(self, state: State, seat: int) -> str:
        dealt = chances(state)
        public = self._shown_as(dealt[2]) if len(dealt) > 2 else "none"
        first, second = self._rounds(state)
        pot = re.search(r"\[Pot: (\d+)\]", state.information_state_string(seat))
        assert pot is not None, "OpenSpiel's Leduc poker no longer names the pot"
        money = "" if state.is_terminal() else f" Pot: {pot[1]}."  # OpenSpiel has paid it out by then
        return (
            f"You are player {seat}. Your card: {self._card(state, seat)}. Public card: {public}.{money}\n"
            f"Round 1: {spoken(first)}. Round 2: {spoken(second)}."
        )

    def dealt(self, state: State, seat: int) -> tuple[str, ...]:
        return (f"You are player {seat}. Your card: {self._card(state, seat)}.",)

    def chance(self, state: State, number: int, outcome: int) -> str | None:
        return f"Public card: {self._shown_as(outcome)}." if number == 2 else None

    def shown(self, state: State, seat: int) -> tuple[str, ...]:
        folded = moves(state)[-1][1] == 0
        return () if folded else (f"Their card: {self._card(state, 1 - seat)}.",)

    def _card(self, state: State, seat: int) -> str:
        dealt = chances(state)
        return self._shown_as(dealt[seat]) if seat < len(dealt) else "none"

    def _shown_as(self, outcome: int) -> str:
        """OpenSpiel deals ranks, 0 to 2, where suits are folded together, else the six cards."""
        return self._name(outcome if self.suits else 2 * outcome)

    def _name(self, card: int) -> str:
        return CARDS[card // 2] + ("sh"[card % 2] if self.suits else "")

    def _rounds(self, state: State) -> tuple[list[str], list[str]]:
        rounds: tuple[list[str], list[str]] = ([], [])
        public = 0  # chance outcomes seen after the two private cards
        for number, step in enumerate(state.full_history()):
            if step.player != CHANCE:
                rounds[public].append(self.action(state, step.action))
            elif number >= 2:
                public = 1
        return rounds


@dataclass(frozen=True, slots=True)
class LiarsDiceFace:
    """Two-player Liar's Dice with `dice` dice each; the highest face is wild."""

    dice: int

    @property
    def rules(self) -> str:
        return (
            f"Liar's dice. Each player hides {self.dice} dice; a 6 is any face. The bid 2 of 5 claims at "
            "least two dice that show 5 among all dice. A bid must have more dice than the last, or as many "
            "of a higher face. Say liar to doubt the last bid: its bidder wins if it is true, else you win."
        )

    def action(self, state: State, action: int) -> str:
        name: str = state.action_to_string(0, action)  # "2-5" or "Liar", the same for both players
        return " of ".join(name.split("-")).lower()

    def position(self, state: State, seat: int) -> str:
        bids = spoken([self.action(state, action) for _, action in moves(state)], ", ")
        return f"You are player {seat}. Your dice: {self._dice(state, seat)}. Bids: {bids}."

    def dealt(self, state: State, seat: int) -> tuple[str, ...]:
        return (f"You are player {seat}. Your dice: {self._dice(state, seat)}.",)

    def chance(self, state: State, number: int, outcome: int) -> str | None:
        return None

    def shown(self, state: State, seat: int) -> tuple[str, ...]:
        return (f"Their dice: {self._dice(state, 1 - seat)}.",)

    def _dice(self, state: State, seat: int) -> str:
        rolls = chances(state)[seat * self.dice : (seat + 1) * self.dice]
        return spoken([str(roll + 1) for roll in sorted(rolls)])


@dataclass(frozen=True, slots=True)
class OpenFace:
    """What the faces of games without chance and secrets share."""

    def dealt(self, state: State, seat: int) -> tuple[str, ...]:
        return ()

    def chance(self, state: State, number: int, outcome: int) -> str | None:
        return None

    def shown(self, state: State, seat: int) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True, slots=True)
class TicTacToeFace(OpenFace):
    """Cells are numbered 1 to 9 by row. `view` "board" draws them, an empty cell as its number; "cells" lists
    whose they are, which names every cell and so is easier to read for a very small model.
    """

    view: Literal["board", "cells"] = "board"

    @property
    def rules(self) -> str:
        cells = " Cells are numbered by row: 1 2 3, 4 5 6, 7 8 9." if self.view == "cells" else ""
        return (
            "Tic-tac-toe. X moves first. Three in a row, column or diagonal win. Move: an empty cell, 1 to 9."
            + cells
        )

    def action(self, state: State, action: int) -> str:
        return str(action + 1)

    def position(self, state: State, seat: int) -> str:
        cells = str(state).replace("\n", "")[:9].upper()
        if self.view == "cells":
            owned = {mark: [str(i + 1) for i, c in enumerate(cells) if c == mark] for mark in "XO"}
            mine, theirs = spoken(owned["XO"[seat]]), spoken(owned["OX"[seat]])
            return f"You are {'XO'[seat]}. Yours: {mine}. Theirs: {theirs}."
        drawn = [str(i + 1) if c == "." else c for i, c in enumerate(cells)]
        rows = [" ".join(drawn[i : i + 3]) for i in (0, 3, 6)]
        return "\n".join([f"You are {'XO'[seat]}.", *rows])


@dataclass(frozen=True, slots=True)
class ConnectFourFace(OpenFace):
    """Columns are numbered 1 to 7 from the left."""

    rules: str = (
        "Connect four. X moves first. A disc falls to the lowest free place of its column. "
        "Four in a row, column or diagonal win. Move: a column, 1 to 7."
    )

    def action(self, state: State, action: int) -> str:
        return str(action + 1)

    def position(self, state: State, seat: int) -> str:
        rows = [" ".join(row.upper()) for row in str(state).splitlines()]
        return "\n".join([f"You are {'XO'[seat]}.", "1 2 3 4 5 6 7", *rows])


@dataclass(frozen=True, slots=True)
class BreakthroughFace(OpenFace):
    """Squares as in chess; a move is from-square and to-square, captures are spelt like any move."""

    rules: str = (
        "Breakthrough. b moves first and down, w moves up. A piece goes one step straight or diagonally "
        "forward to an empty square; diagonally it may take an enemy. Reach the far row or take every enemy "
        "to win. Move: from and to, such as b2b3."
    )

    def action(self, state: State, action: int) -> str:
        name: str = state.action_to_string(0, action)  # squares only: the same for both players
        return name.removesuffix("*")  # OpenSpiel stars a capture; the squares say it already

    def position(self, state: State, seat: int) -> str:
        board = "\n".join(" ".join(row) for row in str(state).rstrip("\n").splitlines())
        return f"You are {('b, moving down', 'w, moving up')[seat]}.\n{board}"
