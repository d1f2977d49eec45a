"""One attempt at an OpenAI-compatible server: key, connections, time limit, and a name for what went wrong.

Whoever asks decides what a failed attempt means: `ludus.engines.openai_engine` tries the one server again,
`ludus.judges.pool` may turn to another. Nobody makes up a reply.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from random import Random
from typing import Any

import httpx

from ludus.config import EndpointConfig
from ludus.errors import UserError

_RETRIED = frozenset({408, 409, 425, 429})  # besides all of 5xx
_EXCERPT = 300  # characters of a server's complaint that an error repeats


@dataclass(slots=True)
class Failed(Exception):
    """One attempt that brought no reply.

    `reason` is a short word to count by, such as "timeout" or "http_500"; `detail` is what the server said,
    to be shown through `Endpoint.excerpt` alone; `retry` says whether the same request may yet succeed at the
    same server; `wait` is how many seconds the server asked for.
    """

    reason: str
    detail: str = ""
    retry: bool = True
    wait: float | None = None


@dataclass(slots=True)
class _Session:
    """What belongs to one event loop."""

    loop: asyncio.AbstractEventLoop
    client: httpx.AsyncClient
    gate: asyncio.Semaphore


@dataclass(slots=True)
class Endpoint:
    """The chat completions of one server."""

    settings: EndpointConfig
    _session: _Session | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Raises UserError for a missing API key."""
        self._key()

    @property
    def url(self) -> str:
        return self.settings.base_url.rstrip("/") + "/chat/completions"

    async def post(self, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> httpx.Response:
        """The server's reply of status 200, whatever it holds. Raises Failed."""
        session = self._open()
        key = self._key()
        sent = dict(headers or {}) | ({} if key is None else {"Authorization": f"Bearer {key}"})
        async with session.gate:
            try:
                # One limit for the whole exchange: httpx's own are per read, and a trickle satisfies those.
                async with asyncio.timeout(self.settings.timeout):
                    response = await session.client.post(self.url, json=body, headers=sent)
            except TimeoutError:
                raise Failed("timeout") from None
            except httpx.TransportError as e:
                raise Failed("connection", f"{type(e).__name__}: {e}") from None
            except httpx.DecodingError:
                raise Failed("bad_encoding") from None
        if response.status_code != 200:
            raise Failed(
                f"http_{response.status_code}",
                response.text,
                retry=response.status_code in _RETRIED or response.status_code >= 500,
                wait=_retry_after(response.headers.get("Retry-After")),
            )
        return response

    def excerpt(self, text: str) -> str:
        """The beginning of what a server said. Servers repeat keys in their complaints; we do not."""
        key = self._key()
        return (text.replace(key, "***") if key else text)[:_EXCERPT]

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None and session.loop is asyncio.get_running_loop():
            await session.client.aclose()

    def _key(self) -> str | None:
        name = self.settings.key_env
        if name is None:
            return None
        key = os.environ.get(name, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"the API key in {name} holds characters that no key has; export it again")
        if not key:
            raise UserError(
                f"{self.url} needs an API key in the environment variable {name}, which is not set; "
                f"export {name}=... before the run"
            )
        return key

    def _open(self) -> _Session:
        loop = asyncio.get_running_loop()
        if self._session is None or self._session.loop is not loop:
            # Connections and semaphores cannot be used from another loop than their own.
            most = self.settings.concurrency
            limits = httpx.Limits(max_connections=most, max_keepalive_connections=most)
            client = httpx.AsyncClient(timeout=None, limits=limits, verify=_certificates())
            self._session = _Session(loop, client, asyncio.Semaphore(most))
        return self._session


@cache
def _certificates() -> ssl.SSLContext:
    """Read once: it takes 25 ms, and clients may share it."""
    return httpx.create_ssl_context()


def message_of(choice: Any) -> tuple[str | None, str]:
    """(text, finish reason) of one choice of a chat completion; raises Failed where it has none.

    The text is None where the server says so: a reasoning server that spent all its tokens on thought.
    """
    try:
        text, finish = choice["message"]["content"], choice["finish_reason"]
    except (KeyError, TypeError):
        raise Failed("bad_shape", str(choice)) from None
    if finish == "content_filter":
        raise Failed("content_filter", retry=False)
    if not (text is None or isinstance(text, str)) or not isinstance(finish, str):
        raise Failed("bad_shape", str(choice))
    return text, finish


def parsed(response: httpx.Response) -> dict[str, Any]:
    """The JSON object in a reply; `choices` is a list with something in it. Raises Failed."""
    try:
        body = response.json()
    except ValueError:
        raise Failed("bad_json", response.text) from None
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or not choices:
        raise Failed("bad_shape", str(body))
    return dict(body)


def pause(settings: EndpointConfig, attempt: int, jitter: Random) -> float:
    """Seconds before attempt number `attempt` + 1 (from 0): doubling, with jitter between a half and 1.5."""
    return min(settings.backoff * 2.0**attempt * (0.5 + jitter.random()), settings.longest_wait)


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
