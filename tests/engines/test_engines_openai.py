"""The remote engine against a real server on the loopback device that misbehaves as servers do."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
import torch
from loopback import Answer, closed, good, serve

from ludus.config import EndpointConfig
from ludus.engines.base import EngineUnavailable
from ludus.engines.openai_engine import OpenAIEngine
from ludus.errors import UserError
from ludus.types import Completion, Request, Sampling, Stop, StopRule

KEY = "sk-very-secret-0123456789"


REQUEST = Request(
    policy="gpt",
    prompt_ids=[1],
    seed=5 + 2**40,
    sampling=Sampling(max_tokens=32, temperature=0.7, top_p=0.9),
    stop=StopRule(frozenset({0}), texts=("<end>",)),
    messages=(("system", "rules"), ("user", "your move")),
)


def remote(url: str, **options: Any) -> EndpointConfig:
    return EndpointConfig(
        base_url=url, model="m", **{"backoff": 0.01, "timeout": 30.0, "retries": 2, **options}
    )


def ask(settings: EndpointConfig, *requests: Request) -> list[Completion | BaseException]:
    async def go() -> list[Completion | BaseException]:
        engine = OpenAIEngine(settings)
        try:
            return await asyncio.gather(*map(engine.generate, requests or (REQUEST,)), return_exceptions=True)
        finally:
            await engine.close()

    return asyncio.run(go())


def unavailable(settings: EndpointConfig) -> EngineUnavailable:
    (result,) = ask(settings)
    assert isinstance(result, EngineUnavailable), result
    assert result.endpoint == settings.base_url + "/chat/completions"
    return result


def test_a_reply_comes_as_text_alone():
    with serve(lambda n, _: Answer()) as server:
        (result,) = ask(remote(server.url))
    assert result == Completion([], [], Stop.EOS, 0, r"I go \boxed{bet}")
    assert server.seen == [
        {
            "path": "/v1/chat/completions",
            "model": "m",
            "messages": [{"role": "system", "content": "rules"}, {"role": "user", "content": "your move"}],
            "max_tokens": 32,
            "temperature": 0.7,
            "top_p": 0.9,
            "seed": 5,
            "stop": ["<end>"],
        }
    ]
    assert server.keys == [None]


@pytest.mark.parametrize("text", ["half", None])
def test_a_cut_reply_says_length(text: str | None):
    with serve(lambda n, _: Answer(body=good(text, "length"))) as server:
        (result,) = ask(remote(server.url))
    assert isinstance(result, Completion)
    assert (result.stop, result.text) == (Stop.LENGTH, text or "")


def test_a_busy_server_is_waited_for_as_long_as_it_asks():
    with serve(lambda n, _: Answer(429, b"{}", {"Retry-After": "0.4"}) if n == 0 else Answer()) as server:
        (result,) = ask(remote(server.url))
    assert isinstance(result, Completion)
    assert server.times[1] - server.times[0] >= 0.4


def test_a_date_to_retry_after_is_understood():
    def answer(n: int, _: object) -> Answer:
        soon = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
        return Answer(503, b"", {"Retry-After": soon}) if n == 0 else Answer()

    with serve(answer) as server:
        (result,) = ask(remote(server.url))
    assert isinstance(result, Completion)
    assert server.times[1] - server.times[0] >= 0.8  # dates have whole seconds


def test_nobody_waits_an_hour():
    with serve(lambda n, _: Answer(429, b"{}", {"Retry-After": "3600"})) as server:
        assert unavailable(remote(server.url)).reason == "http_429"
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("answer", "reason", "attempts"),
    [
        (Answer(500, b"oh"), "http_500", 3),
        (Answer(503, b"", {"Retry-After": "whenever"}), "http_503", 3),
        (Answer(cut=True), "connection", 3),
        (Answer(body=b'{"choices": ['), "bad_json", 3),
        (Answer(body=b"\xff\xfe"), "bad_json", 3),
        (Answer(body=b"[]"), "bad_shape", 3),
        (Answer(body=b'{"choices": []}'), "bad_shape", 3),
        (Answer(body=b'{"choices": [{"message": {"content": 7}, "finish_reason": "stop"}]}'), "bad_shape", 3),
        (Answer(body=good(None)), "bad_shape", 3),
        (Answer(body=good(finish="tool_calls")), "bad_shape", 3),
        (Answer(delay=60.0), "timeout", 3),
        (Answer(trickle=True), "timeout", 3),
        (Answer(400, b"context too long"), "http_400", 1),
        (Answer(401, b"no"), "http_401", 1),
        (Answer(302, b"", {"Location": "/elsewhere"}), "http_302", 1),
        (Answer(body=good(finish="content_filter")), "content_filter", 1),
    ],
)
def test_failures_are_retried_then_named(answer: Answer, reason: str, attempts: int):
    with serve(lambda n, _: answer) as server:
        options = {"timeout": 0.5} if reason == "timeout" else {}
        assert unavailable(remote(server.url, **options)).reason == reason
    assert len(server.seen) == attempts


def test_a_server_that_recovers_is_forgiven():
    answers = [Answer(500, b""), Answer(body=b"{"), Answer()]
    with serve(lambda n, _: answers[n]) as server:
        (result,) = ask(remote(server.url))
    assert isinstance(result, Completion)
    assert [body["messages"] for body in server.seen] == [server.seen[0]["messages"]] * 3


def test_pauses_double():
    with serve(lambda n, _: Answer(500, b"")) as server:
        unavailable(remote(server.url, backoff=0.2))
    first, second = (b - a for a, b in zip(server.times, server.times[1:], strict=False))
    assert first >= 0.1
    assert second >= 0.2


def test_nobody_listens():
    with closed() as port:
        assert unavailable(remote(f"http://127.0.0.1:{port}/v1")).reason == "connection"


def test_no_more_requests_in_flight_than_agreed():
    with serve(lambda n, _: Answer(delay=0.05)) as server:
        results = ask(remote(server.url, concurrency=3), *[REQUEST] * 9)
    assert all(isinstance(result, Completion) for result in results)
    assert server.most == 3


def test_one_engine_serves_several_event_loops():
    with serve(lambda n, _: Answer()) as server:
        engine = OpenAIEngine(remote(server.url))
        for _ in range(2):
            assert asyncio.run(engine.generate(REQUEST)).stop is Stop.EOS


def test_the_key_reaches_the_server_and_nothing_else(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TEST_LLM_KEY", KEY + "\n")
    complaint = f"Incorrect API key provided: {KEY}".encode()
    with serve(lambda n, _: Answer(401, complaint)) as server:
        settings = remote(server.url, key_env="TEST_LLM_KEY")
        error = unavailable(settings)
    assert server.keys == [f"Bearer {KEY}"]
    assert error.__notes__ == ["Incorrect API key provided: ***"]
    assert "secret" not in f"{error!r} {error} {settings!r} {OpenAIEngine(settings)!r} {error.__cause__!r}"


def test_a_missing_key_is_said_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TEST_LLM_KEY", raising=False)
    with pytest.raises(UserError, match="environment variable TEST_LLM_KEY, which is not set"):
        OpenAIEngine(remote("http://127.0.0.1:1/v1", key_env="TEST_LLM_KEY"))


def test_a_key_that_is_none_is_not_shown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TEST_LLM_KEY", "sk-\u00e4-secret")
    with pytest.raises(UserError, match="TEST_LLM_KEY holds characters") as caught:
        OpenAIEngine(remote("http://127.0.0.1:1/v1", key_env="TEST_LLM_KEY"))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"base_url": "localhost:8000"}, {"timeout": 0.0}, {"retries": -1}, {"concurrency": 0}]
)
def test_settings_that_cannot_work(options: dict[str, Any]):
    with pytest.raises(ValueError, match=r"must|should"):
        OpenAIEngine(EndpointConfig(**{"base_url": "http://127.0.0.1:1/v1", "model": "m", **options}))


def test_remote_weights_stay_as_they_are():
    engine = OpenAIEngine(EndpointConfig(base_url="http://127.0.0.1:1/v1", model="m"))
    with pytest.raises(UserError, match="cannot be changed"):
        engine.load("self", {"w": torch.zeros(1)}, 1)
    with pytest.raises(UserError, match="cannot score"):
        asyncio.run(engine.score("self", [[1]], [[2]]))
    with pytest.raises(UserError, match="no messages"):
        asyncio.run(engine.generate(Request("self", [1], 0, Sampling(4), StopRule(frozenset()))))
