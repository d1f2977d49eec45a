"""A conformance suite for any game, ours or a third party's: `check(game)` gives one result per rule.

The rules are those of `ludus.games.base` and of the training loop that relies on them. Every piece of
evidence names the seed and the moves that reproduce it. A match that keeps secrets should also offer
`twin` (see `HasTwin`): without it nobody but the game knows what a seat may not see, and privacy is
reported as not checked.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Protocol, runtime_checkable

from ludus.games.base import (
    Game,
    HasSpiel,
    IllegalAction,
    Judged,
    Match,
    Observation,
    Payoff,
    Ruling,
    judges_of,
)
from ludus.games.forfeit import forfeit_returns

TOLERANCE = 1e-9
POSITIONS = 4  # positions per match at which the expensive rules look
TEXTS = 6  # legal actions tried at each of them


@runtime_checkable
class HasTwin(Protocol):
    """A match that can tell what a seat cannot know. Optional; the privacy rule needs it."""

    def twin(self, seat: int, rng: Random) -> Match | None:
        """A copy of this match, now, in which some of what `seat` may not know is different.

        All that `seat` has been entitled to see must be the same. None where nothing is hidden from it.
        """
        ...


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of one rule. `passed` is None where it could not be checked; `evidence` says why."""

    rule: str
    passed: bool | None
    evidence: str


class Broken(Exception):
    """A rule is broken; the message is the evidence."""


class NotChecked(Exception):
    """A rule cannot be checked on this game; the message says what would make it possible."""


@dataclass(frozen=True, slots=True)
class Position:
    """A match between two moves: whose turn, what every seat sees, returns so far."""

    to_act: tuple[int, ...]
    views: tuple[Observation, ...]
    returns: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """One match as it was played: `positions` has one entry more than `moves`."""

    seed: int
    moves: list[dict[int, str]]
    positions: list[Position]

    def at(self, number: int) -> str:
        """Where in which match, to reproduce it."""
        return f"seed {self.seed} after moves {self.moves[:number]}"


def check(game: Game, seeds: Iterable[int] = range(12)) -> list[Result]:
    """Play `game` from each seed in several ways and test every rule; a broken rule never hides another."""
    traces: list[Trace] = []

    def plays() -> str:
        for seed in seeds:
            for choose in (_at_random, _first, _last):
                traces.append(_play(game, seed, choose))
        return f"{len(traces)} matches played"

    played = _run("matches can be played", plays)
    if not played.passed:
        return [played, *(Result(name, None, "matches cannot be played: see above") for name in RULES)]
    return [played, *(_run(name, partial(rule, game, traces)) for name, rule in RULES.items())]


def _run(name: str, rule: Callable[[], str]) -> Result:
    try:
        return Result(name, True, rule())
    except Broken as e:
        return Result(name, False, str(e))
    except NotChecked as e:
        return Result(name, None, str(e))
    except Exception as e:  # noqa: BLE001  a game under test may raise anything, and that is a finding
        return Result(name, False, f"raised {type(e).__name__}: {e}")


# Playing


def _at_random(match: Match, seat: int, legal: tuple[str, ...] | None, rng: Random) -> str:
    return match.sample(seat, rng)


def _first(match: Match, seat: int, legal: tuple[str, ...] | None, rng: Random) -> str:
    return legal[0] if legal else match.sample(seat, rng)


def _last(match: Match, seat: int, legal: tuple[str, ...] | None, rng: Random) -> str:
    return legal[-1] if legal else match.sample(seat, rng)


def _look(game: Game, match: Match) -> Position:
    seats = range(len(game.roles))
    return Position(match.to_act(), tuple(match.observe(s) for s in seats), match.returns())


def _play(
    game: Game, seed: int, choose: Callable[[Match, int, tuple[str, ...] | None, Random], str]
) -> Trace:
    match, rng = game.start(seed), Random(f"{choose.__name__}{seed}")
    trace = Trace(seed, [], [_look(game, match)])
    while match.to_act() and len(trace.moves) < game.max_turns:
        now = trace.positions[-1]
        _sound(game, trace, now)
        joint = {seat: choose(match, seat, now.views[seat].legal, rng) for seat in now.to_act}
        for seat, text in joint.items():
            legal = now.views[seat].legal
            if legal is not None and text not in legal:
                raise Broken(
                    f"{trace.at(len(trace.moves))}: sample gave {text!r}, which is not listed as legal"
                )
        try:
            _move(match, joint)
        except IllegalAction as e:
            raise Broken(f"{trace.at(len(trace.moves))}: {joint} was chosen as legal but refused: {e}") from e
        trace.moves.append(joint)
        trace.positions.append(_look(game, match))
    return trace


