"""A very small real model, and rows for it."""

from __future__ import annotations

import random

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from ludus.types import Sample

VOCABULARY = 23


def make_model(seed: int = 0, **changes: object) -> PreTrainedModel:
    settings: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "initializer_range": 0.4,  # large, so that the distributions differ from uniform
    }
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**{**settings, **changes})).eval()


def make_rows(count: int, seed: int = 0, logprob: float | None = None) -> list[Sample]:
    """Rows of unequal length, some of two turns, with random advantages."""
    rng = random.Random(seed)
    out = []
    for _ in range(count):
        row = Sample([], [], [], [], [], "g", "r")
        for turn in range(rng.choice([1, 1, 2])):
            advantage = rng.uniform(-1.0, 1.0)
            for trained, length in ((False, rng.randint(1, 9)), (True, rng.randint(1, 6))):
                row.tokens.extend(rng.randrange(VOCABULARY) for _ in range(length))
                row.mask.extend([trained] * length)
                row.logprobs.extend(
                    (rng.uniform(-4.0, -1.0) if logprob is None else logprob) if trained else 0.0
                    for _ in range(length)
                )
                row.advantages.extend([advantage if trained else 0.0] * length)
                row.turn_ids.extend([turn if trained else -1] * length)
        out.append(row)
    return out
