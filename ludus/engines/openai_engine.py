"""Opponents behind an OpenAI-compatible chat endpoint: text in, text out, weights out of our reach.

A request is tried again, after a pause that doubles, when the server is busy, broken or silent, or answers
something that is no completion; then EngineUnavailable tells the rollout to mask the episode. No reply is
ever made up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

from ludus.config import EndpointConfig
from ludus.engines.base import EngineUnavailable, PolicyWeights
from ludus.errors import UserError
from ludus.remote import Endpoint, Failed, message_of, parsed, pause
from ludus.types import Completion, Request, Stop

if TYPE_CHECKING:
    import httpx

_STOPS = {"stop": Stop.EOS, "length": Stop.LENGTH}


@dataclass(slots=True)
class OpenAIEngine:
    """Chat completions from one remote model, whatever policy id the request names. Its version is 0."""

    remote: EndpointConfig
    _server: Endpoint = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Raises UserError for a missing API key."""
        self._server = Endpoint(self.remote)

    @property
    def endpoint(self) -> str:
        return self._server.url

    async def generate(self, request: Request) -> Completion:
        """One reply as `Completion.text`, without ids and log-probabilities, which no server gives exactly.

        Raises EngineUnavailable after the last attempt, at once where the server refuses for good, and
        UserError for a request without `messages`.
        """
        if not request.messages:
            raise UserError(f"{self.endpoint} speaks text, and the request carries no messages")
        jitter = Random(request.seed)
        attempt = 0
        while True:
            try:
                return _completion(await self._server.post(self._body(request)))
            except Failed as failure:
                wait = max(pause(self.remote, attempt, jitter), failure.wait or 0.0)
                last = attempt == self.remote.retries or not failure.retry
                if last or wait > self.remote.longest_wait:
                    error = EngineUnavailable(self.endpoint, failure.reason)
                    if failure.detail:
                        error.add_note(self._server.excerpt(failure.detail))
                    raise error from None
            attempt += 1
            await asyncio.sleep(wait)

    async def score(
        self, policy: str, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Always raises UserError: such servers tell no exact log-probabilities."""
        raise UserError(
            f"{self.endpoint} cannot score {policy!r}: use the torch engine for exact measurements"
        )

    def load(self, policy: str, weights: PolicyWeights, version: int) -> None:
        """Always raises UserError: the weights are the server's."""
        raise UserError(
            f"the weights behind {self.endpoint} cannot be changed; {policy!r} cannot be trained there"
        )

    def unload(self, policy: str) -> None:
        """Nothing to forget: the weights are the server's."""

    def rest(self) -> None:
        """Nothing to free: the memory is the server's."""

    async def close(self) -> None:
        await self._server.close()

    def _body(self, request: Request) -> dict[str, Any]:
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self.remote.model,
            "messages": [{"role": role, "content": content} for role, content in request.messages],
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": request.seed % 2**31,  # some servers read 32 bits
        }
        if sampling.top_k:
            body["top_k"] = sampling.top_k  # no part of OpenAI's own interface: sent only when asked for
        if request.stop.texts:
            body["stop"] = list(request.stop.texts)
        return body


def _completion(response: httpx.Response) -> Completion:
    choice = parsed(response)["choices"][0]
    text, finish = message_of(choice)
    if text is None and finish == "length":
        text = ""  # a reasoning server that spent all tokens on thought
    if text is None or finish not in _STOPS:
        raise Failed("bad_shape", str(choice))
    return Completion(ids=[], logprobs=[], stop=_STOPS[finish], version=0, text=text)