def _move(match: Match, joint: Mapping[int, str]) -> None:
    """One joint move, and a ruling drawn from what was said where the match then waits for one."""
    match.play(joint)
    if isinstance(match, Judged) and (asked := match.pending()) is not None:
        rng = Random(repr(asked))
        match.settle(Ruling(*(rng.random() < 0.5 for _ in range(3))))


def _free(game: Game) -> bool:
    """Whether actions may be text in any script: those that a judge has to read."""
    return bool(judges_of(game))


def _sound(game: Game, trace: Trace, now: Position) -> None:
    seats = len(game.roles)
    where = trace.at(len(trace.moves))
    if len(set(now.to_act)) != len(now.to_act) or not all(0 <= s < seats for s in now.to_act):
        raise Broken(f"{where}: to_act is {now.to_act} in a game of {seats} seats")
    if len(now.returns) != seats or not all(math.isfinite(r) for r in now.returns):
        raise Broken(f"{where}: returns are {now.returns}, not {seats} finite numbers")
    for seat in now.to_act:
        if now.views[seat].legal == ():
            raise Broken(f"{where}: seat {seat} must act but has no legal action")


def _replay(game: Game, trace: Trace, number: int) -> Match:
    """A fresh match brought to position `number` of the trace."""
    match = game.start(trace.seed)
    for joint in trace.moves[:number]:
        _move(match, joint)
    return match


def _some(trace: Trace) -> list[int]:
    """Some positions at which somebody must act, spread over the match, the first and last among them."""
    last = len(trace.moves) - 1
    return sorted({round(last * i / (POSITIONS - 1)) for i in range(POSITIONS)}) if trace.moves else []


def _difference(before: Position, after: Position) -> str | None:
    for name in ("to_act", "returns"):
        if getattr(before, name) != getattr(after, name):
            return f"{name} was {getattr(before, name)} and is {getattr(after, name)}"
    for seat, (old, new) in enumerate(zip(before.views, after.views, strict=True)):
        if old != new:
            return f"seat {seat} saw {old} and sees {new}"
    return None


# The rules: each returns what it looked at, or raises Broken or NotChecked


def _ends(game: Game, traces: list[Trace]) -> str:
    for trace in traces:
        if trace.positions[-1].to_act:
            raise Broken(f"{trace.at(len(trace.moves))}: not over after max_turns = {game.max_turns}")
    return f"the longest match took {max(len(t.moves) for t in traces)} of {game.max_turns} turns"


def _deterministic(game: Game, traces: list[Trace]) -> str:
    """Matches advanced in a mixed order, with the global generator disturbed, repeat their traces."""
    saved = random.getstate()
    try:
        order, matches = Random(0), [game.start(trace.seed) for trace in traces]
        waiting = [i for i, trace in enumerate(traces) for _ in trace.moves]
        order.shuffle(waiting)
        done = [0] * len(traces)
        for step, i in enumerate(waiting):
            random.seed(step)
            _move(matches[i], traces[i].moves[done[i]])
            done[i] += 1
            if change := _difference(traces[i].positions[done[i]], _look(game, matches[i])):
                where = traces[i].at(done[i])
                raise Broken(f"{where}: played again beside other matches, it went differently: {change}")
    finally:
        random.setstate(saved)
    return f"{len(traces)} matches replayed in a mixed order"


def _pure(game: Game, traces: list[Trace]) -> str:
    """A match that nobody looked at ends like one that everybody did; looking twice shows the same."""
    for trace in traces:
        match = _replay(game, trace, len(trace.moves))
        for _ in range(2):
            if change := _difference(trace.positions[-1], _look(game, match)):
                raise Broken(f"{trace.at(len(trace.moves))}: observe changes the match: {change}")
    return f"{len(traces)} matches replayed unobserved"


def _append_only(game: Game, traces: list[Trace]) -> str:
    for trace in traces:
        for number, (now, after) in enumerate(zip(trace.positions, trace.positions[1:], strict=False)):
            for seat, (old, new) in enumerate(zip(now.views, after.views, strict=True)):
                if new.events[: len(old.events)] != old.events:
                    raise Broken(f"{trace.at(number + 1)}: seat {seat}'s earlier events changed")
                if new.rules != trace.positions[0].views[seat].rules:
                    raise Broken(f"{trace.at(number + 1)}: seat {seat}'s rules changed")
    return "events only grow and rules stay"


