"""Several servers of one model: who is asked next, who is left alone, and when a question is given up.

Nothing here looks at texts or their lengths, and questions are served in the order in which they came.

- An attempt goes to the server that has failed this question least, then to the least busy one.
- `strikes` failures in a row mean that a server is *down*: it rests for `rest` seconds, and then one question
  at a time tries it, another one each time, until one passes. So a server that comes back is in use again
  within about three times `rest`.
- A busy server is left alone for as long as its Retry-After says, if that is at most `longest_wait`.
- A server that refuses a question for good (400, 401, ...) is not asked it again. 401, 403 and 404 are
  strikes too, since they speak of the server more than of the question.
- A server gives a question up when it failed it more than `retries` times and answered others in between:
  then the fault is with the question. While nobody is answered it is not, and questions stay for `patience`
  seconds: since their own first failure, or since the server went down.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TypeVar

from ludus.config import EndpointConfig
from ludus.remote import Endpoint, Failed, pause

T = TypeVar("T")
_OF_THE_SERVER = frozenset({"http_401", "http_403", "http_404"})


@dataclass(slots=True, eq=False)
class _Server:
    """One endpoint and how it has fared. Times are the event loop's."""

    endpoint: Endpoint
    busy: int = 0
    probed: bool = False  # one question tries it although it is down
    passed: int = 0
    strikes: int = 0
    rests_until: float = 0.0
    down_since: float | None = None
    reason: str = ""  # of the last failure

    @property
    def settings(self) -> EndpointConfig:
        return self.endpoint.settings

    def free(self, now: float) -> bool:
        if now < self.rests_until or (self.down_since is not None and self.probed):
            return False
        return self.busy < self.settings.concurrency


@dataclass(slots=True)
class _Trouble:
    """What one question met at one server."""

    since: float  # of the first failure
    failures: int = 0
    own: int = 0  # those of them between which others were answered; the first one too
    passed: int = -1  # how many had been answered by the last of them
    refused: bool = False  # for good


_Troubles = dict[_Server, _Trouble]


@dataclass(frozen=True, slots=True)
class _Seat:
    """A place at a server, to be given back."""

    server: _Server
    probe: bool


@dataclass(slots=True, eq=False)
class _Waiting:
    troubles: _Troubles
    seat: asyncio.Future[_Seat]


@dataclass(slots=True)
class _Floor:
    """What belongs to one event loop."""

    loop: asyncio.AbstractEventLoop
    servers: list[_Server]
    queue: deque[_Waiting] = field(default_factory=deque)
    alarm: asyncio.TimerHandle | None = None


