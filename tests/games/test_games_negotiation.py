"""Simple Negotiation: offers, acceptance, payoffs, privacy."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ludus.games.base import IllegalAction
from ludus.games.negotiation import (
    MAX_HOLDING,
    MAX_TEXT,
    MAX_VALUE,
    NAMES,
    Deal,
    NegotiationGame,
    NegotiationMatch,
    deal,
)

GAME = NegotiationGame()
DEAL = Deal(holdings=((3, 2), (1, 5)), values=((4, 7), (6, 2)))  # wood, gold


def match(**args: Any) -> NegotiationMatch:
    return NegotiationMatch(NegotiationGame(**args), DEAL)


def play(m: NegotiationMatch, *texts: str) -> NegotiationMatch:
    for text in texts:
        (seat,) = m.to_act()
        m.play({seat: text})
    return m


def test_texts_by_hand() -> None:
    m = play(match(), "offer 2 wood for 3 gold")
    assert m.observe(1).state == (
        "You are player 1. Moves left: 7. Your gain: +0.\n"
        "You have 1 wood worth 6, 5 gold worth 2.\n"
        "They have 3 wood, 2 gold.\n"
        "Pending: they give 2 wood, get 3 gold. Worth to you: +6."  # 2 * 6 - 3 * 2
    )
    assert m.observe(0).state.endswith("Pending: you give 2 wood, get 3 gold. Worth to you: +13.")
    play(m, "accept")
    assert m.observe(0).state == (
        "You are player 0. Moves left: 6. Your gain: +13.\n"  # 3 * 7 - 2 * 4
        "You have 1 wood worth 4, 5 gold worth 7.\n"
        "They have 3 wood, 2 gold.\n"
        "Pending: none."
    )
    assert m.observe(1).events == (
        "You have 1 wood worth 6, 5 gold worth 2.\nThey have 3 wood, 2 gold.",
        "They: offer 2 wood for 3 gold",
        "You: accept",
    )


def test_payoffs_by_hand() -> None:
    trade = ("offer 2 wood for 3 gold", "accept")  # gains +13 and +6
    assert play(match(), *trade).returns() == (1.0, -1.0)
    share = 7 / 2 / (2 * 5 * 9)
    assert play(match(payout="difference"), *trade).returns() == (share, -share)
    assert match().returns() == (0.0, 0.0)


def test_the_greatest_difference_is_one() -> None:
    extreme = Deal(holdings=((5, 5), (5, 5)), values=((9, 9), (9, 9)))
    m = NegotiationMatch(NegotiationGame(payout="difference", turns=4), extreme)
    play(m, "offer 1 wood for 5 gold", "accept", "say ok", "offer 5 wood for 1 gold")
    assert max(m.returns()) <= 1.0
    assert m.returns() == (4 * 9 / 90, -4 * 9 / 90)


def test_talk_uses_up_the_turn_and_keeps_the_offer() -> None:
    m = play(match(), "offer 1 wood for 1 gold", "say two gold, not one")
    assert m.to_act() == (0,)
    assert m.observe(0).state.endswith(
        'Pending: you give 1 wood, get 1 gold. Worth to you: +3.\nThey said: "two gold, not one"'
    )
    for own in ("accept", "deny"):
        with pytest.raises(IllegalAction, match="no offer to you"):
            m.play({0: own})
    play(m, "say no", "accept")
    assert "You have 2 wood worth 4, 3 gold worth 7." in m.observe(0).state


def test_a_counter_offer_replaces_the_pending_one() -> None:
    m = play(match(), "offer 2 wood for 3 gold", "offer 1 gold for 1 wood")
    assert "Pending: they give 1 gold, get 1 wood. Worth to you: +3." in m.observe(0).state
    play(m, "accept")
    assert "You have 2 wood worth 4, 3 gold worth 7." in m.observe(0).state


def test_denying_drops_the_offer() -> None:
    m = play(match(), "offer 2 wood for 3 gold", "deny")
    assert "Pending: none." in m.observe(0).state
    with pytest.raises(IllegalAction, match="no offer to you"):
        m.play({0: "deny"})


def test_any_amount_may_be_asked_for_but_not_paid() -> None:
    m = play(match(), "offer 1 wood for 999999999999 gold")
    assert m.observe(1).state.endswith(" You cannot pay it.")
    with pytest.raises(IllegalAction, match="do not have"):
        m.play({1: "accept"})
    assert m.to_act() == (1,)
    play(m, "deny")
    longest = f"offer 1 wood for {'9' * (MAX_TEXT - len('offer 1 wood for  gold'))} gold"
    play(m, longest)
    with pytest.raises(IllegalAction, match="too long"):
        m.play({1: longest.replace("9", "99", 1)})


@pytest.mark.parametrize(
    "text",
    [
        "offer 0 wood for 1 gold",
        "offer 01 wood for 1 gold",
        "offer +1 wood for 1 gold",
        "offer 1.0 wood for 1 gold",
        "offer -1 wood for 1 gold",
        "offer １ wood for 1 gold",
        "offer ١ wood for 1 gold",
        "offer 4 wood for 1 gold",  # owns 3
        "offer 1 wood for 1 wood",
        "offer 1 wood 1 gold for 1 gold",
        "offer 1 wood 1 wood for 1 gold",
        "offer 1 silver for 1 gold",
        "offer 1 wood for 1",
        "offer 1 wood for ",
        "offer  1 wood for 1 gold",
        "offer 1 wood  for 1 gold",
        "Offer 1 wood for 1 gold",
        "offer 1 wood for 1 gold.",
        "offer wood for gold",
        "offer 1 wood",
        "accept",
        "deny",
        "Deny",
        "say",
        "say ",
        "say  hello",
        "say hello ",
        "say caf\u00e9",
        "say two\nlines",
        'say "quoted"',
        "hello",
        "",
    ],
)
def test_illegal_texts(text: str) -> None:
    m = match()
    before = (m.observe(0), m.observe(1))
    with pytest.raises(IllegalAction) as caught:
        m.play({0: text})
    assert caught.value.seat == 0
    assert caught.value.reason.isascii()
    assert (m.observe(0), m.observe(1)) == before


def test_five_resources_join_in_one_order() -> None:
    game = NegotiationGame(resources=5, turns=10)
    m = NegotiationMatch(game, Deal(((2, 2, 2, 2, 2), (2, 2, 2, 2, 2)), ((1, 2, 3, 4, 5), (5, 4, 3, 2, 1))))
    m.play({0: "offer 1 wheat 2 brick for 1 wood 2 ore"})
    assert "they give 1 wheat, 2 brick, get 1 wood, 2 ore. Worth to you: +3." in m.observe(1).state
    m.play({1: "accept"})
    assert "Your gain: +3." in m.observe(0).state  # 2 + 10 - 1 - 8
    for wrong in ("offer 1 wood 1 wheat for 1 ore", "offer 1 wheat for 1 ore 1 brick"):
        with pytest.raises(IllegalAction):
            m.play({0: wrong})


def test_deals_are_small_and_positive() -> None:
    for seed in range(100):
        for resources in (2, 5):
            d = deal(resources, Random(seed))
            assert {len(x) for x in (*d.holdings, *d.values)} == {resources}
            assert all(1 <= n <= MAX_HOLDING for h in d.holdings for n in h)
            assert all(1 <= n <= MAX_VALUE for v in d.values for n in v)


def test_sample_is_uniform_over_kinds_then_over_offers_that_can_be_accepted() -> None:
    m = play(match(), "offer 2 wood for 3 gold")
    rng = Random(0)
    drawn = [m.sample(1, rng) for _ in range(3000)]
    kinds = [text.split()[0] for text in drawn]
    for kind in ("offer", "accept", "deny"):
        assert kinds.count(kind) == pytest.approx(1000, abs=120)
    offers = {text for text in drawn if text.startswith("offer")}
    # seat 1 holds 1 wood, 5 gold; seat 0 holds 3 wood, 2 gold: 1 * 2 + 5 * 3 offers
    assert len(offers) == 17
    assert "offer 5 gold for 3 wood" in offers


def test_sample_without_goods_or_partners_goods() -> None:
    rich_and_poor = Deal(holdings=((3, 2), (0, 0)), values=((4, 7), (6, 2)))
    m = NegotiationMatch(GAME, rich_and_poor)
    assert m.sample(0, Random(0)).startswith("offer ")
    m.play({0: "say hi"})
    assert m.sample(1, Random(0)) == "say hello"
    m.play({1: "say hello"})


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    resources=st.sampled_from([2, 5]),
    payout=st.sampled_from(["sign", "difference"]),
    talk=st.lists(st.integers(0, 9), max_size=3),
)
def test_trade_conserves_goods_and_returns_sum_to_zero(
    seed: int, resources: Any, payout: Any, talk: list[int]
) -> None:
    game = NegotiationGame(resources=resources, turns=10, payout=payout)
    m, rng = game.start(seed), Random(seed)

    def goods(seat: int) -> dict[str, int]:
        words = m.observe(seat).state.splitlines()[2].removeprefix("They have ").rstrip(".").split(", ")
        return {item.split()[1]: int(item.split()[0]) for item in words}

    total = {name: goods(0)[name] + goods(1)[name] for name in NAMES[resources]}
    for turn in range(10):
        (seat,) = m.to_act()
        m.play({seat: "say well" if turn in talk else m.sample(seat, rng)})
        assert all(goods(s)[name] >= 0 for s in (0, 1) for name in total)
        assert {name: goods(0)[name] + goods(1)[name] for name in total} == total
        assert sum(m.returns()) == 0
        assert min(m.returns()) >= game.min_return
    assert m.to_act() == ()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), other=st.integers(0, 2**31))
def test_the_others_values_never_show(seed: int, other: int) -> None:
    """Two matches that differ only in seat 1's values look the same to seat 0 from deal to end."""
    d, values = deal(2, Random(seed)), deal(2, Random(other)).values
    pair = [NegotiationMatch(GAME, Deal(d.holdings, (d.values[0], v))) for v in (d.values[1], values[1])]
    rng = Random(seed)
    while pair[0].to_act():
        assert pair[0].observe(0) == pair[1].observe(0)
        (seat,) = pair[0].to_act()
        text = pair[0].sample(seat, rng)
        for m in pair:
            m.play({seat: text})
    assert pair[0].observe(0) == pair[1].observe(0)
    assert pair[1].to_act() == ()
