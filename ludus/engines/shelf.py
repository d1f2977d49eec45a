"""What a dialogue's last reply left in the cache, kept aside for its next turn.

A later prompt of a dialogue begins with the earlier prompt and reply, token for token, so their keys and
values need not be computed again. They are copied out of the row when a reply ends, for another sequence
takes the row, and into whichever row the next turn gets; that costs next to nothing beside computing them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ludus.engines.weights import Weights
from ludus.types import Dialogue


@dataclass(frozen=True, slots=True)
class Kept:
    """Keys and values [2 * layers, K, S, D] of `tokens` [S] by `weights`."""

    policy: str
    weights: Weights
    tokens: list[int]
    caches: Tensor


class Shelf:
    """Dialogues that go on, `limit` tokens of them at most: where it is full, newcomers find no room.

    They stay until they end. (To make room by letting the oldest go would be the worst choice: dialogues come
    back in turn, so the oldest is the next.) A match that is over leaves nothing, so that a resumed run finds
    what an undisturbed one does.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.tokens = 0  # here now
        self._kept: dict[Dialogue, Kept] = {}

    def fits(self, dialogue: Dialogue, tokens: int) -> bool:
        """Whether there is room for so many tokens of a dialogue, in place of what it has here."""
        held = self._kept.get(dialogue)
        return self.tokens - (0 if held is None else len(held.tokens)) + tokens <= self.limit

    def put(self, dialogue: Dialogue, kept: Kept) -> None:
        """Keep what a dialogue left, in place of what it left before, until it ends."""
        self.drop(dialogue)
        assert self.fits(dialogue, len(kept.tokens))
        self._kept[dialogue] = kept
        self.tokens += len(kept.tokens)
        dialogue.let_go = partial(self.drop, dialogue)

    def find(self, dialogue: Dialogue, weights: Weights, prompt: Sequence[int]) -> Kept | None:
        """What `weights` need not compute again of `prompt`, or None. It stays here, for it takes memory."""
        kept = self._kept.get(dialogue)
        if kept is None or kept.weights is not weights or len(kept.tokens) >= len(prompt):
            return None
        return kept if list(prompt[: len(kept.tokens)]) == kept.tokens else None

    def drop(self, dialogue: Dialogue) -> None:
        """Forget a dialogue, if it is here."""
        kept = self._kept.pop(dialogue, None)
        if kept is not None:
            self.tokens -= len(kept.tokens)

    def forget(self, policy: str) -> None:
        """The weights of `policy` are not what they were."""
        for dialogue in [d for d, kept in self._kept.items() if kept.policy == policy]:
            self.drop(dialogue)

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self.tokens = 0
