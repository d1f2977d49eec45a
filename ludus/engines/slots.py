"""Which sequence lies in which row of the KV cache.

Rows 0 .. n-1 are in use, the rows that share weights lie together (one forward pass each), and a finished
sequence leaves a hole that the next arrival fills, so that caches are seldom copied.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Generic, Protocol, TypeVar


class Tenant(Protocol):
    """What lies in a row."""

    row: int

    @property
    def kin(self) -> Any: ...  # hashable; it lies together with those that have the same


T = TypeVar("T", bound=Tenant)


class Slots(Generic[T]):
    """At most `size` tenants in rows. Deterministic: the layout depends on the order of calls alone."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rows: list[T | None] = []
        self.segments: list[tuple[Any, int, int]] = []  # (kin, first row, past the last), in row order
        self.live = 0

    @property
    def holes(self) -> int:
        return len(self.rows) - self.live

    def free(self, tenant: T) -> None:
        """The tenant leaves; its row becomes a hole."""
        assert self.rows[tenant.row] is tenant
        self.rows[tenant.row] = None
        self.live -= 1

    def clear(self) -> None:
        self.rows, self.segments, self.live = [], [], 0

    def forget(self, kept: Collection[Any]) -> None:
        """Hold no kin that is not in `kept`: with nobody here, segments only say who lay where before."""
        if not self.live:
            self.segments = [segment for segment in self.segments if segment[0] in kept]

    def arrange(self, arrivals: Sequence[T] = ()) -> list[tuple[int, int]]:
        """Close all holes and seat the arrivals. Returns the moves (old row, new row) of those already here.

        All moves happen at once: a new row may be another's old one.
        """
        groups: dict[Any, tuple[list[T], list[T]]] = {kin: ([], []) for kin, _, _ in self.segments}
        for tenant in self.rows:
            if tenant is not None:
                groups[tenant.kin][0].append(tenant)
        for tenant in arrivals:
            groups.setdefault(tenant.kin, ([], []))[1].append(tenant)
        total = self.live + len(arrivals)
        assert total <= self.size
        rows: list[T | None] = [None] * total
        segments: list[tuple[Any, int, int]] = []
        moves: list[tuple[int, int]] = []
        start = 0
        for kin, (here, new) in groups.items():
            end = start + len(here) + len(new)
            movers = []
            for tenant in here:
                if start <= tenant.row < end:
                    rows[tenant.row] = tenant
                else:
                    movers.append(tenant)
            places = [row for row in range(start, end) if rows[row] is None]
            for place, tenant in zip(places, [*movers, *new], strict=True):
                rows[place] = tenant
            moves += [(mover.row, place) for mover, place in zip(movers, places, strict=False)]
            for place, tenant in zip(places, [*movers, *new], strict=True):
                tenant.row = place
            if end > start:
                segments.append((kin, start, end))
            start = end
        self.rows, self.segments, self.live = rows, segments, total
        return moves
