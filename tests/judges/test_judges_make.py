"""Configurations of judges, right and wrong."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from ludus.config import JudgeConfig
from ludus.judges.chat import ChatJudge
from ludus.judges.make import make_judge

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
