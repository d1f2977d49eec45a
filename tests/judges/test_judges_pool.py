"""Who is asked next, and when a question is given up; attempts are plain coroutines here."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from random import Random

import pytest

from ludus.config import EndpointConfig
from ludus.judges.pool import Pool
from ludus.remote import Endpoint, Failed

Attempt = Callable[[Endpoint], Awaitable[str]]


def pool(*names: str, concurrency: int = 1, retries: int = 2, patience: float = 5.0) -> Pool:
    endpoints = [
        EndpointConfig(
            base_url=f"http://{name}", model="m", retries=retries, backoff=0.01, concurrency=concurrency
        )
        for name in names
    ]
    return Pool(endpoints, strikes=3, rest=0.05, patience=patience)


def name_of(endpoint: Endpoint) -> str:
    return endpoint.settings.base_url.removeprefix("http://")


async def ask(asked: Pool, attempt: Attempt) -> str:
    return await asyncio.wait_for(asked.ask(attempt, Random(0)), timeout=60)


async def works(endpoint: Endpoint) -> str:
    return name_of(endpoint)


def test_a_place_granted_to_who_has_just_gone_is_given_on():
    async def go() -> str:
        one = pool("a")
        done = asyncio.Event()

        async def first(endpoint: Endpoint) -> str:
            await done.wait()
            return "first"

        async def holder() -> None:
            await ask_directly(first)
            waiting.cancel()  # its place was granted in this very step

        async def ask_directly(attempt: Attempt) -> str:
            return await one.ask(attempt, Random(0))

        holding = asyncio.ensure_future(holder())
        await asyncio.sleep(0)
        waiting = asyncio.ensure_future(ask_directly(works))
        await asyncio.sleep(0)
        done.set()
        await holding
        with pytest.raises(asyncio.CancelledError):
            await waiting
        return await ask(one, works)

    assert asyncio.run(go()) == "a"


def test_one_alone_outlasts_an_outage_that_nobody_passes():
    async def go() -> int:
        loop, tries = asyncio.get_running_loop(), 0
        began = loop.time()

        async def attempt(endpoint: Endpoint) -> str:
            nonlocal tries
            tries += 1
            if loop.time() < began + 0.4:
                raise Failed("http_500")
            return "there"

        assert await ask(pool("a", retries=1), attempt) == "there"
        return tries

    assert 4 <= asyncio.run(go()) < 15  # more often than 1 + retries, and no hammering


def test_one_whom_alone_it_fails_is_given_up_after_its_retries():
    async def go() -> int:
        one = pool("a", concurrency=2, patience=60.0)
        tries, over = 0, asyncio.Event()

        async def attempt(endpoint: Endpoint) -> str:
            nonlocal tries
            tries += 1
            raise Failed("http_500")

        async def others() -> None:
            while not over.is_set():
                await ask(one, works)
                await asyncio.sleep(0)

        crowd = asyncio.ensure_future(others())
        with pytest.raises(Failed) as caught:
            await ask(one, attempt)
        over.set()
        await crowd
        assert caught.value.reason == "http_500"
        return tries

    assert asyncio.run(go()) == 3


def test_the_least_busy_is_next_and_who_failed_comes_last():
    async def go() -> list[str]:
        two = pool("a", "b", concurrency=4)
        seen: list[str] = []
        done = asyncio.Event()

        async def attempt(endpoint: Endpoint) -> str:
            seen.append(name_of(endpoint))
            await done.wait()
            return seen[-1]

        work = [asyncio.ensure_future(ask(two, attempt)) for _ in range(6)]
        await asyncio.sleep(0.01)
        assert Counter(seen) == {"a": 3, "b": 3}
        done.set()
        await asyncio.gather(*work)
        tried: list[str] = []

        async def fails_at_a(endpoint: Endpoint) -> str:
            tried.append(name_of(endpoint))
            if tried[-1] == "a":
                raise Failed("timeout")
            return "b"

        await ask(two, fails_at_a)
        return tried

    assert asyncio.run(go()) == ["a", "b"]


def test_questions_are_served_in_order():
    async def go() -> list[int]:
        one, served = pool("a"), list[int]()

        def numbered(n: int) -> Attempt:
            async def attempt(endpoint: Endpoint) -> str:
                served.append(n)
                await asyncio.sleep(0.001 * (n % 3))
                return ""

            return attempt

        await asyncio.gather(*(ask(one, numbered(n)) for n in range(20)))
        return served

    assert asyncio.run(go()) == list(range(20))
