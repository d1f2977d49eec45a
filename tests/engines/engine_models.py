"""Small random models of each family, and helpers that speak to an engine."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ludus.engines.torch_engine import TorchEngine
from ludus.types import Completion, Request, Sampling, StopRule

VOCAB = 48
EOS = 5
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}


def _gemma3(**changes: Any) -> Gemma3TextConfig:
    """Two kinds of layers, each with a rope of its own."""
    return Gemma3TextConfig(
        **{**SIZES, "num_key_value_heads": 1, "initializer_range": 0.2},
        head_dim=16,
        query_pre_attn_scalar=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10_000.0},
        },
        eos_token_id=EOS,
        **changes,
    )


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3-tied": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True)),
    "qwen3-biased": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, attention_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "llama3": lambda: LlamaForCausalLM(
        LlamaConfig(
            **{**SIZES, "num_key_value_heads": 4},
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        )
    ),
    "llama-biased": lambda: LlamaForCausalLM(
        LlamaConfig(**{**SIZES, "num_key_value_heads": 1}, attention_bias=True, mlp_bias=True)
    ),
    "qwen2-sliding": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=9, max_window_layers=1)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(_gemma3(sliding_window=20)),
    "gemma3-capped": lambda: Gemma3ForCausalLM(
        _gemma3(sliding_window=512, final_logit_softcapping=2.0, tie_word_embeddings=False)
    ),
}


def make_model(family: str = "qwen3-tied", seed: int = 0) -> PreTrainedModel:
    """A small model whose norms and biases are random too, so that none of them can be forgotten."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


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


def run(engine: TorchEngine, requests: Sequence[Request]) -> list[Completion]:
    async def go() -> list[Completion]:
        return list(await asyncio.gather(*map(engine.generate, requests)))

    return asyncio.run(go())


def reference_logprobs(model: PreTrainedModel, prompt: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
    """Full log-probabilities [len(ids), V] by one plain Hugging Face forward pass."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0].float()
    return logits[len(prompt) - 1 : -1].log_softmax(-1)
