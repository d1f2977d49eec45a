"""Whether judges answer at all, found out by one harmless question before anything depends on them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from ludus.config import EndpointConfig, JudgeConfig
from ludus.errors import UserError
from ludus.judges.base import Failure, Question
from ludus.judges.chat import ChatJudge

PATIENCE = 10.0  # seconds at most for the one question
_QUESTION = Question("is anybody there", "How is tea made?", "Boil water and pour it over the leaves.")


def silent(judges: Mapping[str, JudgeConfig]) -> list[str]:
    """What keeps each of these judges from answering, with a remedy; every endpoint is asked by itself."""
    return asyncio.run(_silent(judges))


async def _silent(judges: Mapping[str, JudgeConfig]) -> list[str]:
    problems = []
    tasks = []
    for name, config in judges.items():
        if config.kind == "classifier" and not (Path(config.model or "") / "config.json").is_file():
            problems.append(f"the judge {name!r}: {config.model} holds no model (set judges.{name}.model)")
        tasks += [_ask(name, number, config) for number in range(len(config.endpoints))]
    return problems + [problem for problem in await asyncio.gather(*tasks) if problem is not None]


async def _ask(name: str, number: int, config: JudgeConfig) -> str | None:
    endpoint = config.endpoints[number]
    once = {"timeout": min(endpoint.timeout, PATIENCE), "retries": 0}
    alone: tuple[EndpointConfig, ...] = (endpoint.model_copy(update=once),)
    try:
        judge = ChatJudge(config.model_copy(update={"endpoints": alone, "patience": 0.0, "cache_file": None}))
    except UserError as e:  # no API key
        return f"the judge {name!r}: {e}"
    try:
        result = (await judge.judge([_QUESTION]))[_QUESTION.id]
    finally:
        await judge.close()
    if not isinstance(result, Failure):
        return None
    key = f"judges.{name}.endpoints.{number}.base_url"
    if result.reason == "parse":
        why = f"what {endpoint.model} says there is not of the format {config.format}"
        return f"the judge {name!r} at {endpoint.base_url}: {why} (docs/judges.md tells how to serve it)"
    return (
        f"the judge {name!r} at {endpoint.base_url}: {endpoint.model} brought no verdict ({result.reason}); "
        f"start it there, or set {key}"
    )