class Pool:
    """Attempts at several servers until one succeeds. `attempts` counts those that failed, by reason."""

    def __init__(
        self, endpoints: Sequence[EndpointConfig], *, strikes: int, rest: float, patience: float
    ) -> None:
        """Raises UserError for a missing API key."""
        assert endpoints
        self.attempts: Counter[str] = Counter()
        self._endpoints = [Endpoint(settings) for settings in endpoints]
        self._strikes, self._rest, self._patience = strikes, rest, patience
        self._now: _Floor | None = None

    async def ask(self, attempt: Callable[[Endpoint], Awaitable[T]], jitter: Random) -> T:
        """What the first successful `attempt(endpoint)` returns. Raises Failed where all give it up."""
        floor = self._floor()
        troubles: _Troubles = {}
        while True:
            seat = await self._seat(floor, troubles)
            server = seat.server
            try:
                result = await attempt(server.endpoint)
            except Failed as failure:
                self.attempts[failure.reason] += 1
                self._note_failure(server, troubles, failure, floor.loop.time())
                if self._hopeless(floor, troubles):
                    failure.detail = server.endpoint.excerpt(failure.detail)
                    raise
            else:
                server.passed += 1
                server.strikes = 0
                if server.down_since is not None:
                    server.down_since, server.rests_until = None, 0.0
                return result
            finally:
                self._leave(floor, seat)
            await asyncio.sleep(self._pause(floor, troubles, jitter))

    async def close(self) -> None:
        floor, self._now = self._now, None
        if floor is not None and floor.alarm is not None:
            floor.alarm.cancel()
        for endpoint in self._endpoints:
            await endpoint.close()

    def _floor(self) -> _Floor:
        loop = asyncio.get_running_loop()
        if self._now is None or self._now.loop is not loop:
            self._now = _Floor(loop, [_Server(endpoint) for endpoint in self._endpoints])
        return self._now

    async def _seat(self, floor: _Floor, troubles: _Troubles) -> _Seat:
        """A place to try next. Raises Failed once all servers that are left are down for too long."""
        waiting = _Waiting(troubles, floor.loop.create_future())
        floor.queue.append(waiting)
        self._serve(floor)
        try:
            return await waiting.seat
        except asyncio.CancelledError:
            granted = waiting.seat.done() and not waiting.seat.cancelled() and not waiting.seat.exception()
            if granted:  # just as the question was withdrawn
                self._leave(floor, waiting.seat.result())
            raise

    def _leave(self, floor: _Floor, seat: _Seat) -> None:
        seat.server.busy -= 1
        if seat.probe:
            seat.server.probed = False
        self._serve(floor)

    def _serve(self, floor: _Floor) -> None:
        """Give free places to whoever waits, first come first served; dismiss those who wait in vain."""
        now = floor.loop.time()
        skipped = []
        while floor.queue and any(server.free(now) for server in floor.servers):
            waiting = floor.queue.popleft()
            if waiting.seat.done():
                continue  # withdrawn
            free = [server for server in _left(floor, waiting.troubles) if server.free(now)]
            if not free:
                skipped.append(waiting)
                continue
            best = min(free, key=lambda s: (_failures(s, waiting.troubles), s.busy / s.settings.concurrency))
            seat = _Seat(best, probe=best.down_since is not None)
            best.busy += 1
            best.probed = best.probed or seat.probe
            waiting.seat.set_result(seat)
        floor.queue.extendleft(reversed(skipped))
        if any(self._lost(server, now) for server in floor.servers):
            for waiting in floor.queue:
                left = _left(floor, waiting.troubles)
                if not waiting.seat.done() and all(self._lost(server, now) for server in left):
                    waiting.seat.set_exception(Failed(left[0].reason))
        self._set_alarm(floor, now)

    def _set_alarm(self, floor: _Floor, now: float) -> None:
        """Come back when a rest or somebody's patience ends."""
        if floor.alarm is not None:
            floor.alarm.cancel()
            floor.alarm = None
        times = [server.rests_until for server in floor.servers]
        times += [s.down_since + self._patience for s in floor.servers if s.down_since is not None]
        ahead = [time for time in times if time > now]
        if ahead and floor.queue:
            floor.alarm = floor.loop.call_at(min(ahead), self._serve, floor)

    def _lost(self, server: _Server, now: float) -> bool:
        return server.down_since is not None and now >= server.down_since + self._patience

    def _hopeless(self, floor: _Floor, troubles: _Troubles) -> bool:
        now = floor.loop.time()
        return all(
            server in troubles
            and troubles[server].failures > server.settings.retries
            and now >= troubles[server].since + self._patience
            for server in _left(floor, troubles)
        )

    def _note_failure(self, server: _Server, troubles: _Troubles, failure: Failed, now: float) -> None:
        trouble = troubles.setdefault(server, _Trouble(since=now))
        trouble.failures += 1
        trouble.own += server.passed > trouble.passed
        trouble.passed = server.passed
        longest = server.settings.longest_wait
        too_long = failure.wait is not None and failure.wait > longest
        trouble.refused = not failure.retry or too_long
        if not failure.retry and failure.reason not in _OF_THE_SERVER:
            return  # it speaks of the question
        server.reason = failure.reason
        server.strikes += 1
        if failure.wait is not None:
            server.rests_until = max(server.rests_until, now + min(failure.wait, longest))
        if server.strikes >= self._strikes or too_long:
            server.rests_until = max(server.rests_until, now + self._rest)
            server.down_since = now if server.down_since is None else server.down_since

    def _pause(self, floor: _Floor, troubles: _Troubles, jitter: Random) -> float:
        """Nothing before another server is tried; else it doubles, up to twice a rest."""
        least = min(_left(floor, troubles), key=lambda server: _failures(server, troubles))
        failures = _failures(least, troubles)
        return min(pause(least.settings, failures - 1, jitter), 2 * self._rest) if failures else 0.0


def _left(floor: _Floor, troubles: _Troubles) -> list[_Server]:
    """The servers that have not given this question up."""
    return [
        server
        for server in floor.servers
        if server not in troubles
        or (not troubles[server].refused and troubles[server].own <= server.settings.retries)
    ]


def _failures(server: _Server, troubles: _Troubles) -> int:
    return troubles[server].failures if server in troubles else 0
