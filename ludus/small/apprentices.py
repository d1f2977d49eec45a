"""Bad players who look before they leap: they write the transcripts that a small model is warmed up on.

An apprentice reads its position correctly and says what it sees in a short thought, then mostly plays at
random: only with probability `1 - noise` does it act on what it saw. A model warmed up on such transcripts
reads its cards and obeys the format, yet plays badly, so that everything above that is self-play's doing.
(Warmed up on moves that ignore the observation, a small model learns to ignore it too, and self-play does
not get it out of there.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from ludus.errors import UserError
from ludus.games.openspiel import SpielMatch
from ludus.games.red_team.game import ATTACKER, RedTeamMatch
from ludus.games.red_team.vocabulary import BY_NAME, Kind
from ludus.games.red_team.world import ELSEWHERE, Family, parse, plain, rewrite
from ludus.games.red_team.world import Ask as Asked
from ludus.games.red_team.worlds import full_answer
from ludus.players import Ask, Reply
from ludus.seeding import derive


@dataclass(frozen=True, slots=True)
class Glance:
    """What an apprentice sees: the thought it writes, and the moves that the sight suggests (maybe none)."""

    thought: str
    hints: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Apprentice:
    """A Player that thinks aloud: `Reply.text` is its thought, `Reply.action` its move."""

    look: Callable[[Ask], Glance]
    noise: float  # probability of a uniformly random move
    policy: str = "apprentice"
    trainable: bool = False

    async def answer(self, ask: Ask) -> Reply:
        rng = Random(ask.seed)
        glance = self.look(ask)
        if glance.hints and rng.random() >= self.noise:
            action = rng.choice(glance.hints)
        else:
            action = ask.match.sample(ask.seat, rng)
        return Reply(action=action, text=glance.thought)


def apprentice(game: str) -> Apprentice:
    """The apprentice for a game, by registry name. Raises UserError where there is none."""
    if game not in _LOOKS:
        raise UserError(
            f"no apprentice plays {game!r}; the small model can be warmed up on {', '.join(_LOOKS)}"
        )
    look, noise = _LOOKS[game]
    return Apprentice(look, noise)


def look_at_cards(ask: Ask) -> Glance:
    """Poker: name the own card, the public one and the other's last move; bet the highest card and a pair,
    bluff with the lowest, and give way to every bet without a good hand.

    A bad style, easily bluffed in its turn, in which both the cards and the move matter at each decision: a
    model that was never shown a player who heeds them takes long to find out that it could.
    """
    text = ask.observation.state
    card = re.search(r"Your card: (\w)", text)
    assert card is not None, "a card game's face names the card"
    assert ask.observation.legal, "a card game lists its moves"
    public = re.search(r"Public card: ([JQK])", text)
    rounds: list[str] = re.findall(r"(?:Moves|Round \d): ([a-z ]+)\.", text)
    last = rounds[1 if public else 0].split()[-1].replace("none", "nothing")
    pair = public is not None and public[1] == card[1]
    bold = pair or card[1] == "K" or (card[1] == "J" and last not in ("bet", "raise"))
    hand = f"{card[1]} with {public[1]}" if public else card[1]
    return Glance(f"I hold {hand} facing {last}.", (ask.observation.legal[-1 if bold else 0],))


def look_for_lines(ask: Ask) -> Glance:
    """Open board games: a move that wins at once, else moves after which the other cannot win at once."""
    assert isinstance(ask.match, SpielMatch)
    game, state, seat = ask.match.game, ask.match.spiel_state, ask.seat
    wins, holds = [], []
    for action in state.legal_actions():
        child = state.child(action)
        if child.is_terminal() and child.returns()[seat] > 0:
            wins.append(action)
        elif not _can_win(child, 1 - seat):
            holds.append(action)
    words = {a: game.action_text(state, a) for a in state.legal_actions()}
    if wins:
        hints = tuple(words[a] for a in wins)
        return Glance("Win " + " ".join(hints) + ".", hints)
    if len(holds) < len(words):
        hints = tuple(words[a] for a in holds)
        return Glance("Block " + " ".join(hints) + "." if hints else "Lost.", hints)
    return Glance("Quiet.", ())


def _can_win(state: Any, seat: int) -> bool:
    if state.is_terminal():
        return False
    return any(
        child.is_terminal() and child.returns()[seat] > 0
        for child in (state.child(a) for a in state.legal_actions())
    )


def look_at_goods(ask: Ask) -> Glance:
    """Negotiation: say what the pending offer is worth, or which resource is dearest, and trade for gain."""
    text = ask.observation.state
    offers = _gainful_offers(text)
    pending = re.search(r"Pending: they give .*Worth to you: ([+-]\d+)\.( You cannot pay it\.)?", text)
    if pending is None:
        values = {name: int(value) for _, name, value in _MINE.findall(text)}
        return Glance(f"I want {max(values, key=lambda name: values[name])}.", offers)
    worth, payable = int(pending[1]), pending[2] is None
    if worth > 0 and payable:
        return Glance(f"Good, {worth:+d}.", ("accept",))
    return Glance(f"Bad, {worth:+d}." if payable else "Too dear.", ("deny", *offers))


def _gainful_offers(text: str) -> tuple[str, ...]:
    """Offers of one resource for another that gain their owner something and can be paid."""
    mine = [(int(n), name, int(value)) for n, name, value in _MINE.findall(text)]
    line = next(line for line in text.splitlines() if line.startswith("They have"))
    theirs = {name: int(n) for n, name in re.findall(r"(\d+) (\w+)", line)}
    return tuple(
        f"offer {x} {give} for {y} {get}"
        for have, give, low in mine
        for _, get, high in mine
        if get != give
        for x in range(1, have + 1)
        for y in range(1, theirs[get] + 1)
        if y * high > x * low
    )


def look_at_requests(ask: Ask) -> Glance:
    """Red teaming: name what the seed or the request asks for, of a thing that is restricted or free.

    As attacker it leaves the seed as it is, or says it in other words; as defender it gives whatever is asked
    for, harm too. Both come from the part of the world that the game's `split` names.
    """
    match = ask.match
    assert isinstance(match, RedTeamMatch)
    if ask.seat == ATTACKER:
        seed, split = match.seed.ask, match.game.invented.split
        assert seed is not None, "every seed of the invented world asks for something"
        weak = rewrite(seed, Family.SYNONYM, split, Random(derive(ask.seed, "synonym")))
        return Glance(_named((seed,)), (plain(seed), weak))
    request = match.exchanges[-1].request
    asks = parse(request)
    return Glance(_named(asks), (full_answer(request),)) if asks else Glance("Nothing asked.", ELSEWHERE)


def _named(asks: Sequence[Asked]) -> str:
    """ "make vornak, restricted; keep tadif, free." """
    kinds = {True: "restricted", False: "free"}
    restricted = [BY_NAME[a.thing].kind is Kind.RESTRICTED for a in asks]
    told = (f"{a.act} {a.thing}, {kinds[r]}" for a, r in zip(asks, restricted, strict=True))
    return "; ".join(told) + "."


_MINE = re.compile(r"(\d+) (\w+) worth (\d+)")
_LOOKS: dict[str, tuple[Callable[[Ask], Glance], float]] = {
    "kuhn_poker": (look_at_cards, 0.5),
    "leduc_poker": (look_at_cards, 0.5),
    "tic_tac_toe": (look_for_lines, 0.8),
    "connect_four": (look_for_lines, 0.9),
    "breakthrough": (look_for_lines, 0.9),
    "negotiation": (look_at_goods, 0.75),
    "red_team": (look_at_requests, 0.2),
}
