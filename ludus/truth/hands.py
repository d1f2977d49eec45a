"""How much a policy depends on what only its own seat sees: its hand.

Two information sets of a seat are *hands of one position* where the other seat may be unable to tell them
apart: somewhere in the game its own information is the same in both. All that is public is then the same in
the two, bets and public cards alike, and nothing but the seat's own secrets differs. (So a policy that reads
the public card and not its own does not pass for one that looks at its hand.) In Kuhn poker they are the
three cards at each of the four points of decision, in Leduc poker the three ranks at each course of betting
and public card. Games without secrets have none.

The distance of two laws p and q is sqrt(sum (p - q)^2 / 2), from 0 to 1; for two actions that is the
difference of their probabilities. The figure is its root mean square over all pairs of hands. A sampled law
is off by chance, which would pass for a difference; the expected square of that error is estimated from the
spread of the replies and taken out, so that the mean square is unbiased (to first order, where replies are
illegal).
"""

from __future__ import annotations

import math
from collections import defaultdict
from functools import lru_cache
from itertools import combinations

import pyspiel

from ludus.experts import equilibrium, solvable
from ludus.games.base import HasSpiel
from ludus.truth.policy_table import Estimate, PolicyTable
from ludus.truth.sequence_form import Floats, sequence_form


def differs(game: HasSpiel, table: PolicyTable) -> tuple[float, float] | None:
    """(how much the policy differs between hands, how much an equilibrium does), each from 0 to 1.

    Hands at which no sampled reply was legal are left out. None where nothing is left, and for games too
    large for CFR+, which supplies the equilibrium.
    """
    if not solvable(game):
        return None
    known = [float(e.laws.sum()) > 0 for e in table.estimates]
    pairs = [(i, j) for i, j in hands(game) if known[i] and known[j]]
    if not pairs:
        return None
    return _distance(table, pairs), _distance(PolicyTable.of(game, equilibrium(game)), pairs)


def hands(game: HasSpiel) -> list[tuple[int, int]]:
    """Pairs of the game's information sets (numbers in its sequence form) that are hands of one position.

    The two of a pair have the same legal actions.
    """
    sets = sequence_form(game).sets
    number = {s.key: n for n, s in enumerate(sets)}
    pairs = [(number[a], number[b]) for a, b in _indistinct(str(game.spiel))]
    return [(i, j) for i, j in pairs if sets[i].actions == sets[j].actions]


@lru_cache(maxsize=16)
def _indistinct(game: str) -> list[tuple[str, str]]:
    """Pairs of one seat's information states that the other seat cannot always tell apart."""
    told: dict[tuple[int, str], set[str]] = defaultdict(set)  # by the seat to move and what the other knows
    stack = [pyspiel.load_game(game).new_initial_state()]
    while stack:
        state = stack.pop()
        if state.is_terminal():
            continue
        if not state.is_chance_node():
            seat = state.current_player()
            told[seat, state.information_state_string(1 - seat)].add(state.information_state_string(seat))
        stack += [state.child(action) for action in state.legal_actions()]
    return sorted({pair for keys in told.values() for pair in combinations(sorted(keys), 2)})


def _distance(table: PolicyTable, pairs: list[tuple[int, int]]) -> float:
    """Root mean square over `pairs`, without what chance adds; 0 where chance explains it all."""
    probs = [e.probs for e in table.estimates]
    chance = [_chance(e) for e in table.estimates]
    squares = [float(((probs[i] - probs[j]) ** 2).sum()) - chance[i] - chance[j] for i, j in pairs]
    return math.sqrt(max(0.0, math.fsum(squares) / len(squares) / 2))


def _chance(estimate: Estimate) -> float:
    """The expected squared error of `estimate.probs`, summed over actions; 0 where the law is exact.

    `probs` is a ratio of two sums over replies, that of their laws and that of their legal probabilities;
    linearised, reply k moves it by (law_k - legal_k * probs) / (sum of legal).
    """
    laws, replies = estimate.laws, len(estimate.laws)
    if replies < 2 or not laws.any():
        return 0.0
    legal = laws.sum(axis=1, keepdims=True)
    moved: Floats = (laws - legal * estimate.probs) / legal.sum()
    return float((moved**2).sum()) * replies / (replies - 1)
