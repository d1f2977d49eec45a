"""What a dialogue's last reply left in the cache, kept aside for its next turn.

A later prompt of a dialogue begins with the earlier prompt and reply, token for token, so their keys and
values need not be computed again. They are copied out of the row when a reply ends, for another sequence
takes the row, and into whichever row the next turn gets; that costs next to nothing beside computing them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ludus.engines.weights import Weights


@dataclass(frozen=True, slots=True)
class Kept:
    """Keys and values [2 * layers, K, S, D] of `tokens` [S] by `weights`."""

    policy: str
    weights: Weights
    tokens: list[int]
    caches: Tensor


class Shelf:
    """The dialogues that were put here last, `limit` tokens of them at most.

    What is found depends on the calls of one dialogue and on what came after its last one, never on what
    lay here before: so a resumed run finds what an undisturbed one does.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.tokens = 0  # here now
        self._kept: dict[int, Kept] = {}  # by dialogue, the oldest first

    def put(self, dialogue: int, kept: Kept) -> None:
        """Keep what a dialogue left, in place of what it left before; the oldest others may have to go."""
        self._remove(dialogue)
        self._kept[dialogue] = kept
        self.tokens += len(kept.tokens)
        while self.tokens > self.limit:
            self._remove(next(iter(self._kept)))

    def take(self, dialogue: int, weights: Weights, prompt: Sequence[int]) -> Kept | None:
        """What `weights` need not compute again of `prompt`, or None. It lies here no longer."""
        kept = self._remove(dialogue)
        if kept is None or kept.weights is not weights or len(kept.tokens) >= len(prompt):
            return None
        return kept if list(prompt[: len(kept.tokens)]) == kept.tokens else None

    def forget(self, policy: str) -> None:
        """The weights of `policy` are not what they were."""
        for dialogue in [d for d, kept in self._kept.items() if kept.policy == policy]:
            self._remove(dialogue)

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self.tokens = 0

    def _remove(self, dialogue: int) -> Kept | None:
        kept = self._kept.pop(dialogue, None)
        if kept is not None:
            self.tokens -= len(kept.tokens)
        return kept
