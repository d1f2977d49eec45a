"""The engine protocol: who turns prompt tokens into sampled tokens.

An engine knows policies by id and holds weights for each; it knows no games. Callers await one request
at a time and the engine batches whatever waits, so no match ever waits for another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from ludus.errors import UserError
from ludus.types import Completion, Request

if TYPE_CHECKING:
    from torch import Tensor


class EngineUnavailable(RuntimeError):
    """An engine gave up on a request after all its retries: the episode is masked, nobody is paid.

    `reason` is a short word to count by, such as "timeout" or "http_500"; `endpoint` says where.
    """

    def __init__(self, endpoint: str, reason: str) -> None:
        super().__init__(f"{endpoint}: {reason}")
        self.endpoint = endpoint
        self.reason = reason


class TooLong(UserError):
    """A prompt leaves no room in the engine's context for a reply."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """Weights that are those of the policy `base` but for a low-rank change: W + alpha / rank * B A.

    LoRA (Hu et al., arXiv 2106.09685). `tensors` holds A [rank, in] and B [out, rank] of every changed matrix
    by the names that peft gives them in its files:
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight".
    """

    base: str
    rank: int
    alpha: float
    tensors: Mapping[str, Tensor]


PolicyWeights: TypeAlias = "Mapping[str, Tensor] | Adapter"  # the former with Hugging Face's names


class Engine(Protocol):
    """Generate, score, and take new weights."""

    async def generate(self, request: Request) -> Completion:
        """Sample one completion. Raises TooLong for a prompt that cannot fit the context."""
        ...

    async def score(
        self, policy: str, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Log-probability (nats, temperature 1, no filters) of each continuation token after its prompt."""
        ...

    def load(self, policy: str, weights: PolicyWeights, version: int) -> None:
        """Replace (or add) the weights of `policy`: a Hugging Face state dict, or an adapter of a policy that
        the engine holds.

        At any time: a completion is sampled from its first token to its last by the version that it bears.
        """
        ...

    def unload(self, policy: str) -> None:
        """Forget the weights of `policy`."""
        ...

    def rest(self) -> None:
        """Make what room there is to make for the learner: nothing is asked before the next `load`."""
        ...

    async def close(self) -> None: ...
