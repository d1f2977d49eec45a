"""The conformance suite passes every game of ours and catches each way of breaking the contract."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest

from ludus.games.base import IllegalAction, Match, Observation, Payoff
from ludus.games.check import RULES, Result, check
from ludus.games.openspiel import SpielGame
from ludus.games.registry import describe, make

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((row.name, {}) for row in describe() if "required" not in row.options.values()),
    ("breakthrough", {"rows": 4, "columns": 3}),
    ("kuhn_poker", {"payoff": "sign"}),
    ("kuhn_poker", {"rounds": 3}),
    ("kuhn_poker", {"rounds": 3, "payoff": "sign"}),
    ("leduc_poker", {"rounds": 2, "payoff": "sign"}),
    ("leduc_poker", {"suits": True}),
    ("liars_dice", {"dice": 2}),
    ("liars_dice", {"rounds": 3}),
    ("negotiation", {"resources": 5, "payoff": "difference"}),
]


@pytest.mark.parametrize(("name", "args"), VARIANTS, ids=str)
def test_every_game_passes(name: str, args: dict[str, Any]) -> None:
    results = check(make(name, **args), seeds=range(8))
    assert [r for r in results if not r.passed] == []
    assert [r.rule for r in results] == ["matches can be played", *RULES]


class Coins:
    """Both seats flip a hidden coin and in turn guess the other's. A right guess takes 1 from the other."""

    def __init__(self, game: CoinsGame, seed: int) -> None:
        self.game = game
        rng = Random(seed)
        self.coins = [rng.choice(("heads", "tails")) for _ in range(2)]
        self.guesses: list[str] = []

    def to_act(self) -> tuple[int, ...]:
        return (len(self.guesses),) if len(self.guesses) < 2 else ()

    def observe(self, seat: int) -> Observation:
        told = tuple(f"{'You' if i == seat else 'They'} guess {g}" for i, g in enumerate(self.guesses))
        state = f"You are player {seat}. Your coin: {self.coins[seat]}. {' '.join(told)}"
        key = f"{seat} {self.coins[seat]} {self.guesses}"
        legal = ("heads", "tails") if seat in self.to_act() else ()
        return Observation("Guess the other's coin.", told, state, legal, key)

    def play(self, actions: Mapping[int, str]) -> None:
        for seat, text in actions.items():
            if seat not in self.to_act() or text not in ("heads", "tails"):
                raise IllegalAction(seat, "no")
        self.guesses.append(actions[self.to_act()[0]])

    def returns(self) -> tuple[float, ...]:
        right = [guess == self.coins[1 - seat] for seat, guess in enumerate(self.guesses)]
        lead = float(sum(right[:1]) - sum(right[1:]))
        return (lead, -lead)

    def sample(self, seat: int, rng: Random) -> str:
        return rng.choice(("heads", "tails"))

    def twin(self, seat: int, rng: Random) -> Match | None:
        twin = type(self)(self.game, 0)
        twin.coins, twin.guesses = list(self.coins), list(self.guesses)
        twin.coins[1 - seat] = "heads" if self.coins[1 - seat] == "tails" else "tails"
        return twin


@dataclass(frozen=True)
class CoinsGame:
    match: type[Coins] = Coins
    payoff: Payoff = Payoff.ZERO_SUM
    max_turns: int = 2
    min_return: float = -1.0
    name: str = "coins"
    roles: tuple[str, ...] = ("player_0", "player_1")

    def start(self, seed: int) -> Match:
        return self.match(self, seed)


def broken(results: list[Result]) -> list[str]:
    return [r.rule for r in results if r.passed is False]


def test_a_native_game_passes() -> None:
    results = check(CoinsGame())
    assert all(r.passed for r in results), results


class LooksLeft(Coins):
    def observe(self, seat: int) -> Observation:
        seen = super().observe(seat)
        return Observation(seen.rules, seen.events, f"{seen.state} {self.coins[1]}", seen.legal, seen.key)


class LeaksInEvents(Coins):
    def observe(self, seat: int) -> Observation:
        seen = super().observe(seat)
        return Observation(seen.rules, (*self.coins, *seen.events), seen.state, seen.legal, seen.key)


class GlobalGenerator(Coins):
    def __init__(self, game: CoinsGame, seed: int) -> None:
        super().__init__(game, seed)
        self.coins = [random.choice(("heads", "tails")) for _ in range(2)]


class CountsLooks(Coins):
    looks = 0

    def observe(self, seat: int) -> Observation:
        self.looks += 1
        seen = super().observe(seat)
        return Observation(seen.rules, seen.events, f"{seen.state} {self.looks}", seen.legal, None)


class Forgets(Coins):
    def observe(self, seat: int) -> Observation:
        seen = super().observe(seat)
        return Observation(seen.rules, seen.events[-1:], seen.state, seen.legal, seen.key)


class PaysBoth(Coins):
    def returns(self) -> tuple[float, ...]:
        lead, _ = super().returns()
        return (lead, lead)


class Shouts(Coins):
    def play(self, actions: Mapping[int, str]) -> None:
        super().play({seat: text.lower() for seat, text in actions.items()})


class Strips(Coins):
    def play(self, actions: Mapping[int, str]) -> None:
        super().play({seat: text.strip() for seat, text in actions.items()})


class AnySeat(Coins):
    def play(self, actions: Mapping[int, str]) -> None:
        super().play({seat: text for seat, text in actions.items() if seat in self.to_act()})


