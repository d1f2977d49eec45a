"""Simple Negotiation: two seats trade resources whose worth to the other they cannot see.

After the game of that name in SPIRAL (arXiv 2506.24119) and TextArena, with smaller numbers and these rules:

- *The deal.* Each seat holds 1 to 5 units of every resource and values each unit at 1 to 9, drawn uniformly
  from the match's own generator. Holdings are public, so that both can tell whether a trade can be carried
  out; values are private and never shown to the other seat.
- *Moves*, one per turn, seats alternating: an offer, `accept`, `deny`, or `say TEXT`. An offer is legal if
  its owner holds what it gives, its amounts are positive and no resource stands on both sides; what it asks
  for may be any amount. A pending offer can be accepted by the other seat if that seat holds what is
  asked. Denying drops it, any new offer replaces it, talk leaves it.
- *The end* comes after `turns` moves in total.
- *The payoff.* A seat's gain is the change of its holdings' worth at its own values. `payout` "sign" pays +1
  to the larger gain and -1 to the other (0 when equal); "difference" pays half the difference of the gains
  over `resources * 5 * 9`. A seat gains or loses at most that much (it can neither lose more than it holds
  nor win more than the other does), so these returns lie in [-1, 1]. Both sum to zero.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Literal, NamedTuple

from ludus.games.base import IllegalAction, Observation, Payoff
from ludus.games.moves import quoted, signs, sole_action

NAMES = {2: ("wood", "gold"), 5: ("wheat", "wood", "sheep", "brick", "ore")}
MAX_HOLDING = 5  # units per resource that a seat is dealt, at least 1
MAX_VALUE = 9  # worth of a unit, at least 1
MAX_TEXT = 100  # characters of one action

_OFFER = re.compile(r"offer ([0-9a-z ]+) for ([0-9a-z ]+)")
_AMOUNT = re.compile(r"[1-9][0-9]*")
_TALK = re.compile(r"say ([!#-~](?:[ !#-~]*[!#-~])?)")  # printable ASCII without the double quote

Amounts = tuple[int, ...]  # units per resource, in the order of NAMES


class Offer(NamedTuple):
    """A pending offer: what `seat` gives and what it gets for it."""

    seat: int
    give: Amounts
    get: Amounts


class Deal(NamedTuple):
    """What chance decides, per seat."""

    holdings: tuple[Amounts, Amounts]
    values: tuple[Amounts, Amounts]


@dataclass(frozen=True, slots=True)
class NegotiationGame:
    """The rules above, for two or five resources."""

    resources: Literal[2, 5] = 2
    turns: int = 8
    payout: Literal["sign", "difference"] = "sign"

    @property
    def name(self) -> str:
        return "negotiation"

    @property
    def roles(self) -> tuple[str, ...]:
        return ("player_0", "player_1")

    @property
    def payoff(self) -> Payoff:
        return Payoff.ZERO_SUM

    @property
    def max_turns(self) -> int:
        return self.turns

    @property
    def min_return(self) -> float:
        return -1.0

    @property
    def names(self) -> tuple[str, ...]:
        return NAMES[self.resources]

    @property
    def rules(self) -> str:
        first, second, last = self.names[0], self.names[1], self.names[-1]
        joined = (
            f" Join resources in the order {' '.join(self.names)}: offer 1 {first} 2 {second} for 3 {last}."
            if self.resources > 2
            else ""
        )
        return (
            "Trading. A unit is worth a private amount to each player. Who gains more worth wins. "
            f"Moves: offer 2 {first} for 1 {last} (you give {first}, you get {last}); accept; deny; say TEXT."
            f"{joined}"
        )

    def start(self, seed: int) -> NegotiationMatch:
        """A new match, dealt from `seed`."""
        return NegotiationMatch(self, deal(self.resources, Random(seed)))

    def read_amounts(self, text: str) -> Amounts | None:
        """Units per resource out of "2 wood 1 ore"; None unless it is spelt the one way there is."""
        words = text.split(" ")
        amounts = [0] * self.resources
        last = -1
        if len(words) % 2:
            return None
        for amount, name in zip(words[::2], words[1::2], strict=True):
            index = self.names.index(name) if name in self.names else -1
            if index <= last or not _AMOUNT.fullmatch(amount):
                return None
            amounts[index] = int(amount)
            last = index
        return tuple(amounts)

    def write_amounts(self, amounts: Amounts, separator: str = " ") -> str:
        """ "2 wood 1 ore": the inverse of `read_amounts`; resources with 0 units are left out."""
        return separator.join(f"{n} {name}" for n, name in zip(amounts, self.names, strict=True) if n)


class NegotiationMatch:
    """One play of a NegotiationGame."""

    def __init__(self, game: NegotiationGame, dealt: Deal) -> None:
        self.game = game
        self._values = dealt.values
        self._dealt = dealt.holdings
        self._holdings = dealt.holdings
        self._pending: Offer | None = None
        self._moves: list[str] = []  # the actions so far; seat 0 made the even ones

    def to_act(self) -> tuple[int, ...]:
        return (len(self._moves) % 2,) if len(self._moves) < self.game.turns else ()

    def observe(self, seat: int) -> Observation:
        """`legal` is None: offers are too many to list. (() for the seat whose move it is not.)"""
        return Observation(
            rules=self.game.rules,
            events=(
                self._goods(seat, self._dealt),
                *(f"{'You' if i % 2 == seat else 'They'}: {text}" for i, text in enumerate(self._moves)),
            ),
            state=self._position(seat),
            legal=None if seat in self.to_act() else (),
        )

    def play(self, actions: Mapping[int, str]) -> None:
        seat, text = sole_action(self.to_act(), actions)
        if len(text) > MAX_TEXT:
            raise IllegalAction(seat, f"{len(text)} characters are too long; {MAX_TEXT} are allowed")
        if text == "accept":
            self._accept(seat)
        elif text == "deny":
            self._require_offer(seat)
            self._pending = None
        elif offer := _OFFER.fullmatch(text):
            self._pending = self._read_offer(seat, offer[1], offer[2])
        elif not _TALK.fullmatch(text):
            raise IllegalAction(seat, f"{quoted(text)} is no offer, accept, deny or say")
        self._moves.append(text)

    def returns(self) -> tuple[float, ...]:
        ahead = self._gain(0) - self._gain(1)
        if self.game.payout == "sign":
            return signs((ahead, -ahead))
        share = ahead / 2 / (self.game.resources * MAX_HOLDING * MAX_VALUE)
        return (share, -share)

    def sample(self, seat: int, rng: Random) -> str:
        """Uniform over the kinds (offer, accept, deny) that are legal now; no talk unless nothing else is.

        An offer is uniform over those that give some units of one resource for some of another and that the
        other seat could accept now. If the other owns nothing to ask for, it asks for 1 to 5 units.
        """
        if seat not in self.to_act():
            raise IllegalAction(seat, "not your turn")
        offers = self._simple_offers(seat)
        kinds = ["offer"] if offers else []
        if self._pending is not None and self._pending.seat != seat:
            kinds += ["accept"] if self._payable(self._pending) else []
            kinds += ["deny"]
        if not kinds:
            return "say hello"
        kind = rng.choice(kinds)
        return kind if kind != "offer" else rng.choice(offers)

    def twin(self, seat: int, rng: Random) -> NegotiationMatch:
        """This match with the other seat's values drawn anew."""
        redrawn = deal(self.game.resources, rng).values[1 - seat]
        values = (self._values[0], redrawn) if seat == 0 else (redrawn, self._values[1])
        twin = NegotiationMatch(self.game, Deal(self._dealt, values))
        twin._holdings, twin._pending, twin._moves = self._holdings, self._pending, list(self._moves)
        return twin

    def _position(self, seat: int) -> str:
        left = self.game.turns - len(self._moves)
        lines = [
            f"You are player {seat}. Moves left: {left}. Your gain: {self._gain(seat):+d}.",
            self._goods(seat, self._holdings),
            self._offered(seat),
        ]
        talk = [m for i, m in enumerate(self._moves) if i % 2 != seat and m.startswith("say ")]
        lines += [f'They said: "{talk[-1].removeprefix("say ")}"'] if talk else []
        return "\n".join(lines)

    def _goods(self, seat: int, holdings: tuple[Amounts, Amounts]) -> str:
        mine = zip(holdings[seat], self.game.names, self._values[seat], strict=True)
        theirs = zip(holdings[1 - seat], self.game.names, strict=True)
        return (
            f"You have {', '.join(f'{n} {name} worth {value}' for n, name, value in mine)}.\n"
            f"They have {', '.join(f'{n} {name}' for n, name in theirs)}."
        )

    def _offered(self, seat: int) -> str:
        offer = self._pending
        if offer is None:
            return "Pending: none."
        mine = offer.seat == seat
        change = [(g - p) * (-1 if mine else 1) for p, g in zip(offer.get, offer.give, strict=True)]
        worth = sum(n * value for n, value in zip(change, self._values[seat], strict=True))
        give, get = (self.game.write_amounts(side, ", ") for side in (offer.give, offer.get))
        who = "you" if mine else "they"
        lacking = "" if mine or self._payable(offer) else " You cannot pay it."
        return f"Pending: {who} give {give}, get {get}. Worth to you: {worth:+d}.{lacking}"

    def _gain(self, seat: int) -> int:
        pairs = zip(self._holdings[seat], self._dealt[seat], self._values[seat], strict=True)
        return sum((now - before) * value for now, before, value in pairs)

    def _read_offer(self, seat: int, given: str, wanted: str) -> Offer:
        give, get = self.game.read_amounts(given), self.game.read_amounts(wanted)
        if give is None or get is None:
            order = " ".join(self.game.names)
            raise IllegalAction(
                seat, f"an offer reads: offer 2 {self.game.names[0]} for 1 {self.game.names[-1]} ({order})"
            )
        if any(a and b for a, b in zip(give, get, strict=True)):
            raise IllegalAction(seat, "an offer cannot give and ask for the same resource")
        if any(a > b for a, b in zip(give, self._holdings[seat], strict=True)):
            raise IllegalAction(seat, "an offer cannot give more than you have")
        return Offer(seat, give, get)

    def _require_offer(self, seat: int) -> Offer:
        if self._pending is None or self._pending.seat == seat:
            raise IllegalAction(seat, "there is no offer to you")
        return self._pending

    def _payable(self, offer: Offer) -> bool:
        return all(a <= b for a, b in zip(offer.get, self._holdings[1 - offer.seat], strict=True))

    def _accept(self, seat: int) -> None:
        offer = self._require_offer(seat)
        if not self._payable(offer):
            raise IllegalAction(seat, "you do not have what the offer asks for")
        moved = [get - give for give, get in zip(offer.give, offer.get, strict=True)]
        giver = tuple(n + d for n, d in zip(self._holdings[offer.seat], moved, strict=True))
        taker = tuple(n - d for n, d in zip(self._holdings[seat], moved, strict=True))
        self._holdings = (taker, giver) if seat == 0 else (giver, taker)
        self._pending = None

    def _simple_offers(self, seat: int) -> list[str]:
        mine, theirs = self._holdings[seat], self._holdings[1 - seat]
        if not any(theirs[b] for a, n in enumerate(mine) if n for b in range(len(theirs)) if b != a):
            theirs = (MAX_HOLDING,) * self.game.resources
        names = self.game.names
        return [
            f"offer {x} {names[a]} for {y} {names[b]}"
            for a in range(len(names))
            for b in range(len(names))
            if a != b
            for x in range(1, mine[a] + 1)
            for y in range(1, theirs[b] + 1)
        ]


def deal(resources: int, rng: Random) -> Deal:
    """Holdings and values of both seats."""

    def draw(top: int) -> tuple[Amounts, Amounts]:
        mine, theirs = (tuple(rng.randint(1, top) for _ in range(resources)) for _ in range(2))
        return mine, theirs

    return Deal(holdings=draw(MAX_HOLDING), values=draw(MAX_VALUE))
