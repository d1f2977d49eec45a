"""A small two-player zero-sum game as arrays, in the sequence form of Koller, Megiddo and von Stengel (1996).

The whole tree is walked once with OpenSpiel's own states; after that the value and the best responses of
many policies are computed together, which is what a bootstrap over policies needs. The arrays also hold
what OpenSpiel's own algorithms have no place for: a policy that forfeits at an information set.

Notation: a *cell* is one action at one information set; a player's *sequence* is the last cell it played
(ROOT before its first). A *behaviour* gives each cell its probability, shape [cells, policies]. With
perfect recall the probability that a player's own choices lead to a sequence, its *reach*, is the product
of the behaviour along the player's earlier cells.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyspiel
from numpy.typing import NDArray

from ludus.errors import UserError
from ludus.experts import unfit
from ludus.games.base import HasSpiel

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MAX_SETS = 25_000  # information sets: liar's dice with one die each has 24,576
MAX_NODES = 2_000_000  # histories walked
_CHUNK = 4_000_000  # numbers held at once while many policies are evaluated


@dataclass(frozen=True, slots=True)
class InformationSet:
    """One decision of one seat. `state` is one of its states (a pyspiel.State; do not change it)."""

    key: str  # OpenSpiel's information state string
    seat: int
    actions: tuple[int, ...]  # OpenSpiel's legal actions
    state: Any


@dataclass(frozen=True, slots=True)
class Values:
    """Per policy: seat 0's `value` on policy [P], and each seat's when it best responds, [2, P]."""

    value: Floats
    best_response: Floats

    @property
    def nash_conv(self) -> Floats:
        """What both seats together gain by best responding (Lanctot et al. 2017), shape [P]."""
        total: Floats = self.best_response.sum(axis=0)
        return np.maximum(total, 0.0)  # exact arithmetic never goes below 0


@dataclass(frozen=True, slots=True)
class _Entries:
    """Sums over histories: entry k adds weight[k] * (a column of `source[k]`) to row `target[k]`."""

    target: Ints
    source: Ints
    weight: Floats


class SequenceForm:
    """The arrays of one game. `sets` are its information sets; cells follow their order and actions."""

    def __init__(self, game: Any) -> None:
        """Walk `game` (a pyspiel.Game). Raises UserError where it is too large or of the wrong kind."""
        problem = unfit(game)
        if problem is not None:
            raise UserError(f"{_name(game)} {problem}, so its exploitability cannot be computed exactly")
        walk = _Walk(game)
        self.sets: tuple[InformationSet, ...] = tuple(walk.sets)
        self.first = np.array(walk.first, dtype=np.int64)  # [sets]: each set's first cell
        self.cells = walk.cells
        self.index = walk.index  # key -> position in `sets`
        self._penalty = -float(game.min_utility())
        self._parent = np.array(walk.parent, dtype=np.int64)  # [sets]: own sequence that leads there
        self._of_cell = np.repeat(np.arange(len(self.sets)), [len(s.actions) for s in self.sets])
        self._seat = np.array([s.seat for s in self.sets], dtype=np.int64)
        depth = np.array(walk.depth, dtype=np.int64)
        self._levels = [
            [np.flatnonzero((self._seat == seat) & (depth == d)) for d in range(int(depth.max()) + 1)]
            for seat in (0, 1)
        ]
        self._payoffs = [_entries({s[:2]: s[2] for s in walk.payoffs(seat)}) for seat in (0, 1)]
        self._forfeits = [_entries(walk.forfeits[seat]) for seat in (0, 1)]  # by the seat that gains

    def behaviour(self, policy: Mapping[str, Mapping[int, float]]) -> Floats:
        """A table {information state: {action: probability}} as a column [cells, 1].

        Raises UserError where an information set is missing or its probabilities do not sum to 1.
        """
        column = np.zeros((self.cells, 1))
        for information_set, start in zip(self.sets, self.first, strict=True):
            row = policy.get(information_set.key)
            if row is None:
                raise UserError(f"the policy says nothing about information set {information_set.key!r}")
            strange = set(row) - set(information_set.actions)
            if strange and any(row[a] for a in strange):
                raise UserError(
                    f"the policy plays {sorted(strange)} at {information_set.key!r}, where the legal actions "
                    f"are {list(information_set.actions)}"
                )
            probs = [row.get(a, 0.0) for a in information_set.actions]
            if min(probs) < 0 or abs(sum(probs) - 1) > 1e-6:
                raise UserError(f"the policy's probabilities at {information_set.key!r} are {probs}: no law")
            column[start : start + len(probs), 0] = np.array(probs) / sum(probs)
        return column

    def evaluate(self, behaviour: Floats, forfeit: Floats | None = None) -> Values:
        """Value and best responses of each policy (column) of `behaviour` [cells, P].

        `forfeit` [sets, P] is the probability that the policy forfeits at a set instead of acting; its
        `behaviour` there is what it does otherwise. A forfeit ends the match with the worst utility of the
        game for the offender and the opposite for the other seat; a best response never forfeits.
        """
        size = max(self.cells, *(len(e.weight) for e in (*self._payoffs, *self._forfeits)))
        step = max(1, _CHUNK // size)
        values, responses = [], []
        for low in range(0, behaviour.shape[1], step):
            part = slice(low, low + step)
            v, r = self._evaluate(behaviour[:, part], None if forfeit is None else forfeit[:, part])
            values.append(v)
            responses.append(r)
        return Values(np.concatenate(values), np.concatenate(responses, axis=1))

    def _evaluate(self, behaviour: Floats, forfeit: Floats | None) -> tuple[Floats, Floats]:
        if forfeit is not None:
            behaviour = behaviour * (1.0 - forfeit[self._of_cell])
        reach = self._reach(behaviour)
        offence = None if forfeit is None else forfeit * reach[self._parent]  # [sets, P], own reach only
        gains = [self._gain(seat, reach, offence) for seat in (0, 1)]
        value = (gains[0] * np.where(self._owned(0)[:, None], reach, 0.0)).sum(axis=0)
        if offence is not None:  # what seat 0 loses by its own forfeits
            lost = self._forfeits[1]
            value -= self._penalty * (lost.weight[:, None] * reach[lost.target] * offence[lost.source]).sum(
                axis=0
            )
        return value, np.stack([self._best(seat, gains[seat]) for seat in (0, 1)])

    def _reach(self, behaviour: Floats) -> Floats:
        reach = np.ones((self.cells + 1, behaviour.shape[1]))  # the last row is ROOT
        for levels in self._levels:
            for sets in levels:
                cells = self._cells_of(sets)
                reach[cells] = reach[self._parent[self._of_cell[cells]]] * behaviour[cells]
        return reach

    def _gain(self, seat: int, reach: Floats, offence: Floats | None) -> Floats:
        """What ends at each sequence of `seat`, weighted by chance and the other seat: [cells + 1, P]."""
        gain = np.zeros_like(reach)
        _add(gain, self._payoffs[seat], reach)
        if offence is not None:
            _add(gain, self._forfeits[seat], offence * self._penalty)
        return gain

    def _best(self, seat: int, gain: Floats) -> Floats:
        """Value of the best response of `seat` [P]: its sets from the last to the first, best cell each."""
        total = gain.copy()
        for sets in reversed(self._levels[seat]):
            if not len(sets):
                continue
            cells = self._cells_of(sets)
            sizes = np.array([len(self.sets[i].actions) for i in sets])
            starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
            best = np.maximum.reduceat(total[cells], starts, axis=0)
            np.add.at(total, self._parent[sets], best)
        root: Floats = total[self.cells]
        return root

    def _cells_of(self, sets: Ints) -> Ints:
        ranges = [np.arange(self.first[i], self.first[i] + len(self.sets[i].actions)) for i in sets]
        return np.concatenate(ranges) if ranges else np.zeros(0, dtype=np.int64)

    def _owned(self, seat: int) -> NDArray[np.bool_]:
        return np.append(self._seat[self._of_cell] == seat, True)


def sequence_form(game: HasSpiel) -> SequenceForm:
    """The arrays of `game`, kept for later calls. Raises UserError as `SequenceForm` does."""
    return _built(str(game.spiel))


def information_sets(game: HasSpiel) -> int | None:
    """Number of information sets of `game`; None where its exploitability cannot be computed exactly."""
    return _counted(str(game.spiel))


@lru_cache(maxsize=16)
def _built(game: str) -> SequenceForm:
    return SequenceForm(pyspiel.load_game(game))


@lru_cache(maxsize=64)
def _counted(game: str) -> int | None:
    try:
        return len(_built(game).sets)
    except UserError:
        return None


def _name(game: Any) -> str:
    return str(game.get_type().short_name)


class _Walk:
    """One pass over the tree that collects sets, sequences and weights."""

    def __init__(self, game: Any) -> None:
        self.sets: list[InformationSet] = []
        self.first: list[int] = []
        self.parent: list[int] = []  # cell, or -1 for ROOT: the same as the last row
        self.depth: list[int] = []  # own moves before this one
        self.index: dict[str, int] = {}
        self.cells = 0
        self.ends: dict[tuple[int, int], float] = defaultdict(float)  # (sequence 0, sequence 1) -> payoff
        self.forfeits: tuple[dict[tuple[int, int], float], dict[tuple[int, int], float]] = (
            defaultdict(float),
            defaultdict(float),
        )  # by the seat that gains: (its sequence, the offender's set) -> chance
        name = _name(game)
        stack: list[tuple[Any, float, tuple[int, int], tuple[int, int]]] = [
            (game.new_initial_state(), 1.0, (-1, -1), (0, 0))
        ]
        nodes = 0
        while stack:
            nodes += 1
            if nodes > MAX_NODES or len(self.sets) > MAX_SETS:
                raise UserError(
                    f"{name} has more than {MAX_SETS} information sets or {MAX_NODES} histories: too large "
                    "for exact exploitability"
                )
            state, chance, at, depth = stack.pop()
            if state.is_terminal():
                self.ends[at] += chance * state.returns()[0]
            elif state.is_chance_node():
                # Reversed, so that sets are numbered in the order of a walk that goes left first.
                for outcome, p in reversed(state.chance_outcomes()):
                    stack.append((state.child(outcome), chance * p, at, depth))
            else:
                stack += self._decide(state, chance, at, depth)

    def _decide(
        self, state: Any, chance: float, at: tuple[int, int], depth: tuple[int, int]
    ) -> list[tuple[Any, float, tuple[int, int], tuple[int, int]]]:
        seat = state.current_player()
        key = state.information_state_string(seat)
        number = self.index.get(key)
        actions = state.legal_actions()
        if number is None:
            number = self.index[key] = len(self.sets)
            self.sets.append(InformationSet(key, seat, tuple(actions), state))
            self.first.append(self.cells)
            self.parent.append(at[seat])
            self.depth.append(depth[seat])
            self.cells += len(actions)
        assert self.parent[number] == at[seat], f"{key!r} forgets what its seat did (no perfect recall)"
        self.forfeits[1 - seat][at[1 - seat], number] += chance
        found = []
        for k in reversed(range(len(actions))):
            cell = self.first[number] + k
            after = (cell, at[1]) if seat == 0 else (at[0], cell)
            deeper = (depth[0] + 1, depth[1]) if seat == 0 else (depth[0], depth[1] + 1)
            found.append((state.child(actions[k]), chance, after, deeper))
        return found

    def payoffs(self, seat: int) -> list[tuple[int, int, float]]:
        """(own sequence, other's sequence, own payoff times chance) of every pair that can end a match."""
        sign = 1.0 if seat == 0 else -1.0
        return [(pair[seat], pair[1 - seat], sign * payoff) for pair, payoff in self.ends.items()]


def _entries(weights: Mapping[tuple[int, int], float]) -> _Entries:
    pairs: Sequence[tuple[int, int]] = sorted(weights)
    array = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return _Entries(array[:, 0], array[:, 1], np.array([weights[p] for p in pairs], dtype=np.float64))


def _add(rows: Floats, entries: _Entries, columns: Floats) -> None:
    """rows[target] += weight * columns[source]; targets are sorted, so each row is one run."""
    if not len(entries.weight):
        return
    starts = np.flatnonzero(np.diff(entries.target, prepend=entries.target[0] - 1))
    summed = np.add.reduceat(entries.weight[:, None] * columns[entries.source], starts, axis=0)
    rows[entries.target[starts]] += summed
