"""Models that vLLM runs on the CPU, and the engine started for one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from engine_models import reference_logprobs
from families import SIZES
from transformers import PreTrainedModel

from ludus.config import EngineConfig
from ludus.engines.vllm_engine import VllmEngine
from ludus.types import Completion, Request

CONTEXT = 160
# vLLM's attention on the CPU wants heads of at least 32.
WIDE: dict[str, Any] = {**SIZES, "hidden_size": 64, "head_dim": 32}


def shaken(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """All weights random, the norms too, so that none can be forgotten."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if "norm" in name else 0.0))
    return model.eval()


def start(model: PreTrainedModel, directory: Path, rank: int = 0, **options: Any) -> VllmEngine:
    model.save_pretrained(directory)
    settled = {"kind": "vllm", "slots": 8, "context": CONTEXT, "threads": 1}
    vllm = {"eager": True, **options.pop("vllm", {})}
    return VllmEngine(directory, EngineConfig.model_validate({**settled, "vllm": vllm, **options}), rank)


def assert_exact(model: PreTrainedModel, request: Request, completion: Completion) -> None:
    """The log-probabilities are those of one plain forward pass."""
    exact = reference_logprobs(model, request.prompt_ids, completion.ids)
    wanted = exact.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(completion.logprobs), wanted, atol=1e-4, rtol=0)
