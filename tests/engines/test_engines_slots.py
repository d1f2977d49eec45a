"""The row book-keeping against what it promises, over random arrivals and departures."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from ludus.engines.slots import Slots


@dataclass(eq=False)
class Guest:
    kin: str
    name: int
    row: int = -1


def test_arrivals_fill_the_holes_and_nobody_else_moves():
    slots: Slots[Guest] = Slots(8)
    guests = [Guest("a", i) for i in range(4)]
    assert slots.arrange(guests) == []
    slots.free(guests[1])
    late = Guest("a", 4)
    assert slots.arrange([late]) == []
    assert late.row == 1
    assert slots.segments == [("a", 0, 4)]


def test_a_hole_without_arrivals_is_filled_from_the_end():
    slots: Slots[Guest] = Slots(8)
    guests = [Guest("a", i) for i in range(4)]
    slots.arrange(guests)
    slots.free(guests[0])
    assert slots.arrange() == [(3, 0)]
    assert [g.name for g in slots.rows if g] == [3, 1, 2]


def test_policies_stay_together():
    slots: Slots[Guest] = Slots(8)
    slots.arrange([Guest("a", 0), Guest("b", 1), Guest("a", 2)])
    assert slots.segments == [("a", 0, 2), ("b", 2, 3)]
    assert slots.arrange([Guest("a", 3)]) == [(2, 3)]
    assert slots.segments == [("a", 0, 3), ("b", 3, 4)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_contents_follow_their_guests(data: st.DataObject):
    slots: Slots[Guest] = Slots(10)
    memory: list[int | None] = [None] * 10  # what the KV rows hold: the guest's name
    count = 0
    for _ in range(data.draw(st.integers(1, 12))):
        for guest in [g for g in slots.rows if g is not None]:
            if data.draw(st.booleans()):
                slots.free(guest)
        room = slots.size - slots.live
        arrivals = [
            Guest(data.draw(st.sampled_from("abc")), count + i)
            for i in range(data.draw(st.integers(0, room)))
        ]
        count += len(arrivals)
        moves = slots.arrange(arrivals)
        assert len({old for old, _ in moves}) == len({new for _, new in moves}) == len(moves)
        before = list(memory)
        for old, new in moves:
            memory[new] = before[old]
        for guest in arrivals:
            memory[guest.row] = guest.name
        assert slots.holes == 0
        assert slots.live == len(slots.rows) <= slots.size
        for row, guest in enumerate(slots.rows):
            assert guest is not None
            assert guest.row == row
            assert memory[row] == guest.name
        flat = [kin for kin, first, end in slots.segments for _ in range(first, end)]
        assert flat == [guest.kin for guest in slots.rows if guest]
        assert len({kin for kin, _, _ in slots.segments}) == len(slots.segments)
