"""From rows to tensors: who shares an optimizer step, who shares a forward pass, and the padding."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ludus.seeding import derive
from ludus.types import Batch, Sample


def minibatches(count: int, parts: int, seed: int, step: int, epoch: int) -> list[list[int]]:
    """Split the rows 0..count-1 at random into `parts` of nearly equal size, for one optimizer step each.

    The split is a function of (seed, step, epoch) and nothing else, so a resumed run draws the same one.
    There are never more parts than rows.
    """
    order = list(range(count))
    parts = min(parts, count)
    if parts > 1:
        random.Random(derive(seed, "minibatches", step, epoch)).shuffle(order)
    return [order[count * i // parts : count * (i + 1) // parts] for i in range(parts)]


def passes(count: int, batch: int, epochs: int, seed: int) -> Iterator[list[int]]:
    """The rows 0..count-1 in `epochs` passes of shuffled batches, each batch for one optimizer step.

    Rows that fill no whole batch at the end of a pass are left out of that pass.
    """
    rng = random.Random(seed)
    order = list(range(count))
    for _ in range(epochs):
        rng.shuffle(order)
        for k in range(count // batch):
            yield order[k * batch : (k + 1) * batch]


def microbatches(lengths: Sequence[int], max_tokens: int, packed: bool = False) -> list[list[int]]:
    """Group row indices for one forward pass each, similar lengths together, longest first.

    Rows times the longest length stays within `max_tokens`, or of `packed` rows, which are not padded, the
    sum of their lengths; a row that is longer by itself goes alone. Longest first, so that a run out of
    memory shows in the first pass.
    """
    out: list[list[int]] = []
    total = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        total += lengths[i]
        if out and (total if packed else (len(out[-1]) + 1) * lengths[out[-1][0]]) <= max_tokens:
            out[-1].append(i)
        else:
            out.append([i])
            total = lengths[i]
    return out


def fill_rounds(micros: Sequence[list[int]], ranks: int) -> list[list[int]]:
    """The same rows in a multiple of `ranks` micro-batches, where there are rows enough, in the same order.

    Whoever has the most rows is split in two, until every rank has something to compute in every round.
    """
    out = list(micros)
    while len(out) % ranks:
        largest = max(range(len(out)), key=lambda i: len(out[i]))
        rows = out[largest]
        if len(rows) == 1:
            break
        half = len(rows) // 2
        out[largest : largest + 1] = [rows[:half], rows[half:]]
    return out


def collate(
    samples: Sequence[Sample], device: torch.device, proximal: Sequence[Tensor] | None = None
) -> Batch:
    """Right-padded tensors. `proximal` holds one float32 tensor [length] per row, where known."""
    lengths = [len(s.tokens) for s in samples]
    width = max(lengths)

    def ints(rows: list[list[int]]) -> Tensor:
        return torch.tensor([r + [0] * (width - len(r)) for r in rows], dtype=torch.int64).to(device)

    def floats(rows: list[list[float]]) -> Tensor:
        return torch.tensor([r + [0.0] * (width - len(r)) for r in rows], dtype=torch.float32).to(device)

    mask = torch.tensor([s.mask + [False] * (width - len(s.mask)) for s in samples], dtype=torch.bool)
    return Batch(
        tokens=ints([s.tokens for s in samples]),
        mask=mask.to(device),
        behaviour_logprobs=floats([s.logprobs for s in samples]),
        proximal_logprobs=None
        if proximal is None
        else torch.nn.utils.rnn.pad_sequence(list(proximal), batch_first=True).to(device),
        advantages=floats([s.advantages for s in samples]),
        turn_weights=floats([_turn_weights(s) for s in samples]),
        lengths=torch.tensor(lengths, dtype=torch.int64).to(device),
    )


def count_tokens(samples: Sequence[Sample]) -> int:
    """Trained tokens."""
    return sum(sum(s.mask) for s in samples)


def count_turns(samples: Sequence[Sample]) -> int:
    """Trained turns."""
    return sum(max(s.turn_ids, default=-1) + 1 for s in samples)


def _turn_weights(sample: Sample) -> list[float]:
    sizes = Counter(sample.turn_ids)
    return [1.0 / sizes[turn] if turn >= 0 else 0.0 for turn in sample.turn_ids]