def _payoff(game: Game, traces: list[Trace]) -> str:
    seats = range(len(game.roles))
    paid = [(f"{t.at(len(t.moves))}: returns", t.positions[-1].returns) for t in traces]
    paid += [(f"forfeit of seat {seat}", forfeit_returns(game, seat, "zero_sum")) for seat in seats]
    for where, returns in paid:
        if game.payoff is Payoff.ZERO_SUM and abs(sum(returns)) > TOLERANCE:
            raise Broken(f"{where} {returns} sum to {sum(returns)}, not 0")
        if game.payoff is Payoff.COMMON and max(returns) - min(returns) > TOLERANCE:
            raise Broken(f"{where} {returns} differ, though all seats are paid alike")
    return f"{len(paid)} returns are {game.payoff.value}, forfeits included"


def _bounded(game: Game, traces: list[Trace]) -> str:
    worst = math.inf
    for trace in traces:
        lowest = min(trace.positions[-1].returns)
        if lowest < game.min_return - TOLERANCE:
            raise Broken(
                f"{trace.at(len(trace.moves))}: return {lowest} is below min_return {game.min_return}"
            )
        worst = min(worst, lowest)
    return f"the worst return was {worst}, min_return is {game.min_return}"


def _one_spelling(game: Game, traces: list[Trace]) -> str:
    count = 0
    for trace in traces:
        for number, joint in enumerate(trace.moves):
            for seat, played in joint.items():
                texts = trace.positions[number].views[seat].legal or (played,)
                for text in texts:
                    plain = _free(game) or (text.isascii() and text.isprintable())
                    if not (text and plain and text == text.strip()):
                        raise Broken(f"{trace.at(number)}: {text!r} is not stripped, printable ASCII")
                if len({text.casefold() for text in texts}) < len(texts):
                    raise Broken(f"{trace.at(number)}: two legal actions are spelt alike: {texts}")
                count += len(texts)
    return f"{count} action texts are stripped{'' if _free(game) else ' ASCII'} and distinct"


def _legal_accepted(game: Game, traces: list[Trace]) -> str:
    count = 0
    for trace in traces:
        rng = Random(trace.seed)
        for number in _some(trace):
            for seat, joint in _variants(game, trace, number, rng):
                try:
                    _replay(game, trace, number).play(joint)
                except IllegalAction as e:
                    raise Broken(
                        f"{trace.at(number)}: seat {seat}'s legal {joint[seat]!r} is refused: {e}"
                    ) from e
                count += 1
    return f"{count} legal actions accepted"


def _variants(game: Game, trace: Trace, number: int, rng: Random) -> list[tuple[int, dict[int, str]]]:
    """Joint moves at a position in which one seat plays some other legal action."""
    variants = []
    for seat in trace.moves[number]:
        legal = trace.positions[number].views[seat].legal
        if legal is None:
            match = _replay(game, trace, number)
            texts = [match.sample(seat, rng) for _ in range(TEXTS)]
        else:
            texts = rng.sample(legal, min(TEXTS, len(legal)))
        variants += [(seat, {**trace.moves[number], seat: text}) for text in texts]
    return variants


def _illegal_refused(game: Game, traces: list[Trace]) -> str:
    count = 0
    for trace in traces:
        for number in _some(trace):
            match = _replay(game, trace, number)
            before = trace.positions[number]
            for joint in _hostile(trace.moves[number], before, game):
                try:
                    match.play(joint)
                except IllegalAction:
                    count += 1
                except Exception as e:
                    said = f"raised {type(e).__name__} instead of IllegalAction"
                    raise Broken(f"{trace.at(number)}: {_short(joint)} {said}") from e
                else:
                    raise Broken(f"{trace.at(number)}: the illegal {_short(joint)} was accepted")
                if change := _difference(before, _look(game, match)):
                    raise Broken(
                        f"{trace.at(number)}: the refused {_short(joint)} changed the match: {change}"
                    )
            for joint in trace.moves[number:]:
                _move(match, joint)
            if change := _difference(trace.positions[-1], _look(game, match)):
                raise Broken(f"{trace.at(number)}: refused actions changed how the match went on: {change}")
    return f"{count} illegal actions refused without a trace"


def _hostile(joint: Mapping[int, str], now: Position, game: Game) -> list[dict[int, str]]:
    """Joint moves that must be refused, each wrong in one place only."""
    wrong: list[dict[int, str]] = []
    for seat, text in joint.items():
        legal = now.views[seat].legal
        texts = ["", " ", f" {text}", f"{text} ", f"{text}\n", f"{text}\0", "x" * 100_000]
        if not _free(game):
            texts += [f"{text}\u200b", _shift(text, 0xFEE0, "!~"), _shift(text, 0x0660 - ord("0"), "09")]
        if legal is not None:  # free text may well contain these
            texts += [text.upper(), text.title(), f"{text}.", f"{text} {text}", f"[{text}]"]
            texts += [rf"\boxed{{{text}}}", f"0{text}", "no such move"]
        fine = (text,) if legal is None else legal
        wrong += [{**joint, seat: bad} for bad in texts if bad not in fine]
    idle = [seat for seat in range(len(game.roles)) if seat not in joint]
    wrong += [{**joint, seat: next(iter(joint.values()))} for seat in idle]
    return wrong