class Punishes(Coins):
    def play(self, actions: Mapping[int, str]) -> None:
        try:
            super().play(actions)
        except IllegalAction:
            self.coins.reverse()
            raise


class Crashes(Coins):
    def play(self, actions: Mapping[int, str]) -> None:
        if "" in actions.values():
            raise KeyError("empty")
        super().play(actions)


class RefusesTails(Coins):
    def play(self, actions: Mapping[int, str]) -> None:
        if "tails" in actions.values():
            raise IllegalAction(0, "no tails")
        super().play(actions)

    def sample(self, seat: int, rng: Random) -> str:
        return "heads"


class TwoSpellings(Coins):
    def observe(self, seat: int) -> Observation:
        seen = super().observe(seat)
        legal = (*seen.legal, "Heads") if seen.legal else ()
        return Observation(seen.rules, seen.events, seen.state, legal, seen.key)

    def play(self, actions: Mapping[int, str]) -> None:
        super().play({s: "heads" if t == "Heads" else t for s, t in actions.items()})


class OneKey(Coins):
    def observe(self, seat: int) -> Observation:
        seen = super().observe(seat)
        return Observation(seen.rules, seen.events, seen.state, seen.legal, "same")


class OneText(Coins):
    def observe(self, seat: int) -> Observation:
        seen = super().observe(seat)
        return Observation(seen.rules, seen.events, "Guess.", seen.legal, seen.key)


class EmptyTwin(Coins):
    def twin(self, seat: int, rng: Random) -> Match | None:
        twin = type(self)(self.game, 0)
        twin.coins, twin.guesses = list(self.coins), list(self.guesses)
        return twin


@pytest.mark.parametrize(
    ("match", "rule"),
    [
        (LooksLeft, "secrets stay secret"),
        (LeaksInEvents, "secrets stay secret"),
        (EmptyTwin, "secrets stay secret"),
        (GlobalGenerator, "same seed, same match, whatever runs beside it"),
        (CountsLooks, "observe changes nothing"),
        (Forgets, "events only grow"),
        (PaysBoth, "returns fit the payoff, forfeits included"),
        (Shouts, "illegal actions change nothing"),
        (Strips, "illegal actions change nothing"),
        (AnySeat, "illegal actions change nothing"),
        (Punishes, "illegal actions change nothing"),
        (Crashes, "illegal actions change nothing"),
        (TwoSpellings, "one spelling per action"),
        (OneKey, "information sets and texts match"),
        (OneText, "information sets and texts match"),
    ],
)
def test_each_rule_catches_its_breach(match: type[Coins], rule: str) -> None:
    results = check(CoinsGame(match))
    assert rule in broken(results)
    evidence = next(r.evidence for r in results if r.rule == rule)
    assert evidence.startswith("seed ") or match is EmptyTwin  # which is no single match's fault


def test_bounds_that_lie() -> None:
    assert broken(check(CoinsGame(min_return=-0.5))) == ["min_return is a bound"]
    assert broken(check(CoinsGame(max_turns=1))) == ["ends within max_turns"]
    assert broken(check(CoinsGame(payoff=Payoff.COMMON))) == ["returns fit the payoff, forfeits included"]
    assert broken(check(CoinsGame(payoff=Payoff.GENERAL))) == []


def test_a_legal_action_that_is_refused() -> None:
    results = check(CoinsGame(RefusesTails))
    assert broken(results) == ["matches can be played"]
    assert "'tails'" in results[0].evidence
    assert {r.passed for r in results[1:]} == {None}
    assert len(results) == 1 + len(RULES)


class PickyInTheMiddle(Coins):
    """Lists three actions; the middle one, that neither end of the list tries, is refused."""

    def observe(self, seat: int) -> Observation:
        seen = super().observe(seat)
        legal = ("heads", "edge", "tails") if seen.legal else ()
        return Observation(seen.rules, seen.events, seen.state, legal, seen.key)


def test_a_listed_action_that_is_refused() -> None:
    results = check(CoinsGame(PickyInTheMiddle))
    assert broken(results) == ["legal actions are accepted"]


class NoTwin:
    """Coins without the hook."""

    def __init__(self, game: CoinsGame, seed: int) -> None:
        inner = Coins(game, seed)
        self.to_act, self.observe, self.play = inner.to_act, inner.observe, inner.play
        self.returns, self.sample = inner.returns, inner.sample


def test_privacy_without_a_hook_is_said_to_be_unchecked() -> None:
    results = check(CoinsGame(NoTwin))  # type: ignore[arg-type]
    assert [(r.rule, r.passed) for r in results if not r.passed] == [("secrets stay secret", None)]
    assert "HasTwin" in next(r.evidence for r in results if r.passed is None)


def test_the_global_generator_is_left_as_it_was() -> None:
    random.seed(5)
    before = random.getstate()
    check(CoinsGame())
    assert random.getstate() == before


@dataclass(frozen=True)
class OtherWords:
    """A game whose search reads other words than its matches."""

    inner: SpielGame

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def spiel(self) -> Any:
        return self.inner.spiel

    def action_text(self, state: Any, action: int) -> str:
        return self.inner.action_text(state, action)

    def observe_state(self, state: Any, seat: int) -> Observation:
        seen = self.inner.observe_state(state, seat)
        return Observation(seen.rules, seen.events, f"{seen.state} ", seen.legal, seen.key)


def test_a_search_that_reads_other_words_is_caught() -> None:
    inner = make("kuhn_poker")
    assert isinstance(inner, SpielGame)
    assert broken(check(OtherWords(inner))) == ["information sets and texts match"]
