"""Helpers that speak to an engine."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import torch
from families import EOS, VOCAB
from transformers import PreTrainedModel

from ludus.engines.base import Engine
from ludus.types import Completion, Request, Sampling, StopRule


def make_requests(count: int, seed: int = 0, longest: int = 70, **sampling: Any) -> list[Request]:
    """Requests of all kinds of lengths that stop at EOS or at random limits."""
    rng = random.Random(seed)
    return [
        Request(
            policy="self",
            prompt_ids=[rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))],
            seed=rng.getrandbits(63),
            sampling=Sampling(max_tokens=rng.randint(1, 24), **sampling),
            stop=StopRule(frozenset({EOS})),
        )
        for _ in range(count)
    ]


def run(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    async def go() -> list[Completion]:
        return list(await asyncio.gather(*map(engine.generate, requests)))

    return asyncio.run(go())


def reference_logprobs(model: PreTrainedModel, prompt: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
    """Full log-probabilities [len(ids), V] by one plain Hugging Face forward pass."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0].float()
    return logits[len(prompt) - 1 : -1].log_softmax(-1)
