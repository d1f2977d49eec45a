"""Games whose rules OpenSpiel owns: a match around a pyspiel state, with words from a text face.

`SpielGame.observe_state(state, seat)` is the only place where a position becomes an Observation, so a
search over states (exact exploitability, minimax) reads exactly what a player in a match reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import pyspiel

from ludus.games.base import IllegalAction, Observation, Payoff
from ludus.games.faces import CHANCE, Face
from ludus.games.moves import Payout, quoted, signs, sole_action


@dataclass(frozen=True, slots=True, eq=False)
class SpielGame:
    """One OpenSpiel game for two players, zero-sum and turn by turn, behind text.

    `payout` "chips" returns OpenSpiel's own payoffs, "sign" their sign (-1, 0, +1). Best responses computed
    on `spiel` are in chips whatever `payout` says.
    """

    name: str
    spiel: Any  # pyspiel.Game
    face: Face
    payout: Payout = "chips"

    @property
    def roles(self) -> tuple[str, ...]:
        return ("player_0", "player_1")

    @property
    def payoff(self) -> Payoff:
        return Payoff.ZERO_SUM

    @property
    def max_turns(self) -> int:
        return int(self.spiel.max_game_length())

    @property
    def min_return(self) -> float:
        return float(self.spiel.min_utility()) if self.payout == "chips" else -1.0

    def start(self, seed: int) -> SpielMatch:
        """A new match; its chance is drawn from a generator of its own, seeded with `seed`."""
        rng = Random(seed)
        return SpielMatch(self, deal(self.spiel.new_initial_state(), rng), rng)

    def action_text(self, state: Any, action: int) -> str:
        """The canonical text of OpenSpiel's `action` in `state`."""
        return self.face.action(state, action)

    def actions(self, state: Any) -> dict[str, int]:
        """Canonical text -> OpenSpiel action, for every legal action of the player to move in `state`."""
        return {self.face.action(state, action): action for action in state.legal_actions()}

    def observe_state(self, state: Any, seat: int) -> Observation:
        """What `seat` reads in `state`. `legal` is () when it is not this seat's move.

        `key` is the information state for games with secrets. For games without, it is the position and
        the side to move, so that different move orders to one board share their key.
        """
        position = self.face.position(state, seat)
        if state.is_terminal():
            position += f"\n{_result(state, seat)}"
        return Observation(
            rules=self.face.rules,
            events=self._events(state, seat),
            state=position,
            legal=tuple(self.actions(state)) if state.current_player() == seat else (),
            key=self._key(state, seat),
        )

    def twin_state(self, state: Any, seat: int, rng: Random) -> Any | None:
        """A state that `seat` cannot tell from `state`, with one hidden chance outcome changed.

        None where `seat` knows everything. Chosen at random among all single changes that keep the seat's
        information state; every later move is the same.
        """
        if not _has_secrets(self.spiel):
            return None
        told = state.information_state_string(seat)
        history = state.full_history()
        options: list[tuple[int, int]] = []
        probe = self.spiel.new_initial_state()
        for index, step in enumerate(history):
            if step.player == CHANCE:
                outcomes = (outcome for outcome, _ in probe.chance_outcomes())
                options += [(index, outcome) for outcome in outcomes if outcome != step.action]
            probe.apply_action(step.action)
        rng.shuffle(options)
        for index, outcome in options:
            twin = self._replay([s.action for s in history], index, outcome)
            if twin is not None and twin.information_state_string(seat) == told:
                return twin
        return None

    def _replay(self, actions: list[int], changed: int, outcome: int) -> Any | None:
        state = self.spiel.new_initial_state()
        for index, action in enumerate(actions):
            chosen = outcome if index == changed else action
            if chosen not in state.legal_actions():
                return None
            state.apply_action(chosen)
        return state

    def _key(self, state: Any, seat: int) -> str:
        if _has_secrets(self.spiel):
            return str(state.information_state_string(seat))
        return f"{state}\nplayer {state.current_player()}"

    def _events(self, state: Any, seat: int) -> tuple[str, ...]:
        events = list(self.face.dealt(state, seat))
        number = 0
        for step in state.full_history():
            if step.player == CHANCE:
                event = self.face.chance(state, number, step.action)
                events += [event] if event is not None else []
                number += 1
            else:
                who = "You" if step.player == seat else "They"
                events.append(f"{who}: {self.face.action(state, step.action)}")
        if state.is_terminal():
            events += [*self.face.shown(state, seat), _result(state, seat)]
        return tuple(events)


class SpielMatch:
    """One play of a SpielGame."""

    def __init__(self, game: SpielGame, state: Any, rng: Random) -> None:
        self.game = game
        self._state = state
        self._rng = rng

    @property
    def spiel_state(self) -> Any:
        """A copy of the position, for players that search."""
        return self._state.clone()

    def to_act(self) -> tuple[int, ...]:
        return () if self._state.is_terminal() else (int(self._state.current_player()),)

    def observe(self, seat: int) -> Observation:
        return self.game.observe_state(self._state, seat)

    def play(self, actions: Mapping[int, str]) -> None:
        seat, text = sole_action(self.to_act(), actions)
        action = self.game.actions(self._state).get(text)
        if action is None:
            raise IllegalAction(seat, f"{quoted(text)} is not a legal move")
        self._state.apply_action(action)
        deal(self._state, self._rng)

    def returns(self) -> tuple[float, ...]:
        if not self._state.is_terminal():
            return (0.0, 0.0)
        chips = tuple(float(r) for r in self._state.returns())
        return chips if self.game.payout == "chips" else signs(chips)

    def sample(self, seat: int, rng: Random) -> str:
        """Uniform over the legal actions."""
        if seat not in self.to_act():
            raise IllegalAction(seat, "not your turn")
        return rng.choice(list(self.game.actions(self._state)))

    def twin(self, seat: int, rng: Random) -> SpielMatch | None:
        """This match as it might be for all that `seat` knows (`ludus.games.check.HasTwin`)."""
        state = self.game.twin_state(self._state, seat, rng)
        return None if state is None else SpielMatch(self.game, state, rng)


def deal(state: Any, rng: Random) -> Any:
    """Resolve chance in `state`, in place, until a player must move or the game is over."""
    while state.is_chance_node():
        outcomes, weights = zip(*state.chance_outcomes(), strict=True)
        state.apply_action(rng.choices(outcomes, weights)[0])
    return state


def _has_secrets(spiel: Any) -> bool:
    return bool(spiel.get_type().information == pyspiel.GameType.Information.IMPERFECT_INFORMATION)


def _result(state: Any, seat: int) -> str:
    return f"Result: {state.returns()[seat]:+g}"
