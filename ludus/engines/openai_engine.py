"""Opponents behind an OpenAI-compatible chat endpoint: text in, text out, weights out of our reach.

A request is tried again, after a pause that doubles, when the server is busy, broken or silent, or answers
something that is no completion; then EngineUnavailable tells the rollout to mask the episode. No reply is
ever made up.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from random import Random
from typing import TYPE_CHECKING, Any

import httpx

from ludus.config import EndpointConfig
from ludus.engines.base import EngineUnavailable
from ludus.errors import UserError
from ludus.types import Completion, Request, Stop

if TYPE_CHECKING:
    from torch import Tensor

_STOPS = {"stop": Stop.EOS, "length": Stop.LENGTH}
_RETRIED = frozenset({408, 409, 425, 429})  # besides all of 5xx
_EXCERPT = 300  # characters of a server's complaint that an error repeats


@dataclass(slots=True)
class _Failure(Exception):
    """One attempt that brought no completion."""

    reason: str
    detail: str = ""
    retry: bool = True
    wait: float | None = None  # seconds that the server asked for


@dataclass(slots=True)
class _Session:
    """What belongs to one event loop."""

    loop: asyncio.AbstractEventLoop
    client: httpx.AsyncClient
    gate: asyncio.Semaphore


@dataclass(slots=True)
class OpenAIEngine:
    """Chat completions from one remote model, whatever policy id the request names. Its version is 0."""

    remote: EndpointConfig
    _session: _Session | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Raises UserError for a missing API key."""
        self._key()

    @property
    def endpoint(self) -> str:
        return self.remote.base_url.rstrip("/") + "/chat/completions"

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
                return await self._attempt(request)
            except _Failure as failure:
                wait = self.remote.backoff * 2**attempt * (0.5 + jitter.random())
                wait = max(min(wait, self.remote.longest_wait), failure.wait or 0.0)
                last = attempt == self.remote.retries or not failure.retry
                if last or wait > self.remote.longest_wait:
                    error = EngineUnavailable(self.endpoint, failure.reason)
                    if failure.detail:
                        error.add_note(self._hidden(failure.detail)[:_EXCERPT])
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

    def load(self, policy: str, weights: Mapping[str, Tensor], version: int) -> None:
        """Always raises UserError: the weights are the server's."""
        raise UserError(
            f"the weights behind {self.endpoint} cannot be changed; {policy!r} cannot be trained there"
        )

    def unload(self, policy: str) -> None:
        """Nothing to forget: the weights are the server's."""

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None and session.loop is asyncio.get_running_loop():
            await session.client.aclose()

    def _key(self) -> str | None:
        name = self.remote.key_env
        if name is None:
            return None
        key = os.environ.get(name, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"the API key in {name} holds characters that no key has; export it again")
        if not key:
            raise UserError(
                f"{self.endpoint} needs an API key in the environment variable {name}, which is not set; "
                f"export {name}=... before the run"
            )
        return key

    def _hidden(self, text: str) -> str:
        """Servers repeat keys in their complaints; we do not."""
        key = self._key()
        return text.replace(key, "***") if key else text

    def _open(self) -> _Session:
        loop = asyncio.get_running_loop()
        if self._session is None or self._session.loop is not loop:
            # Connections and semaphores cannot be used from another loop than their own.
            self._session = _Session(
                loop, httpx.AsyncClient(timeout=None), asyncio.Semaphore(self.remote.concurrency)
            )
        return self._session

    async def _attempt(self, request: Request) -> Completion:
        session = self._open()
        key = self._key()
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        async with session.gate:
            try:
                # One limit for the whole exchange: httpx's own are per read, and a trickle satisfies those.
                async with asyncio.timeout(self.remote.timeout):
                    response = await session.client.post(
                        self.endpoint, json=self._body(request), headers=headers
                    )
            except TimeoutError:
                raise _Failure("timeout") from None
            except httpx.TransportError as e:
                raise _Failure("connection", f"{type(e).__name__}: {e}") from None
            except httpx.DecodingError:
                raise _Failure("bad_encoding") from None
        if response.status_code != 200:
            raise _Failure(
                f"http_{response.status_code}",
                response.text,
                retry=response.status_code in _RETRIED or response.status_code >= 500,
                wait=_retry_after(response.headers.get("Retry-After")),
            )
        return _completion(response)

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
    try:
        body = response.json()
    except ValueError:
        raise _Failure("bad_json", response.text) from None
    try:
        choice = body["choices"][0]
        text, finish = choice["message"]["content"], choice["finish_reason"]
    except (KeyError, IndexError, TypeError):
        raise _Failure("bad_shape", str(body)) from None
    if finish == "content_filter":
        raise _Failure("content_filter", retry=False)
    if text is None and finish == "length":
        text = ""  # a reasoning server that spent all tokens on thought
    if not isinstance(text, str) or finish not in _STOPS:
        raise _Failure("bad_shape", str(choice))
    return Completion(ids=[], logprobs=[], stop=_STOPS[finish], version=0, text=text)


def _retry_after(value: str | None) -> float | None:
    """Seconds that the header asks to wait: a number, or a date (RFC 9110, section 10.2.3)."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass  # then it should be a date
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None  # neither: as if the server had asked for nothing
    return max(0.0, (when.astimezone(UTC) - datetime.now(UTC)).total_seconds())
