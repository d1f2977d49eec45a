"""Guard models behind OpenAI-compatible chat endpoints."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence
from pathlib import Path
from random import Random

import httpx

from ludus.config import JudgeConfig
from ludus.judges.base import Failure, Question, Stats, Verdict, check_ids
from ludus.judges.cache import Cache, key
from ludus.judges.formats import Format, LlamaGuard, Part, Qwen3Guard, Unparsed, WildGuard, merge, quote
from ludus.judges.ledger import Ledger
from ludus.judges.pool import Pool
from ludus.remote import Endpoint, Failed, message_of, parsed

_SNAPSHOT = r"(-\d{4}-?\d{2}-?\d{2})?"  # servers answer gpt-x to gpt-x-2026-01-31


class ChatJudge:
    """One guard model, at one or several endpoints, asked at temperature 0.

    Questions of one call that ask the same are asked once. Verdicts are cached, failures are not.
    """

    def __init__(self, config: JudgeConfig) -> None:
        """Raises UserError for a missing API key and for a cache file that cannot be used."""
        assert config.kind == "chat"
        self._config = config
        self._format = make_format(config)
        models = sorted({endpoint.model for endpoint in config.endpoints})
        mode = f"/{config.controversial}" if config.format == "qwen3guard" else ""
        self.id = f"{self._format.name}{mode}@{'+'.join(models)}"
        self._ledger = Ledger(self.id, config.window, config.max_unparsed, config.max_failed)
        self._pool = Pool(
            config.endpoints, strikes=config.strikes, rest=config.rest, patience=config.patience
        )
        self._ledger.attempts = self._pool.attempts
        self._sent = 0
        self._cache = Cache(config.cache, Path(config.cache_file) if config.cache_file else None)

    async def judge(self, questions: Sequence[Question]) -> dict[str, Verdict | Failure]:
        """See `Judge.judge`. What was judged before an alarm sounds is in the cache."""
        check_ids(questions)
        parts = {question.id: self._format.parts(question) for question in questions}
        tasks = {
            part: asyncio.ensure_future(self._answer(part))
            for part in dict.fromkeys(part for several in parts.values() for part in several)
        }
        try:
            await asyncio.gather(*tasks.values())
        finally:  # an alarm, or the caller has lost interest
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
        results = {name: _joined([tasks[part].result() for part in parts[name]]) for name in parts}
        self._ledger.judged(results)
        return results

    def stats(self) -> Stats:
        return self._ledger.stats()

    async def close(self) -> None:
        self._cache.close()
        await self._pool.close()

    async def _answer(self, part: Part) -> Verdict | Failure:
        name = key(self.id, *part)
        known = self._cache.get(name)
        if known is not None:
            self._ledger.cached += 1
            return known
        result = await self._ask(part, name)
        if isinstance(result, Verdict):
            self._cache.add(name, result)
        self._ledger.called(result)
        return result

    async def _ask(self, part: Part, name: str) -> Verdict | Failure:
        request, answer = part
        quoted = (quote(request), None if answer is None else quote(answer))
        self._ledger.quoted += quoted != part
        messages = [{"role": role, "content": text} for role, text in self._format.messages(quoted)]
        try:
            reply = await self._pool.ask(
                lambda endpoint: self._attempt(endpoint, messages), Random(int(name, 16))
            )
        except Failed as failure:
            return Failure(failure.reason, failure.detail)
        try:
            return self._format.read(reply, part)
        except Unparsed as problem:
            return Failure("parse", f"{problem}: {reply}")

    async def _attempt(self, endpoint: Endpoint, messages: list[dict[str, str]]) -> str:
        body = {
            "model": endpoint.settings.model,
            "messages": messages,
            "max_tokens": self._config.max_tokens,
            "temperature": 0.0,
        }
        self._sent += 1
        name = f"ludus-{os.getpid()}-{id(self):x}-{self._sent}"  # never twice, or servers mix them up
        response = await endpoint.post(body, {"X-Request-Id": name} if self._config.request_ids else None)
        return self._reply(response, endpoint.settings.model, name)

    def _reply(self, response: httpx.Response, asked: str, name: str) -> str:
        """The text of the one choice of a reply to this very call. Raises Failed."""
        body = parsed(response)
        if self._config.request_ids:
            ids = (response.headers.get("X-Request-Id"), str(body.get("id")).removeprefix("chatcmpl-"))
            if name not in ids:
                raise Failed("wrong_id", f"asked as {name}, answered as {ids[0]} and {ids[1]}")
        model = body.get("model")
        strange = model is not None and not re.fullmatch(re.escape(asked) + _SNAPSHOT, str(model))
        if strange and self._config.check_model:
            raise Failed("wrong_model", f"asked {asked}, answered by {model}")
        (choice, *more) = body["choices"]
        text, finish = message_of(choice)
        if more or choice.get("index", 0) != 0:
            raise Failed("bad_shape", "not one choice of number 0")
        if finish == "length":
            raise Failed("cut", text or "", retry=False)
        if finish != "stop":
            raise Failed("bad_shape", f"finish_reason {finish}")
        if text is None or not text.strip():
            raise Failed("empty")
        return text


def make_format(config: JudgeConfig) -> Format:
    """The format that a configuration names."""
    if config.format == "wildguard":
        return WildGuard()
    if config.format == "llama_guard":
        return LlamaGuard(both=config.both)
    return Qwen3Guard(config.controversial, config.both)


def _joined(results: list[Verdict | Failure]) -> Verdict | Failure:
    """The verdict of all parts of a question; a part that failed leaves the question without one."""
    verdicts = []
    for result in results:
        if isinstance(result, Failure):
            return result
        verdicts.append(result)
    return merge(verdicts)
