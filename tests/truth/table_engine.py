"""A language model that is a table: every prompt has a known law over whole replies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from random import Random

from ludus.types import Completion, Request, Stop

Law = list[tuple[tuple[int, ...], Stop, float]]  # (reply ids, why it stopped, probability)

KUHN_BETS = {  # OpenSpiel's information states -> (constant, multiple of alpha): probability of a bet
    "0": (0, 1),
    "1": (0, 0),
    "2": (0, 3),
    "0pb": (0, 0),
    "1pb": (1 / 3, 1),
    "2pb": (1, 0),
    "0p": (1 / 3, 0),
    "1p": (0, 0),
    "2p": (1, 0),
    "0b": (0, 0),
    "1b": (1 / 3, 0),
    "2b": (1, 0),
}


def kuhn_equilibrium(alpha: float) -> dict[str, dict[int, float]]:
    """The equilibria of Kuhn poker, one for every alpha in [0, 1/3] (Kuhn 1950)."""
    bets = {key: constant + factor * alpha for key, (constant, factor) in KUHN_BETS.items()}
    return {key: {0: 1 - bet, 1: bet} for key, bet in bets.items()}


class TableEngine:
    """Samples replies and scores continuations, both from the table alone."""

    def __init__(self, laws: Mapping[tuple[int, ...], Law]) -> None:
        self.laws = laws
        self.generated = 0
        self.scored = 0

    async def generate(self, request: Request) -> Completion:
        self.generated += 1
        law = self.laws[tuple(request.prompt_ids)]
        ids, stop, _ = Random(request.seed).choices(law, [p for _, _, p in law])[0]
        if len(ids) > request.sampling.max_tokens:
            ids, stop = ids[: request.sampling.max_tokens], Stop.LENGTH
        return Completion(list(ids), await self._logprobs(list(request.prompt_ids), ids), stop, version=0)

    async def score(
        self, policy: str, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        self.scored += len(prompts)
        pairs = zip(prompts, continuations, strict=True)
        return [await self._logprobs(list(prompt), tuple(ids)) for prompt, ids in pairs]

    async def close(self) -> None: ...

    def load(self, policy: str, weights: object, version: int) -> None:
        raise NotImplementedError("a table has no weights")

    async def _logprobs(self, prompt: list[int], ids: tuple[int, ...]) -> list[float]:
        base = next(key for key in self.laws if tuple(prompt[: len(key)]) == key)
        said = tuple(prompt[len(base) :])
        masses = [self._mass(base, said + ids[:k]) for k in range(len(ids) + 1)]
        return [math.log(b / a) if b > 0 else -math.inf for a, b in pairwise(masses)]

    def _mass(self, base: tuple[int, ...], prefix: tuple[int, ...]) -> float:
        return math.fsum(p for ids, _, p in self.laws[base] if ids[: len(prefix)] == prefix)
