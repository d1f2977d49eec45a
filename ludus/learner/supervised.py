"""Supervised rows beside self-play: what they are, and which of them go into which optimizer step.

The draw is a function of (seed, update, epoch, minibatch) and nothing else, so that a resumed run draws the
same rows without anything in the checkpoint but the learner's counters.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ludus.seeding import derive
from ludus.types import Sample


@dataclass(frozen=True, slots=True)
class Row:
    """One text to imitate. `tokens` are ids (array "i"); `trained` the half-open stretches that are learnt,
    in order: the replies, not what they answer.
    """

    tokens: array[int]
    trained: tuple[tuple[int, int], ...]

    def sample(self, source: str = "") -> Sample:
        """The row as the learner takes it, one turn per stretch."""
        n = len(self.tokens)
        sample = Sample(
            self.tokens.tolist(), [False] * n, [0.0] * n, [0.0] * n, [-1] * n, game=source, role=""
        )
        for number, (start, end) in enumerate(self.trained):
            sample.mask[start:end] = [True] * (end - start)
            sample.advantages[start:end] = [1.0] * (end - start)
            sample.turn_ids[start:end] = [number] * (end - start)
        return sample


@dataclass(frozen=True, slots=True)
class Source:
    """The rows of one file. `weight` is its share of the rows drawn, relative to the other sources."""

    name: str
    weight: float
    rows: Sequence[Row]


class Supervised:
    """Rows for every optimizer step: `batch` of them, whose mean cross-entropy counts `weight` times."""

    def __init__(self, sources: Sequence[Source], *, weight: float, batch: int) -> None:
        assert sources, "nothing to draw from"
        assert all(source.rows for source in sources), "a source without rows cannot be drawn from"
        self.sources = tuple(sources)
        self.weight = weight
        self.batch = batch

    def draw(self, seed: int, update: int, epoch: int, minibatch: int) -> list[Sample]:
        """The rows of one optimizer step: a source by its weight, then one of its rows, all alike likely.

        No row is there twice, as long as its source has others that are not.
        """
        rng = random.Random(derive(seed, "supervised", update, epoch, minibatch))
        names = range(len(self.sources))
        drawn = rng.choices(names, [source.weight for source in self.sources], k=self.batch)
        samples = []
        for i in names:
            source, count = self.sources[i], drawn.count(i)
            whole, rest = divmod(count, len(source.rows))
            picked = [*(k for _ in range(whole) for k in range(len(source.rows)))]
            picked += rng.sample(range(len(source.rows)), rest)
            samples += [source.rows[k].sample(source.name) for k in picked]
        return samples

    @cached_property
    def digest(self) -> str:
        """The same digest draws the same batches."""
        return digest(self.sources)


def digest(sources: Sequence[Source]) -> str:
    """A hash of all rows, their order, and the sources' weights."""
    found = hashlib.blake2b(digest_size=16)
    for source in sources:
        found.update(repr((source.name, source.weight, len(source.rows))).encode())
        for row in source.rows:
            found.update(row.tokens.tobytes())
            found.update(repr(row.trained).encode())
    return found.hexdigest()
