"""The engine protocol: who turns prompt tokens into sampled tokens.

An engine knows policies by id and holds weights for each; it knows no games. Callers await one request
at a time and the engine batches whatever waits, so no match ever waits for another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

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

    def load(self, policy: str, weights: Mapping[str, Tensor], version: int) -> None:
        """Replace (or add) the weights of `policy`; names as in the Hugging Face state dict.

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
