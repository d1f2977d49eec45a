"""Configurations of judges, right and wrong."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from judge_server import honest
from loopback import Answer, serve
from loopback import good as words

from ludus.config import JudgeConfig
from ludus.errors import UserError
from ludus.judges.chat import ChatJudge
from ludus.judges.make import check_judges, make_judge, open_judges, says
from ludus.judges.probe import silent

ONE = {"base_url": "http://127.0.0.1:1/v1", "model": "m"}


def test_a_chat_judge():
    config = JudgeConfig.model_validate({"endpoints": [ONE], "format": "llama_guard"})
    judge = make_judge(config)
    assert isinstance(judge, ChatJudge)
    assert judge.id == "llama_guard@m"
    assert JudgeConfig.model_validate(config.model_dump(mode="json", exclude_none=True)) == config


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "a chat judge needs endpoints"),
        ({"endpoints": [ONE, {**ONE, "base_url": "http://127.0.0.1:1/v1/"}]}, "is there twice"),
        ({"endpoints": [ONE], "model": "m"}, "'model' says nothing to a judge of kind 'chat'"),
        ({"kind": "classifier", "model": "m"}, "a classifier needs model"),
        (
            {"kind": "classifier", "model": "m", "labels": {"refusal": ["x"]}, "endpoints": [ONE]},
            "'endpoints' says nothing to a judge of kind 'classifier'",
        ),
        ({"kind": "classifier", "model": "m", "labels": {"harm": ["x"]}}, "labels"),
        ({"endpoints": [ONE], "format": "other"}, "format"),
        ({"endpoints": [ONE], "rest": 60.0}, "rest"),
        ({"endpoints": [ONE], "max_failed": 1.5}, "max_failed"),
    ],
)
def test_configurations_that_make_no_judge(options: dict[str, Any], problem: str):
    with pytest.raises(ValueError, match=problem):
        JudgeConfig.model_validate(options)


def test_a_chat_judge_needs_no_torch():
    code = "import sys, ludus.judges.make; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def chat(**options: Any) -> JudgeConfig:
    return JudgeConfig.model_validate({"endpoints": [ONE], **options})


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (chat(), {"request_harmful", "answer_harmful", "refusal"}),
        (chat(format="qwen3guard"), {"request_harmful", "answer_harmful", "refusal"}),
        (chat(format="qwen3guard", both=False), {"answer_harmful", "refusal"}),
        (chat(format="llama_guard"), {"request_harmful", "answer_harmful"}),
        (chat(format="llama_guard", both=False), {"answer_harmful"}),
        (
            JudgeConfig.model_validate({"kind": "classifier", "model": "m", "labels": {"refusal": ["x"]}}),
            {"refusal"},
        ),
    ],
)
def test_what_a_judge_says(config: JudgeConfig, fields: set[str]):
    assert says(config) == fields


def test_judges_of_games_are_checked_before_they_are_made():
    known = {"guard": chat(), "llama": chat(format="llama_guard")}
    assert set(open_judges(known, {"red": ("guard", "llama"), "kuhn": ()})) == {"guard", "llama"}
    assert open_judges(known, {"kuhn": ()}) == {}
    with pytest.raises(UserError, match=r"red is judged by 'gard'.*did you mean 'guard'\?"):
        check_judges(known, {"red": ("gard",)})
    with pytest.raises(UserError, match=r"describe it in \[judges\.x\]"):
        check_judges({}, {"red": ("x",)})
    with pytest.raises(UserError, match="paid by the judge 'llama', which never says refusal"):
        check_judges(known, {"red": ("llama", "guard")})


def test_a_judge_is_the_same_one_wherever_it_is_served():
    moved = {**ONE, "base_url": "http://127.0.0.1:2/v1", "timeout": 5.0}
    here = chat(cache_file="x", max_failed=0.5).identity
    assert here == chat(endpoints=[moved, ONE]).identity
    assert here != chat(endpoints=[{**ONE, "model": "n"}]).identity
    assert here != chat(format="llama_guard").identity


def test_silent_judges_are_told_with_what_keeps_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with (
        serve(honest) as good,
        serve(lambda n, body: Answer(status=500)) as broken,
        serve(hang) as hanging,
        serve(lambda n, body: Answer(body=words("Sure!", model=body["model"]))) as chatty,
    ):
        urls = [good.url, broken.url, hanging.url, chatty.url, "http://127.0.0.1:1/v1"]
        endpoints: list[dict[str, Any]] = [{"base_url": url, "model": "guard"} for url in urls]
        endpoints[2]["timeout"] = 1.0
        endpoints.append({**endpoints[0], "base_url": "http://127.0.0.1:2/v1", "key_env": "NO_SUCH_KEY"})
        found = silent({"guard": chat(endpoints=endpoints)})
    assert len(found) == 5
    assert "guard brought no verdict (http_500); start it there" in found[0]
    assert found[0].endswith("or set judges.guard.endpoints.1.base_url")
    assert "(timeout)" in found[1]
    assert "what guard says there is not of the format wildguard" in found[2]
    assert "(connection)" in found[3]
    assert "NO_SUCH_KEY" in found[4]
    assert good.seen[0]["messages"][0]["content"].count("tea") == 1
    assert silent({}) == []
    local = {"kind": "classifier", "model": "nowhere", "labels": {"refusal": ["x"]}}
    assert silent({"local": JudgeConfig.model_validate(local)}) == [
        "the judge 'local': nowhere holds no model (set judges.local.model)"
    ]


def hang(n: int, body: dict[str, Any]) -> Answer:
    answer = honest(n, body)
    answer.delay = 60.0
    return answer