def _shift(text: str, by: int, span: str) -> str:
    """The characters between span[0] and span[1] moved to another block of Unicode."""
    return "".join(chr(ord(c) + by) if span[0] <= c <= span[1] else c for c in text)


def _short(joint: Mapping[int, str]) -> dict[int, str]:
    return {seat: text if len(text) <= 60 else f"{text[:60]}..." for seat, text in joint.items()}


def _private(game: Game, traces: list[Trace]) -> str:
    """What a seat may not know can change without a change in what it sees."""
    if len(game.roles) == 1:
        return "one seat: nobody to hide anything from"
    compared = told_apart = 0
    for trace in traces:
        match, rng = game.start(trace.seed), Random(trace.seed)
        if not isinstance(match, HasTwin):
            raise NotChecked("the match has no twin(seat, rng): see ludus.games.check.HasTwin")
        for number, now in enumerate(trace.positions[:-1]):
            for seat, view in enumerate(now.views):
                twin = match.twin(seat, rng)
                if twin is None:
                    continue
                other = _look(game, twin)
                if other.views[seat] != view or other.to_act != now.to_act:
                    raise Broken(
                        f"{trace.at(number)}: seat {seat} can see what it may not know: "
                        f"{view} against {other.views[seat]}"
                    )
                compared += 1
                told_apart += other.views != now.views
            _move(match, trace.moves[number])
    if compared and not told_apart:
        raise Broken("twin() changed nothing that any seat can see, so nothing was tested")
    return f"{compared} twins compared" if compared else "twin() says that nothing is hidden"


def _keyed(game: Game, traces: list[Trace]) -> str:
    """One key, one text; one text, one key. For OpenSpiel games `observe_state` must read the same."""
    seen = [
        (trace.at(number), seat, now.views[seat])
        for trace in traces
        for number, now in enumerate(trace.positions)
        for seat in now.to_act
    ]
    if isinstance(game, HasSpiel):
        seen += [item for trace in traces for item in _walk(game, trace.seed)]
    seen = [item for item in seen if item[2].key is not None]
    text_of: dict[tuple[int, str | None], tuple[str, object]] = {}
    key_of: dict[tuple[int, str, object], str | None] = {}
    for where, seat, view in seen:
        text = (view.state, view.legal)
        if text_of.setdefault((seat, view.key), text) != text:
            raise Broken(
                f"{where}: seat {seat} reads another text than before under key {view.key!r}: {text}"
            )
        if key_of.setdefault((seat, *text), view.key) != view.key:
            raise Broken(f"{where}: seat {seat} reads the same text under another key {view.key!r}: {text}")
    return f"{len(text_of)} information sets, each with a text of its own" if seen else "the game names none"


def _walk(game: HasSpiel, seed: int) -> list[tuple[str, int, Observation]]:
    """Observations along a random play of the OpenSpiel game itself."""
    rng = Random(seed)
    state = game.spiel.new_initial_state()
    views = []
    while not state.is_terminal():
        if state.is_chance_node():
            outcomes, weights = zip(*state.chance_outcomes(), strict=True)
            state.apply_action(rng.choices(outcomes, weights)[0])
            continue
        seat = state.current_player()
        view = game.observe_state(state, seat)
        where = f"OpenSpiel history {state.history()}"
        texts = tuple(game.action_text(state, action) for action in state.legal_actions())
        if view.legal is not None and sorted(texts) != sorted(view.legal):
            raise Broken(f"{where}: observe_state lists {view.legal}, action_text gives {texts}")
        views.append((where, seat, view))
        state.apply_action(rng.choice(state.legal_actions()))
    return views


RULES: dict[str, Callable[[Game, list[Trace]], str]] = {
    "ends within max_turns": _ends,
    "same seed, same match, whatever runs beside it": _deterministic,
    "observe changes nothing": _pure,
    "events only grow": _append_only,
    "returns fit the payoff, forfeits included": _payoff,
    "min_return is a bound": _bounded,
    "one spelling per action": _one_spelling,
    "legal actions are accepted": _legal_accepted,
    "illegal actions change nothing": _illegal_refused,
    "secrets stay secret": _private,
    "information sets and texts match": _keyed,
}
